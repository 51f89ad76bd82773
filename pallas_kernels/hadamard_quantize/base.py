"""x @ H / sqrt(h), block by block, and its codes, in plain JAX.

H is Sylvester's matrix of order h, a power of two: signs alone, so bfloat16
holds it and a matrix unit applies it, with float32 sums.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import rows


def matrix(h: int) -> np.ndarray:
  """Sylvester's (h, h) matrix of +-1, float32."""
  H = np.ones((1, 1), np.float32)
  while H.shape[0] < h:
    H = np.block([[H, H], [H, -H]])
  return H


def transform(x: jax.Array, h: int) -> jax.Array:
  """x (M, K) -> (M, K) float32."""
  M, K = x.shape
  blocks = x.reshape(M, K // h, h)
  y = jax.lax.dot_general(
    blocks,
    jnp.asarray(matrix(h), x.dtype),
    (((2,), (0,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  return y.reshape(M, K) * h**-0.5


def hadamard_quantize(
  x: jax.Array, h: int, x_format: str
) -> tuple[jax.Array, jax.Array]:
  """x (M, K) -> codes (M, K), scale (M, 1)."""
  return rows.quantize(transform(x, h), x_format)
