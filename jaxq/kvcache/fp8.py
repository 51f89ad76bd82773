"""8-bit floats under a fixed scale.

  e4m3   x / scale, held to +-448, three bits of fraction
  e5m2   x as it is, two bits of fraction and the range of float16

The scale is static: 1 serves most models, whose keys and values are far below
448. Keys of a projection with a large bias are not: then one bad layer ruins
everything (Qwen2.5-7B: perplexity 7 becomes 214), without a NaN to tell of it.
`out_of_range` measures that on real keys; keep those keys as they are with
k_dtype=none. Scales fold into q and the output, so they cost nothing.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxq.kvcache import interface, per_token, stores

DTYPES = {
  'e4m3': jnp.float8_e4m3fn,
  'e5m2': jnp.float8_e5m2,
  'none': None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8Config:
  """k_dtype, v_dtype: of DTYPES; 'none' keeps that of the activations.

  k_scale, v_scale: what e4m3 values are divided by.
  """

  k_dtype: str = 'e4m3'
  v_dtype: str = 'e4m3'
  k_scale: float = 1.0
  v_scale: float = 1.0

  def __post_init__(self):
    for name in ('k_dtype', 'v_dtype'):
      if getattr(self, name) not in DTYPES:
        raise ValueError(
          f'fp8: {name}={getattr(self, name)!r}; allowed {sorted(DTYPES)}.'
        )
    for name in ('k_scale', 'v_scale'):
      if not getattr(self, name) > 0:
        raise ValueError(
          f'fp8: {name}={getattr(self, name)}; it must be positive. 1 is none.'
        )

  def init(self, shape: interface.CacheShape) -> per_token.TokenCache:
    """An empty cache."""

    def store(name, scale):
      dtype = DTYPES[name]
      plain = stores.float_store(shape, shape.capacity, dtype)
      if name != 'e4m3':
        return plain
      heads = (1, 1, shape.kv_heads, 1)
      return ScaledStore(plain, jnp.full(heads, scale, jnp.float32))

    k = store(self.k_dtype, self.k_scale)
    v = store(self.v_dtype, self.v_scale)
    return per_token.token_cache(shape, k, v)


@flax.struct.dataclass
class ScaledStore:
  """A float8 store of values divided by a scale (1, 1, Hkv, 1) per head."""

  store: stores.FloatStore
  scale: jax.Array

  @property
  def slots(self) -> int:
    """S."""
    return self.store.slots

  def encode(self, x: jax.Array) -> jax.Array:
    """x (B, T, Hkv, D), clipped first: a cast alone makes NaN of overflow."""
    most = float(jnp.finfo(self.store.x.dtype).max)
    x = x.astype(jnp.float32) / self.scale
    return self.store.encode(jnp.clip(x, -most, most))

  def put(self, encoded: jax.Array, slots: jax.Array) -> 'ScaledStore':
    """Writes to slots (B, T)."""
    return dataclasses.replace(self, store=self.store.put(encoded, slots))

  def values(self, first: Any, size: int) -> jax.Array:
    """(B, size, Hkv, D) float32."""
    return self.store.values(first, size) * self.scale

  def scores(self, q: jax.Array, first: Any, size: int) -> jax.Array:
    """q (B, Hkv, G, T, D) -> (B, Hkv, G, T, size)."""
    return self.store.scores(q * self._per_head(), first, size)

  def combine(self, p: jax.Array, first: Any, size: int) -> jax.Array:
    """p (B, Hkv, G, T, size) -> (B, Hkv, G, T, D)."""
    return self.store.combine(p, first, size) * self._per_head()

  def _per_head(self) -> jax.Array:
    return self.scale.reshape(1, -1, 1, 1, 1)


def out_of_range(
  x: jax.Array, dtype: str = 'e4m3', scale: float = 1.0
) -> float:
  """The share of keys or values that the format would clip; outside jit."""
  most = float(jnp.finfo(DTYPES[dtype]).max)
  return float(jnp.mean(jnp.abs(x.astype(jnp.float32)) > most * scale))
