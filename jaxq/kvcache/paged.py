"""Pages: rows share one pool, and a table says which pages are whose.

  slot of position t = table[row, t // page_size] * page_size + t % page_size

A row costs the pages it uses and not its longest possible length, and rows that
share a prefix may share its pages. Page 0 belongs to nobody, so that a table
filled with zeros is in bounds. The table is an array: `Pages` hands pages out
on the host, between steps.

This plain form gathers one page of every row at a time. `init` gives every row
pages of its own, so that the cache serves without an allocator; with `pages`
the pool is smaller than that, and `with_table` takes what the host decided.

`PagedStore` is a pool seen through a table, as a store like any other: caches
that select tokens (quest, tokenselect) keep theirs in it, and read of the pool
only what they chose.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxq.kvcache import contiguous, interface, kernel, softmax, stores


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedConfig:
  """page_size: tokens of a page, a power of two. pages: of the pool; 0: all."""

  page_size: int = 64
  pages: int = 0

  def __post_init__(self):
    check('paged', self.page_size, self.pages)

  def init(self, shape: interface.CacheShape) -> 'PagedCache':
    """An empty cache; without a table if the pool is too small for all."""
    k, v = make(shape, self.page_size, self.pages)
    return PagedCache(
      k=k.pool,
      v=v.pool,
      table=k.table,
      length=jnp.zeros((shape.batch,), jnp.int32),
      capacity=shape.capacity,
    )


@flax.struct.dataclass
class PagedCache:
  """k, v (pages, page_size, Hkv, D); table (B, pages of a row) int32."""

  k: jax.Array
  v: jax.Array
  table: jax.Array
  length: jax.Array
  capacity: int = flax.struct.field(pytree_node=False)

  @property
  def page_size(self) -> int:
    """Tokens of a page."""
    return self.k.shape[-3]

  @property
  def elements(self) -> int:
    """Elements of a token's keys."""
    return self.k.shape[-2] * self.k.shape[-1]

  def with_table(self, table: jax.Array) -> 'PagedCache':
    """The cache with another table (B, at least capacity / page_size).

    Raises:
      ValueError: other rows, or too few pages for the capacity.
    """
    B = self.length.shape[-1]
    table = _fitting(table, self.table, B, self.capacity, self.page_size)
    return dataclasses.replace(self, table=table)

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
    plain = lambda: softmax.attend_store(
      queries,
      positions,
      PagedStore(self.k, self.table),
      PagedStore(self.v, self.table),
      lambda slots: contiguous.held(slots, self.length),
      jnp.max(self.length),
      scoring,
      unit=self.page_size,
    )
    cached = kernel.attend(
      q,
      positions,
      stores.FloatStore(self.k),
      stores.FloatStore(self.v),
      self.length,
      scoring,
      plain,
      table=self.table,
    )
    own = kernel.attend_own(q, k, v, positions, scoring)
    out = softmax.finish(softmax.merge(cached, own), q.dtype)
    return out, interface.Update(k=k, v=v)

  def append(
    self, update: interface.Update, length: jax.Array, counts: jax.Array
  ) -> 'PagedCache':
    """As interface.Cache says; a token without a page is dropped."""
    slots = contiguous.new_slots(
      length, counts, update.k.shape[1], self.capacity
    )
    k, v = PagedStore(self.k, self.table), PagedStore(self.v, self.table)
    slots = jnp.where(slots < self.capacity, slots, k.slots)
    return dataclasses.replace(
      self,
      k=k.put(update.k, slots).pool,
      v=v.put(update.v, slots).pool,
      length=length + counts,
    )


@flax.struct.dataclass
class PagedStore:
  """A pool seen through a table: slot t of a row lies in its page t // size.

  pool (pages, page_size, Hkv, D); table (B, pages of a row) int32, 0: none.
  """

  pool: jax.Array
  table: jax.Array

  @property
  def slots(self) -> int:
    """What the table of a row has room for."""
    return self.table.shape[-1] * self.page_size

  @property
  def page_size(self) -> int:
    """Tokens of a page."""
    return self.pool.shape[-3]

  def encode(self, x: jax.Array) -> jax.Array:
    """x (B, T, Hkv, D) in the pool's dtype."""
    return x.astype(self.pool.dtype)

  def put(self, encoded: jax.Array, slots: jax.Array) -> 'PagedStore':
    """Writes to slots (B, T); a token without a page is dropped."""
    pool, size = self.pool, self.page_size
    index = jnp.minimum(slots // size, self.table.shape[1] - 1)
    page = jnp.take_along_axis(self.table, index, axis=1)  # (B, T)
    page = jnp.where((slots < self.slots) & (page > 0), page, pool.shape[0])
    # All pages in a row are one row of slots.
    flat = pool.reshape(1, -1, *pool.shape[2:])
    at = (page * size + slots % size).reshape(1, -1)
    new = encoded.reshape(1, -1, *encoded.shape[2:])
    pool = stores.scatter(flat, new, at).reshape(pool.shape)
    return dataclasses.replace(self, pool=pool)

  def rows(self, slots: jax.Array) -> jax.Array:
    """Tokens at slots (B, R) -> (B, R, Hkv, D); nothing else is read."""
    size = self.page_size
    page = jnp.take_along_axis(self.table, slots // size, axis=1)
    return self.pool[page, slots % size]

  def pick(self, slots: jax.Array) -> jax.Array:
    """Slots (B, R, H') -> (B, R, H', D), H' a multiple of Hkv, as slots.at."""
    B, R, heads = slots.shape
    size, Hkv = self.page_size, self.pool.shape[2]
    page = slots.reshape(B, R * heads) // size
    page = jnp.take_along_axis(self.table, page, axis=1).reshape(slots.shape)
    head = jnp.arange(heads) // (heads // Hkv)
    return self.pool[page, slots % size, head[None, None]]

  def values(self, first: Any, size: int) -> jax.Array:
    """(B, size, Hkv, D) float32, of few slots."""
    return self._block(first, size)

  def scores(self, q: jax.Array, first: Any, size: int) -> jax.Array:
    """q (B, Hkv, G, T, D) -> (B, Hkv, G, T, size).

    A run of whole pages begins with one. Long ones are read block by block.
    """

    def of(first, size):
      return jnp.einsum('bkgtd,bskd->bkgts', q, self._block(first, size))

    step = self._step
    if size <= step:
      return of(first, size)
    blocks, rest = divmod(size, step)
    parts = jax.lax.map(
      lambda i: of(first + i * step, step), jnp.arange(blocks)
    )
    out = jnp.moveaxis(parts, 0, -2).reshape(*q.shape[:-1], blocks * step)
    if not rest:
      return out
    return jnp.concatenate([out, of(first + blocks * step, rest)], axis=-1)

  def combine(self, p: jax.Array, first: Any, size: int) -> jax.Array:
    """p (B, Hkv, G, T, size) -> (B, Hkv, G, T, D), as `scores` reads."""

    def of(start, size):
      part = jax.lax.dynamic_slice_in_dim(p, start, size, axis=-1)
      block = self._block(first + start, size)
      return jnp.einsum('bkgts,bskd->bkgtd', part, block)

    step = self._step
    if size <= step:
      return jnp.einsum('bkgts,bskd->bkgtd', p, self._block(first, size))
    blocks, rest = divmod(size, step)
    out = jnp.zeros((*p.shape[:-1], self.pool.shape[-1]), jnp.float32)
    out = jax.lax.fori_loop(
      0, blocks, lambda i, total: total + of(i * step, step), out
    )
    return out + of(blocks * step, rest) if rest else out

  @property
  def _step(self):
    """Slots that are read at a time."""
    return max(softmax.BLOCK // self.page_size, 1) * self.page_size

  def _block(self, first, size):
    page_size = self.page_size
    if size % page_size:  # Not of whole pages: token by token.
      at = jnp.asarray(first + jnp.arange(size))[None]
      at = jnp.broadcast_to(at, (self.table.shape[0], size))
      return self.rows(at).astype(jnp.float32)
    index = stores.take(self.table, first // page_size, size // page_size)
    pages = self.pool[index]  # (B, n, page_size, Hkv, D)
    B = index.shape[0]
    return pages.reshape(B, size, *pages.shape[3:]).astype(jnp.float32)


def make(
  shape: interface.CacheShape, page_size: int, pages: int = 0
) -> tuple[PagedStore, PagedStore]:
  """Empty stores of keys and values, each with a table of its own.

  Args:
    shape: what they are for.
    page_size: tokens of a page.
    pages: of a pool; 0: all that the rows can need, each with its own. With
      fewer the table is empty (with_table).
  """
  B, per_row = shape.batch, -(-shape.capacity // page_size)
  table = np.arange(1, 1 + B * per_row, dtype=np.int32).reshape(B, per_row)
  if pages and pages < 1 + B * per_row:
    table = np.zeros_like(table)
  size = (
    pages or 1 + B * per_row,
    page_size,
    shape.kv_heads,
    shape.head_dim,
  )
  empty = lambda: PagedStore(jnp.zeros(size, shape.dtype), jnp.asarray(table))
  return empty(), empty()


def with_table(cache: Any, table: jax.Array) -> Any:
  """A cache with PagedStores k and v, with another table for both.

  Args:
    cache: of one layer, or stacked.
    table: (B, at least capacity / page_size) int32; 0 where there is no page.

  Raises:
    ValueError: other rows, too few pages, or a cache that is not paged.
  """
  if not isinstance(cache.k, PagedStore):
    raise ValueError(
      f'paged: a {type(cache).__name__} that keeps its tokens in a '
      f"{type(cache.k).__name__}; a table is for inner='paged'."
    )
  B, capacity = cache.length.shape[-1], cache.capacity
  # Two arrays, so that both may be donated.
  tables = [
    _fitting(table, s.table, B, capacity, s.page_size) + 0
    for s in (cache.k, cache.v)
  ]
  k, v = (
    dataclasses.replace(s, table=t)
    for s, t in zip((cache.k, cache.v), tables, strict=True)
  )
  return dataclasses.replace(cache, k=k, v=v)


def check(who: str, page_size: int, pages: int) -> None:
  """Raises ValueError for pages that no pool has."""
  if page_size < 1 or page_size & (page_size - 1):
    raise ValueError(
      f'{who}: page_size={page_size}; it must be a power of two, as 16 or 64.'
    )
  if pages < 0 or pages == 1:
    raise ValueError(
      f'{who}: pages={pages}; allowed 0 (enough for all rows) or at least 2, '
      'as page 0 stays free.'
    )


def _fitting(table, like, B, capacity, page_size):
  """The table, stacked as `like` is."""
  needed = -(-capacity // page_size)
  if table.shape[-2] != B or table.shape[-1] < needed:
    raise ValueError(
      f'paged: a table {table.shape} for {B} rows of {capacity} tokens; '
      f'it must be ({B}, {needed} or more) at page_size={page_size}. '
      'Fill unused entries with 0.'
    )
  table = jnp.broadcast_to(table, like.shape[:-2] + table.shape[-2:])
  return table.astype(jnp.int32)


class Pages:
  """Hands out pages 1..pages-1 on the host."""

  def __init__(self, pages: int):
    self._free = list(range(pages - 1, 0, -1))

  @property
  def free(self) -> int:
    """How many are left."""
    return len(self._free)

  def allocate(self, count: int) -> list[int]:
    """`count` page numbers.

    Raises:
      ValueError: so many are not free; nothing is handed out.
    """
    if count > len(self._free):
      raise ValueError(
        f'paged: {count} pages asked for and {len(self._free)} free; release '
        'those of finished rows, or make the pool larger with pages=.'
      )
    return [self._free.pop() for _ in range(count)]

  def release(self, pages: list[int]) -> None:
    """Takes pages back."""
    self._free.extend(reversed(pages))
