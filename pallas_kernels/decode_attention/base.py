"""Decode attention in plain JAX: what the kernels must equal, and XLA's path.

What is read is decoded to float32 first, all of it: a definition, and a path
for short caches. jaxq.kvcache.softmax reads long ones block by block.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import stored

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def decode_attention(
  q: jax.Array,
  k: stored.Stored,
  v: stored.Stored,
  seen: stored.Visits,
  oldest: jax.Array,
  *,
  page: int,
  pooled: bool,
  ring: int,
  softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
  """Softmax attention over the slots of some pages.

  Args:
    q: (B, T, H, D), times the scale.
    k, v: contiguous rows or pools.
    seen: pages (B, N) of each row.
    oldest: (B, T) int32, the first position that a query sees.
    page: slots of a page.
    pooled: whether k and v are pools.
    ring: slots of a ring, or 0.
    softcap: scores become softcap * tanh(scores / softcap).

  Returns:
    Output (B, T, H, D) and log-sum-exp (B, T, H), float32; 0 and -inf for a
    query that sees nothing.
  """
  B, T, H, D = q.shape
  k = stored.take_pages(k, seen.pages, page, pooled)
  v = stored.take_pages(v, seen.pages, page, pooled)
  offsets = jnp.arange(page, dtype=jnp.int32)
  held = (offsets[None, None] < seen.count[..., None]).reshape(B, -1)
  positions = (seen.first[..., None] + offsets[None, None]).reshape(B, -1)
  if ring:
    past = positions > seen.last[:, None]
    positions = jnp.where(past, positions - ring, positions)
  mask = held[:, None] & (positions[:, None] >= oldest[:, :, None])  # (B, T, S)
  mask = mask[:, None, None]
  q = q.astype(jnp.float32).reshape(B, T, k.heads, H // k.heads, D)
  keys = jnp.where(held[..., None, None], stored.values(k), 0.0)
  s = jnp.einsum('btkgd,bskd->bkgts', q, keys, precision='highest')
  if softcap is not None:
    s = softcap * jnp.tanh(s / softcap)
  s = jnp.where(mask, s, MASKED)
  largest = jnp.max(s, axis=-1, keepdims=True)
  p = jnp.where(mask, jnp.exp(s - largest), 0.0)
  total = jnp.sum(p, axis=-1, keepdims=True)
  decoded = jnp.where(held[..., None, None], stored.values(v), 0.0)
  out = jnp.einsum('bkgts,bskd->bkgtd', p, decoded, precision='highest')
  out = out / jnp.where(total > 0, total, 1.0)
  lse = jnp.where(total > 0, largest + jnp.log(total), -jnp.inf)[..., 0]
  out = out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)
  return out, lse.transpose(0, 3, 1, 2).reshape(B, T, H)


def merge(
  parts: Sequence[tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array]:
  """(out, log-sum-exp) of the keys of all parts together.

  Args:
    parts: out (..., D), log-sum-exp (...); -inf: a part that saw nothing.
  """
  lses = jnp.stack([lse for _, lse in parts])
  largest = jnp.max(lses, axis=0)
  finite = jnp.where(jnp.isneginf(largest), 0.0, largest)
  weights = jnp.exp(lses - finite[None])
  total = jnp.sum(weights, axis=0)
  outs = jnp.stack([out.astype(jnp.float32) for out, _ in parts])
  out = jnp.sum(outs * weights[..., None], axis=0)
  out = out / jnp.where(total > 0, total, 1.0)[..., None]
  return out, finite + jnp.log(total)
