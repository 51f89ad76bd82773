"""Slots that hold one token each: picked from, and replaced, one by one.

What the caches that select tokens share.

  pick     at(store, slots)        the chosen tokens as a small store, which
                                   jaxq.kvcache.softmax attends to like any
  replace  places(rank, capacity)  where new tokens go: over the lowest ranked

Stores whose grids span tokens (KIVI's keys) cannot do either: one token of a
group cannot leave it. The inner caches are therefore those of INNER, which
encode every token by itself.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.kvcache import (
  fp8,
  interface,
  paged,
  per_token,
  softmax,
  stores,
  topk,
)

INNER: dict[str, Any] = {
  'contiguous': None,
  'fp8': fp8.Fp8Config(),
  'int2': per_token.PerTokenConfig(bits=2),
  'int4': per_token.PerTokenConfig(bits=4),
  'int8': per_token.PerTokenConfig(bits=8),
}


def check_inner(who: str, inner: str, also: tuple[str, ...] = ()) -> None:
  """Raises ValueError for a cache whose tokens do not lie alone."""
  if inner not in (*INNER, *also):
    raise ValueError(
      f'{who}: inner={inner!r}; allowed {sorted((*INNER, *also))}, which '
      'encode every token by itself. Caches that quantize blocks of tokens '
      'cannot give one away.'
    )


def make(
  inner: str, shape: interface.CacheShape, count: int
) -> tuple[Any, Any]:
  """Empty stores of keys and values with `count` slots a row."""
  if INNER[inner] is None:
    return stores.float_store(shape, count), stores.float_store(shape, count)
  cache = INNER[inner].init(dataclasses.replace(shape, capacity=count))
  return cache.k, cache.v


def rows(store: Any, slots: jax.Array, kv_heads: int) -> jax.Array:
  """Tokens that all heads share, at slots (B, R) -> (B, R, Hkv, D).

  Of a FloatStore, or of one in pages.
  """
  if isinstance(store, paged.PagedStore):
    return store.rows(slots)
  index = slots[..., None]
  index = jnp.broadcast_to(index, (*index.shape[:2], kv_heads))
  picked: jax.Array = at(store, index).x
  return picked


def at(store: Any, slots: jax.Array) -> Any:
  """The tokens at slots (B, R, H') as a store of R slots and H' heads.

  H' is a multiple of the store's heads; a head serves the H' / Hkv ones that
  follow each other, so that query heads may choose apart.
  """
  if isinstance(store, stores.FloatStore):
    return stores.FloatStore(_pick(store.x, slots))
  if isinstance(store, paged.PagedStore):
    return stores.FloatStore(store.pick(slots))
  if isinstance(store, fp8.ScaledStore):
    repeats = slots.shape[2] // store.scale.shape[2]
    return dataclasses.replace(
      store,
      store=at(store.store, slots),
      scale=jnp.repeat(store.scale, repeats, axis=2),
    )
  assert store.grid.tokens == 1, store.grid
  return dataclasses.replace(
    store,
    codes=_pick(store.codes, slots),
    scale=_pick(store.scale, slots),
    offset=None if store.offset is None else _pick(store.offset, slots),
  )


def places(rank: jax.Array, capacity: int) -> jax.Array:
  """Which slots new tokens take, so that the highest ranked are held.

  Args:
    rank: (B, H, capacity + T): of what the slots hold, then of T new tokens;
      -inf where there is nothing. Of equal ones the first is kept.
    capacity: slots.

  Returns:
    (B, T, H) int32. A new token that is not kept goes to `capacity`: nowhere.
    Tokens that are kept do not move.
  """
  if rank.shape[-1] == capacity + 1:  # One token: over the lowest, or nowhere.
    lowest = jnp.argmin(rank, axis=-1)
    held = (lowest < capacity) & (rank[..., -1] > -jnp.inf)
    slots = jnp.where(held, lowest, capacity)[..., None]
    return slots.transpose(0, 2, 1).astype(jnp.int32)
  index, _ = topk.largest(rank, capacity)
  keep = _mark(index, rank.shape[-1]) & (rank > -jnp.inf)
  new = keep[..., capacity:]
  free = jnp.argsort(keep[..., :capacity], axis=-1, stable=True)
  order = jnp.maximum(jnp.cumsum(new, axis=-1) - 1, 0)
  slots = jnp.take_along_axis(free, jnp.minimum(order, capacity - 1), axis=-1)
  slots = jnp.where(new, slots, capacity)
  return slots.transpose(0, 2, 1).astype(jnp.int32)


def attend_masked(
  queries: jax.Array,
  k: Any,
  v: Any,
  seen: jax.Array,
  scoring: interface.Scoring,
) -> softmax.Partial:
  """Each query over slots of its own choice, by masking all others.

  What picking gives, at the cost of all slots: for many queries at once, as in
  an evaluation.

  Args:
    queries: (B, Hkv, G, T, D), scaled.
    k, v: stores of S slots.
    seen: bool that broadcasts to (B, Hkv, G, T, S).
    scoring: its softcap.
  """
  scores = softmax.cap(k.scores(queries, 0, k.slots), scoring)
  seen = jnp.broadcast_to(seen, scores.shape)
  return softmax.add(
    softmax.empty(queries), scores, seen, lambda p: v.combine(p, 0, v.slots)
  )


def _pick(a: jax.Array, slots: jax.Array) -> jax.Array:
  """a (B, S, Hkv, n), slots (B, R, H') -> (B, R, H', n)."""
  heads = jnp.arange(slots.shape[2]) // (slots.shape[2] // a.shape[2])
  rows = jnp.arange(a.shape[0])[:, None, None]
  return a[rows, slots, heads[None, None]]


def _mark(index: jax.Array, size: int) -> jax.Array:
  """index (B, H, R) -> bool (B, H, size), true there."""
  B, H, _ = index.shape
  rows, heads = jnp.arange(B)[:, None, None], jnp.arange(H)[None, :, None]
  return jnp.zeros((B, H, size), bool).at[rows, heads, index].set(True)
