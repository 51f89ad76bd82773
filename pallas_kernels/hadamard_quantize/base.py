"""x @ H / sqrt(h), block by block, and its codes, in plain JAX.

H is Sylvester's matrix of order h, a power of two: signs alone, so bfloat16
holds it and a matrix unit applies it, with float32 sums. Above WIDTH it is the
product of two, H_h = H_{h / w} x H_w (Kronecker): inside runs of w = WIDTH
channels, and then between them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import rows

WIDTH = 512


def matrix(h: int) -> np.ndarray:
  """Sylvester's (h, h) matrix of +-1, float32."""
  H = np.ones((1, 1), np.float32)
  while H.shape[0] < h:
    H = np.block([[H, H], [H, -H]])
  return H


def transform(x: jax.Array, h: int) -> jax.Array:
  """x (M, K) -> (M, K) float32."""
  (M, K), w = x.shape, min(h, WIDTH)
  y = _times(x.reshape(M, K // w, w), w, 2)
  if h > w:
    y = _times(y.reshape(M, K // h, h // w, w), h // w, 2)  # (M, K/h, w, h/w)
    y = jnp.swapaxes(y, 2, 3)
  return y.reshape(M, K) * h**-0.5


def hadamard_quantize(
  x: jax.Array, h: int, x_format: str
) -> tuple[jax.Array, jax.Array]:
  """x (M, K) -> codes (M, K), scale (M, 1)."""
  return rows.quantize(transform(x, h), x_format)


def _times(x: jax.Array, n: int, axis: int) -> jax.Array:
  """Matrix n along `axis`, which becomes the last -> float32."""
  return jax.lax.dot_general(
    x,
    jnp.asarray(matrix(n), x.dtype),
    (((axis,), (0,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
