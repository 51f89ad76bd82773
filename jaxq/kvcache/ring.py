"""A ring of the last W tokens, for attention with a sliding window.

The token at position t lies in slot t mod W, so slot s holds the greatest
position below the length that is s mod W: positions need no array. Keys are
stored after RoPE with their absolute positions. Equal to a contiguous cache
under the same window, in W slots whatever the length; it never overflows.

A layer without a window (Gemma alternates) keeps everything, contiguously,
unless a window is asked for: `ring:window=512` shows every layer the last 512.
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
  softmax,
  stores,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingConfig:
  """window: tokens kept and seen; None: the window of the layer."""

  window: int | None = None

  def __post_init__(self):
    if self.window is not None and self.window < 1:
      raise ValueError(
        f'ring: window={self.window}; it must be at least 1. Leave it out for '
        "the layer's own."
      )

  def init(
    self, shape: interface.CacheShape
  ) -> 'RingCache | contiguous.ContiguousCache':
    """An empty cache; contiguous where there is no window.

    Raises:
      ValueError: a window longer than the capacity.
    """
    if self.window is not None and self.window > shape.capacity:
      raise ValueError(
        f'ring: window={self.window} and a capacity of {shape.capacity} '
        'tokens; the window must not be longer. Use a contiguous cache, or a '
        'shorter window.'
      )
    windows = [w for w in (self.window, shape.window) if w is not None]
    if not windows:
      return contiguous.ContiguousConfig().init(shape)
    W = min(*windows, shape.capacity)
    size = (shape.batch, W, shape.kv_heads, shape.head_dim)
    return RingCache(
      k=jnp.zeros(size, shape.dtype),
      v=jnp.zeros(size, shape.dtype),
      length=jnp.zeros((shape.batch,), jnp.int32),
      tokens=shape.capacity,
    )


@flax.struct.dataclass
class RingCache:
  """k, v (B, W, Hkv, D). length (B,): tokens seen. tokens: asked for."""

  k: Any  # An array; a layer of a stack in a scan.
  v: Any
  length: jax.Array
  tokens: int = flax.struct.field(pytree_node=False)

  @property
  def window(self) -> int:
    """W."""
    return int(self.k.shape[-3])

  @property
  def capacity(self) -> int:
    """No limit: positions are int32."""
    return jnp.iinfo(jnp.int32).max

  @property
  def elements(self) -> int:
    """Elements of a token's keys."""
    return int(self.k.shape[-2] * self.k.shape[-1])

  def positions(self, slots: jax.Array) -> jax.Array:
    """(size,) -> (B, size, 1): what the slots hold; negative: nothing."""
    last = self.length[:, None, None] - 1
    return last - (last - slots[None, :, None]) % self.window

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
    """As interface.Cache says, under the shorter of both windows."""
    interface.check_inputs(self, q, k, self.k.shape[-2])
    window = min(self.window, scoring.window or self.window)
    scoring = dataclasses.replace(scoring, window=window)
    queries = softmax.group(q, self.k.shape[-2], scoring.scale)
    of_k, of_v = stores.FloatStore(self.k), stores.FloatStore(self.v)
    plain = lambda: softmax.attend_store(
      queries,
      positions,
      of_k,
      of_v,
      self.positions,
      jnp.minimum(jnp.max(self.length), self.window),
      scoring,
    )
    cached = kernel.attend(
      q, positions, of_k, of_v, self.length, scoring, plain, ring=True
    )
    own = kernel.attend_own(q, k, v, positions, scoring)
    out = softmax.finish(softmax.merge(cached, own), q.dtype)
    return out, interface.Update(k=k, v=v)

  def append(
    self, update: interface.Update, length: jax.Array, counts: jax.Array
  ) -> 'RingCache':
    """As interface.Cache says; the newest W of all tokens stay."""
    offsets = jnp.arange(update.k.shape[1], dtype=jnp.int32)[None]
    counts_b1 = counts[:, None]
    kept = (offsets < counts_b1) & (offsets >= counts_b1 - self.window)
    slots = (length[:, None] + offsets) % self.window
    slots = jnp.where(kept, slots, self.window)
    return dataclasses.replace(
      self,
      k=stores.scatter(self.k, update.k, slots),
      v=stores.scatter(self.v, update.v, slots),
      length=length + counts,
    )
