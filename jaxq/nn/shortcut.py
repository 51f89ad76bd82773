"""Shortcut: the residual branch of a post-norm block, as a layer.

  y = x * scale + bias

In a post-norm model (BERT) a norm's output is read twice: by the linears of the
branch and by the residual sum. A scale or shift that moves out of the norm into
those linears must be undone for the sum, and this is where: x * scale + bias is
the norm's output as it was. Ones and zeros in a model as it is loaded.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxq.nn import linear


class Shortcut(nn.Module):
  """Per channel scale and bias, both (C,)."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., C) -> (..., C) in x.dtype."""
    shape = (x.shape[-1],)
    scale = linear.param(self, 'scale', nn.initializers.ones, shape)
    bias = linear.param(self, 'bias', nn.initializers.zeros, shape)
    row = (1,) * (x.ndim - 1) + shape
    scale, bias = (
      jnp.asarray(leaf, x.dtype).reshape(row) for leaf in (scale, bias)
    )
    return x * scale + bias
