"""Token embedding and the language-model head that may share its table."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxq.nn import linear


class Embed(nn.Module):
  """Rows of a table (V, C), times a constant, plus a row per position.

  Attributes:
    vocab_size, features: V, C.
    scale: times the rows; the tied head is not scaled (Gemma).
    max_position: rows of a table of learned positions; 0: there is none.
  """

  vocab_size: int
  features: int
  scale: float = 1.0
  max_position: int = 0

  def setup(self):
    self.embedding = linear.param(
      self,
      'embedding',
      nn.initializers.normal(0.02),
      (self.vocab_size, self.features),
    )

    if self.max_position:
      self.positions = linear.param(
        self,
        'positions',
        nn.initializers.normal(0.02),
        (self.max_position, self.features),
      )

  def __call__(
    self, tokens: jax.Array, positions: jax.Array | None = None
  ) -> jax.Array:
    """(B, T) int32, positions (B, T) or None for 0..T-1 -> (B, T, C).

    A position past the table takes its last row.
    """
    x = jnp.take(jnp.asarray(self.embedding), tokens, axis=0)
    if self.scale != 1:
      x = x * jnp.asarray(self.scale, x.dtype)
    if self.max_position:
      if positions is None:
        positions = jnp.arange(tokens.shape[1])[None]
      x = x + jnp.take(
        jnp.asarray(self.positions), positions, axis=0, mode='clip'
      )
    return x

  def attend(self, x: jax.Array) -> jax.Array:
    """The tied head: (..., C) -> logits (..., V) float32."""
    table = jnp.asarray(self.embedding, x.dtype)
    return jnp.matmul(x, table.T, preferred_element_type=jnp.float32)
