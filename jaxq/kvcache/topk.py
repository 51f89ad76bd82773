"""The tokens or pages of largest score: what every selecting cache ends with.

On a TPU a kernel counts them where the scores lie (pallas_kernels.select_topk);
elsewhere jax.lax.top_k sorts. Both choose the same: of equal scores the first.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.select_topk import api


def largest(
  scores: jax.Array,
  k: int,
  *,
  implementation: str | None = None,
  **options: Any,
) -> tuple[jax.Array, jax.Array]:
  """scores (..., S) -> places (..., k) int32, and whether there is any.

  Softmax does not ask for an order: the kernel gives places as they rise,
  top_k by falling scores.

  Args:
    scores: -inf where there is nothing; never chosen before something.
    k: 1..S.
    implementation: None: the kernel where it serves; 'xla': jax.lax.top_k.
    **options: of select_topk.

  Raises:
    ValueError, NotImplementedError: as select_topk.
  """
  name = implementation or api.choose(scores)
  if name == 'xla':
    best, index = jax.lax.top_k(scores, k)
    return index, best > -jnp.inf
  index = api.select_topk(scores, k, implementation=name, **options)
  return index, jnp.take_along_axis(scores, index, axis=-1) > -jnp.inf
