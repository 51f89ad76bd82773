"""Don't Waste Bits: a small network gives every token its bits.

Haeri et al., 2026, https://arxiv.org/abs/2604.04722; the network and its
features are jaxq.kvcache.bit_controller.

  a step     attend to four pools, 2, 4, 8 and 16 bits, and to the new tokens
  append     the new keys and values are put aside as they are
  decide     behind the head, whose logits the features need: a class for every
             new token, the same in all layers; it is encoded once, into a pool

Softmax does not care for the order of tokens, so pools are attended to one
after the other and the parts are merged. A pool holds its share of the tokens;
a token whose class is full goes to the next higher one with room, or, if there
is none, to the next lower: `moved` counts both.

policy='budget' cuts the expected bits where the shares lie among the tokens the
controller was trained on, so that pools fill up evenly; 'argmax' takes the most
likely class. controller='random' draws classes by the same shares, 'position'
gives bits to the newest of every 128 tokens in turn: the controls.

`decide` is called by what runs a model (experiments.adapters); a cache whose
last tokens were not decided about refuses to go on.
"""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxq.kvcache import bit_controller, interface, kernel, softmax, stores

CLASSES = bit_controller.CLASSES
POLICIES = ('argmax', 'budget')


@dataclasses.dataclass(frozen=True, kw_only=True)
class DontWasteBitsConfig:
  """Attributes.

  controller: file of a trained one; 'shipped', of SmolLM2-135M; 'random' or
    'position', the controls.
  policy: of POLICIES.
  shares: of the classes, with slashes; they sum to 1.
  variance: whether the last layer's attention is looked at, for which every
    step takes its scores twice.
  group_size: channels that share a scale; -1: all of a head.
  seed: of 'random'.
  """

  controller: str = 'shipped'
  policy: str = 'budget'
  shares: str = '0.35/0.35/0.2/0.1'
  variance: bool = True
  group_size: int = -1
  seed: int = 0

  def __post_init__(self):
    if self.policy not in POLICIES:
      raise ValueError(
        f'dont_waste_bits: policy={self.policy!r}; allowed {sorted(POLICIES)}.'
      )
    if self.policy == 'argmax' and self.controller in ('random', 'position'):
      raise ValueError(
        f"dont_waste_bits: policy='argmax' with controller="
        f'{self.controller!r}, which has no classes to choose. Use '
        'policy=budget.'
      )
    self.parts()

  def parts(self) -> tuple[float, ...]:
    """The shares as numbers.

    Raises:
      ValueError: not one for each class, or they do not sum to 1.
    """
    try:
      parts = tuple(float(text) for text in self.shares.split('/'))
    except ValueError:
      parts = ()
    good = len(parts) == len(CLASSES) and min(parts) >= 0
    if not good or abs(sum(parts) - 1) > 1e-6:
      raise ValueError(
        f'dont_waste_bits: shares={self.shares}; one for each of {CLASSES} '
        'bits is needed, summing to 1, as in 0.35/0.35/0.2/0.1.'
      )
    return parts

  def trained(self) -> bit_controller.Trained | None:
    """The controller; None for a control."""
    if self.controller in ('random', 'position'):
      return None
    path = self.controller
    if path == 'shipped':
      path = str(bit_controller.SHIPPED)
    return bit_controller.load(path)

  def init(self, shape: interface.CacheShape) -> 'DontWasteBitsCache':
    """An empty cache; ValueError where a head cannot be packed."""
    self.trained()
    sizes = pool_sizes(self.parts(), shape.capacity)
    pools = tuple(
      self._pool(shape, bits, size) if size else None
      for bits, size in zip(CLASSES, sizes, strict=True)
    )
    B = shape.batch
    return DontWasteBitsCache(
      pools=pools,
      used=jnp.zeros((B, len(CLASSES)), jnp.int32),
      moved=jnp.zeros((B, 2), jnp.int32),
      tokens=jnp.zeros((B, shape.capacity), jnp.int32),
      distinct=jnp.zeros((B,), jnp.int32),
      length=jnp.zeros((B,), jnp.int32),
      aside=None,
      config=self,
      capacity=shape.capacity,
      kv_heads=shape.kv_heads,
      head_dim=shape.head_dim,
    )

  def _pool(self, shape, bits, size) -> 'Pool':
    def store():
      if bits == 16:
        return stores.float_store(shape, size)
      grid = stores.Grid(
        bits=bits, channels=self.group_size, scale_dtype='bfloat16'
      )
      return stores.int_store(shape, size, grid)

    return Pool(
      k=store(),
      v=store(),
      positions=jnp.full((shape.batch, size, 1, 1), -1, jnp.int32),
    )


@flax.struct.dataclass
class Pool:
  """k, v: stores of one class. positions: (B, slots, 1, 1), -1: empty."""

  k: Any
  v: Any
  positions: jax.Array

  def held(self, slots: jax.Array) -> jax.Array:
    """Positions (B, size, 1) of what consecutive slots hold; -1: nothing."""
    return stores.take(self.positions, slots[0], slots.shape[0])[..., 0]


@flax.struct.dataclass
class Aside:
  """New tokens that are not decided about: k, v (B, T, Hkv, D).

  variance: (B, T) of their attention rows. counts, before: (B,), how many of
  the T there are, and how many tokens were there before.
  """

  k: jax.Array
  v: jax.Array
  variance: jax.Array
  counts: jax.Array
  before: jax.Array


@flax.struct.dataclass
class DontWasteBitsCache:
  """pools: of the classes, None where a class has no share.

  used: (B, 4) tokens in them. moved: (B, 2), that went higher and lower for
  want of room. tokens: (B, S) int32, read so far, distinct (B,) of them: for
  the rarity. length: (B,). aside: see `decide`.
  """

  pools: tuple[Any, ...]
  used: jax.Array
  moved: jax.Array
  tokens: jax.Array
  distinct: jax.Array
  length: jax.Array
  aside: Aside | None
  config: DontWasteBitsConfig = flax.struct.field(pytree_node=False)
  capacity: int = flax.struct.field(pytree_node=False)
  kv_heads: int = flax.struct.field(pytree_node=False)
  head_dim: int = flax.struct.field(pytree_node=False)

  @property
  def elements(self) -> int:
    """Elements of a token's keys."""
    return self.kv_heads * self.head_dim

  def attend(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    scoring: interface.Scoring,
  ) -> tuple[jax.Array, interface.Update]:
    """As interface.Cache says; the update's state is the rows' variance."""
    interface.check_inputs(self, q, k, self.kv_heads)
    if self.aside is not None:
      raise ValueError(
        'dont_waste_bits: the last tokens have no bits yet. Call '
        'dont_waste_bits.decide behind each step, as experiments.adapters does.'
      )
    queries = softmax.group(q, self.kv_heads, scoring.scale)
    state = self._state(q, queries, k, v, positions, scoring)
    out = softmax.finish(state, q.dtype)
    variance = jnp.zeros(positions.shape, jnp.float32)
    if self.config.variance and scoring.softcap is None:
      # sum p^2 = sum exp(2 s) / (sum exp(s))^2.
      twice = self._state(2 * q, 2 * queries, k, v, positions, scoring)
      squares = softmax.log_sum_exp(twice) - 2 * softmax.log_sum_exp(state)
      seen = (positions + 1).astype(jnp.float32)
      variance = jnp.mean(jnp.exp(squares), axis=(1, 2)) * seen - 1.0
    return out, interface.Update(k=k, v=v, state=variance)

  def append(
    self, update: interface.Update, length: jax.Array, counts: jax.Array
  ) -> 'DontWasteBitsCache':
    """As interface.Cache says, but puts the tokens aside for `decide`."""
    variance = update.state
    if variance is None:
      variance = jnp.zeros(update.k.shape[:2], jnp.float32)
    aside = Aside(
      k=update.k, v=update.v, variance=variance, counts=counts, before=length
    )
    return dataclasses.replace(self, aside=aside, length=length + counts)

  def store(
    self, tokens: jax.Array, classes: jax.Array, first: jax.Array
  ) -> 'DontWasteBitsCache':
    """Encodes what is aside.

    Args:
      tokens: (B, T) int32, the new ones.
      classes: (B, T) int32, the wanted classes.
      first: (B, T), of their kind.
    """
    aside = self.aside
    assert aside is not None
    T = tokens.shape[1]
    offsets = jnp.arange(T, dtype=jnp.int32)[None]
    there = offsets < aside.counts[:, None]
    positions = aside.before[:, None] + offsets
    sizes = [0 if p is None else p.k.slots for p in self.pools]
    taken, slots, used, moved = assign(classes, there, self.used, sizes)
    pools: list[Any] = []
    for i, pool in enumerate(self.pools):
      if pool is None:
        pools.append(None)
        continue
      where = jnp.where(there & (taken == i), slots, pool.k.slots)
      pools.append(
        Pool(
          k=pool.k.put(pool.k.encode(aside.k), where),
          v=pool.v.put(pool.v.encode(aside.v), where),
          positions=stores.scatter(
            pool.positions, positions[..., None, None], where
          ),
        )
      )
    at = jnp.where(there, positions, self.capacity)
    return dataclasses.replace(
      self,
      pools=tuple(pools),
      used=used,
      moved=self.moved + moved,
      tokens=stores.scatter(self.tokens, tokens, at),
      distinct=self.distinct + jnp.sum(first & there, axis=1, dtype=jnp.int32),
      aside=None,
    )

  def _state(self, q, queries, k, v, positions, scoring) -> softmax.Partial:
    state = kernel.attend_own(q, k, v, positions, scoring)
    for i, pool in enumerate(self.pools):
      if pool is None:
        continue
      part = softmax.attend_store(
        queries,
        positions,
        pool.k,
        pool.v,
        pool.held,
        jnp.max(self.used[:, i]),
        scoring,
      )
      state = softmax.merge(state, part)
    return state


def decide(
  caches: tuple[Any, ...],
  tokens: jax.Array,
  entropy: jax.Array,
  confidence: jax.Array,
) -> tuple[Any, ...]:
  """Gives the tokens of the last step their bits, in all layers alike.

  Args:
    caches: stacked, layers first, as a model's step leaves them; the last
      layer's attention counts.
    tokens: (B, T) int32, that the step read.
    entropy, confidence: (B, T), of what the model said behind each.
  """
  last = caches[-1]
  config, aside = last.config, last.aside
  assert aside is not None
  one = jax.tree.map(lambda a: a[-1], last)
  before = one.aside.before
  rare, first = bit_controller.rarity(one.tokens, tokens, before, one.distinct)
  features = jnp.stack(
    [entropy, rare, one.aside.variance, confidence], axis=-1
  )  # (B, T, 4)
  classes = choose(config, features, before)
  store = jax.vmap(lambda cache: cache.store(tokens, classes, first))
  return tuple(store(cache) for cache in caches)


def choose(
  config: DontWasteBitsConfig, features: jax.Array, before: jax.Array
) -> jax.Array:
  """Features (B, T, 4) of tokens behind `before` (B,) -> classes (B, T)."""
  positions = before[:, None] + jnp.arange(features.shape[1])[None]
  trained = config.trained()
  if trained is None:
    if config.controller == 'random':
      value = _uniform(positions, config.seed)
    else:
      value = (positions % 128).astype(jnp.float32) / 128
    edges = np.cumsum(config.parts())[:-1]
  else:
    if not config.variance:
      features = features.at[..., 2].set(float(trained.mean[2]))
    logits = trained.logits(features)
    if config.policy == 'argmax':
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    value = bit_controller.expected_bits(logits)
    edges = trained.thresholds(config.parts())
  limits = jnp.asarray(edges, jnp.float32)
  return jnp.sum(
    value[..., None] > limits.reshape(1, 1, -1), axis=-1, dtype=jnp.int32
  )


def assign(
  classes: jax.Array, there: jax.Array, used: jax.Array, sizes: list[int]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Tokens into pools, one after the other.

  Args:
    classes: (B, T) wanted. there: (B, T), false: no token.
    used: (B, 4) slots that are taken. sizes: of the pools.

  Returns:
    Classes and slots (B, T), used (B, 4), and moved (B, 2): how many went to a
    higher class and to a lower one.
  """
  size = jnp.asarray(sizes, jnp.int32)[None]
  index = jnp.arange(len(sizes))[None]

  def step(used, token):
    wanted, real = (a[:, None] for a in token)  # (B, 1)
    room = used < size
    # The wanted class first, then the higher ones, then the lower downwards.
    order = jnp.where(index >= wanted, index - wanted, 2 * len(sizes) - index)
    order = jnp.where(room, order, 4 * len(sizes))
    taken = jnp.argmin(order, axis=1, keepdims=True)
    slot = jnp.take_along_axis(used, taken, axis=1)
    used = used + ((index == taken) & real).astype(jnp.int32)
    moved = jnp.concatenate([taken > wanted, taken < wanted], axis=1) & real
    return used, (taken[:, 0], slot[:, 0], moved)

  used, (taken, slots, moved) = jax.lax.scan(step, used, (classes.T, there.T))
  total = jnp.sum(moved, axis=0, dtype=jnp.int32)
  return taken.T.astype(jnp.int32), slots.T, used, total


def pool_sizes(parts: tuple[float, ...], capacity: int) -> list[int]:
  """Slots of the pools: the shares of the capacity, all of it in sum."""
  sizes = [math.floor(part * capacity + 1e-6) for part in parts]
  top = max(i for i, part in enumerate(parts) if part > 0)
  sizes[top] += capacity - sum(sizes)  # What rounding left, generously.
  return sizes


def _uniform(positions: jax.Array, seed: int) -> jax.Array:
  """(B, T) in 0..1, the same for a position in any batch."""
  key = jax.random.key(seed)
  draw = lambda p: jax.random.uniform(jax.random.fold_in(key, p))
  return jax.vmap(jax.vmap(draw))(positions)
