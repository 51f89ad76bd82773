"""Sampling the next token: temperature, then top-k, then top-p.

Top-p (nucleus) is Holtzman et al., 2020, https://arxiv.org/abs/1904.09751: of
the tokens by falling probability, those whose predecessors have less than
top_p together. It is taken on the probabilities that temperature and top-k
leave, as other libraries do.

A row's random key is folded with the absolute position of the token drawn, so
that the text does not depend on how the positions were cut into steps, nor on
the other rows. Temperature 0 is greedy: argmax, of equal logits the lowest
index.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How the next token is chosen. Static and hashable.

  temperature: divides the logits; 0 is greedy.
  top_k: tokens kept; 0 keeps all. Of equal logits the lowest index is kept.
  top_p: probability mass kept, in (0, 1]; 1 keeps all.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
      raise ValueError(
        f'Sampling: temperature={self.temperature}; it must be finite and not '
        'negative. 0 is greedy, 1 the model as trained.'
      )
    if self.top_k < 0:
      raise ValueError(
        f'Sampling: top_k={self.top_k}; it must be at least 0. 0 keeps all '
        'tokens.'
      )
    if not 0.0 < self.top_p <= 1.0:
      raise ValueError(
        f'Sampling: top_p={self.top_p}; it must be above 0 and at most 1. 1 '
        'keeps all tokens.'
      )


GREEDY = Sampling()


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
  """What is drawn from: (B, V) -> float32 (B, V), -inf where not kept.

  Raises:
    ValueError: temperature 0, which draws nothing.
  """
  if sampling.temperature == 0.0:
    raise ValueError(
      'filter_logits: temperature=0.0; it must be positive, as greedy decoding '
      'draws nothing. Use sample.'
    )
  V = logits.shape[-1]
  logits = logits.astype(jnp.float32) / sampling.temperature
  k = min(sampling.top_k or V, V)
  if k == V and sampling.top_p == 1.0:
    return logits
  top, indices = jax.lax.top_k(logits, k)  # (B, k), falling
  p = jax.nn.softmax(top)
  before = jnp.cumsum(p, axis=-1) - p  # Mass of the more likely ones.
  # The first is always kept: rounding may not leave an empty set.
  kept = (before < sampling.top_p) | (jnp.arange(k)[None] == 0)
  rows = jnp.arange(logits.shape[0])[:, None]
  filtered = jnp.full_like(logits, -jnp.inf)
  return filtered.at[rows, indices].set(jnp.where(kept, top, -jnp.inf))


def sample(
  logits: jax.Array, keys: jax.Array, positions: jax.Array, sampling: Sampling
) -> jax.Array:
  """Chooses one token per row.

  Args:
    logits: (B, V).
    keys: (B,) random keys, one per row, the same at every position.
    positions: (B,) int32, the absolute position of the token to be drawn.
    sampling: static.

  Returns:
    (B,) int32.
  """
  if sampling.temperature == 0.0:
    logits = logits.astype(jnp.float32)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  filtered = filter_logits(logits, sampling)

  def draw(key, position, row):
    return jax.random.categorical(jax.random.fold_in(key, position), row)

  return jax.vmap(draw)(keys, positions, filtered).astype(jnp.int32)
