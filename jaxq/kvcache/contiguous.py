"""The plain cache: contiguous keys and values with a static capacity.

Slot t of a row holds the token at position t. Rows may have different lengths;
slots at or past a row's length hold garbage that the causal mask never shows.

The methods are those of every cache (jaxq.kvcache.interface). The functions
append first and attend after, all tokens in one softmax: for models that keep
this cache and no other.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxq.kvcache import interface, kernel, layers, softmax, stores


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContiguousConfig:
  """Nothing to choose."""

  def init(self, shape: interface.CacheShape) -> 'ContiguousCache':
    """An empty cache."""
    return init(
      shape.batch, shape.capacity, shape.kv_heads, shape.head_dim, shape.dtype
    )


@flax.struct.dataclass
class ContiguousCache:
  """k, v: (B, S, Hkv, D), keys after RoPE. length: (B,) int32, tokens held."""

  k: Any  # An array; a layer of a stack in a scan.
  v: Any
  length: jax.Array

  @property
  def capacity(self) -> int:
    """S, the most tokens a row can hold."""
    return int(self.k.shape[-3])

  @property
  def elements(self) -> int:
    """Elements of a token's keys."""
    return int(self.k.shape[-2] * self.k.shape[-1])

  def split(self) -> tuple[layers.Own, layers.Whole]:
    """As interface.split says: layers read the stack where it lies."""
    return layers.split(self)

  def attend(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    scoring: interface.Scoring,
  ) -> tuple[jax.Array, interface.Update]:
    """As interface.Cache says."""
    interface.check_inputs(self, q, k, self.k.shape[-2])
    queries = softmax.group(q, self.k.shape[-2], scoring.scale)
    of_k, of_v = stores.FloatStore(self.k), stores.FloatStore(self.v)
    plain = lambda: softmax.attend_store(
      queries,
      positions,
      of_k,
      of_v,
      lambda slots: held(slots, self.length),
      jnp.max(self.length),
      scoring,
    )
    cached = kernel.attend(
      q, positions, of_k, of_v, self.length, scoring, plain
    )
    own = kernel.attend_own(q, k, v, positions, scoring)
    out = softmax.finish(softmax.merge(cached, own), q.dtype)
    return out, interface.Update(k=k, v=v)

  def append(
    self, update: interface.Update, length: jax.Array, counts: jax.Array
  ) -> 'ContiguousCache':
    """As interface.Cache says."""
    slots = new_slots(length, counts, update.k.shape[1], self.capacity)
    return ContiguousCache(
      k=stores.scatter(self.k, update.k, slots),
      v=stores.scatter(self.v, update.v, slots),
      length=length + counts,
    )


def init(
  batch: int,
  capacity: int,
  kv_heads: int,
  head_dim: int,
  dtype: jnp.dtype = jnp.float32,
) -> ContiguousCache:
  """An empty cache."""
  shape = (batch, capacity, kv_heads, head_dim)
  return ContiguousCache(
    k=jnp.zeros(shape, dtype),
    v=jnp.zeros(shape, dtype),
    length=jnp.zeros((batch,), jnp.int32),
  )


def append(
  cache: ContiguousCache, k: jax.Array, v: jax.Array
) -> ContiguousCache:
  """Writes k, v (B, T, Hkv, D) behind each row's tokens.

  The caller keeps length + T <= capacity: inside jit nothing can be raised, and
  a row that overflows drops its newest tokens.
  """
  T = k.shape[1]
  slots = cache.length[:, None] + jnp.arange(T)[None]  # (B, T)
  return ContiguousCache(
    k=stores.scatter(cache.k, k, slots),
    v=stores.scatter(cache.v, v, slots),
    length=cache.length + T,
  )


def attend(
  cache: ContiguousCache,
  q: jax.Array,
  positions: jax.Array,
  *,
  scale: float | None = None,
  window: int | None = None,
  softcap: float | None = None,
) -> jax.Array:
  """Causal attention over the cache; scores and softmax in float32.

  Args:
    cache: holds the tokens of q already.
    q: (B, T, H, D).
    positions: (B, T) int32, of q.
    scale: of the scores; None is 1 / sqrt(D).
    window: keys a query sees, itself counted; None is all before it.
    softcap: scores become softcap * tanh(scores / softcap); None leaves them.

  Returns:
    (B, T, H, D) in q.dtype.
  """
  slots = jnp.arange(cache.capacity)[None, None]  # (1, 1, S)
  mask = slots <= positions[:, :, None]  # (B, T, S)
  if window is not None:
    mask &= slots > positions[:, :, None] - window
  k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
  if softcap is None:
    return jax.nn.dot_product_attention(
      q, k, v, mask=mask[:, None], scale=scale
    )
  B, T, H, D = q.shape
  Hkv = k.shape[2]
  q = q.reshape(B, T, Hkv, H // Hkv, D)
  scores = jnp.einsum(
    'btkgd,bskd->bkgts', q, k, preferred_element_type=jnp.float32
  )
  scores = scores * (D**-0.5 if scale is None else scale)
  scores = softcap * jnp.tanh(scores / softcap)
  scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum('bkgts,bskd->btkgd', weights, v).reshape(B, T, H, D)


def held(slots: jax.Array, length: jax.Array) -> jax.Array:
  """Positions (B, size, 1) of slots (size,) that hold a row in order."""
  slots = slots[None, :, None]
  return jnp.where(slots < length[:, None, None], slots, -1)


def new_slots(
  length: jax.Array, counts: jax.Array, T: int, capacity: int
) -> jax.Array:
  """Where T tokens go, (B, T) int32; padding goes to the capacity: nowhere."""
  offsets = jnp.arange(T, dtype=jnp.int32)[None]
  slots = length[:, None] + offsets
  return jnp.where(offsets < counts[:, None], slots, capacity)


def nbytes(cache: ContiguousCache) -> int:
  """Exact bytes of all leaves."""
  return interface.nbytes(cache)
