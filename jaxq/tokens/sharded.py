"""Selection where the tokens of a row lie on several devices.

A long video has its token axis N over a mesh axis. The k best of all are among
the k best of each shard, so that

  local top-k -> all_gather of k_max (score, index) pairs a shard -> top-k

is exact, ties to the lower index as in primitives.select_topk. Then each device
gathers those of the chosen tokens that it has, and a sum puts them together: of
the tokens themselves only what is kept ever moves, 4 B k_max D bytes for each
device, where an all_gather in front of the selection would move all N.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxq.tokens import primitives


def select_topk(
  scores: jax.Array,
  mask: jax.Array,
  k_max: int,
  k: jax.Array,
  *,
  mesh: Mesh,
  axis: str,
) -> tuple[jax.Array, jax.Array]:
  """As primitives.select_topk, of (B, N) with N over `axis` of the mesh.

  Raises:
    ValueError: N is not a multiple of the axis.
  """
  check(scores.shape[1], mesh, axis)
  over = PartitionSpec(None, axis)
  select = functools.partial(_select, k_max=k_max, axis=axis)
  return _shard_map(select, mesh, (over, over, PartitionSpec()))(
    scores, mask, k
  )


def gather(
  x: jax.Array, index: jax.Array, *, mesh: Mesh, axis: str
) -> jax.Array:
  """As primitives.gather, of x (B, N, D) with N over `axis` of the mesh.

  Raises:
    ValueError: N is not a multiple of the axis.
  """
  check(x.shape[1], mesh, axis)
  over = PartitionSpec(None, axis)

  def local(x, index):
    here = index - jax.lax.axis_index(axis) * x.shape[1]
    own = (here >= 0) & (here < x.shape[1]) & (index >= 0)
    rows = primitives.gather(x, jnp.where(own, here, -1))
    return jax.lax.psum(rows, axis)

  return _shard_map(local, mesh, (over, PartitionSpec()))(x, index)


def check(N: int, mesh: Mesh, axis: str) -> None:
  """Raises ValueError unless N tokens divide over an axis of the mesh."""
  if axis not in mesh.shape or N % mesh.shape[axis]:
    raise ValueError(
      f'tokens.sharded: N={N} tokens over axis {axis!r} of the mesh '
      f'{dict(mesh.shape)}; the axis must be there and divide N. Pad the '
      'tokens with masked ones.'
    )


def _select(
  scores: jax.Array, mask: jax.Array, k: jax.Array, *, k_max: int, axis: str
) -> tuple[jax.Array, jax.Array]:
  """On one shard (B, n) of the scores."""
  n = scores.shape[1]
  values, index = jax.lax.top_k(primitives.usable(scores, mask), min(k_max, n))
  index = index + jax.lax.axis_index(axis) * n
  # Shards follow each other in order of their tokens, and top_k puts the lower
  # index first among equals, so that it does so among all candidates too.
  values = jax.lax.all_gather(values, axis, axis=1, tiled=True)
  index = jax.lax.all_gather(index, axis, axis=1, tiled=True)
  values, best = jax.lax.top_k(values, min(k_max, values.shape[1]))
  index = jnp.take_along_axis(index, best, axis=1)
  used = (values > -jnp.inf) & (jnp.arange(index.shape[1])[None] < k[:, None])
  last = jnp.iinfo(jnp.int32).max
  index = jnp.sort(jnp.where(used, index, last), axis=1)
  index = jnp.where(index == last, -1, index)
  short = k_max - index.shape[1]
  index = jnp.pad(index, ((0, 0), (0, short)), constant_values=-1)
  return index.astype(jnp.int32), index >= 0


def _shard_map(f: Any, mesh: Mesh, in_specs: Any) -> Any:
  """shard_map whose results are whole on every device."""
  return jax.shard_map(
    f, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(), check_vma=False
  )
