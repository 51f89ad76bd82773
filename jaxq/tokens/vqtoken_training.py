"""VQToken's training: losses, rates and metrics beside the model's own loss.

Zhang and Fu, 2025, https://arxiv.org/abs/2503.16980. All is trained for the
language model's cross-entropy, each part at a rate of its own. Labels are not
differentiated; means are, each member getting 1 / members of its code's
gradient. `commitment_loss`, off in the paper, pulls tokens to their codes.
"""

import jax
import jax.numpy as jnp
import optax

from jaxq.tokens import interface, primitives, training

# Parts of the tree by regex, first match first, and their peak rates.
RATES = ((r'vision', 2e-6), (r'projector|vqtoken', 1e-6), (r'', 1e-5))


def commitment_loss(
  ts: interface.TokenSet,
  reduced: interface.Reduced,
  codes: jax.Array,
  beta: float = 0.25,
) -> jax.Array:
  """beta * mean |x - code of x|^2 of unit vectors; no gradient to the codes.

  Args:
    ts: the tokens.
    reduced: their assignment.
    codes: (B, K, D), the codebook before the attention.
    beta: weight.
  """
  x = primitives.normalize(jnp.where(ts.mask[..., None], ts.tokens, 0))
  codes = jax.lax.stop_gradient(codes.astype(jnp.float32))
  near = primitives.gather(codes, reduced.assignment)
  squared = jnp.sum((x - near) ** 2, axis=-1)
  assigned = reduced.assignment >= 0
  total = jnp.sum(jnp.where(assigned, squared, 0.0))
  number = jnp.sum(assigned, dtype=jnp.float32)
  return beta * total / jnp.maximum(number, 1.0)


def optimizer(
  steps: int,
  rates: tuple[tuple[str, float], ...] = RATES,
  warmup: float = 0.03,
) -> optax.GradientTransformation:
  """AdamW with warm-up and cosine, at a rate per part of the tree."""
  first = max(1, int(warmup * steps))

  def make(rate):
    schedule = optax.warmup_cosine_decay_schedule(
      0.0, rate, first, max(steps, first + 1)
    )
    return optax.adamw(schedule)

  return training.rates(rates, make)


def explained_variance(
  ts: interface.TokenSet, reduced: interface.Reduced
) -> jax.Array:
  """1 - |x - B[Z]|^2 / |x - mean x|^2 of a row's tokens: (B,) float32."""
  mask = ts.mask[..., None]
  x = jnp.where(mask, ts.tokens, 0).astype(jnp.float32)
  number = jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.float32)
  mean = jnp.sum(x, axis=1, keepdims=True) / jnp.maximum(number, 1.0)
  near = primitives.unmerge(reduced).astype(jnp.float32)
  square = lambda a: jnp.sum(jnp.where(mask, a * a, 0.0), axis=(1, 2))
  return 1 - square(x - near) / jnp.maximum(square(x - mean), 1e-12)


def token_ratio(reduced: interface.Reduced, ts: interface.TokenSet) -> float:
  """Codes over tokens, of the whole batch."""
  number = jnp.sum(ts.mask, dtype=jnp.float32)
  total = jnp.sum(reduced.count).astype(jnp.float32)
  return float(total / jnp.maximum(number, 1.0))


def token_density(accuracy: float, tokens: float) -> float:
  """TokDense: accuracy in percent per token the language model reads.

  Raises:
    ValueError: there are no tokens.
  """
  if tokens <= 0:
    raise ValueError(
      f'token_density: tokens={tokens}; it must be positive. Pass the mean '
      'number of tokens per video.'
    )
  return accuracy / tokens
