"""Attention received in plain JAX: what the kernel must equal.

  p[t, s] = exp(scale * q[t] . k[s] - lse[t]),   0 for rows that do not count
  received[s] = sum_t p[t, s], or max_t p[t, s]

The weights (T, S) of every head are written out and read again.
"""

import jax
import jax.numpy as jnp


def attention_received(
  q: jax.Array,
  k: jax.Array,
  lse: jax.Array,
  *,
  reduce: str,
  scale: float,
  causal: bool,
) -> jax.Array:
  """One sequence: q (T, H, D), k (S, Hkv, D), lse (H, T) -> (H, S) float32.

  A row whose lse is infinite does not count.
  """
  logits = _logits(q, k, scale, causal)
  counts = jnp.isfinite(lse)[..., None]  # (H, T, 1)
  # Before the exponential, so that gradients of rows left out are zeros.
  shifted = logits - jnp.where(counts, lse[..., None], 0.0)
  p = jnp.exp(jnp.where(counts, shifted, -jnp.inf))
  return jnp.sum(p, axis=1) if reduce == 'sum' else jnp.max(p, axis=1)


def row_logsumexp(
  q: jax.Array,
  k: jax.Array,
  key_mask: jax.Array | None,
  *,
  scale: float,
  causal: bool,
) -> jax.Array:
  """One sequence: q (T, H, D), k (S, Hkv, D), key_mask (S,) -> (H, T) float32.

  A row that sees no key has -inf.
  """
  logits = _logits(q, k, scale, causal)
  if key_mask is not None:
    logits = jnp.where(key_mask[None, None], logits, -jnp.inf)
  return jax.nn.logsumexp(logits, axis=-1)


def _logits(q, k, scale, causal):
  """(H, T, S) float32; -inf where a causal row does not see a key."""
  T, H, D = q.shape
  S, Hkv, _ = k.shape
  grouped = q.reshape(T, Hkv, H // Hkv, D)
  logits = scale * jnp.einsum(
    'thgd,shd->hgts',
    grouped,
    k,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  logits = logits.reshape(H, T, S)
  if causal:  # The last row is at the position of the last key.
    seen = jnp.arange(T)[:, None] + (S - T) >= jnp.arange(S)[None]
    logits = jnp.where(seen[None], logits, -jnp.inf)
  return logits
