"""One compiled function over many windows, on one device or on a mesh.

Every batch has the same shape, so the function compiles once; the last batch
is filled up with copies of the first window, whose results are dropped. On a
mesh a batch is one window per device along 'data'.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxq.parallel import arrays

_AXIS = 'data'


def run(
  function: Callable[[jax.Array], Any],
  tokens: np.ndarray,
  *,
  mesh: jax.sharding.Mesh | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Any:
  """Applies `function` to all windows, one window per device at a time.

  Args:
    function: jitted; maps tokens (B, T) to a pytree of arrays (B, ...).
    tokens: (num, T) int32. Every process has all of them.
    mesh: None: one window at a time on the default device.
    progress: called with (windows done, num) after each batch.

  Returns:
    The pytree with NumPy leaves (num, ...), on every process.

  Raises:
    TypeError, ValueError: tokens are not integers (num >= 1, T >= 2), or the
      mesh has no axis 'data'.
  """
  _check(tokens, mesh)
  num, T = tokens.shape
  size = 1 if mesh is None else mesh.shape[_AXIS]
  outputs = []
  for start in range(0, num, size):
    rows = np.arange(start, start + size)
    batch = tokens[np.where(rows < num, rows, 0)].astype(np.int32)  # (B, T)
    out = function(place(batch, mesh))
    kept = min(size, num - start)
    outputs.append(jax.tree.map(lambda a, kept=kept: fetch(a)[:kept], out))
    if progress is not None:
      progress(start + kept, num)
  return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)


def replicate(variables: Any, mesh: jax.sharding.Mesh | None) -> Any:
  """Puts the leaves that do not lie on `mesh` yet on all of its devices."""
  if mesh is None:
    return variables
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def place(leaf):
    sharding = getattr(leaf, 'sharding', None)
    if isinstance(sharding, jax.sharding.NamedSharding):
      return leaf if sharding.mesh == mesh else arrays.put(leaf, everywhere)
    return arrays.put(leaf, everywhere)

  return jax.tree.map(place, variables)


def place(batch: np.ndarray, mesh: jax.sharding.Mesh | None) -> jax.Array:
  """Puts a batch whose rows are shared out over 'data'; None: one device."""
  if mesh is None:
    return jax.numpy.asarray(batch)
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(_AXIS))
  return arrays.put(batch, sharding)


def fetch(array: jax.Array) -> np.ndarray:
  """The whole array on the host, on every process."""
  return arrays.fetch(array)


def _check(tokens: np.ndarray, mesh: jax.sharding.Mesh | None) -> None:
  if not np.issubdtype(tokens.dtype, np.integer):
    raise TypeError(
      f'windows: dtype {tokens.dtype}; token ids must be integers. Tokenize '
      'the text first.'
    )
  if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
    raise ValueError(
      f'windows: shape {tokens.shape}; allowed is (num, T) with num >= 1 and '
      'T >= 2, as each token is scored from those before it. Give more text, '
      'or shorter windows.'
    )
  if mesh is not None and _AXIS not in mesh.shape:
    raise ValueError(
      f'windows: the mesh has axes {sorted(mesh.shape)}; an axis {_AXIS!r} is '
      'needed to share the windows out. Name one of its axes so.'
    )
