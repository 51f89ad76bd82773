"""Normalisation layers, computed in float32.

A block in which linears alone read a norm calls it by kernel_inputs.feed, which
may take codes of what it gives; `kind` is the kernel's name for it.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxq.nn import linear


class RMSNorm(nn.Module):
  """y = x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich, 2019).

  A bias (C,) that a method put beside the scale is added.

  Attributes:
    eps: added to the mean square.
  """

  kind: ClassVar[str] = 'rms'
  eps: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., C) -> (..., C) in x.dtype; statistics in float32."""
    scale = linear.param(self, 'scale', nn.initializers.ones, (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    variance = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    y = x32 * jax.lax.rsqrt(variance + self.eps)
    y = y * _row(scale, x)
    if self.has_variable('params', 'bias'):
      y = y + _row(self.get_variable('params', 'bias'), x)
    return y.astype(x.dtype)


class LayerNorm(nn.Module):
  """y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias (Ba et al., 2016).

  Attributes:
    eps: added to the variance.
  """

  kind: ClassVar[str] = 'layer'
  eps: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., C) -> (..., C) in x.dtype; statistics in float32."""
    scale = linear.param(self, 'scale', nn.initializers.ones, (x.shape[-1],))
    bias = linear.param(self, 'bias', nn.initializers.zeros, (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    y = x32 * jax.lax.rsqrt(variance + self.eps)
    return (y * _row(scale, x) + _row(bias, x)).astype(x.dtype)


def _row(leaf: jax.Array, x: jax.Array) -> jax.Array:
  """(C,) -> (1, ..., 1, C) float32, to stand beside x."""
  shape = (1,) * (x.ndim - 1) + (-1,)
  return jnp.reshape(leaf, shape).astype(jnp.float32)
