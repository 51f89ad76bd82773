"""Labels of tokens, and what is chosen by them: Double Sparsity's selection.

  label   k[C_h] of every token: the r channels that decide q k
  score   s_t = q[C_h] label_t

The functions take any cache with `label` (a store of r channels), `channels`
(Hkv, r), `length` (B,) and the fields of `config` that they read.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxq.kvcache import topk


def put(label: Any, channels: jax.Array, k: jax.Array, where: jax.Array) -> Any:
  """The store of labels with those of k (B, T, Hkv, D) at slots (B, T)."""
  chosen = jnp.take_along_axis(k, channels[None, None], axis=-1)
  return label.put(label.encode(chosen), where)


def scores(cache: Any, queries: jax.Array) -> jax.Array:
  """(B, Hkv, G, T, D) -> q[C] label_t, (B, Hkv, G, T, S)."""
  index = cache.channels[None, :, None, None]  # (1, Hkv, 1, 1, r)
  short = jnp.take_along_axis(queries, index, axis=-1)
  found: jax.Array = cache.label.scores(short, 0, cache.label.slots)
  return found


def rank(cache: Any, queries: jax.Array) -> jax.Array:
  """What tokens are chosen by: (B, Hkv, 1 or G, T, S), -inf: none."""
  found = scores(cache, queries)
  length = cache.length[:, None, None, None, None]
  slot = jnp.arange(found.shape[-1]).reshape(1, 1, 1, 1, -1)
  held = slot < length
  if cache.config.group_by == 'kv_head':
    p = jax.nn.softmax(jnp.where(held, found, -1e30), axis=-1)
    found = jnp.sum(p, axis=2, keepdims=True)
  safe = slot < cache.config.sinks
  safe |= slot >= length - cache.config.recent
  found = jnp.where(safe, jnp.inf, found)
  return jnp.where(held, found, -jnp.inf)


def select(cache: Any, queries: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Queries of one token (B, Hkv, G, D) -> tokens, and whether they are any.

  (B, H', heavy_tokens) both; H' is Hkv or H as config.group_by says.
  """
  ranked = rank(cache, queries[:, :, :, None])[:, :, :, 0]
  ranked = ranked.reshape(ranked.shape[0], -1, ranked.shape[-1])
  return topk.largest(ranked, cache.config.heavy_tokens)
