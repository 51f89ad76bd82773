"""Token embedding and the language-model head that may share its table."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxq.nn import linear


class Embed(nn.Module):
  """Rows of a table (V, C).

  Attributes:
    vocab_size, features: V, C.
  """

  vocab_size: int
  features: int

  def setup(self):
    self.embedding = linear.param(
      self,
      'embedding',
      nn.initializers.normal(0.02),
      (self.vocab_size, self.features),
    )

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """(B, T) int32 -> (B, T, C)."""
    return jnp.take(jnp.asarray(self.embedding), tokens, axis=0)

  def attend(self, x: jax.Array) -> jax.Array:
    """The tied head: (..., C) -> logits (..., V) float32."""
    table = jnp.asarray(self.embedding, x.dtype)
    return jnp.matmul(x, table.T, preferred_element_type=jnp.float32)
