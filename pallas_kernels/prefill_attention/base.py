"""Prefill attention in plain JAX: what the kernel must equal, and XLA's path.

All scores exist at once, (B, H, T, S) in float32.
"""

import jax
import jax.numpy as jnp


def prefill_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  start: jax.Array,
  lengths: jax.Array,
  *,
  scale: float,
  window: int | None,
  softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
  """q (B, T, H, D), k, v (B, S, Hkv, D) -> out, log-sum-exp (B, T, H).

  float32 sums; out in q's dtype. 0 and -inf for a query that sees nothing.
  """
  B, T, H, D = q.shape
  rows = start[:, None] + jnp.arange(T)[None]
  s, seen = _scores(q, k, rows, lengths, scale, window, softcap)
  largest = jnp.max(jnp.where(seen, s, -jnp.inf), axis=-1, keepdims=True)
  finite = jnp.where(jnp.isneginf(largest), 0.0, largest)
  p = jnp.where(seen, jnp.exp(s - finite), 0.0)
  total = jnp.sum(p, axis=-1, keepdims=True)
  held = jnp.arange(k.shape[1])[None] < lengths[:, None]
  v = jnp.where(held[:, :, None, None], v.astype(jnp.float32), 0.0)
  out = jnp.einsum('bkgts,bskd->btkgd', p, v, precision='highest')
  out = out.reshape(B, T, H, D)
  shares = jnp.where(total > 0, total, 1.0)[..., 0]  # (B, Hkv, G, T)
  by_token = lambda a: a.transpose(0, 3, 1, 2).reshape(B, T, H)
  lse = by_token(finite[..., 0] + jnp.log(total[..., 0]))
  return (out / by_token(shares)[..., None]).astype(q.dtype), lse


def received(
  q: jax.Array,
  k: jax.Array,
  lse: jax.Array,
  weights: jax.Array,
  positions: jax.Array,
  lengths: jax.Array,
  *,
  scale: float,
  window: int | None,
  softcap: float | None,
) -> jax.Array:
  """sum_t weights_t p_ts, p = exp(s - lse): (B, H, S) float32."""
  B, T, H, _ = q.shape
  s, seen = _scores(q, k, positions, lengths, scale, window, softcap)
  by_head = lse.reshape(B, T, k.shape[2], -1).transpose(0, 2, 3, 1)
  finite = jnp.where(jnp.isneginf(by_head), 0.0, by_head)
  p = jnp.where(seen, jnp.exp(s - finite[..., None]), 0.0)
  sums = jnp.einsum('bkgts,bt->bkgs', p, weights.astype(jnp.float32))
  return sums.reshape(B, H, -1)


def _scores(q, k, positions, lengths, scale, window, softcap):
  """Scores (B, Hkv, G, T, S) and what is seen, which broadcasts to them.

  positions (B, T), of the queries.
  """
  B, T, H, D = q.shape
  q = (q.astype(jnp.float32) * scale).reshape(B, T, k.shape[2], -1, D)
  keys = k.astype(jnp.float32)
  s = jnp.einsum('btkgd,bskd->bkgts', q, keys, precision='highest')
  if softcap is not None:
    s = softcap * jnp.tanh(s / softcap)
  rows = positions[:, :, None]
  columns = jnp.arange(k.shape[1])[None, None]
  seen = (columns <= rows) & (columns < lengths[:, None, None])
  if window is not None:
    seen &= columns > rows - window
  return s, seen[:, None, None]
