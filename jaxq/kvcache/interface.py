"""What every key/value cache is: attend first, append after.

  out, update = cache.attend(q, k, v, positions, scoring)    in each layer
  cache = append(cache, update, counts)                      behind all layers

`attend` shows T new queries what the cache holds, as it is stored, and the new
keys and values themselves in full precision, causally; so a prompt that comes
in one piece is attended to exactly, and a long one in chunks costs the error of
the chunks before. `append` stores them. Reading and writing apart, a model that
scans over its layers writes its stacked caches once a step, in place where they
were donated; inside the scan they are only read.

A cache is a pytree of static capacity with a field `length` (B,): tokens held,
of each row. Rows of a batch may differ: `counts` says how many of the T tokens
of a row are tokens, the rest is padding behind them and is not stored. Tokens
that were quantized are never quantized again. Arrays that hold tokens are (B,
slots, Hkv, channels); `shardings` relies on it.

Selection (eviction, sparse attention) is a score function over a cache: higher
is kept. A cache that chooses by attention, as ZipCache does, has `attend` put
its scores (B, Hkv, tokens) into the Update, and `append` acts on them.
"""

import dataclasses
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheShape:
  """What a cache is made for.

  batch (B), capacity (tokens a row can hold), kv_heads (Hkv), head_dim (D).
  dtype: of what is not compressed. window: of the layer's attention; None: all.
  heads: query heads (H), for caches that keep queries. rope: an nn.rope.Rope,
    for caches that give tokens other positions; None: keys are not rotated.
  """

  batch: int
  capacity: int
  kv_heads: int
  head_dim: int
  dtype: Any = jnp.float32
  window: int | None = None
  heads: int | None = None
  rope: Any = None

  def __post_init__(self):
    for name in ('batch', 'capacity', 'kv_heads', 'head_dim'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'CacheShape: {name}={getattr(self, name)}; it must be at least 1.'
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
  """How scores are made of q and k; static.

  scale: None is 1 / sqrt(D). window: keys a query sees, itself counted; None is
  all before it. softcap: scores become softcap * tanh(scores / softcap).
  """

  scale: float | None = None
  window: int | None = None
  softcap: float | None = None


@flax.struct.dataclass
class Update:
  """What `append` stores: k, v (B, T, Hkv, D) in the cache's own basis.

  scores: (B, Hkv, tokens) float32, of those that are still to be classified;
    None where the cache does not choose.
  state: what else the cache is to keep, rows first; None: nothing.
  """

  k: jax.Array
  v: jax.Array
  scores: jax.Array | None = None
  state: Any = None


class Cache(Protocol):
  """The contract of the module docstring."""

  length: jax.Array

  @property
  def capacity(self) -> int:
    """Tokens a row can hold; a ring holds the newest of any number."""
    ...

  def attend(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    scoring: Scoring,
  ) -> tuple[jax.Array, Update]:
    """q (B, T, H, D), k, v (B, T, Hkv, D), positions (B, T) -> (B, T, H, D).

    Positions of a row follow its length; negative ones are padding.
    """
    ...

  def append(
    self, update: Update, length: jax.Array, counts: jax.Array
  ) -> 'Cache':
    """Stores counts (B,) tokens a row behind its `length` (B,).

    `length` is that of the cache; it is an argument so that under vmap over
    layers, which all have the same, what depends on it stays one branch.
    """
    ...


class CacheConfig(Protocol):
  """A frozen dataclass that makes caches; equal ones share programs."""

  def __hash__(self) -> int: ...

  def init(self, shape: CacheShape) -> Cache:
    """An empty cache; ValueError for a shape it cannot serve."""
    ...


def append(cache: Any, update: Update, counts: jax.Array | None = None) -> Any:
  """Stores the tokens of one layer.

  Args:
    cache: of one layer, or stacked (layers first); so is the update.
    update: from `attend`.
    counts: (B,) int32 tokens of each row; None: all T.

  Raises:
    ValueError: an update of other rows, or counts that are not of it. Outside
      jit, before anything is written: a row would hold more than the capacity.
      Inside jit such tokens are dropped.
  """
  stacked = cache.length.ndim == 2
  length = cache.length[0] if stacked else cache.length
  if counts is None:
    counts = jnp.full(length.shape, update.k.shape[-3], jnp.int32)
  check_update(length, update, counts)
  check_room(length, counts, cache.capacity)
  if not stacked or getattr(cache, 'appends_stacks', False):
    return cache.append(update, length, counts)
  return jax.vmap(lambda c, u: c.append(u, length, counts))(cache, update)


def split(cache: Any) -> tuple[Any, Any]:
  """A stacked cache as what a scan over its layers slices, and the rest.

  The rest is handed to every layer whole, for its `joined`; None: nothing. See
  jaxq.kvcache.layers, and jaxq.kvcache.offload for one that does more.
  """
  return cache.split() if hasattr(cache, 'split') else (cache, None)


def check_room(length: Any, counts: Any, capacity: int) -> None:
  """Raises ValueError if concrete lengths would pass the capacity."""
  if any(isinstance(a, jax.core.Tracer) for a in (length, counts)):
    return
  needed = np.asarray(length) + np.asarray(counts)
  if needed.size and needed.max() > capacity:
    row = int(needed.argmax())
    raise ValueError(
      f'kvcache: row {row} would hold {needed.max()} tokens; the capacity is '
      f'{capacity}. Make the cache larger, or use a ring cache, which keeps '
      'the newest.'
    )


def check_update(length: Any, update: Update, counts: Any) -> None:
  """Raises ValueError unless an update is of the rows of a cache."""
  B, T = update.k.shape[-4:-2]
  if length.shape != (B,) or counts.shape != length.shape:
    raise ValueError(
      f'kvcache: an update of {B} rows and counts {counts.shape} for a cache '
      f'of {length.shape[0]} rows; there must be one of each for a row. Append '
      'what `attend` returned.'
    )
  if isinstance(counts, jax.core.Tracer):
    return
  values = np.asarray(counts)
  if values.size and not 0 <= values.min() <= values.max() <= T:
    raise ValueError(
      f'kvcache: counts {values.tolist()} of an update of {T} tokens; allowed '
      f'0..{T}, the tokens of a row that are not padding.'
    )


def check_inputs(cache: Any, q: jax.Array, k: jax.Array, kv_heads: int) -> None:
  """Raises ValueError unless new tokens fit the cache: rows, heads, D."""
  B = cache.length.shape[-1]
  if q.shape[0] != B or k.shape[0] != B:
    raise ValueError(
      f'kvcache: q {q.shape} and k {k.shape} for a cache of {B} rows; the '
      'batch must be that of the cache. Make a cache for this batch.'
    )
  if k.shape[2] != kv_heads or q.shape[2] % kv_heads:
    raise ValueError(
      f'kvcache: {q.shape[2]} query and {k.shape[2]} key heads for a cache of '
      f'{kv_heads}; key heads must be those of the cache and divide the query '
      "heads. Make the cache from the model's config."
    )
  D = cache.elements // kv_heads
  if q.shape[1] != k.shape[1] or (q.shape[3], k.shape[3]) != (D, D):
    raise ValueError(
      f'kvcache: q {q.shape} and k {k.shape} for heads of {D}; every new token '
      'has a query and a key, of the head_dim of the cache. Make the cache '
      "from the model's config."
    )


def nbytes(cache: Any) -> int:
  """Exact bytes of all leaves."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))


def bits_per_element(cache: Any, tokens: int | None = None) -> float:
  """Bits of all leaves per key or value element of a full cache.

  Args:
    cache: of one layer, or stacked. Arrays or ShapeDtypeStructs.
    tokens: elements are counted of so many a row; None: what the cache was
      made for.
  """
  leaves = jax.tree.leaves(cache)
  total = sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in leaves)
  rows = int(np.prod(cache.length.shape))
  if tokens is None:
    tokens = getattr(cache, 'tokens', None) or cache.capacity
  return 8 * total / (2 * rows * tokens * cache.elements)


def stored_bits_per_element(cache: Any) -> float:
  """Like `bits_per_element`, less the window that is kept in full precision."""
  window = [getattr(cache, f'{name}_residual', None) for name in 'kv']
  rows = cache.length.size
  elements = 2 * rows * cache.capacity * cache.elements
  residual = sum(
    int(np.prod(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(window)
  )
  return bits_per_element(cache, cache.capacity) - 8 * residual / elements


def shardings(cache: Any, mesh: Mesh) -> Any:
  """NamedShardings of a cache: heads over `model`, rows over `data`.

  An axis that the mesh does not divide stays whole.
  """

  def fit(size, axis):
    return axis if size > 1 and size % mesh.shape[axis] == 0 else None

  def of(leaf):
    stacked = cache.length.ndim - 1
    spec: list[Any] = [None] * leaf.ndim
    if leaf.ndim == cache.length.ndim:
      spec[-1] = fit(leaf.shape[-1], 'data')
    elif leaf.ndim == stacked + 4:
      spec[-2] = fit(leaf.shape[-2], 'model')
      if leaf.shape[stacked] == cache.length.shape[-1]:
        spec[stacked] = fit(leaf.shape[stacked], 'data')
    return NamedSharding(mesh, PartitionSpec(*spec))

  found = jax.tree.map(of, cache)
  return cache.in_host(found) if hasattr(cache, 'in_host') else found
