"""One token at a time: caches that compress a token when it comes.

  int8, int4, int2   a scale per token and head, of keys and of values
  fp8                one fixed scale for all, e4m3 or e5m2
  turboquant         keys on a sphere (jaxq.kvcache.turboquant)

No residual window: a token is stored in its final form by the step that brings
it, so that decoding and a prefill of the same tokens leave the same bytes. The
step's own tokens are seen in full precision, once.

Per token an outlier channel sets the step of the whole head, which keys have
(KIVI, arXiv 2402.02750): at 4 bits and below see jaxq.kvcache.kivi. int8 is
symmetric, 8 + 16 / D bits; fewer bits have an offset, b + 32 / D.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxq.kvcache import (
  contiguous,
  interface,
  kernel,
  layers,
  rotation,
  softmax,
  stores,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerTokenConfig:
  """bits: 1..8, of keys. value_bits: None: the same. scale_dtype: as stored.

  group_size: channels that share a scale; -1: all of a head.
  """

  bits: int = 8
  value_bits: int | None = None
  group_size: int = -1
  scale_dtype: str = 'float16'

  def __post_init__(self):
    if self.group_size < 1 and self.group_size != -1:
      raise ValueError(
        f'kvcache: group_size={self.group_size}; allowed -1 (a head) or more '
        'than 0.'
      )
    self.grid(self.bits)
    if self.value_bits is not None:
      self.grid(self.value_bits)

  def grid(self, bits: int) -> stores.Grid:
    """Symmetric at 8 bits."""
    return stores.Grid(
      bits=bits,
      channels=self.group_size,
      mode='symmetric' if bits == 8 else 'minimum',
      scale_dtype=self.scale_dtype,
    )

  def init(self, shape: interface.CacheShape) -> 'TokenCache':
    """An empty cache; ValueError where a head cannot be packed."""
    grids = self.grid(self.bits), self.grid(self.value_bits or self.bits)
    k, v = (stores.int_store(shape, shape.capacity, grid) for grid in grids)
    return token_cache(shape, k, v)


@flax.struct.dataclass
class TokenCache:
  """k, v: stores of (B, S) slots; slot t holds position t. length (B,).

  key_rotation: of queries and keys, before they are stored; None: none.
  """

  k: Any
  v: Any
  length: jax.Array
  elements: int = flax.struct.field(pytree_node=False)
  kv_heads: int = flax.struct.field(pytree_node=False)
  key_rotation: rotation.Rotation | None = flax.struct.field(pytree_node=False)

  @property
  def capacity(self) -> int:
    """S."""
    return self.k.slots

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
    interface.check_inputs(self, q, k, self.kv_heads)
    q, k = (
      rotation.turn(self.key_rotation, q),
      rotation.turn(self.key_rotation, k),
    )
    queries = softmax.group(q, self.kv_heads, scoring.scale)
    plain = lambda: softmax.attend_store(
      queries,
      positions,
      self.k,
      self.v,
      lambda slots: contiguous.held(slots, self.length),
      jnp.max(self.length),
      scoring,
    )
    cached = kernel.attend(
      q, positions, self.k, self.v, self.length, scoring, plain
    )
    own = kernel.attend_own(q, k, v, positions, scoring)
    out = softmax.finish(softmax.merge(cached, own), q.dtype)
    return out, interface.Update(k=k, v=v)

  def append(
    self, update: interface.Update, length: jax.Array, counts: jax.Array
  ) -> 'TokenCache':
    """As interface.Cache says."""
    slots = contiguous.new_slots(
      length, counts, update.k.shape[1], self.capacity
    )
    return dataclasses.replace(
      self,
      k=self.k.put(self.k.encode(update.k), slots),
      v=self.v.put(self.v.encode(update.v), slots),
      length=length + counts,
    )


def token_cache(
  shape: interface.CacheShape,
  k: Any,
  v: Any,
  turned: rotation.Rotation | None = None,
) -> TokenCache:
  """An empty cache of two empty stores."""
  return TokenCache(
    k=k,
    v=v,
    length=jnp.zeros((shape.batch,), jnp.int32),
    elements=shape.kv_heads * shape.head_dim,
    kv_heads=shape.kv_heads,
    key_rotation=turned,
  )
