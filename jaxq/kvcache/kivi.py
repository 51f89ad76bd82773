"""KIVI: keys per channel, values per token; and what OScaR adds to it.

Liu et al., 2024, https://arxiv.org/abs/2402.02750.

  keys     groups of g tokens of one channel share scale and offset
  values   groups of g channels of one token do
  newest   up to R tokens stay in full precision (jaxq.kvcache.residual)

Keys have a few channels that are large in every token. A scale per token must
cover them and rounds all others to nothing; a scale per channel isolates them.
Values have no such channels, and tokens of unlike size. Bits per element: b +
32 / g, thus 3.0 at 2 bits and g = 32, beside the residual.

Three flags make OScaR (jaxq.kvcache.oscar) of it, one by one for ablations:
`rotate` turns queries and keys, `token_scale` divides a key by its norm and
multiplies its scores, `value_rotation` turns values.

Departures: a block of R tokens is quantized at once, keys and values alike; the
reference moves its values one token at a time, so that its residual of values
is R tokens longer on average. Codes are made with the scale and offset as they
are stored. A token's own step sees it, and the block it may complete, in full
precision.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxq.kvcache import (
  interface,
  kernel,
  layers,
  residual,
  rotation,
  softmax,
  stores,
)

BITS = (1, 2, 3, 4, 8, 16)
NORM_SCOPES = ('head', 'token')
VALUE_ROTATIONS = ('folded', 'none', 'online')


@dataclasses.dataclass(frozen=True, kw_only=True)
class KiviConfig:
  """Attributes.

  bits, value_bits: of keys and values, 16 keeps them as they are; value_bits
    None: as keys.
  group_size: tokens of a key group. value_group_size: channels of a value
    group; None: as keys, but no more than a head.
  residual: R, a multiple of group_size.
  mode: 'minimum' or 'integer' (jaxq.kvcache.stores).
  rotate: whether queries and keys are rotated.
  token_scale: whether keys are divided by their norms.
  norm_scope: 'token', one norm for all heads; 'head', one for each, which needs
    no sum over devices that share the heads.
  value_rotation: 'online'; 'folded', where the model's weights hold it
    (oscar.fold_value_rotation); 'none'.
  scale_dtype, norm_dtype: as stored. clip: times the range.
  """

  bits: int = 2
  value_bits: int | None = None
  group_size: int = 32
  value_group_size: int | None = None
  residual: int = 128
  mode: str = 'minimum'
  rotate: bool = False
  token_scale: bool = False
  norm_scope: str = 'token'
  value_rotation: str = 'none'
  scale_dtype: str = 'float16'
  norm_dtype: str = 'float32'
  clip: float = 1.0

  def __post_init__(self):
    for name, allowed in (
      ('bits', BITS),
      ('value_bits', (None, *BITS)),
      ('norm_scope', NORM_SCOPES),
      ('value_rotation', VALUE_ROTATIONS),
      ('mode', ('integer', 'minimum')),
      ('norm_dtype', stores.SCALE_DTYPES),
      ('scale_dtype', stores.SCALE_DTYPES),
    ):
      if getattr(self, name) not in allowed:
        texts = sorted(str(a) for a in allowed)
        raise ValueError(
          f'kivi: {name}={getattr(self, name)!r}; allowed {texts}.'
        )
    for name in ('group_size', 'residual', 'value_group_size'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'kivi: {name}={value}; it must be at least 1.')
    if self.residual % self.group_size:
      raise ValueError(
        f'kivi: residual={self.residual}, group_size={self.group_size}; a '
        'residual window is whole groups. Give a multiple of '
        f'{self.group_size}.'
      )

  def init(self, shape: interface.CacheShape) -> 'KiviCache':
    """An empty cache.

    Raises:
      ValueError: a head that cannot be grouped, packed or rotated.
    """
    if self.rotate or self.value_rotation == 'online':
      rotation.check(shape.head_dim)
    slots = residual.slots_of(self.residual, shape.capacity)
    k = self._store(shape, slots, self.bits, self.group_size, 1)
    if self.token_scale:
      heads = shape.kv_heads if self.norm_scope == 'head' else 1
      norm = jnp.zeros((shape.batch, slots, heads, 1), self.norm_dtype)
      k = stores.NormedStore(k, norm)
    return self.around(shape, k)

  def around(self, shape: interface.CacheShape, k: Any) -> 'KiviCache':
    """An empty cache of this empty store of keys, with values as configured.

    Args:
      shape: what it is for.
      k: of residual.slots_of slots, which encodes whole groups of tokens.
    """
    channels = self.value_group_size or min(self.group_size, shape.head_dim)
    bits = self.bits if self.value_bits is None else self.value_bits
    window = (shape.batch, self.residual, shape.kv_heads, shape.head_dim)
    return KiviCache(
      k=k,
      v=self._store(shape, k.slots, bits, 1, channels),
      k_residual=jnp.zeros(window, shape.dtype),
      v_residual=jnp.zeros(window, shape.dtype),
      length=jnp.zeros((shape.batch,), jnp.int32),
      config=self,
      capacity=shape.capacity,
    )

  def _store(self, shape, slots, bits, tokens, channels) -> Any:
    if bits == 16:
      return stores.float_store(shape, slots)
    grid = stores.Grid(
      bits=bits,
      tokens=tokens,
      channels=channels,
      mode=self.mode,
      scale_dtype=self.scale_dtype,
      clip=self.clip,
    )
    return stores.int_store(shape, slots, grid)


@flax.struct.dataclass
class KiviCache:
  """k, v: stores of committed tokens, slot t of position t.

  k_residual, v_residual: (B, R, Hkv, D), rotated. length: (B,) int32.
  """

  k: Any
  v: Any
  k_residual: jax.Array
  v_residual: jax.Array
  length: jax.Array
  config: KiviConfig = flax.struct.field(pytree_node=False)
  capacity: int = flax.struct.field(pytree_node=False)

  @property
  def elements(self) -> int:
    """Elements of a token's keys."""
    return self.k_residual.shape[-2] * self.k_residual.shape[-1]

  def split(self) -> tuple[layers.Own, layers.Whole]:
    """As interface.split says: layers read the stack where it lies."""
    return layers.split(self)

  def attend(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    scoring: interface.Scoring,
  ) -> tuple[jax.Array, interface.Update]:
    """As interface.Cache says."""
    R, Hkv = self.k_residual.shape[1:3]
    interface.check_inputs(self, q, k, Hkv)
    of_keys, of_values = self._rotations()
    q, k = rotation.turn(of_keys, q), rotation.turn(of_keys, k)
    v = rotation.turn(of_values, v)
    queries = softmax.group(q, Hkv, scoring.scale)
    committed = self.length // R * R
    plain = lambda: softmax.attend_store(
      queries,
      positions,
      self.k,
      self.v,
      lambda slots: residual.committed(slots, self.length, R),
      jnp.max(committed),
      scoring,
      unit=self.config.group_size,
    )
    stored = kernel.attend(
      q, positions, self.k, self.v, committed, scoring, plain
    )
    window = softmax.attend_store(
      queries,
      positions,
      stores.FloatStore(self.k_residual),
      stores.FloatStore(self.v_residual),
      lambda slots: residual.held(slots, self.length, R),
      jnp.max(self.length % R),
      scoring,
      block=R,
    )
    own = kernel.attend_own(q, k, v, positions, scoring)
    state = softmax.merge(softmax.merge(stored, window), own)
    out = rotation.turn_back(of_values, softmax.finish(state, q.dtype))
    return out, interface.Update(k=k, v=v)

  def append(
    self, update: interface.Update, length: jax.Array, counts: jax.Array
  ) -> 'KiviCache':
    """As interface.Cache says."""
    R, T = self.k_residual.shape[1], update.k.shape[1]
    positions = residual.block_positions(length, T, R)
    complete = positions < ((length + counts) // R * R)[:, None]

    def encode():
      k = residual.contents(self.k_residual, update.k, length)
      v = residual.contents(self.v_residual, update.v, length)
      return self.k.encode(k), self.v.encode(v)

    k, v = residual.encode_if(complete, encode)
    slots = jnp.where(complete, positions, self.k.slots)
    return dataclasses.replace(
      self,
      k=self.k.put(k, slots, R),
      v=self.v.put(v, slots, R),
      k_residual=residual.keep(self.k_residual, update.k, length, counts),
      v_residual=residual.keep(self.v_residual, update.v, length, counts),
      length=length + counts,
    )

  def _rotations(self):
    """Of queries and keys, and of values: None where there is none."""
    plain = rotation.Rotation()
    return (
      plain if self.config.rotate else None,
      plain if self.config.value_rotation == 'online' else None,
    )
