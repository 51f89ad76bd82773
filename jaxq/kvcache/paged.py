"""Pages: rows share one pool, and a table says which pages are whose.

  slot of position t = table[row, t // page_size] * page_size + t % page_size

A row costs the pages it uses and not its longest possible length, and rows that
share a prefix may share its pages. Page 0 belongs to nobody, so that a table
filled with zeros is in bounds. The table is an array: `Pages` hands pages out
on the host, between steps.

This plain form gathers one page of every row at a time. `init` gives every row
pages of its own, so that the cache serves without an allocator; with `pages`
the pool is smaller than that, and `with_table` takes what the host decided.
"""

import dataclasses

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
    size = self.page_size
    if size < 1 or size & (size - 1):
      raise ValueError(
        f'paged: page_size={size}; it must be a power of two, as 16 or 64.'
      )
    if self.pages < 0 or self.pages == 1:
      raise ValueError(
        f'paged: pages={self.pages}; allowed 0 (enough for all rows) or at '
        'least 2, as page 0 stays free.'
      )

  def init(self, shape: interface.CacheShape) -> 'PagedCache':
    """An empty cache; without a table if the pool is too small for all."""
    B = shape.batch
    per_row = -(-shape.capacity // self.page_size)
    pages = self.pages or 1 + B * per_row
    table = np.arange(1, 1 + B * per_row, dtype=np.int32).reshape(B, per_row)
    if pages < 1 + B * per_row:
      table = np.zeros_like(table)
    size = (pages, self.page_size, shape.kv_heads, shape.head_dim)
    return PagedCache(
      k=jnp.zeros(size, shape.dtype),
      v=jnp.zeros(size, shape.dtype),
      table=jnp.asarray(table),
      length=jnp.zeros((B,), jnp.int32),
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
    needed = -(-self.capacity // self.page_size)
    if table.shape[-2] != B or table.shape[-1] < needed:
      raise ValueError(
        f'paged: a table {table.shape} for {B} rows of {self.capacity} tokens; '
        f'it must be ({B}, {needed} or more) at page_size={self.page_size}. '
        'Fill unused entries with 0.'
      )
    stack = self.table.shape[:-2]
    table = jnp.broadcast_to(table, stack + table.shape[-2:])
    return dataclasses.replace(self, table=table.astype(jnp.int32))

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
      _Pages(self.k, self.table),
      _Pages(self.v, self.table),
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
    own = softmax.attend_own(queries, k, v, scoring)
    out = softmax.finish(softmax.merge(cached, own), q.dtype)
    return out, interface.Update(k=k, v=v)

  def append(
    self, update: interface.Update, length: jax.Array, counts: jax.Array
  ) -> 'PagedCache':
    """As interface.Cache says; a token without a page is dropped."""
    pages, per_row = self.k.shape[0], self.table.shape[1]
    size = self.page_size
    slots = contiguous.new_slots(
      length, counts, update.k.shape[1], self.capacity
    )
    index = jnp.minimum(slots // size, per_row - 1)
    page = jnp.take_along_axis(self.table, index, axis=1)  # (B, T)
    page = jnp.where((slots < self.capacity) & (page > 0), page, pages)

    def put(pool, new):  # All pages in a row are one row of slots.
      flat = pool.reshape(1, -1, *pool.shape[2:])
      index = (page * size + slots % size).reshape(1, -1)
      new = new.reshape(1, -1, *new.shape[2:])
      return stores.scatter(flat, new, index).reshape(pool.shape)

    return dataclasses.replace(
      self,
      k=put(self.k, update.k),
      v=put(self.v, update.v),
      length=length + counts,
    )


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


@dataclasses.dataclass(frozen=True)
class _Pages:
  """A pool seen through a table, as a store that is only read."""

  pool: jax.Array
  table: jax.Array

  @property
  def slots(self) -> int:
    return self.table.shape[1] * self.pool.shape[1]

  def _block(self, first, size):
    page_size = self.pool.shape[1]
    index = stores.take(self.table, first // page_size, size // page_size)
    pages = self.pool[index]  # (B, n, page_size, Hkv, D)
    B, n = index.shape
    return pages.reshape(B, size, *pages.shape[3:]).astype(jnp.float32)

  def scores(self, q, first, size):
    return jnp.einsum('bkgtd,bskd->bkgts', q, self._block(first, size))

  def combine(self, p, first, size):
    return jnp.einsum('bkgts,bskd->bkgtd', p, self._block(first, size))
