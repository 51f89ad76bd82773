"""Double Sparsity with its keys and values in host memory.

Yang et al., 2024, https://arxiv.org/abs/2408.07092.

  device   labels of all tokens; keys and values of the dense layers
  host     keys and values of the sparse layers, all tokens (pinned_host)
  a step   s = q[C] label; the best tokens; the host gathers their rows, and
           only these cross: 2 B Hkv heavy_tokens D values a layer, whatever the
           length, and those of the new token back

Layers are scanned, and a scan slices what it scans: a layer cut out of host
memory would cross whole. So `Tokens` holds the layers of a run as they lie, is
handed to all of them uncut, and a layer puts its own number before the rows it
asks for. A prompt in pieces, whose tokens attend to all of those before, reads
them from the host block by block.

predict: the rows of layer l + 1 are asked for while layer l runs, with the
query that its projection makes of layer l's attention input,

  q' = RoPE(W_q[l+1] x_l)        x_l under the norm of layer l, by construction

so that they can cross beside layer l's attention and MLP, on which they do not
depend; the schedule that libtpu gives with JAX 0.10.2 still waits for the host
at once. Two buffers of rows, one read and one arriving, are what the scan
carries. Layers 0 and 1, the first and the last of a run and those of
`exact_layers` ask with their own query; what came for them is dropped. Which
layers can be predicted is measured: python -m benchmarks.kv_prediction.
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
  labels,
  quest,
  softmax,
  stores,
)
from pallas_kernels import compat

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
_UNSTABLE = 2  # First layers, whose inputs say nothing of the next.


@flax.struct.dataclass
class Tokens:
  """Keys and values of the layers of a run, never sliced by layer.

  near_k, near_v (N, B, S, Hkv, D): of the N dense layers, which come first, on
  the device; None: there are none. far_k, far_v: of the others, on the host.
  """

  near_k: jax.Array | None
  near_v: jax.Array | None
  far_k: jax.Array
  far_v: jax.Array


@flax.struct.dataclass
class Rows:
  """Tokens that were chosen: k, v (B, R, H', D), at (B, R, H'), -1: none."""

  k: jax.Array
  v: jax.Array
  at: jax.Array


@flax.struct.dataclass
class Shared:
  """What all layers of a run are handed whole.

  tokens: the keys and values. layers: the caches of all layers, for a look at
  the labels of the next; None without `predict`. query: variables of the query
  projections of all layers, from the model; None: nothing is predicted.
  """

  tokens: Tokens
  layers: Any = None
  query: Any = None

  def ahead(self, T: int) -> Rows | None:
    """An empty buffer for a step of T tokens; None: nothing is predicted."""
    if self.layers is None or T > 1 or self.layers.reads_all:
      return None
    rows: Rows = self.layers.no_rows()
    return rows


@flax.struct.dataclass
class OffloadedCache:
  """One layer, or a stack of them; see the module docstring.

  label: a store of labels. channels (Hkv, r) int32. layer: () int32 in its run.
  predicted: () whether its rows were asked for by the layer before. length
  (B,) int32. In a scan `tokens` is None until `joined`. near: dense layers of
  the run. ahead: the rows that were predicted.
  """

  tokens: Tokens | None
  label: Any
  channels: jax.Array
  layer: jax.Array
  predicted: jax.Array
  length: jax.Array
  ahead: Rows | None = None
  beyond: Shared | None = None
  near: int = flax.struct.field(pytree_node=False, default=0)
  shape: Any = flax.struct.field(pytree_node=False, default=None)
  config: Any = flax.struct.field(pytree_node=False, default=None)

  @property
  def appends_stacks(self) -> bool:
    """Whether `append` takes a stack at once, as host memory asks for."""
    return True

  @property
  def capacity(self) -> int:
    """S."""
    return int(self.shape.capacity)

  @property
  def elements(self) -> int:
    """Elements of a token's keys."""
    return int(self.shape.kv_heads * self.shape.head_dim)

  @property
  def sizes(self) -> tuple[int, int]:
    """B, Hkv."""
    return self.length.shape[-1], self.channels.shape[-2]

  @property
  def dtype(self) -> Any:
    """Of keys and values."""
    return self.shape.dtype

  @property
  def reads_all(self) -> bool:
    """Whether a row's tokens are never more than are read."""
    return bool(self.config.heavy_tokens >= self.capacity)

  def of_layers(self, layers: range) -> Any:
    """A stacked cache for these layers, the dense ones on the device."""
    c, count = self.config, len(layers)
    near = min(count, max(0, c.dense_layers - layers.start))
    if near == count:  # Nothing is read by label.
      plain = dataclasses.replace(
        c, offload=False, predict=False, exact_layers=()
      )
      stack = lambda a: jnp.stack([a] * count)
      return jax.tree.map(stack, plain.init(self.shape)).of_layers(layers)
    order = c.order(layers.stop, self.shape.kv_heads, self.shape.head_dim)
    r = self.channels.shape[-1]
    exact = {layers.start, layers.stop - 1, *range(_UNSTABLE), *c.exact_layers}
    predicted = [c.predict and i >= c.dense_layers for i in layers]
    return dataclasses.replace(
      self,
      tokens=_empty(self.shape, near, count - near),
      channels=jnp.asarray(order[layers.start :, :, :r], jnp.int32)[:count],
      layer=jnp.arange(count, dtype=jnp.int32),
      predicted=jnp.asarray(
        [p and i not in exact for i, p in zip(layers, predicted, strict=True)]
      ),
      near=near,
    )

  def split(self) -> tuple['OffloadedCache', Shared]:
    """What a scan over the layers slices, and what it hands to all of them."""
    assert self.tokens is not None
    own = self.replace(tokens=None)  # type: ignore[attr-defined]
    layers = own if self.config.predict else None
    return own, Shared(tokens=self.tokens, layers=layers)

  def joined(self, shared: Shared, ahead: Rows | None) -> 'OffloadedCache':
    """A layer with what all layers share, and the rows that were predicted."""
    return dataclasses.replace(
      self, tokens=shared.tokens, ahead=ahead, beyond=shared
    )

  def attend(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    scoring: interface.Scoring,
  ) -> tuple[jax.Array, interface.Update]:
    """As interface.Cache says."""
    assert self.tokens is not None
    tokens, Hkv = self.tokens, self.channels.shape[0]
    interface.check_inputs(self, q, k, Hkv)
    queries = softmax.group(q, Hkv, scoring.scale)
    is_far = self.layer >= self.near

    def everything(of_k, of_v, layer, mine):  # No blocks unless it is mine.
      return softmax.attend_store(
        queries,
        positions,
        _Layer(of_k, layer),
        _Layer(of_v, layer),
        lambda at: contiguous.held(at, self.length),
        jnp.where(mine, jnp.max(self.length), 0),
        scoring,
      )

    def near():
      layer = jnp.minimum(self.layer, self.near - 1)
      return everything(tokens.near_k, tokens.near_v, layer, ~is_far)

    def far():
      layer = jnp.maximum(self.layer - self.near, 0)
      of_k, of_v = _hosted(tokens.far_k), _hosted(tokens.far_v)
      return everything(of_k, of_v, layer, is_far)

    def chosen():
      rows = self._rows(queries[:, :, :, 0])
      return quest.attend_rows(
        queries,
        positions,
        stores.FloatStore(rows.k),
        stores.FloatStore(rows.v),
        jnp.where(is_far, rows.at, -1),
        scoring,
      )

    # Both parts, one of them of nothing, and no branch: see _when.
    everywhere = q.shape[1] > 1 or self.reads_all
    cached = far() if everywhere else chosen()
    if self.near:
      cached = softmax.merge(near(), cached)
    own = kernel.attend_own(q, k, v, positions, scoring)
    out = softmax.finish(softmax.merge(cached, own), q.dtype)
    return out, interface.Update(k=k, v=v)

  def fetch(self, queries: jax.Array) -> Rows:
    """The rows that queries (B, Hkv, G, D) of one token choose, by the host."""
    assert self.tokens is not None
    index, some = labels.select(self, queries)  # (B, H', R)
    index, some = (a.transpose(0, 2, 1) for a in (index, some))
    B, Hkv = self.sizes
    heads = jnp.arange(index.shape[2]) // (index.shape[2] // Hkv)
    at = jnp.stack(
      jnp.broadcast_arrays(
        jnp.maximum(self.layer - self.near, 0),
        jnp.arange(B)[:, None, None],
        index,
        heads[None, None],
      ),
      axis=-1,
    ).astype(jnp.int32)  # (B, R, H', 4): layer, row, slot and head.
    k, v = compat.on_host(
      _gather,
      _hosted(self.tokens.far_k),
      _hosted(self.tokens.far_v),
      jax.device_put(at, HOST),
    )
    k, v = (jax.device_put(a, DEVICE) for a in (k, v))
    return Rows(k=k, v=v, at=jnp.where(some, index, -1))

  def fetch_ahead(self, q: jax.Array, scale: float | None) -> Rows:
    """What the next layer of the run will read.

    Args:
      q: (B, 1, H, D), the query predicted for it.
      scale: of the scores; None is 1 / sqrt(D).
    """
    assert self.beyond is not None and self.ahead is not None
    layers, count = self.beyond.layers, self.beyond.layers.layer.shape[0]
    last = jnp.minimum(self.layer + 1, count - 1)
    following = jax.tree.map(lambda a: _at(a, last), layers)
    following = following.joined(self.beyond, None)
    queries = softmax.group(q, self.channels.shape[0], scale)[:, :, :, 0]
    # Also where the next layer asks for itself: a fetch that depends on nothing
    # of this layer's own attention is one that a compiler can hide behind it.
    return following.fetch(queries)

  def next_query(self) -> Any:
    """Variables of the next layer's query projection."""
    assert self.beyond is not None
    last = self.beyond.layers.layer.shape[0] - 1
    return jax.tree.map(
      lambda a: _at(a, jnp.minimum(self.layer + 1, last)), self.beyond.query
    )

  def append(
    self, update: interface.Update, length: jax.Array, counts: jax.Array
  ) -> 'OffloadedCache':
    """As interface.Cache says; of one layer, or of the stack at once."""
    assert self.tokens is not None
    stacked = self.length.ndim == 2
    k, v = (a if stacked else a[None] for a in (update.k, update.v))
    where = contiguous.new_slots(length, counts, k.shape[2], self.capacity)
    put = jax.vmap(labels.put, (0, 0, 0, None)) if stacked else labels.put
    tokens, near = self.tokens, self.near
    scatter = jax.vmap(stores.scatter, (0, 0, None))
    if tokens.near_k is not None and tokens.near_v is not None:
      tokens = dataclasses.replace(
        tokens,
        near_k=scatter(tokens.near_k, k[:near], where),
        near_v=scatter(tokens.near_v, v[:near], where),
      )
    rows = jnp.broadcast_to(jnp.arange(where.shape[0])[:, None], where.shape)
    at = jnp.stack([rows, where], axis=-1).astype(jnp.int32)
    far_k, far_v = compat.on_host(
      _scatter,
      _hosted(tokens.far_k),
      _hosted(tokens.far_v),
      *(
        jax.device_put(a, HOST)
        for a in (
          k[near:].astype(self.dtype),
          v[near:].astype(self.dtype),
          at,
        )
      ),
    )
    return dataclasses.replace(
      self,
      tokens=dataclasses.replace(tokens, far_k=far_k, far_v=far_v),
      label=put(self.label, self.channels, update.k, where),
      length=jnp.broadcast_to(length + counts, self.length.shape),
    )

  def in_host(self, shardings: Any) -> Any:
    """The shardings with the memory that what they are of lies in."""
    tokens = shardings.tokens
    far_k, far_v = (
      s.with_memory_kind('pinned_host') for s in (tokens.far_k, tokens.far_v)
    )
    tokens = dataclasses.replace(tokens, far_k=far_k, far_v=far_v)
    return dataclasses.replace(shardings, tokens=tokens)

  def _rows(self, queries):
    """The rows that this layer reads: those predicted, or its own."""
    own = self.layer >= self.near
    if self.ahead is not None:
      return _when(
        own & ~self.predicted, lambda: self.fetch(queries), self.ahead
      )
    if not self.near:
      return self.fetch(queries)
    return _when(own, lambda: self.fetch(queries), self.no_rows())

  def no_rows(self) -> Rows:
    """An empty buffer."""
    (B, Hkv), D = self.sizes, self.shape.head_dim
    heads = Hkv if self.config.group_by == 'kv_head' else self.shape.heads
    rows = (B, self.config.heavy_tokens, heads)
    empty = jnp.zeros((*rows, D), self.dtype)
    return Rows(k=empty, v=empty, at=jnp.full(rows, -1, jnp.int32))


def init(
  config: Any, shape: interface.CacheShape, label: Any, channels: jax.Array
) -> OffloadedCache:
  """An empty cache of one sparse layer.

  Args:
    config: a DoubleSparsityConfig.
    shape: what it is for.
    label: an empty store of labels.
    channels: (Hkv, r) int32.
  """
  return OffloadedCache(
    tokens=_empty(shape, 0, 1),
    label=label,
    channels=channels,
    layer=jnp.zeros((), jnp.int32),
    predicted=jnp.zeros((), bool),
    length=jnp.zeros((shape.batch,), jnp.int32),
    shape=shape,
    config=config,
  )


def device_nbytes(cache: Any) -> int:
  """Exact bytes of the leaves, which are arrays, that lie on the device."""
  leaves = jax.tree.leaves(cache)
  return sum(
    leaf.nbytes for leaf in leaves if jax.typeof(leaf).memory_space != HOST
  )


@dataclasses.dataclass(frozen=True)
class _Layer:
  """Layer `layer` of x (L, B, S, Hkv, D), anywhere, as a store to read."""

  x: jax.Array
  layer: jax.Array

  @property
  def slots(self) -> int:
    return self.x.shape[2]

  def _block(self, first, size):
    _, B, _, Hkv, D = self.x.shape
    zero = jnp.zeros((), jnp.int32)
    start = (self.layer, zero, jnp.asarray(first, jnp.int32), zero, zero)
    block = jax.lax.dynamic_slice(self.x, start, (1, B, size, Hkv, D))
    if jax.typeof(block).memory_space == HOST:
      block = jax.device_put(block, DEVICE)
    return block[0].astype(jnp.float32)

  def scores(self, q, first, size):
    return jnp.einsum('bkgtd,bskd->bkgts', q, self._block(first, size))

  def combine(self, p, first, size):
    return jnp.einsum('bkgts,bskd->bkgtd', p, self._block(first, size))


def _empty(shape: interface.CacheShape, near: int, far: int) -> Tokens:
  """Zeros for so many layers; the host's are made there."""
  size = (shape.batch, shape.capacity, shape.kv_heads, shape.head_dim)
  far_k, far_v = (
    compat.on_host(lambda: jnp.zeros((far, *size), shape.dtype))
    for _ in range(2)
  )
  near_k, near_v = (
    jnp.zeros((near, *size), shape.dtype) if near else None for _ in range(2)
  )
  return Tokens(near_k=near_k, near_v=near_v, far_k=far_k, far_v=far_v)


def _when(flag: jax.Array, f: Any, otherwise: Rows) -> Rows:
  """f() or otherwise, as a loop of one turn or of none.

  XLA follows host memory into loops; in a branch it may refuse it.
  """
  turns = flag.astype(jnp.int32)
  found: Rows = jax.lax.fori_loop(0, turns, lambda i, rows: f(), otherwise)
  return found


def _hosted(x: jax.Array) -> jax.Array:
  """x, for the types, in host memory, where shapes alone did not say so."""
  there = jax.typeof(x).memory_space == HOST
  return x if there else jax.device_put(x, HOST)


def _at(a: jax.Array, i: jax.Array) -> jax.Array:
  """a[i], i traced."""
  return jax.lax.dynamic_index_in_dim(a, i, keepdims=False)


def _gather(k, v, at):
  """k, v (L, B, S, Hkv, D), at (B, R, H', 4) -> (B, R, H', D) of both.

  Nothing but its arguments: a constant would lie on the device.
  """
  dims = jax.lax.GatherDimensionNumbers(
    offset_dims=(3,),
    collapsed_slice_dims=(0, 1, 2, 3),
    start_index_map=(0, 1, 2, 3),
  )
  mode = jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
  one = (1, 1, 1, 1, k.shape[-1])
  return tuple(jax.lax.gather(a, at, dims, one, mode=mode) for a in (k, v))


def _scatter(k, v, new_k, new_v, at):
  """new (L, B, T, Hkv, D) into k and v at (B, T, 2); past the end: none.

  Short floats as bits, for the reason that stores.scatter gives.
  """
  dims = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(0, 3, 4),
    inserted_window_dims=(1, 2),
    scatter_dims_to_operand_dims=(1, 2),
  )
  mode = jax.lax.GatherScatterMode.FILL_OR_DROP

  def put(a, new):
    dtype = a.dtype
    if dtype.itemsize == 2:
      a, new = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (a, new))
    a = jax.lax.scatter(a, at, new, dims, mode=mode)
    return jax.lax.bitcast_convert_type(a, dtype) if dtype != a.dtype else a

  return put(k, new_k), put(v, new_v)
