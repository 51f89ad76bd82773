"""ZipCache: more bits for the tokens that attention goes to.

He et al., 2024, https://arxiv.org/abs/2405.14256.

  saliency   attention received / queries that could see it (saliency.py)
  split      the salient share of each block gets bits, the rest low_bits
  keys       per channel, over the tokens of a class in a block
  values     V / c per token, c_j = sqrt(max_t |V_tj|) ("channel-separable"):
             a scale per token and head, and one per channel of a block

Softmax does not care for the order of tokens, so the classes are not scattered
back: each is a dense pool, attended to by itself, and the partial results are
merged. Nothing is expanded: K scales go into q, V's into p and, c, the output.

Streaming: the newest R tokens stay in full precision; a full block is
classified by the queries of the step that completed it (one query in decoding,
probes of the chunk in prefill), encoded once and appended. The reference
encodes everything anew every 100 steps, and drifts.

Saliency follows the queries there are: a context compressed before the question
is known (a shared prefix) is split by the wrong ones.

Bits per element, at b bits on average, R = 128, D = 64: keys b + 0.5, values b
+ 0.5 + 0.1, positions 0.06.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxq.kvcache import (
  interface,
  kernel,
  residual,
  saliency,
  softmax,
  stores,
)

BITS = (2, 4, 8, 16)
SPLITS = ('random', 'saliency')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZipCacheConfig:
  """Attributes.

  bits, low_bits: of salient and of other tokens, keys and values alike.
  salient: the share of a block that is salient.
  residual: R, tokens of a block, at most 256.
  probe_recent, probe_random: shares of a chunk's queries that are probes.
  denominator: of saliency.DENOMINATORS.
  split: 'saliency', or 'random' for comparison.
  separate: whether values are divided by c.
  scale_dtype: as stored; float16 overflows for outliers past 65504.
  seed: of probes and of the random split.
  """

  bits: int = 4
  low_bits: int = 2
  salient: float = 0.6
  residual: int = 128
  probe_recent: float = 0.05
  probe_random: float = 0.05
  denominator: str = 'probe'
  split: str = 'saliency'
  separate: bool = True
  scale_dtype: str = 'bfloat16'
  seed: int = 0

  def __post_init__(self):
    for name, allowed in (
      ('bits', BITS),
      ('low_bits', BITS),
      ('split', SPLITS),
      ('scale_dtype', stores.SCALE_DTYPES),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'zipcache: {name}={getattr(self, name)!r}; allowed '
          f'{sorted(allowed)}.'
        )
    saliency.check_denominator(self.denominator)
    for name in ('salient', 'probe_recent', 'probe_random'):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(
          f'zipcache: {name}={getattr(self, name)}; it is a share, 0..1.'
        )
    if not 2 <= self.residual <= 256:
      raise ValueError(
        f'zipcache: residual={self.residual}; allowed 2..256, as a place in a '
        'block is one byte. Use 128.'
      )

  def counts(self) -> tuple[int, int]:
    """Salient and other tokens of a block."""
    other = int((1 - self.salient) * self.residual + 1e-6)
    return self.residual - other, other

  def init(self, shape: interface.CacheShape) -> 'ZipCache':
    """An empty cache; ValueError where a head cannot be packed."""
    blocks = max(1, shape.capacity // self.residual)
    pools = tuple(
      self._pool(shape, blocks, count, bits) if count else None
      for count, bits in zip(
        self.counts(), (self.bits, self.low_bits), strict=True
      )
    )
    channels = (shape.batch, blocks, shape.kv_heads, shape.head_dim)
    window = (shape.batch, self.residual, shape.kv_heads, shape.head_dim)
    return ZipCache(
      pools=pools,
      channel=jnp.ones(channels, self.scale_dtype) if self.separate else None,
      k_residual=jnp.zeros(window, shape.dtype),
      v_residual=jnp.zeros(window, shape.dtype),
      length=jnp.zeros((shape.batch,), jnp.int32),
      config=self,
      capacity=shape.capacity,
    )

  def _pool(self, shape, blocks, count, bits) -> 'Pool':
    slots = blocks * count

    def store(tokens, channels):
      if bits == 16:
        return stores.float_store(shape, slots)
      grid = stores.Grid(
        bits=bits,
        tokens=tokens,
        channels=channels,
        scale_dtype=self.scale_dtype,
      )
      return stores.int_store(shape, slots, grid)

    return Pool(
      k=store(count, 1),
      v=store(1, -1),
      place=jnp.zeros((shape.batch, slots, shape.kv_heads, 1), jnp.uint8),
      count=count,
    )


@flax.struct.dataclass
class Pool:
  """The tokens of one class, `count` of every block.

  k, v: stores of (B, blocks * count) slots; heads hold different tokens.
  place: (B, slots, Hkv, 1) uint8, where in its block a token stood.
  """

  k: Any
  v: Any
  place: jax.Array
  count: int = flax.struct.field(pytree_node=False)

  def positions(self, slots: jax.Array, length: jax.Array, R: int) -> jax.Array:
    """Positions (B, size, Hkv) of what consecutive slots hold; -1: nothing."""
    places = stores.take(self.place, slots[0], slots.shape[0])[..., 0]
    first = (slots // self.count * R)[None, :, None]
    held = first < (length // R * R)[:, None, None]
    return jnp.where(held, first + places.astype(jnp.int32), -1)


@flax.struct.dataclass
class ZipCache:
  """pools: (salient, other), None where a class is empty.

  channel: c (B, blocks, Hkv, D), or None. k_residual, v_residual: (B, R, Hkv,
  D). length: (B,) int32.
  """

  pools: tuple[Any, ...]
  channel: jax.Array | None
  k_residual: jax.Array
  v_residual: jax.Array
  length: jax.Array
  config: ZipCacheConfig = flax.struct.field(pytree_node=False)
  capacity: int = flax.struct.field(pytree_node=False)

  @property
  def elements(self) -> int:
    """Elements of a token's keys."""
    return self.k_residual.shape[-2] * self.k_residual.shape[-1]

  def attend(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    scoring: interface.Scoring,
  ) -> tuple[jax.Array, interface.Update]:
    """As interface.Cache says; the update has the saliencies."""
    R, Hkv = self.k_residual.shape[1:3]
    interface.check_inputs(self, q, k, Hkv)
    queries = softmax.group(q, Hkv, scoring.scale)
    state = kernel.attend_own(q, k, v, positions, scoring)
    for pool in self.pools:
      if pool is None:
        continue
      part = softmax.attend_store(
        queries,
        positions,
        pool.k,
        self._values(pool),
        functools.partial(pool.positions, length=self.length, R=R),
        jnp.max(self.length // R * pool.count),
        scoring,
        unit=pool.count,
      )
      state = softmax.merge(state, part)
    window = softmax.attend_store(
      queries,
      positions,
      stores.FloatStore(self.k_residual),
      stores.FloatStore(self.v_residual),
      lambda slots: residual.held(slots, self.length, R),
      jnp.max(self.length % R),
      scoring,
      block=R,
    )
    state = softmax.merge(state, window)
    out = softmax.finish(state, q.dtype)
    scores = self._saliency(q, queries, state, k, positions, scoring)
    return out, interface.Update(k=k, v=v, scores=scores)

  def append(
    self, update: interface.Update, length: jax.Array, counts: jax.Array
  ) -> 'ZipCache':
    """As interface.Cache says."""
    R, T = self.k_residual.shape[1], update.k.shape[1]
    scores = update.scores
    if scores is None:
      raise ValueError(
        'zipcache: an update without scores; a block is split by them. Append '
        'what `attend` returned.'
      )
    positions = residual.block_positions(length, T, R)
    complete = positions < ((length + counts) // R * R)[:, None]

    def encode():
      k = residual.contents(self.k_residual, update.k, length)
      v = residual.contents(self.v_residual, update.v, length)
      s = residual.contents(scores[..., :R], scores[..., R:], length, axis=2)
      return self._encode(k, v, s)

    encoded, channel = residual.encode_if(complete, encode)
    blocks = complete[:, ::R]  # (B, n)
    index = positions[:, ::R] // R
    pools = tuple(
      None if pool is None else _put(pool, new, index, blocks)
      for pool, new in zip(self.pools, encoded, strict=True)
    )
    c = self.channel
    if c is not None:
      c = stores.scatter(c, channel, jnp.where(blocks, index, c.shape[1]))
    return dataclasses.replace(
      self,
      pools=pools,
      channel=c,
      k_residual=residual.keep(self.k_residual, update.k, length, counts),
      v_residual=residual.keep(self.v_residual, update.v, length, counts),
      length=length + counts,
    )

  def _values(self, pool: Pool) -> Any:
    if self.channel is None or not isinstance(pool.v, stores.IntStore):
      return pool.v
    return SeparateStore(pool.v, self.channel, pool.count)

  def _saliency(self, q, queries, state, k, positions, scoring) -> jax.Array:
    """Of the residual's slots and the new tokens: (B, Hkv, R + T)."""
    R, T, c = self.k_residual.shape[1], k.shape[1], self.config
    valid = positions >= 0
    counts = jnp.sum(valid, axis=1, dtype=jnp.int32)
    if c.split == 'random':
      return self._random(k, R + T)
    index, chosen = saliency.probe_indices(
      T, counts, recent=c.probe_recent, random=c.probe_random, seed=c.seed
    )
    rows = index[:, None, None, :]
    probes = jnp.take_along_axis(queries, rows[..., None], axis=3)
    lse = jnp.take_along_axis(softmax.log_sum_exp(state), rows, axis=3)
    at = jnp.take_along_axis(positions, index, axis=1)  # (B, P)
    slots = jnp.arange(R, dtype=jnp.int32)
    old = residual.held(slots, self.length, R)[..., 0]
    key_positions = jnp.concatenate([old, positions], axis=1)[:, None]
    seen = chosen[:, :, None] & (key_positions >= 0)
    seen &= key_positions <= at[:, :, None]
    if scoring.window is not None:
      seen &= key_positions > at[:, :, None] - scoring.window
    old_keys = self.k_residual
    of_new = kernel.received(
      q, lse, k, positions, scoring, index=index, chosen=chosen
    )
    if of_new is None:
      keys = jnp.concatenate([old_keys, k.astype(old_keys.dtype)], 1)
      sums = saliency.received(probes, lse, keys, seen, scoring)
    else:
      of_old = saliency.received(probes, lse, old_keys, seen[..., :R], scoring)
      sums = jnp.concatenate([of_old, of_new], axis=-1)
    total = self.length + counts
    could = total[:, None] - jnp.maximum(key_positions[:, 0], 0)
    return saliency.normalize(sums, seen, could, c.denominator)

  def _random(self, k, n):
    """Uniform scores, from the seed and the keys: unlike in every layer."""
    noise = jnp.sum(k.astype(jnp.float32))
    key = jax.random.fold_in(
      jax.random.key(self.config.seed),
      jax.lax.bitcast_convert_type(noise, jnp.uint32),
    )
    return jax.random.uniform(key, (k.shape[0], k.shape[2], n))

  def _encode(self, k, v, scores):
    """Whole blocks (B, n R, Hkv, D), scores (B, Hkv, n R) -> for `_put`."""
    R, (B, _, Hkv, D) = self.k_residual.shape[1], k.shape
    n = k.shape[1] // R
    k, v = (x.reshape(B, n, R, Hkv, D) for x in (k, v))
    channel = None
    if self.channel is not None:
      most = jnp.max(jnp.abs(v.astype(jnp.float32)), axis=2)
      channel = jnp.sqrt(jnp.where(most > 0, most, 1.0))  # (B, n, Hkv, D)
      channel = channel.astype(self.channel.dtype)
    scores = scores.reshape(B, Hkv, n, R).transpose(0, 2, 1, 3)
    classes = saliency.split_salient(scores, self.config.counts()[0])
    made: list[Any] = []
    for pool, places in zip(self.pools, classes, strict=True):
      if pool is None:
        made.append(None)
        continue
      places = places.transpose(0, 1, 3, 2)[..., None]  # (B, n, count, Hkv, 1)
      one_k = jnp.take_along_axis(k, places, axis=2)
      one_v = jnp.take_along_axis(v, places, axis=2).astype(jnp.float32)
      if channel is not None and isinstance(pool.v, stores.IntStore):
        one_v = one_v / channel.astype(jnp.float32)[:, :, None]
      flat = (B, n * pool.count, Hkv)
      made.append(
        (
          pool.k.encode(one_k.reshape(*flat, D)),
          pool.v.encode(one_v.reshape(*flat, D)),
          places.reshape(*flat, 1).astype(jnp.uint8),
        )
      )
    return tuple(made), channel


@flax.struct.dataclass
class SeparateStore:
  """Values V / c: the channel scales of a block go on its output.

  store: IntStore with a scale per token. channel: (B, blocks, Hkv, D). count:
  slots of a block.
  """

  store: stores.IntStore
  channel: jax.Array
  count: int = flax.struct.field(pytree_node=False)

  @property
  def slots(self) -> int:
    """Of the store."""
    return self.store.slots

  def values(self, first: Any, size: int) -> jax.Array:
    """(B, size, Hkv, D) float32."""
    c = jnp.repeat(self._channels(first, size), self.count, axis=1)
    return self.store.values(first, size) * c

  def combine(self, p: jax.Array, first: Any, size: int) -> jax.Array:
    """p (B, Hkv, G, T, size) -> (B, Hkv, G, T, D)."""
    blocks = size // self.count
    out = jnp.float32(0)
    channels = self._channels(first, size)
    for i in range(blocks):
      part = p[..., i * self.count : (i + 1) * self.count]
      start = first + i * self.count
      c = channels[:, i][:, :, None, None]  # (B, Hkv, 1, 1, D)
      out = out + self.store.combine(part, start, self.count) * c
    return out

  def _channels(self, first, size):
    c = stores.take(self.channel, first // self.count, size // self.count)
    return c.astype(jnp.float32)


def _put(
  pool: Pool, encoded: Any, index: jax.Array, complete: jax.Array
) -> Pool:
  """Writes blocks of a class to their places; index, complete (B, n)."""
  k, v, places = encoded
  within = jnp.arange(pool.count, dtype=jnp.int32)[None, None]
  slots = jnp.where(
    complete[..., None],
    index[..., None] * pool.count + within,
    pool.place.shape[1],
  ).reshape(index.shape[0], -1)
  return dataclasses.replace(
    pool,
    k=pool.k.put(k, slots),
    v=pool.v.put(v, slots),
    place=stores.scatter(pool.place, places, slots),
  )
