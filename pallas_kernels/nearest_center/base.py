"""The best centers of each row in plain JAX: what the kernel must equal.

  score[n, k] = sum_d x[n, d] c[k, d] + bias[k]        in float32

The scores (N, K) are written out, ranked, and read again.
"""

import jax
import jax.numpy as jnp


def nearest_center(
  x: jax.Array, c: jax.Array, bias: jax.Array | None, top: int
) -> tuple[jax.Array, jax.Array]:
  """x (N, D), c (K, D), bias (K,) -> values (N, top), indices (N, top).

  Values are float32 and descend; of equal ones the lowest index comes first.
  """
  return jax.lax.top_k(scores(x, c, bias), top)


def scores(x: jax.Array, c: jax.Array, bias: jax.Array | None) -> jax.Array:
  """x (N, D), c (K, D), bias (K,) -> (N, K) float32."""
  found = jax.lax.dot_general(
    x,
    c,
    (((1,), (1,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  if bias is not None:
    found = found + bias.astype(jnp.float32)[None]
  return found
