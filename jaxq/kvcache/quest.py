"""Quest: read only the pages whose keys could matter to this query.

Tang et al., 2024, https://arxiv.org/abs/2406.10774.

  of each page      low_j = min_t k_tj,  high_j = max_t k_tj
  bound of a page   sum_j max(q_j low_j, q_j high_j) >= q k_t of all its tokens
  attention         to the budget / page_size pages of highest bound, exactly

Everything is kept and little is read: it saves traffic, not capacity. The
bounds cost 1 / page_size of the keys twice. Prompts are read densely (they are
bound by arithmetic), and so are the first layers, whose attention is spread.

Query heads that share a key head share its pages, chosen by the largest of
their bounds, so that a page is read once ('q_head' lets each choose, as in the
reference; 'all' has the heads of a layer share: a page is then one run of
memory, which on a TPU the attention kernel reads by its number).
`dense_prefill=false` gives every token of a chunk pages of its own by masking:
what decoding would see, for evaluations.
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
  slots,
  softmax,
  stores,
  topk,
)

GROUPS = ('kv_head', 'q_head')
PAGE_GROUPS = ('all', *GROUPS)
_FEWEST = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestConfig:
  """Attributes.

  page_size: tokens of a page. budget: tokens that are read, in whole pages, at
  least 3. dense_layers: first layers that read everything. group_by: who
  chooses, of PAGE_GROUPS. dense_prefill: see the module docstring. inner: what
  tokens are kept in, of slots.INNER, or 'paged': a pool of these pages. pages:
  of the pool; 0: all that the rows need.
  """

  page_size: int = 16
  budget: int = 1024
  dense_layers: int = 2
  group_by: str = 'kv_head'
  dense_prefill: bool = True
  inner: str = 'contiguous'
  pages: int = 0

  def __post_init__(self):
    slots.check_inner('quest', self.inner, ('paged',))
    check_group('quest', self.group_by, PAGE_GROUPS)
    if self.inner == 'paged':
      paged.check('quest', self.page_size, self.pages)
    elif self.pages:
      raise ValueError(
        f'quest: pages={self.pages}, inner={self.inner!r}; there is a pool '
        "with inner='paged' alone. Leave pages out."
      )
    for name, least in (('page_size', 1), ('budget', 1), ('dense_layers', 0)):
      if getattr(self, name) < least:
        raise ValueError(
          f'quest: {name}={getattr(self, name)}; it must be at least {least}.'
        )

  def pages_read(self) -> int:
    """Pages that a step reads."""
    return max(_FEWEST, self.budget // self.page_size)

  def init(self, shape: interface.CacheShape) -> Any:
    """An empty cache; contiguous for a layer that has a window anyway.

    Raises:
      ValueError: the budget is more than the capacity.
    """
    check_budget('quest', self.budget, shape.capacity)
    if shape.window is not None:
      return contiguous.ContiguousConfig().init(shape)
    pages = -(-shape.capacity // self.page_size)
    if self.inner == 'paged':
      k, v = paged.make(shape, self.page_size, self.pages)
    else:
      k, v = slots.make(self.inner, shape, pages * self.page_size)
    size = (shape.batch, pages, shape.kv_heads, shape.head_dim)
    most = jnp.finfo(shape.dtype).max
    return QuestCache(
      k=k,
      v=v,
      low=jnp.full(size, most, shape.dtype),
      high=jnp.full(size, -most, shape.dtype),
      sparse=jnp.ones((), bool),
      length=jnp.zeros((shape.batch,), jnp.int32),
      config=self,
      capacity=shape.capacity,
    )


@flax.struct.dataclass
class QuestCache:
  """k, v: stores, slot t of position t. low, high (B, pages, Hkv, D).

  sparse: (), false in layers that read everything. length: (B,) int32.
  """

  k: Any
  v: Any
  low: jax.Array
  high: jax.Array
  sparse: jax.Array
  length: jax.Array
  config: QuestConfig = flax.struct.field(pytree_node=False)
  capacity: int = flax.struct.field(pytree_node=False)

  @property
  def elements(self) -> int:
    """Elements of a token's keys."""
    return self.low.shape[-2] * self.low.shape[-1]

  def of_layers(self, layers: range) -> 'QuestCache':
    """A stacked cache in which the first layers read everything."""
    sparse = jnp.asarray([i >= self.config.dense_layers for i in layers])
    return dataclasses.replace(self, sparse=sparse)

  def attend(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    scoring: interface.Scoring,
  ) -> tuple[jax.Array, interface.Update]:
    """As interface.Cache says."""
    Hkv = self.low.shape[-2]
    interface.check_inputs(self, q, k, Hkv)
    queries = softmax.group(q, Hkv, scoring.scale)
    size, n = self.config.page_size, self.config.pages_read()

    def dense():
      return attend_all(self, queries, positions, scoring)

    def chosen():
      index, some = self.select(queries[:, :, :, 0])
      return attend_pages(self, q, positions, index, some, scoring)

    def masked():
      bound = self.bounds(queries)  # (B, Hkv, G, T, pages)
      if self.config.group_by != 'q_head':
        shared = (1, 2) if self.config.group_by == 'all' else 2
        bound = jnp.max(bound, axis=shared, keepdims=True)
      pages = top(bound, n)
      seen = jnp.repeat(pages, size, axis=-1)
      seen &= holds(self, self.k.slots)
      return slots.attend_masked(queries, self.k, self.v, seen, scoring)

    cached = by_step(self, q.shape[1], n * size, dense, chosen, masked)
    own = kernel.attend_own(q, k, v, positions, scoring)
    out = softmax.finish(softmax.merge(cached, own), q.dtype)
    return out, interface.Update(k=k, v=v)

  def bounds(self, queries: jax.Array) -> jax.Array:
    """(B, Hkv, G, T, D) -> (B, Hkv, G, T, pages); -inf where a page is empty.

    max(q low, q high) is q high where q is positive and q low elsewhere.
    """
    low, high = (a.astype(jnp.float32) for a in (self.low, self.high))
    used = jnp.arange(low.shape[1])[None] * self.config.page_size
    used = used < self.length[:, None]  # (B, pages)
    low, high = (jnp.where(used[..., None, None], a, 0) for a in (low, high))
    up, down = jnp.maximum(queries, 0), jnp.minimum(queries, 0)
    bound = jnp.einsum('bkgtd,bpkd->bkgtp', up, high)
    bound += jnp.einsum('bkgtd,bpkd->bkgtp', down, low)
    return jnp.where(used[:, None, None, None], bound, -jnp.inf)

  def select(self, queries: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Queries of one token (B, Hkv, G, D) -> pages and whether they are any.

    (B, H', n) both, H' as `group_by` says.
    """
    bound = self.bounds(queries[:, :, :, None])[:, :, :, 0]
    if self.config.group_by == 'all':
      bound = jnp.max(bound, axis=(1, 2))[:, None]
    elif self.config.group_by == 'kv_head':
      bound = jnp.max(bound, axis=2)
    else:
      bound = bound.reshape(bound.shape[0], -1, bound.shape[-1])
    return topk.largest(bound, min(self.config.pages_read(), bound.shape[2]))

  def append(
    self, update: interface.Update, length: jax.Array, counts: jax.Array
  ) -> 'QuestCache':
    """As interface.Cache says."""
    where = contiguous.new_slots(
      length, counts, update.k.shape[1], self.capacity
    )
    kept = where < self.capacity
    page = jnp.where(kept, where // self.config.page_size, self.low.shape[1])
    rows = jnp.arange(page.shape[0])[:, None]
    new = update.k.astype(self.low.dtype)
    return dataclasses.replace(
      self,
      k=self.k.put(
        self.k.encode(update.k), jnp.where(kept, where, self.k.slots)
      ),
      v=self.v.put(
        self.v.encode(update.v), jnp.where(kept, where, self.v.slots)
      ),
      low=self.low.at[rows, page].min(new, mode='drop'),
      high=self.high.at[rows, page].max(new, mode='drop'),
      length=length + counts,
    )


def check_group(
  who: str, group_by: str, allowed: tuple[str, ...] = GROUPS
) -> None:
  """Raises ValueError for one that is not allowed."""
  if group_by not in allowed:
    raise ValueError(
      f'{who}: group_by={group_by!r}; allowed {sorted(allowed)}.'
    )


def check_budget(who: str, budget: int, capacity: int) -> None:
  """Raises ValueError for a budget that the cache cannot hold."""
  if budget > capacity:
    raise ValueError(
      f'{who}: a budget of {budget} tokens for a cache of {capacity}; it must '
      'not be more. Use a smaller budget, or a contiguous cache.'
    )


def top(scores: jax.Array, count: int) -> jax.Array:
  """Whether a score is among the `count` highest of the last axis.

  Of equal ones the first; never one of -inf.
  """
  if count >= scores.shape[-1]:
    return scores > -jnp.inf
  rows = scores.reshape(-1, scores.shape[-1])
  index, _ = topk.largest(rows, count)
  row = jnp.arange(rows.shape[0])[:, None]
  chosen = jnp.zeros(rows.shape, bool).at[row, index].set(True)
  return chosen.reshape(scores.shape) & (scores > -jnp.inf)


def holds(cache: Any, size: int) -> jax.Array:
  """Which of the first slots are tokens: (B, 1, 1, 1, size)."""
  slot = jnp.arange(size).reshape(1, 1, 1, 1, size)
  return slot < cache.length[:, None, None, None, None]


def by_step(
  cache: Any, T: int, read: int, dense: Any, chosen: Any, masked: Any
) -> softmax.Partial:
  """What the cached tokens of a step contribute.

  Args:
    cache: with `sparse`, `config.dense_prefill` and a store `k`.
    T: new tokens of the step.
    read: tokens that are read; dense where that is all of them.
    dense, chosen, masked: () -> Partial: of everything, of what one query
      chose, of what each of several queries chose.
  """
  if read >= cache.k.slots or (T > 1 and cache.config.dense_prefill):
    return dense()
  some: softmax.Partial = jax.lax.cond(
    cache.sparse & jnp.any(cache.length > 0),
    masked if T > 1 else chosen,
    dense,
  )
  return some


def attend_all(
  cache: Any, queries: jax.Array, positions: jax.Array, scoring: Any
) -> softmax.Partial:
  """Queries over all that a cache with stores k and v holds."""
  return softmax.attend_store(
    queries,
    positions,
    cache.k,
    cache.v,
    lambda at: contiguous.held(at, cache.length),
    jnp.max(cache.length),
    scoring,
  )


def attend_pages(
  cache: QuestCache,
  q: jax.Array,
  positions: jax.Array,
  index: jax.Array,
  some: jax.Array,
  scoring: Any,
  **options: Any,
) -> softmax.Partial:
  """q (B, 1, H, D) over its pages: of all heads by a kernel where one serves.

  Args:
    cache: what is read.
    q: queries of one token, not scaled.
    positions: (B, 1) int32.
    index, some: (B, H', n) pages and whether they are any, from `select`.
    scoring: scale and softcap.
    **options: of kernel.attend.
  """
  size, Hkv = cache.config.page_size, cache.low.shape[-2]

  def gathered():
    queries = softmax.group(q, Hkv, scoring.scale)
    heads = Hkv if cache.config.group_by == 'all' else index.shape[1]
    pages, held = (
      jnp.broadcast_to(a, (a.shape[0], heads, a.shape[2]))
      for a in (index, some)
    )
    within = jnp.arange(size).reshape(1, 1, 1, size)
    tokens = pages[..., None] * size + within  # (B, H', n, size)
    tokens = tokens.reshape(*pages.shape[:2], -1).transpose(0, 2, 1)
    held = jnp.repeat(held, size, axis=-1).transpose(0, 2, 1)
    held &= tokens < cache.length[:, None, None]
    return attend_chosen(cache, queries, positions, tokens, held, scoring)

  if cache.config.group_by != 'all':  # Heads read different pages.
    return gathered()
  k, v, table = cache.k, cache.v, None
  if isinstance(k, paged.PagedStore):
    table = k.table
    k, v = (stores.FloatStore(store.pool) for store in (k, v))
  return kernel.attend(
    q,
    positions,
    k,
    v,
    cache.length,
    scoring,
    gathered,
    table=table,
    selected=jnp.where(some, index, -1)[:, 0],
    page_size=size,
    **options,
  )


def attend_chosen(
  cache: Any,
  queries: jax.Array,
  positions: jax.Array,
  tokens: jax.Array,
  held: jax.Array,
  scoring: Any,
) -> softmax.Partial:
  """Queries of one token over the slots `tokens` (B, R, H'), where held.

  H' is Hkv or H: then a query head has tokens of its own.
  """
  tokens = jnp.minimum(tokens, cache.k.slots - 1)
  return attend_rows(
    queries,
    positions,
    slots.at(cache.k, tokens),
    slots.at(cache.v, tokens),
    jnp.where(held, tokens, -1),
    scoring,
  )


def attend_rows(
  queries: jax.Array,
  positions: jax.Array,
  k: Any,
  v: Any,
  at: jax.Array,
  scoring: Any,
) -> softmax.Partial:
  """Queries of one token over stores of the R tokens `at` (B, R, H'); -1: none.

  H' is Hkv or H, the heads of the stores.
  """
  B, Hkv, G, T, D = queries.shape
  R, heads = at.shape[1:]
  own = queries.reshape(B, heads, -1, T, D)
  part = softmax.attend_store(
    own,
    positions,
    k,
    v,
    lambda index: stores.take(at, index[0], index.shape[0]),
    jnp.int32(R),
    scoring,
  )
  return jax.tree.map(lambda a: a.reshape(B, Hkv, G, T, -1), part)
