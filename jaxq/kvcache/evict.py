"""Eviction: a cache of fewer slots than tokens, for the tokens worth keeping.

  --kv_cache=evict:policy=snapkv,ratio=0.5
  --kv_cache=evict:policy=knorm,ratio=0.25,inner=int4

A row has `budget` slots per key head, whatever it has read. Each step attends
to what is held and, in full precision, to the new tokens; then every head keeps
the highest ranked of both (jaxq.kvcache.scores), new tokens overwrite those
that lose (jaxq.kvcache.slots.places), and nothing else moves: the memory really
is that small, while decoding too, and no kept token is quantized again. A
prompt that is read in one piece is thus compressed once, behind an exact
prefill, as its authors do; one read in chunks is compressed on its way.

Ranks are scores, with two exceptions: the first `sinks` tokens and the newest
`recent` ones are never evicted.

  fixed     random, streaming, knorm    known when the token comes
  summed    h2o                         grows with every query
  window    snapkv, expected            from the last `window` queries, which
                                        are kept; anew with every chunk and,
                                        while decoding, every `interval` tokens

`head_budgets` gives a layer's budget to its heads together (AdaKV, Feng et al.,
2024, https://arxiv.org/abs/2407.11550): one pool of Hkv * budget slots, of
which every head is sure of a `safeguard` share of its even part. Keys and
queries keep the positions they had; streaming with `reposition` numbers what is
held without gaps, as StreamingLLM does, so that a text may grow past the
positions the model knows.

A token and head costs its key and value, a position and a score (8 bytes).
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxq.kvcache import (
  head_budgets,
  interface,
  kernel,
  reposition,
  scores,
  slots,
  softmax,
  stores,
)
from jaxq.nn import rope as rope_lib

FIXED = ('knorm', 'random', 'streaming')
WINDOW = ('expected', 'snapkv')
POLICIES = (*FIXED, 'h2o', *WINDOW)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvictConfig:
  """Attributes.

  policy: of POLICIES.
  ratio: slots per head over the tokens the cache is made for.
  budget: slots per head; None: by the ratio.
  inner: what tokens are kept in, of slots.INNER.
  sinks, recent: first and newest tokens that are never evicted. recent=None:
    half of the budget for h2o, none for streaming, `window` for the others.
  window: queries that snapkv and expected look at.
  interval: decoding steps between two looks, at most `recent`.
  kernel: neighbours that snapkv averages; odd.
  future: positions that expected averages over.
  head_budgets: heads share their budget (AdaKV). safeguard: see there.
  reposition: streaming only; see the module docstring.
  seed: of random.
  """

  policy: str = 'snapkv'
  ratio: float = 0.5
  budget: int | None = None
  inner: str = 'contiguous'
  sinks: int = 4
  recent: int | None = None
  window: int = 32
  interval: int = 16
  kernel: int = 5
  future: int = 512
  head_budgets: bool = False
  safeguard: float = 0.2
  reposition: bool = False
  seed: int = 0

  def __post_init__(self):
    if self.policy not in POLICIES:
      raise ValueError(
        f'evict: policy={self.policy!r}; allowed {sorted(POLICIES)}.'
      )
    slots.check_inner('evict', self.inner)
    if not 0 < self.ratio <= 1:
      raise ValueError(
        f'evict: ratio={self.ratio}; it is the share of tokens that are kept, '
        'more than 0 and at most 1.'
      )
    if not 0 <= self.safeguard <= 1:
      raise ValueError(
        f'evict: safeguard={self.safeguard}; it is a share, 0..1.'
      )
    for name, least in (
      ('budget', 1),
      ('sinks', 0),
      ('recent', 0),
      ('window', 1),
      ('interval', 1),
      ('kernel', 1),
      ('future', 1),
    ):
      value = getattr(self, name)
      if value is not None and value < least:
        raise ValueError(f'evict: {name}={value}; it must be at least {least}.')
    if self.kernel % 2 == 0:
      raise ValueError(
        f'evict: kernel={self.kernel}; it must be odd, so that a token lies in '
        f'the middle of its neighbours. Use {self.kernel + 1}.'
      )
    if self.policy in WINDOW and self.interval > self.protected(0)[1]:
      raise ValueError(
        f'evict: interval={self.interval}, recent={self.protected(0)[1]}; a '
        'token must be scored before it may go. Use an interval of at most '
        '`recent`.'
      )
    if self.reposition and self.policy != 'streaming':
      raise ValueError(
        f'evict: reposition with policy={self.policy!r}; only streaming keeps '
        'tokens in two runs that can be numbered anew. Use policy=streaming.'
      )
    if self.reposition and self.head_budgets:
      raise ValueError(
        'evict: reposition with head_budgets; sinks must be the first slots '
        'of each head. Use one of them.'
      )

  def protected(self, budget: int) -> tuple[int, int]:
    """First and newest tokens that are never evicted."""
    if self.recent is not None:
      return self.sinks, self.recent
    newest = {'h2o': budget // 2, 'streaming': 0}
    return self.sinks, newest.get(self.policy, self.window)

  def budget_of(self, capacity: int) -> int:
    """Slots per head for so many tokens.

    Raises:
      ValueError: more than the tokens, or no more than are protected.
    """
    budget = self.budget or int(self.ratio * capacity)
    if budget > capacity:
      raise ValueError(
        f'evict: budget={budget} for a cache of {capacity} tokens; it must not '
        'be more. Use a smaller budget, or a contiguous cache.'
      )
    sinks, recent = self.protected(budget)
    if budget < capacity and sinks + recent >= budget:
      raise ValueError(
        f'evict: budget={budget}, sinks={sinks}, recent={recent}; the budget '
        'must be more than both, or there is nothing to choose. Raise budget '
        'or ratio, or lower recent or window.'
      )
    return budget

  def init(self, shape: interface.CacheShape) -> 'EvictCache':
    """An empty cache.

    Raises:
      ValueError: a budget that does not fit, no query heads in the shape where
        queries are kept, no rotary positions where they are needed.
    """
    budget = self.budget_of(shape.capacity)
    if self.reposition:
      reposition.check('evict', shape.rope)
    heads, per_head = shape.kv_heads, budget
    if self.head_budgets:
      heads, per_head = 1, budget * shape.kv_heads
    inner = dataclasses.replace(shape, kv_heads=heads)
    k, v = slots.make(self.inner, inner, per_head)
    size = (shape.batch, per_head, heads, 1)
    queries = None
    if self.policy in WINDOW:
      if shape.heads is None:
        raise ValueError(
          f'evict: policy={self.policy!r} keeps queries; CacheShape.heads must '
          "say how many heads they have. Give the model's."
        )
      window = (shape.batch, self.window, shape.heads, shape.head_dim)
      queries = jnp.zeros(window, shape.dtype)
    return EvictCache(
      k=k,
      v=v,
      positions=jnp.full(size, -1, jnp.int32),
      score=jnp.zeros(size, jnp.float32),
      head=jnp.zeros(size, jnp.uint8) if self.head_budgets else None,
      queries=queries,
      layer=jnp.zeros((), jnp.int32),
      length=jnp.zeros((shape.batch,), jnp.int32),
      config=self,
      capacity=shape.capacity,
      kv_heads=shape.kv_heads,
      head_dim=shape.head_dim,
      rope=shape.rope,
    )


@flax.struct.dataclass
class EvictCache:
  """S slots of each of the key heads, or of all of them together.

  k, v: stores. positions: (B, S, Hkv, 1) int32, -1: empty. score: (B, S, Hkv,
  1) float32. head: (B, S, 1, 1) uint8, whose a slot is, where heads share them
  (Hkv above is 1 then); else None. queries: (B, W, H, D), the last, or None.
  layer: (). length: (B,) int32, tokens read.
  """

  k: Any
  v: Any
  positions: jax.Array
  score: jax.Array
  head: jax.Array | None
  queries: jax.Array | None
  layer: jax.Array
  length: jax.Array
  config: EvictConfig = flax.struct.field(pytree_node=False)
  capacity: int = flax.struct.field(pytree_node=False)
  kv_heads: int = flax.struct.field(pytree_node=False)
  head_dim: int = flax.struct.field(pytree_node=False)
  rope: rope_lib.Rope | None = flax.struct.field(pytree_node=False)

  @property
  def elements(self) -> int:
    """Elements of a token's keys."""
    return self.kv_heads * self.head_dim

  @property
  def budget(self) -> int:
    """Slots per head, on average."""
    return self.k.slots // (self.kv_heads if self.config.head_budgets else 1)

  def of_layers(self, layers: range) -> 'EvictCache':
    """A stacked cache that knows which layers it is of."""
    return dataclasses.replace(self, layer=jnp.asarray(layers, jnp.int32))

  def attend(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    scoring: interface.Scoring,
  ) -> tuple[jax.Array, interface.Update]:
    """As interface.Cache says; the update has the scores, held ones first."""
    interface.check_inputs(self, q, k, self.kv_heads)
    queries = softmax.group(q, self.kv_heads, scoring.scale)
    state = kernel.attend_own(q, k, v, positions, scoring)
    for part in self._held(q, queries, positions, scoring):
      state = softmax.merge(state, part)
    out = softmax.finish(state, q.dtype)
    window = self._window(q, positions)
    tokens = self._candidates(k, v, positions)
    gained = None
    if self.config.policy == 'h2o':
      gained = self._received(q, queries, state, k, positions, scoring)
    ranks = self._scores(k, positions, tokens, window, gained, scoring)
    return out, interface.Update(
      k=k, v=v, scores=ranks, state=None if window is None else window.q
    )

  def append(
    self, update: interface.Update, length: jax.Array, counts: jax.Array
  ) -> 'EvictCache':
    """As interface.Cache says; keeps the highest ranked."""
    if update.scores is None:
      raise ValueError(
        'evict: an update without scores; tokens are kept by them. Append what '
        '`attend` returned.'
      )
    T, S = update.k.shape[1], self.k.slots
    offsets = jnp.arange(T, dtype=jnp.int32)[None]
    new = jnp.where(offsets < counts[:, None], length[:, None] + offsets, -1)
    new = jnp.broadcast_to(new[..., None], (*new.shape, self.kv_heads))
    held = self._flat(jnp.concatenate([self._held_positions(), new], axis=1))
    rank = self._rank(update.scores, held, length + counts)
    where = slots.places(rank, S)
    k, v = self._shared(update.k), self._shared(update.v)
    heads = self.head
    if heads is not None:
      whose = jnp.arange(self.kv_heads, dtype=jnp.uint8)
      whose = jnp.broadcast_to(jnp.tile(whose, T), (k.shape[0], k.shape[1]))
      heads = stores.scatter(heads, whose[..., None, None], where)
    fresh = update.scores.transpose(0, 2, 1)[..., None]  # (B, S + T, Hkv, 1)
    at = held.transpose(0, 2, 1)[:, S:, :, None]
    return dataclasses.replace(
      self,
      k=self.k.put(self.k.encode(k), where),
      v=self.v.put(self.v.encode(v), where),
      positions=stores.scatter(self.positions, at, where),
      score=stores.scatter(fresh[:, :S], fresh[:, S:], where),
      head=heads,
      queries=self.queries if update.state is None else update.state,
      length=length + counts,
    )

  def _held_positions(self) -> jax.Array:
    """(B, S, Hkv): what a slot holds for a head, -1: nothing."""
    held = self.positions[..., 0]
    if self.head is None:
      return held
    heads = jnp.arange(self.kv_heads, dtype=jnp.uint8)[None, None]
    own = self.head[..., 0] == heads  # (B, S, Hkv)
    return jnp.where(own, held, -1)

  def _held(self, q, queries, positions, scoring) -> list[softmax.Partial]:
    """Attention to what is held, in one part, or apart from the sinks."""
    k, v = self._stores()
    held = self._held_positions()
    most = self.length if self.head is None else self.length * self.kv_heads
    used = jnp.minimum(jnp.max(most), self.k.slots)  # They fill up in order.

    def attend(queries, held, used):
      return softmax.attend_store(
        queries,
        positions,
        k,
        v,
        lambda at: jax.lax.dynamic_slice_in_dim(held, at[0], at.shape[0], 1),
        used,
        scoring,
      )

    if not self.config.reposition:
      return [attend(queries, held, used)]
    assert self.rope is not None  # init checked it.
    sinks = self.config.sinks
    first = (held >= 0) & (held < sinks)
    dropped = jnp.maximum(self.length - self.k.slots, 0)
    back = jnp.broadcast_to(-dropped[:, None], positions.shape)
    near = softmax.group(
      reposition.turn(q, back, self.rope), self.kv_heads, scoring.scale
    )
    return [
      attend(queries, jnp.where(first, -1, held), used),
      attend(near, jnp.where(first, held, -1), jnp.minimum(used, sinks)),
    ]

  def _stores(self) -> tuple[Any, Any]:
    if self.head is None:
      return self.k, self.v
    return head_budgets.Together(self.k, self.kv_heads), head_budgets.Together(
      self.v, self.kv_heads
    )

  def _shared(self, x: jax.Array) -> jax.Array:
    """(B, T, Hkv, D), one head of T * Hkv tokens where heads share slots."""
    if self.head is None:
      return x
    return x.reshape(x.shape[0], -1, 1, x.shape[-1])

  def _flat(self, x: jax.Array) -> jax.Array:
    """(B, S + T, Hkv) -> (B, Hkv or 1, S + T or S + T * Hkv), as in slots.

    Of a shared slot only the head it belongs to says something: the largest.
    """
    S = self.k.slots
    if self.head is None:
      return x.transpose(0, 2, 1)
    held, new = jnp.max(x[:, :S], axis=-1), x[:, S:]
    return jnp.concatenate([held, new.reshape(new.shape[0], -1)], 1)[:, None]

  def _candidates(self, k, v, positions) -> Any:
    """A function: all that may be kept, (B, S + T, Hkv, ...)."""
    new = jnp.broadcast_to(positions[..., None], (*k.shape[:3],))
    held = jnp.concatenate([self._held_positions(), new], axis=1)
    of_k, of_v = self._stores()
    S = self.k.slots

    def make():
      return scores.Candidates(
        k=jnp.concatenate([of_k.values(0, S), k.astype(jnp.float32)], 1),
        v=jnp.concatenate([of_v.values(0, S), v.astype(jnp.float32)], 1),
        positions=held,
      )

    return make

  def _window(self, q, positions) -> scores.Window | None:
    """The last W queries, old and new."""
    if self.queries is None:
      return None
    counts = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    W = self.queries.shape[1]
    both = jnp.concatenate([self.queries, q.astype(self.queries.dtype)], 1)
    index = counts[:, None] + jnp.arange(W)[None]
    last = jnp.take_along_axis(both, index[..., None, None], axis=1)
    at = (self.length + counts)[:, None] - W + jnp.arange(W)[None]
    return scores.Window(q=last, positions=at)

  def _received(self, q, queries, state, k, positions, scoring) -> jax.Array:
    """Attention that this step's queries pay: (B, Hkv, S + T)."""
    lse = softmax.log_sum_exp(state)
    of_k, held = self._stores()[0], self._held_positions()
    new = jnp.broadcast_to(positions[..., None], k.shape[:3])

    def old():
      return scores.received(queries, lse, positions, of_k, held, scoring)

    def none():
      return jnp.zeros((k.shape[0], self.kv_heads, of_k.slots), jnp.float32)

    own = kernel.received(q, lse, k, positions, scoring)
    if own is None:
      own = scores.received(
        queries, lse, positions, stores.FloatStore(k), new, scoring
      )
    else:
      own = own / queries.shape[2]
    held_part = jax.lax.cond(jnp.any(self.length > 0), old, none)
    return jnp.concatenate([held_part, own], axis=-1)

  def _scores(self, k, positions, tokens, window, gained, scoring) -> jax.Array:
    """(B, Hkv, S + T), or (B, 1, S + T Hkv): of old and new tokens."""
    c, Hkv, (B, T) = self.config, self.kv_heads, positions.shape
    old = self.score[..., 0].transpose(0, 2, 1)

    def with_new(new):  # (B, Hkv, T) -> behind the old ones.
      if self.head is not None:
        new = new.transpose(0, 2, 1).reshape(B, 1, -1)
      return jnp.concatenate([old, new], axis=-1)

    if c.policy == 'random':
      return with_new(scores.random(positions, Hkv, c.seed, self.layer))
    if c.policy == 'streaming':
      return with_new(scores.streaming(positions, Hkv))
    if c.policy == 'knorm':
      return with_new(scores.knorm(k))
    before = with_new(jnp.zeros((B, Hkv, T), jnp.float32))
    if c.policy == 'h2o':
      return before + self._flat(gained.transpose(0, 2, 1))
    total = self.length + jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    due = total > self.budget
    if T == 1:
      due &= (self.length % c.interval == 0) | (self.length == self.budget)

    def look():
      both = tokens()
      if c.policy == 'snapkv':
        made = scores.snapkv(window, both, scoring, c.kernel)
      else:
        made = scores.expected(
          window,
          both,
          scoring,
          rope=self.rope,
          length=total,
          future=c.future,
          sinks=c.sinks,
        )
      made = self._flat(made.transpose(0, 2, 1))
      return jnp.where(due[:, None, None], made, before)

    return jax.lax.cond(jnp.any(due), look, lambda: before)

  def _rank(self, ranks, positions, total) -> jax.Array:
    """Scores with what is empty last and what is protected first."""
    sinks, recent = self.config.protected(self.budget)
    safe = positions < sinks
    safe |= positions >= (total - recent)[:, None, None]
    rank = jnp.where(safe, jnp.inf, ranks)
    rank = jnp.where(positions >= 0, rank, -jnp.inf)
    if self.head is None:
      return rank
    T = (rank.shape[-1] - self.k.slots) // self.kv_heads
    whose = jnp.tile(jnp.arange(self.kv_heads, dtype=jnp.uint8), T)
    whose = jnp.broadcast_to(whose, (rank.shape[0], T * self.kv_heads))
    head = jnp.concatenate([self.head[:, :, 0, 0], whose], axis=1)
    sure = int(self.budget * self.config.safeguard)
    return head_budgets.safeguarded(rank[:, 0], head, self.kv_heads, sure)[
      :, None
    ]
