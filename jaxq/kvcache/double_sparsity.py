"""Double Sparsity: a few key channels say which tokens to read.

Yang et al., 2024, https://arxiv.org/abs/2408.07092.

  offline   C_h: the r channels of a head whose mean |q_j k_j| is largest
  label     k[C_h] of every token, in a few bits, beside the cache
  a step    s_t = q[C_h] label_t;  the `heavy_tokens` best tokens are read
  output    softmax(q K' / sqrt(D)) V' over them and the new tokens, exactly

Few channels carry most of q k, and which is a property of the model: sets made
from two texts agree. At 4 bits and D / 4 channels the codes of the labels are
1/16 of the keys, beside a scale and minimum of 16 bits each per token and head.
Traffic is saved, not capacity.

The channels come from jaxq.kvcache.label_channels: python -m
experiments.label_channels makes the file that `channels` names. 'random' in its
place draws them: the control.

Key heads are what tokens are chosen for ('kv_head': the query heads that share
one vote with their softmaxes), or query heads ('q_head', as in the reference).
New tokens are always seen. Departures: the query is not rounded with the
labels, and these are really kept in `label_bits`. Keys and values stay on the
device, or in host memory with `offload` (jaxq.kvcache.offload).
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxq.kvcache import (
  contiguous,
  interface,
  kernel,
  label_channels,
  labels,
  offload,
  quest,
  slots,
  softmax,
  stores,
)

LABEL_BITS = (2, 4, 8, 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoubleSparsityConfig:
  """Attributes.

  channels: file of label_channels.save, or 'random'.
  heavy_tokens: tokens that are read beside the new ones.
  group_factor: D over the channels of a label.
  label_bits: of a label's channel, of LABEL_BITS; 16 keeps them as they are.
  dense_layers: first layers that read everything.
  min_length: rows that are shorter read everything.
  sinks: first tokens that are always read. recent: newest.
  group_by: of quest.GROUPS. dense_prefill: as quest's.
  inner: what tokens are kept in, of slots.INNER.
  seed: of channels='random'.
  offload: whether keys and values of layers that are not dense lie in host
    memory; the device holds their labels and what a step reads.
  predict: with offload, whether a layer's tokens are asked for by the one
    before, with a guess of its query.
  exact_layers: layers that are not guessed.
  """

  channels: str = ''
  heavy_tokens: int = 256
  group_factor: int = 4
  label_bits: int = 4
  dense_layers: int = 2
  min_length: int = 0
  sinks: int = 0
  recent: int = 0
  group_by: str = 'kv_head'
  dense_prefill: bool = True
  inner: str = 'contiguous'
  seed: int = 0
  offload: bool = False
  predict: bool = False
  exact_layers: tuple[int, ...] = ()

  def __post_init__(self):
    slots.check_inner('double_sparsity', self.inner)
    quest.check_group('double_sparsity', self.group_by)
    if self.label_bits not in LABEL_BITS:
      raise ValueError(
        f'double_sparsity: label_bits={self.label_bits}; allowed '
        f'{sorted(LABEL_BITS)}.'
      )
    for name, least in (
      ('heavy_tokens', 1),
      ('group_factor', 1),
      ('dense_layers', 0),
      ('min_length', 0),
      ('sinks', 0),
      ('recent', 0),
    ):
      if getattr(self, name) < least:
        raise ValueError(
          f'double_sparsity: {name}={getattr(self, name)}; it must be at least '
          f'{least}.'
        )
    if self.sinks + self.recent > self.heavy_tokens:
      raise ValueError(
        f'double_sparsity: sinks={self.sinks} and recent={self.recent} of '
        f'heavy_tokens={self.heavy_tokens}; they are part of them. Lower them.'
      )
    self._check_offload()

  def _check_offload(self):
    if self.predict and not self.offload:
      raise ValueError(
        'double_sparsity: predict=True, offload=False; a prediction hides the '
        'way from host memory. Use both, or none.'
      )
    if self.exact_layers and not self.predict:
      raise ValueError(
        f'double_sparsity: exact_layers={self.exact_layers}, predict=False; '
        'they are those that are not predicted. Leave them out.'
      )
    if not self.offload:
      return
    for name, allowed, why in (
      ('inner', 'contiguous', 'the host gathers rows and does not decode them'),
      ('min_length', 0, 'reading all of a short row would move the cache'),
      ('dense_prefill', True, 'masking would move the cache for every chunk'),
    ):
      if getattr(self, name) != allowed:
        raise ValueError(
          f'double_sparsity: offload=True, {name}={getattr(self, name)!r}; '
          f'allowed {allowed!r}: {why}. Leave it out, or offload=false.'
        )

  def init(self, shape: interface.CacheShape) -> Any:
    """An empty cache; contiguous for a layer that has a window anyway.

    Raises:
      ValueError: no channels, or of other heads; group_factor does not divide
        a head; more heavy tokens than the capacity.
    """
    quest.check_budget('double_sparsity', self.heavy_tokens, shape.capacity)
    D = shape.head_dim
    if D % self.group_factor:
      raise ValueError(
        f'double_sparsity: head_dim={D}, group_factor={self.group_factor}; a '
        f'label has head_dim / group_factor channels. Use a divisor of {D}.'
      )
    if shape.window is not None:
      return contiguous.ContiguousConfig().init(shape)
    r = D // self.group_factor
    order = self.order(1, shape.kv_heads, D)
    channels = jnp.asarray(order[0, :, :r], jnp.int32)
    short = dataclasses.replace(shape, head_dim=r)
    label: Any = stores.float_store(short, shape.capacity)
    if self.label_bits < 16:
      grid = stores.Grid(bits=self.label_bits)
      label = stores.int_store(short, shape.capacity, grid)
    if self.offload:
      return offload.init(self, shape, label, channels)
    k, v = slots.make(self.inner, shape, shape.capacity)
    return DoubleSparseCache(
      k=k,
      v=v,
      label=label,
      channels=channels,
      sparse=jnp.ones((), bool),
      length=jnp.zeros((shape.batch,), jnp.int32),
      elements=shape.kv_heads * D,
      head_dim=D,
      config=self,
    )

  def order(self, layers: int, heads: int, D: int) -> np.ndarray:
    """Channels of every layer and head, the best first: (layers, heads, D).

    Raises:
      ValueError: no channels, or of fewer layers or other heads.
    """
    if self.channels == 'random':
      rng = np.random.default_rng(self.seed)
      return np.argsort(rng.random((layers, heads, D)), axis=-1)
    if not self.channels:
      raise ValueError(
        "double_sparsity: channels=''; a label needs channels that were "
        'calibrated on this model. Make them with python -m '
        'experiments.label_channels and give the file, or channels=random.'
      )
    found = label_channels.load(self.channels)
    if found.shape[0] < layers or found.shape[1:] != (heads, D):
      raise ValueError(
        f'{self.channels}: channels of {found.shape[0]} layers, '
        f'{found.shape[1]} key heads of {found.shape[2]}; the model has '
        f'{layers} layers or more, {heads} heads of {D}. Calibrate this model.'
      )
    return found


@flax.struct.dataclass
class DoubleSparseCache:
  """k, v, label: stores, slot t of position t; label has r channels.

  channels: (Hkv, r) int32. sparse: (), false in layers that read everything.
  length: (B,) int32.
  """

  k: Any
  v: Any
  label: Any
  channels: jax.Array
  sparse: jax.Array
  length: jax.Array
  elements: int = flax.struct.field(pytree_node=False)
  head_dim: int = flax.struct.field(pytree_node=False)
  config: DoubleSparsityConfig = flax.struct.field(pytree_node=False)

  @property
  def capacity(self) -> int:
    """S."""
    return self.k.slots

  def of_layers(self, layers: range) -> 'DoubleSparseCache':
    """A stacked cache with the channels of these layers."""
    c, (_, Hkv, r) = self.config, self.channels.shape
    order = c.order(layers.stop, Hkv, self.head_dim)
    own = order[layers.start : layers.stop, :, :r]
    return dataclasses.replace(
      self,
      channels=jnp.asarray(own, jnp.int32),
      sparse=jnp.asarray([i >= c.dense_layers for i in layers]),
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
    Hkv = self.channels.shape[0]
    interface.check_inputs(self, q, k, Hkv)
    queries = softmax.group(q, Hkv, scoring.scale)

    def dense():
      return quest.attend_all(self, queries, positions, scoring)

    def chosen():
      index, held = self.select(queries[:, :, :, 0])
      short = self.length < self.config.min_length
      index, held = (a.transpose(0, 2, 1) for a in (index, held))
      part = quest.attend_chosen(self, queries, positions, index, held, scoring)
      if not self.config.min_length:
        return part
      whole = dense()
      pick = short[:, None, None, None, None]
      return jax.tree.map(lambda a, b: jnp.where(pick, a, b), whole, part)

    def masked():
      ranked = labels.rank(self, queries)  # (B, Hkv, 1 or G, T, S)
      seen = quest.top(ranked, self.config.heavy_tokens)
      short = (self.length < self.config.min_length)[:, None, None, None, None]
      seen |= quest.holds(self, self.k.slots) & short
      return slots.attend_masked(queries, self.k, self.v, seen, scoring)

    cached = quest.by_step(
      self, q.shape[1], self.config.heavy_tokens, dense, chosen, masked
    )
    own = kernel.attend_own(q, k, v, positions, scoring)
    out = softmax.finish(softmax.merge(cached, own), q.dtype)
    return out, interface.Update(k=k, v=v)

  def select(self, queries: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Queries of one token (B, Hkv, G, D) -> tokens, and whether they are any.

    (B, H', heavy_tokens) both; H' is Hkv or H as `group_by` says.
    """
    return labels.select(self, queries)

  def append(
    self, update: interface.Update, length: jax.Array, counts: jax.Array
  ) -> 'DoubleSparseCache':
    """As interface.Cache says."""
    where = contiguous.new_slots(
      length, counts, update.k.shape[1], self.capacity
    )
    return dataclasses.replace(
      self,
      k=self.k.put(self.k.encode(update.k), where),
      v=self.v.put(self.v.encode(update.v), where),
      label=labels.put(self.label, self.channels, update.k, where),
      length=length + counts,
    )
