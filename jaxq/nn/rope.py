"""Rotary position embedding, half-split (Su et al., 2021, arXiv 2104.09864).

Channel i of the first half of a head turns with channel i of the second half
by the angle position * theta^(-2i/D): the layout of Hugging Face checkpoints.
GGUF files interleave the pairs; jaxq.io.gguf undoes that at load.
"""

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
  """Turns x by its positions.

  Args:
    x: (B, T, H, D), D even.
    positions: (B, T) int32.
    theta: base of the frequencies.

  Returns:
    (B, T, H, D) in x.dtype; angles in float32.
  """
  half = x.shape[-1] // 2
  exponents = jnp.arange(half, dtype=jnp.float32) / half
  frequencies = jnp.exp(-jnp.log(jnp.float32(theta)) * exponents)  # (D/2,)
  angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None]
  cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
  x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # (B, T, H, D/2)
  turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
  return turned.astype(x.dtype)
