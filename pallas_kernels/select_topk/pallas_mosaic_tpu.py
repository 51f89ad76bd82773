"""The k-th largest score of a row on TPU, and the places at or above it.

Grid    (R/8,). Body: scores as integers that compare as they do; the k-th
        largest is built bit by bit, from the top: a bit is set if at least k
        are as large. 32 counts over a row on chip, no exchange of elements.
Then, in plain JAX, places from a running count: the j-th place is where the
count of selected slots reaches j.
On-chip 2 * 8 * 4 S * 2 bytes: S = 131072: 17 MB.
Traffic 4 S R bytes of scores.
Needs   S up to 2^18.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import compat, targets, tiles

_ROWS = 8
_MOST = 2**18
_RUN = 2048  # Scores that are compared at a time.
_LOWEST = -(2**31)


def why_not(scores: Any, chip: str) -> str:
  """Why this kernel cannot serve; '' if it can."""
  if chip not in targets.TARGETS:
    return f'chip is {chip!r}; it runs on {sorted(targets.TARGETS)}.'
  if scores.shape[-1] > _MOST:
    return f'{scores.shape[-1]} scores in a row; it takes {_MOST}.'
  return ''


def select_topk(
  scores: jax.Array, k: int, lengths: jax.Array, *, interpret: bool = False
) -> jax.Array:
  """As base.select_topk."""
  R, S = scores.shape
  slots = jnp.arange(S, dtype=jnp.int32)[None]
  held = slots < lengths[:, None]
  keys = jnp.where(held, sortable(scores), _LOWEST)
  padded = jnp.pad(
    keys,
    ((0, -R % _ROWS), (0, -S % (tiles.LANES if S <= _RUN else _RUN))),
    constant_values=_LOWEST,
  )
  edge = _kth_largest(padded, k, interpret)[:R, :1]
  above = keys > edge
  equal = (keys == edge) & held
  need = k - jnp.sum(above, axis=1, keepdims=True)
  taken = above | (equal & (jnp.cumsum(equal, axis=1) <= need))
  count = jnp.cumsum(taken.astype(jnp.int32), axis=1)
  wanted = jnp.arange(1, k + 1, dtype=jnp.int32)
  places = jax.vmap(lambda c: jnp.searchsorted(c, wanted))(count)
  return jnp.where(wanted[None] <= count[:, -1:], places, -1).astype(jnp.int32)


def sortable(x: jax.Array) -> jax.Array:
  """float32 -> int32 in the same order, -0 as 0."""
  bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.int32)
  return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _kth_largest(keys, k, interpret):
  """keys (R, S) int32 -> (R, 128) int32, equal along lanes."""
  R, S = keys.shape

  def kernel(ref, out_ref):
    run = min(S, _RUN)

    def count(edge):  # (8, 1) -> (8, 1) float32: keys that are as large.
      def add(c, total):
        at = pl.multiple_of(c * run, run)
        part = ref[:, pl.ds(at, run)]
        return total + tiles.fold(jnp.where(part >= edge, 1.0, 0.0))

      zeros = jnp.zeros((_ROWS, tiles.LANES), jnp.float32)
      total = jax.lax.fori_loop(0, S // run, add, zeros)
      return jnp.sum(total, axis=1, keepdims=True)

    zero = jnp.zeros((_ROWS, 1), jnp.int32)
    edge = jnp.where(count(zero) >= k, zero, _LOWEST)

    def bit(i, edge):
      trial = edge + (jnp.int32(1) << (30 - i))
      return jnp.where(count(trial) >= k, trial, edge)

    edge = jax.lax.fori_loop(0, 31, bit, edge)
    out_ref[...] = jnp.broadcast_to(edge, out_ref.shape)

  return pl.pallas_call(
    kernel,
    grid=(R // _ROWS,),
    in_specs=[pl.BlockSpec((_ROWS, S), lambda i: (i, 0))],
    out_specs=pl.BlockSpec((_ROWS, tiles.LANES), lambda i: (i, 0)),
    out_shape=compat.out_struct((R, tiles.LANES), jnp.int32, keys),
    compiler_params=compat.tpu_params(
      ('parallel',), 2 * _ROWS * 4 * S + 16 * 2**20
    ),
    interpret=compat.interpret_mode(interpret),
    name='select_topk',
  )(keys)
