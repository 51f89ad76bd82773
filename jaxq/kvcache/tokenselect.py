"""TokenSelect: all heads vote for the tokens that are read, numbered anew.

Wu et al., 2024, https://arxiv.org/abs/2411.02886.

  score   S_hj = mean_c(q_ch) k_j        keys without positions, queries at
                                         `local`: all far tokens equally far
  vote    v_j = sum_h softmax_j(S_h)     no head can outvote the others
  list    the first `sinks`, the `budget` best of those between, the last
          `local` tokens with the new ones
  output  exact attention over the list, the token at place m rotated to m

One list serves all heads of a layer, so a token is one contiguous read. Places
never exceed sinks + budget + local: a text may be longer than any the model was
trained on. Keys are stored without positions (jaxq.kvcache.reposition) and
rotated as they are read.

While decoding, a query that resembles the one of the last vote (cosine at least
theta) reuses its list; tokens that left the local window since stay in it, and
after local / 2 tokens a vote is due in any case. `hits` counts the reuses.

More than `chunk` new tokens are read as chunks, one after the other. Rows with
fewer tokens than a list holds see all of them, without a vote.

Departures: query head h votes with its own key head h // (H / Hkv); the
published kernel pairs it with h % Hkv (gqa_map='mod'). Scores are float32. The
reference has its reuse switched off; theta=2 does that.
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
  paged,
  quest,
  reposition,
  slots,
  softmax,
  stores,
)
from jaxq.nn import rope as rope_lib
from pallas_kernels.select_topk import api as topk

GQA_MAPS = ('grouped', 'mod')
INNER = ('contiguous', 'paged')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSelectConfig:
  """Attributes.

  budget: tokens that are voted for.
  sinks, local: first and last tokens that are always read.
  chunk: new tokens that share a vote, at most `local`.
  theta: cosine from which a vote is reused; above 1 never.
  pool: neighbours whose largest vote counts, odd; 0: none.
  score_scale: times the scores of the vote.
  gqa_map: which key head a query head votes with, of GQA_MAPS.
  reposition: whether places are positions; else tokens keep theirs.
  inner: what tokens are kept in, of INNER: rows of their own, or pages of a
    pool (jaxq.kvcache.paged), of which a list's tokens alone are read.
  page_size, pages: of the pool, as paged's.
  """

  budget: int = 2048
  sinks: int = 128
  local: int = 512
  chunk: int = 512
  theta: float = 0.9
  pool: int = 0
  score_scale: float = 1.0
  gqa_map: str = 'grouped'
  reposition: bool = True
  inner: str = 'contiguous'
  page_size: int = 64
  pages: int = 0

  def __post_init__(self):
    if self.inner not in INNER:
      raise ValueError(
        f'tokenselect: inner={self.inner!r}; allowed {sorted(INNER)}. Keys lie '
        'without positions and are rotated as they are read: codes would be '
        'decoded for every list.'
      )
    paged.check('tokenselect', self.page_size, self.pages)
    if self.pages and self.inner != 'paged':
      raise ValueError(
        f'tokenselect: pages={self.pages}, inner={self.inner!r}; there is a '
        "pool with inner='paged' alone. Leave pages out."
      )
    for name, least in (
      ('budget', 1),
      ('sinks', 0),
      ('local', 1),
      ('chunk', 1),
      ('pool', 0),
    ):
      if getattr(self, name) < least:
        raise ValueError(
          f'tokenselect: {name}={getattr(self, name)}; it must be at least '
          f'{least}.'
        )
    if self.local < self.chunk:
      raise ValueError(
        f'tokenselect: local={self.local}, chunk={self.chunk}; the new tokens '
        'are the last of the local ones. Use a chunk of at most `local`.'
      )
    if self.pool and self.pool % 2 == 0:
      raise ValueError(
        f'tokenselect: pool={self.pool}; it must be odd, so that a token lies '
        f'in the middle, or 0 for none. Use {self.pool + 1}.'
      )
    if not -1 <= self.theta <= 2:
      raise ValueError(
        f'tokenselect: theta={self.theta}; a cosine is needed, -1..1, or up to '
        '2 for no reuse.'
      )
    if self.gqa_map not in GQA_MAPS:
      raise ValueError(
        f'tokenselect: gqa_map={self.gqa_map!r}; allowed {sorted(GQA_MAPS)}.'
      )

  def init(self, shape: interface.CacheShape) -> Any:
    """An empty cache; contiguous for a layer that has a window anyway.

    Raises:
      ValueError: a list longer than the capacity, no query heads in the shape,
        or no rotary positions with `reposition`.
    """
    quest.check_budget('tokenselect', self.budget, shape.capacity)
    if shape.heads is None:
      raise ValueError(
        'tokenselect: it keeps a query; CacheShape.heads must say how many '
        "heads it has. Give the model's."
      )
    if self.reposition:
      reposition.check('tokenselect', shape.rope)
    if shape.window is not None:
      return contiguous.ContiguousConfig().init(shape)
    B, S = shape.batch, shape.capacity
    if self.inner == 'paged':
      k, v = paged.make(shape, self.page_size, self.pages)
    else:
      k, v = slots.make('contiguous', shape, S)
    return TokenSelectCache(
      k=k,
      v=v,
      query=jnp.zeros((B, shape.heads * shape.head_dim), jnp.float32),
      index=jnp.zeros((B, self.budget), jnp.int32),
      voted=jnp.full((B,), -1, jnp.int32),
      hits=jnp.zeros((B,), jnp.int32),
      length=jnp.zeros((B,), jnp.int32),
      config=self,
      kv_heads=shape.kv_heads,
      head_dim=shape.head_dim,
      rope=shape.rope,
      room=S,
    )


@flax.struct.dataclass
class TokenSelectCache:
  """k, v: stores, slot t of position t; k without positions.

  query (B, H * D) float32 and index (B, budget) int32: of the last vote, which
  was at `voted` (B,) tokens, -1: none. hits (B,): reuses since the last prompt.
  length: (B,) int32.
  """

  k: Any
  v: Any
  query: jax.Array
  index: jax.Array
  voted: jax.Array
  hits: jax.Array
  length: jax.Array
  config: TokenSelectConfig = flax.struct.field(pytree_node=False)
  kv_heads: int = flax.struct.field(pytree_node=False)
  head_dim: int = flax.struct.field(pytree_node=False)
  rope: rope_lib.Rope | None = flax.struct.field(pytree_node=False)
  room: int = flax.struct.field(pytree_node=False)

  @property
  def capacity(self) -> int:
    """S; the last page may have room for more."""
    return self.room

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
    """As interface.Cache says; the update's state is that of the vote."""
    interface.check_inputs(self, q, k, self.kv_heads)
    T, chunk = q.shape[1], self.config.chunk
    if chunk >= T:
      return self._attend(q, k, v, positions, scoring)
    count = -(-T // chunk)

    def split(a, fill=0):
      widths = [(0, 0), (0, count * chunk - T)] + [(0, 0)] * (a.ndim - 2)
      a = jnp.pad(a, widths, constant_values=fill)
      return a.reshape(a.shape[0], count, chunk, *a.shape[2:]).swapaxes(0, 1)

    def read(cache, part):
      out, update = cache._attend(*part, scoring)
      counts = jnp.sum(part[3] >= 0, axis=1, dtype=jnp.int32)
      return cache.append(update, cache.length, counts), (out, update)

    parts = split(q), split(k), split(v), split(positions, -1)
    _, (out, update) = jax.lax.scan(read, self, parts)

    def join(a):
      a = a.swapaxes(0, 1)
      return a.reshape(a.shape[0], count * chunk, *a.shape[3:])[:, :T]

    last = jax.tree.map(lambda a: a[-1], update.state)
    return join(out), interface.Update(
      k=join(update.k), v=join(update.v), state=last
    )

  def append(
    self, update: interface.Update, length: jax.Array, counts: jax.Array
  ) -> 'TokenSelectCache':
    """As interface.Cache says."""
    if update.state is None:
      raise ValueError(
        'tokenselect: an update without the state of its vote. Append what '
        '`attend` returned.'
      )
    where = contiguous.new_slots(
      length, counts, update.k.shape[1], self.capacity
    )
    where = jnp.where(where < self.capacity, where, self.k.slots)
    query, index, voted, hits = update.state
    return dataclasses.replace(
      self,
      k=self.k.put(self.k.encode(update.k), where),
      v=self.v.put(self.v.encode(update.v), where),
      query=query,
      index=index,
      voted=voted,
      hits=hits,
      length=length + counts,
    )

  def _attend(self, q, k, v, positions, scoring):
    """Of at most `chunk` new tokens."""
    c, T = self.config, q.shape[1]
    counts = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    bare = k
    if self.rope is not None and c.reposition:
      bare = reposition.turn(k, -positions, self.rope)
    state, listed, held = self._listed(q, positions, counts)
    places = jnp.cumsum(held, axis=1) - 1  # (B, R)
    last = jnp.sum(held, axis=1)  # Where the new tokens begin.
    chosen_k, chosen_v = (
      slots.rows(store, listed, self.kv_heads) for store in (self.k, self.v)
    )
    at = listed
    own = positions
    if c.reposition:
      assert self.rope is not None  # init checked it.
      chosen_k = reposition.turn(chosen_k, places, self.rope)
      at, own = places, last[:, None] + jnp.arange(T)[None]
      q, k = (reposition.turn(x, own - positions, self.rope) for x in (q, k))
    at = jnp.where(held, at, -1)[..., None]
    queries = softmax.group(q, self.kv_heads, scoring.scale)
    cached = softmax.attend_store(
      queries,
      own,
      stores.FloatStore(chosen_k),
      stores.FloatStore(chosen_v),
      lambda i: stores.take(at, i[0], i.shape[0]),
      jnp.int32(at.shape[1]),
      scoring,
    )
    new = kernel.attend_own(q, k, v, positions, scoring)
    out = softmax.finish(softmax.merge(cached, new), q.dtype)
    return out, interface.Update(k=bare, v=v, state=state)

  def _listed(self, q, positions, counts):
    """The state of the vote; slots (B, R) to read, in order; which are any."""
    c, S, (B, T) = self.config, self.k.slots, positions.shape
    total = self.length + counts
    slot = jnp.arange(S, dtype=jnp.int32)[None]
    whole = jnp.broadcast_to(slot, (B, S)), slot < self.length[:, None]
    state = self.query, self.index, self.voted, self.hits
    more = c.local // 2
    R = c.sinks + c.budget + c.local + more
    if R >= S:  # Everything fits into a list.
      return state, *whole
    flat = self._scoring_query(q, positions, counts)  # (B, H * D)
    due = total > c.sinks + c.budget + c.local
    hit = jnp.zeros_like(due)
    if T == 1:
      cosine = jnp.sum(flat * self.query, axis=1) / jnp.maximum(
        jnp.linalg.norm(flat, axis=1) * jnp.linalg.norm(self.query, axis=1),
        1e-30,
      )
      hit = (self.voted >= 0) & (cosine >= c.theta) & due
      hit &= total - self.voted < max(more, 1)
    vote = due & ~hit

    def elect():
      votes = soft_vote(
        flat.reshape(B, -1, self.head_dim), self.k, self._may(total), c
      )
      return jnp.where(vote[:, None], select(votes, c), self.index)

    index = jax.lax.cond(jnp.any(vote), elect, lambda: self.index)
    voted = jnp.where(vote, total, self.voted)
    if T > 1:  # A list for many queries is not one for the next.
      state = flat, index, jnp.full_like(voted, -1), jnp.zeros_like(self.hits)
    else:
      query = jnp.where(vote[:, None], flat, self.query)
      state = query, index, voted, self.hits + hit.astype(jnp.int32)
    start = jnp.where(hit, self.voted, total) - c.local  # Of the last tokens.
    first = jnp.broadcast_to(jnp.arange(c.sinks)[None], (B, c.sinks))
    last = start[:, None] + jnp.arange(c.local + more)[None]
    listed = jnp.concatenate([first, index, last], axis=1)
    held = listed < self.length[:, None]
    # Rows that fit see their tokens in order.
    order = jnp.broadcast_to(jnp.arange(R)[None], (B, R))
    listed = jnp.where(due[:, None], listed, order)
    held = jnp.where(due[:, None], held, order < self.length[:, None])
    return state, jnp.clip(listed, 0, S - 1).astype(jnp.int32), held

  def _scoring_query(self, q, positions, counts):
    """The mean of the new queries, as they stand `local` behind: (B, H * D)."""
    c, (B, T) = self.config, positions.shape
    if c.reposition:
      assert self.rope is not None  # init checked it.
      at = c.local + jnp.arange(T)[None]
      q = reposition.turn(q, at - positions, self.rope)
    valid = (positions >= 0)[:, :, None, None]
    total = jnp.sum(jnp.where(valid, q.astype(jnp.float32), 0.0), axis=1)
    count = jnp.maximum(counts, 1).astype(jnp.float32)
    return (total / count[:, None, None]).reshape(B, -1)

  def _may(self, total):
    """(B, S): the tokens that are voted on."""
    slot = jnp.arange(self.k.slots)[None]
    end = total[:, None] - self.config.local
    return (slot >= self.config.sinks) & (slot < end)


def soft_vote(
  query: jax.Array, k: Any, may: jax.Array, config: TokenSelectConfig
) -> jax.Array:
  """Votes of all heads for tokens: (B, S) float32, 0 where there may be none.

  They sum up to the number of heads, but for pooling.

  Args:
    query: (B, H, D).
    k: a store of S slots, without positions.
    may: (B, S).
    config: score_scale, gqa_map and pool.
  """
  B, H, D = query.shape
  Hkv = k.values(0, 1).shape[2]
  query = query * config.score_scale
  if config.gqa_map == 'mod':  # Head h with key head h % Hkv.
    grouped = query.reshape(B, H // Hkv, Hkv, D).swapaxes(1, 2)
  else:
    grouped = query.reshape(B, Hkv, H // Hkv, D)
  scores = k.scores(grouped[:, :, :, None], 0, k.slots)[:, :, :, 0]
  may = may[:, None, None]
  p = jax.nn.softmax(jnp.where(may, scores, -1e30), axis=-1)
  votes = jnp.sum(jnp.where(may, p, 0.0), axis=(1, 2))
  if config.pool:
    half = config.pool // 2
    votes = jax.lax.reduce_window(
      votes, 0.0, jax.lax.max, (1, config.pool), (1, 1), [(0, 0), (half, half)]
    )
  return jnp.where(may[:, 0, 0], votes, -jnp.inf)


def select(votes: jax.Array, config: TokenSelectConfig) -> jax.Array:
  """Votes (B, S) -> the `budget` best tokens, in order: (B, budget) int32."""
  return topk.select_topk(votes, config.budget)
