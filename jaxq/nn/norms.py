"""Normalisation layers, computed in float32."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxq.nn import linear


class RMSNorm(nn.Module):
  """y = x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich, 2019).

  Attributes:
    eps: added to the mean square.
  """

  eps: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., C) -> (..., C) in x.dtype; statistics in float32."""
    scale = linear.param(self, 'scale', nn.initializers.ones, (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    variance = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    y = x32 * jax.lax.rsqrt(variance + self.eps)
    shape = (1,) * (x.ndim - 1) + (-1,)
    return (y * jnp.reshape(scale, shape).astype(jnp.float32)).astype(x.dtype)
