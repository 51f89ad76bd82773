"""What a calibration refuses on the way, in one sentence that names the layer.

Values are checked where they are: on the host as NumPy arrays, on the mesh as
global ones. What is read lazily is checked as it is read.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.nn import blocks, taps

Params = Mapping[str, Any]


def _damaged(name: str) -> str:
  return (
    f'{name}: NaN or Inf in the checkpoint; the file is damaged or was saved '
    'from a diverged run. Get it again.'
  )


def finite(
  params: Params, where: str, message: Callable[[str], str] = _damaged
) -> None:
  """Raises ValueError naming the first parameter with NaN or Inf.

  Args:
    params: NumPy, JAX or lazy leaves.
    where: of the model they are, for their names.
    message: of a name.
  """
  for path, leaf in taps.leaves(params):
    for array in jax.tree.leaves(leaf):
      if not isinstance(array, np.ndarray | jax.Array):
        continue
      if not jnp.issubdtype(array.dtype, jnp.floating):
        continue
      xp: Any = np if isinstance(array, np.ndarray) else jnp
      if not bool(xp.all(xp.isfinite(array))):
        raise ValueError(message(f'{where}.{path}'.replace('/', '.')))


def finite_stats(stats: Mapping[str, Any], i: int) -> None:
  """Raises ValueError naming the first statistic of block i with NaN or Inf.

  Args:
    stats: {tap: {name: state}}.
    i: the block.
  """
  for path, named in stats.items():
    for name, state in named.items():
      if not all(
        bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state)
      ):
        raise ValueError(
          f'{blocks.name_of(i, path)}: {name} of its activations is NaN or '
          'Inf; check the weights before it, or calibrate in float32.'
        )
