"""Small caches, keys with outlier channels, and attention without a cache."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.kvcache import (
  contiguous,
  dont_waste_bits,
  double_sparsity,
  evict,
  fp8,
  interface,
  kivi,
  oscar,
  paged,
  per_token,
  qjl,
  quest,
  ring,
  tokenselect,
  turboquant,
  zipcache,
)
from jaxq.nn import causal, rope

B, H, HKV, D = 2, 4, 2, 16
R = 16  # Residual windows.
SMALL = {'residual': R, 'group_size': 8}
PLAIN = interface.Scoring()

KIVI = kivi.KiviConfig(**SMALL)
OSCAR = dataclasses.replace(oscar.CONFIG, **SMALL)
ZIPCACHE = zipcache.ZipCacheConfig(residual=R)
# Every member, at its defaults but for small windows.
CACHES = {
  'contiguous': contiguous.ContiguousConfig(),
  'ring': ring.RingConfig(window=64),
  'paged': paged.PagedConfig(page_size=8),
  'int8': per_token.PerTokenConfig(bits=8),
  'int4': per_token.PerTokenConfig(bits=4),
  'int2': per_token.PerTokenConfig(bits=2, group_size=8),
  'fp8': fp8.Fp8Config(),
  'turboquant': turboquant.TurboQuantConfig(bits=3),
  'kivi': KIVI,
  'oscar': OSCAR,
  'oscar_head': dataclasses.replace(OSCAR, norm_scope='head'),
  'qjl': qjl.QjlConfig(
    **SMALL, sketch=56, outlier_sketch=32, outliers=2, value_bits=4
  ),
  'zipcache': ZIPCACHE,
}

EVICT = evict.EvictConfig(
  policy='snapkv', budget=24, sinks=2, recent=4, window=4, interval=4, future=8
)
SPARSE = double_sparsity.DoubleSparsityConfig(
  channels='random', heavy_tokens=12, dense_layers=0
)
TOKENSELECT = tokenselect.TokenSelectConfig(budget=8, sinks=2, local=8, chunk=8)
# Needs a decision behind each step (test_dont_waste_bits).
BITS = dont_waste_bits.DontWasteBitsConfig(controller='random')
# Those that select tokens: the contract of test_selection.
SELECTING: dict[str, Any] = {
  'evict_snapkv': EVICT,
  'evict_expected': dataclasses.replace(EVICT, policy='expected'),
  'evict_h2o': dataclasses.replace(EVICT, policy='h2o'),
  'evict_streaming': dataclasses.replace(
    EVICT, policy='streaming', reposition=True
  ),
  'evict_knorm_int8': dataclasses.replace(EVICT, policy='knorm', inner='int8'),
  'evict_random': dataclasses.replace(EVICT, policy='random'),
  'evict_heads': dataclasses.replace(EVICT, head_budgets=True),
  'quest': quest.QuestConfig(page_size=4, budget=12, dense_layers=0),
  'double_sparsity': SPARSE,
  'tokenselect': TOKENSELECT,
}
# Those that keep what they are given.
LOSSLESS = {
  'contiguous': contiguous.ContiguousConfig(),
  'ring': ring.RingConfig(window=64),
  'paged': paged.PagedConfig(page_size=8),
  'fp8_none': fp8.Fp8Config(k_dtype='none', v_dtype='none'),
  'oscar_16': dataclasses.replace(OSCAR, bits=16),
  'zipcache_16': dataclasses.replace(ZIPCACHE, bits=16, low_bits=16),
}


def shape(batch=B, capacity=64, **kwargs):
  """A CacheShape."""
  return interface.CacheShape(
    batch=batch,
    capacity=capacity,
    kv_heads=HKV,
    head_dim=D,
    heads=H,
    rope=rope.Rope(),
    **kwargs,
  )


@functools.cache
def qkv(T, seed=0, batch=B):
  """q (B, T, H, D), k and v (B, T, HKV, D); some key channels are large."""
  keys = jax.random.split(jax.random.key(seed), 3)
  q = jax.random.normal(keys[0], (batch, T, H, D))
  k, v = (jax.random.normal(key, (batch, T, HKV, D)) for key in keys[1:])
  return q, k.at[..., 3].add(8.0), v


def positions_of(length, T, counts=None):
  """(B, T): from each row's length on; negative behind its count."""
  offsets = jnp.arange(T)[None]
  positions = jnp.asarray(length)[:, None] + offsets
  if counts is None:
    return positions
  return jnp.where(offsets < jnp.asarray(counts)[:, None], positions, -1)


@functools.partial(jax.jit, static_argnums=0)
def step(scoring, cache, q, k, v, positions):
  """One attend and one append."""
  out, update = cache.attend(q, k, v, positions, scoring)
  counts = jnp.sum(positions >= 0, axis=1)
  return out, interface.append(cache, update, counts)


def run(config, data, sizes, *, scoring=PLAIN, capacity=64, cache=None):
  """Feeds tokens in pieces of `sizes`: outputs (B, sum, H, D), the cache."""
  q, k, v = data
  if cache is None:
    cache = config.init(shape(batch=q.shape[0], capacity=capacity))
  outs, start = [], 0
  for size in sizes:
    piece = slice(start, start + size)
    out, cache = step(
      scoring,
      cache,
      q[:, piece],
      k[:, piece],
      v[:, piece],
      positions_of(cache.length, size),
    )
    outs.append(out)
    start += size
  return jnp.concatenate(outs, axis=1), cache


def attention(data, scoring=PLAIN):
  """Without a cache."""
  q, k, v = data
  return causal.attention(q, k, v, **dataclasses.asdict(scoring))


def held(cache, count):
  """Dequantized keys and values of the first `count` slots of both stores."""
  return cache.k.values(0, count), cache.v.values(0, count)


def same(a, b):
  """Whether two trees are equal, bit for bit."""
  return all(
    np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )
