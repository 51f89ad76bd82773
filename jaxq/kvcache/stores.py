"""Stores: arrays that hold the keys or the values of tokens, in some format.

  encoded = store.encode(x (B, T, Hkv, D))        pure, no slots yet
  store   = store.put(encoded, slots (B, T))      slots past the end are dropped
            (run=R: they are whole runs of R slots, one behind the other)
  scores  = store.scores(q, first, size)          q K^T of a run of slots
  out     = store.combine(p, first, size)         p V of them

Scales never touch a cache-sized array. With x ~ scale * code + offset:

  K per channel   q x_t = (q scale_g) code_t + q offset_g    q scaled per group
  K per token     q x_t = scale_t (q code_t) + offset_t sum(q)
  V per token     p x   = (p scale) code + (p offset) 1
  V in groups of channels   scale on the codes of one block; offset as above

Codes are packed along channels, planar (jaxq.numerics.packing): byte j of a
token holds channels j, j + D/4, j + D/2, ... at 2 bits. Encoding and putting
are apart so that a cache can encode in one branch of a `lax.cond` and put, in
place, outside.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxq.kvcache import interface
from jaxq.numerics import packing
from pallas_kernels import targets
from pallas_kernels.cache_append import api as cache_append

BITS = (1, 2, 3, 4, 5, 6, 7, 8)
MODES = ('integer', 'minimum', 'symmetric')
SCALE_DTYPES = ('bfloat16', 'float16', 'float32')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
  """How values become codes.

  bits: of a code.
  tokens, channels: values that share a scale, in both directions; channels=-1
    is all of a head.
  mode: 'minimum': x ~ scale * code + min. 'integer': the same, min moved to a
    multiple of the scale, of any size (an unclamped zero point). 'symmetric':
    no offset.
  scale_dtype: as stored; codes are made with the rounded scale.
  clip: times the range.
  """

  bits: int
  tokens: int = 1
  channels: int = -1
  mode: str = 'minimum'
  scale_dtype: str = 'float16'
  clip: float = 1.0

  def __post_init__(self):
    for name, allowed in (
      ('bits', BITS),
      ('mode', MODES),
      ('scale_dtype', SCALE_DTYPES),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'kvcache: {name}={getattr(self, name)!r}; allowed {sorted(allowed)}.'
        )
    if self.mode == 'symmetric' and self.bits < 2:
      raise ValueError(
        "kvcache: bits=1 with mode='symmetric'; its grid needs 2 bits. Use "
        "mode='minimum'."
      )

  @property
  def qmax(self) -> int:
    """The largest code; of a symmetric grid, counted from its middle."""
    if self.mode == 'symmetric':
      return 2 ** (self.bits - 1) - 1
    return 2**self.bits - 1


@flax.struct.dataclass
class Encoded:
  """codes (B, T, Hkv, packed); scale, offset (B, T / tokens, Hkv, groups)."""

  codes: jax.Array
  scale: jax.Array
  offset: jax.Array | None


@flax.struct.dataclass
class IntStore:
  """Integer codes with scales; see the module docstring.

  codes (B, S, Hkv, D * bits / 8) uint8; scale, offset (B, S / tokens, Hkv, D /
  channels) of grid.scale_dtype, offset None for symmetric grids.
  """

  codes: jax.Array
  scale: jax.Array
  offset: jax.Array | None
  grid: Grid = flax.struct.field(pytree_node=False)
  head_dim: int = flax.struct.field(pytree_node=False)

  @property
  def slots(self) -> int:
    """S."""
    return self.codes.shape[-3]

  def encode(self, x: jax.Array) -> Encoded:
    """x (B, T, Hkv, D), T a multiple of the grid's tokens -> Encoded."""
    codes, scale, offset = quantize(x, self.grid)
    return Encoded(pack(codes, self.grid.bits), scale, offset)

  def put(self, encoded: Encoded, slots: jax.Array, run: int = 1) -> 'IntStore':
    """Writes to slots (B, T), which lie in whole groups of tokens."""
    groups = slots[:, :: self.grid.tokens] // self.grid.tokens
    of_groups = max(run // self.grid.tokens, 1)
    offset = self.offset
    if offset is not None and encoded.offset is not None:
      offset = write(offset, encoded.offset, groups, of_groups)
    return dataclasses.replace(
      self,
      codes=write(self.codes, encoded.codes, slots, run),
      scale=write(self.scale, encoded.scale, groups, of_groups),
      offset=offset,
    )

  def values(self, first: Any, size: int) -> jax.Array:
    """Decoded (B, size, Hkv, D) float32: for tests and small runs of slots."""
    codes, scale, offset = self._block(first, size)
    scale = _spread(scale, codes.shape)
    out = codes * scale
    return out if offset is None else out + _spread(offset, codes.shape)

  def scores(self, q: jax.Array, first: Any, size: int) -> jax.Array:
    """q (B, Hkv, G, T, D) -> (B, Hkv, G, T, size)."""
    codes, scale, offset = self._block(first, size)
    B, _, Hkv, D = codes.shape
    n, m = scale.shape[1], scale.shape[3]
    if m == D and self.grid.tokens > 1:  # Per channel.
      codes = codes.reshape(B, n, size // n, Hkv, D)
      scaled = jnp.einsum('bkgtd,bnkd->bkngtd', q, scale)
      out = jnp.einsum('bkngtd,bnikd->bkgtni', scaled, codes)
      if offset is not None:
        out = out + jnp.einsum('bkgtd,bnkd->bkgtn', q, offset)[..., None]
      return out.reshape(*q.shape[:-1], size)
    per_token = self.grid.tokens == 1 and m == 1
    if not per_token:
      codes = codes * _spread(scale, codes.shape)
    out = jnp.einsum('bkgtd,bskd->bkgts', q, codes)
    if per_token:
      out = out * _columns(scale)
    if offset is not None:
      sums = q.reshape(*q.shape[:-1], m, D // m).sum(axis=-1)
      offset = jnp.repeat(offset, self.grid.tokens, axis=1)
      out = out + jnp.einsum('bkgtm,bskm->bkgts', sums, offset)
    return out

  def combine(self, p: jax.Array, first: Any, size: int) -> jax.Array:
    """p (B, Hkv, G, T, size) -> (B, Hkv, G, T, D)."""
    codes, scale, offset = self._block(first, size)
    D, m = codes.shape[3], scale.shape[3]
    if self.grid.tokens == 1 and m == 1:
      out = jnp.einsum('bkgts,bskd->bkgtd', p * _columns(scale), codes)
    else:
      codes = codes * _spread(scale, codes.shape)
      out = jnp.einsum('bkgts,bskd->bkgtd', p, codes)
    if offset is not None:
      offset = jnp.repeat(offset, self.grid.tokens, axis=1)
      shift = jnp.einsum('bkgts,bskm->bkgtm', p, offset)
      out = out + jnp.repeat(shift, D // m, axis=-1)
    return out

  def _block(self, first, size):
    """Codes as float32 (B, size, Hkv, D), scale, offset of a run of slots."""
    tokens = self.grid.tokens
    codes = unpack(take(self.codes, first, size), self.grid.bits, self.head_dim)
    codes = codes.astype(jnp.float32)
    if self.grid.mode == 'symmetric':
      codes = codes - self.grid.qmax

    def params(a):
      if a is None:
        return None
      return take(a, first // tokens, size // tokens).astype(jnp.float32)

    return codes, params(self.scale), params(self.offset)


@flax.struct.dataclass
class FloatStore:
  """Values as they are, in some floating dtype: x (B, S, Hkv, D)."""

  x: jax.Array

  @property
  def slots(self) -> int:
    """S."""
    return self.x.shape[-3]

  def encode(self, x: jax.Array) -> jax.Array:
    """x (B, T, Hkv, D) in the store's dtype."""
    return x.astype(self.x.dtype)

  def put(
    self, encoded: jax.Array, slots: jax.Array, run: int = 1
  ) -> 'FloatStore':
    """Writes to slots (B, T)."""
    return dataclasses.replace(self, x=write(self.x, encoded, slots, run))

  def values(self, first: Any, size: int) -> jax.Array:
    """(B, size, Hkv, D) float32."""
    return take(self.x, first, size).astype(jnp.float32)

  def scores(self, q: jax.Array, first: Any, size: int) -> jax.Array:
    """q (B, Hkv, G, T, D) -> (B, Hkv, G, T, size)."""
    return jnp.einsum('bkgtd,bskd->bkgts', q, self.values(first, size))

  def combine(self, p: jax.Array, first: Any, size: int) -> jax.Array:
    """p (B, Hkv, G, T, size) -> (B, Hkv, G, T, D)."""
    return jnp.einsum('bkgts,bskd->bkgtd', p, self.values(first, size))


@flax.struct.dataclass
class NormedStore:
  """Keys divided by their norms; the norms multiply the scores' columns.

  store: of the divided keys. norm: (B, S, 1 or Hkv, 1), one per token or one
  per token and head.
  """

  store: Any
  norm: jax.Array

  @property
  def slots(self) -> int:
    """S."""
    return self.store.slots

  def encode(self, x: jax.Array) -> tuple[Any, jax.Array]:
    """x (B, T, Hkv, D) -> what the store makes of x / norm, and the norm."""
    unit, norm = scale_tokens(x, per_head=self.norm.shape[-2] > 1)
    return self.store.encode(unit), norm.astype(self.norm.dtype)

  def put(
    self, encoded: tuple[Any, jax.Array], slots: jax.Array, run: int = 1
  ) -> Any:
    """Writes to slots (B, T)."""
    return dataclasses.replace(
      self,
      store=self.store.put(encoded[0], slots, run),
      norm=write(self.norm, encoded[1], slots, run),
    )

  def values(self, first: Any, size: int) -> jax.Array:
    """(B, size, Hkv, D) float32."""
    norm = take(self.norm, first, size).astype(jnp.float32)
    return self.store.values(first, size) * norm

  def scores(self, q: jax.Array, first: Any, size: int) -> jax.Array:
    """q (B, Hkv, G, T, D) -> (B, Hkv, G, T, size)."""
    norm = take(self.norm, first, size).astype(jnp.float32)
    return self.store.scores(q, first, size) * _columns(norm)


def scale_tokens(
  x: jax.Array, per_head: bool = False
) -> tuple[jax.Array, jax.Array]:
  """x (B, T, Hkv, D) -> x / norm and norm (B, T, 1 or Hkv, 1), float32.

  One L2 norm per token, over all heads, or one per token and head. A token of
  zeros has norm 1. Accumulated in float32: in 16 bits it would overflow.
  """
  x = x.astype(jnp.float32)
  axes = (3,) if per_head else (2, 3)
  norm = jnp.sqrt(jnp.sum(x * x, axis=axes, keepdims=True))
  norm = jnp.where(norm > 1e-8, norm, 1.0)
  return x / norm, norm


def int_store(shape: interface.CacheShape, slots: int, grid: Grid) -> IntStore:
  """An empty store.

  Raises:
    ValueError: head_dim cannot be packed, or is no multiple of the channels, or
      slots are no multiple of the tokens.
  """
  D, Hkv = shape.head_dim, shape.kv_heads
  channels = D if grid.channels == -1 else grid.channels
  if channels < 1 or D % channels:
    raise ValueError(
      f'kvcache: head_dim={D}, groups of {channels} channels; groups must '
      f'divide a head. Use a divisor of {D}.'
    )
  check_packable(D, grid.bits)
  if slots % grid.tokens:
    raise ValueError(
      f'kvcache: {slots} slots, groups of {grid.tokens} tokens; slots must be '
      'whole groups. Use a group that divides them.'
    )
  params = (shape.batch, slots // grid.tokens, Hkv, D // channels)
  width = D if grid.bits == 8 else D * grid.bits // 8
  zeros = jnp.zeros(params, grid.scale_dtype)
  return IntStore(
    codes=jnp.zeros((shape.batch, slots, Hkv, width), jnp.uint8),
    scale=zeros,
    offset=None if grid.mode == 'symmetric' else jnp.zeros_like(zeros),
    grid=grid,
    head_dim=D,
  )


def float_store(
  shape: interface.CacheShape, slots: int, dtype: Any = None
) -> FloatStore:
  """An empty store of the shape's dtype, or of another."""
  size = (shape.batch, slots, shape.kv_heads, shape.head_dim)
  return FloatStore(jnp.zeros(size, shape.dtype if dtype is None else dtype))


def check_packable(head_dim: int, bits: int) -> None:
  """Raises ValueError unless a head's codes fill whole bytes."""
  if bits < 8 and not packing.packable(bits, head_dim):
    raise ValueError(
      f'kvcache: head_dim={head_dim} at {bits} bits; the codes of a head must '
      f'fill whole bytes. Use 8 bits, or a head_dim that is a multiple of '
      f'{8 // packing.planes(bits)[-1]}.'
    )


def quantize(
  x: jax.Array, grid: Grid
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """x (B, T, Hkv, D) -> codes uint8 of that shape, scale, offset.

  A constant slice has scale 1 and code 0 ('minimum'), scale 0 ('integer'), so
  that it is kept exactly but for the rounding of its offset.
  """
  B, T, Hkv, D = x.shape
  channels = D if grid.channels == -1 else grid.channels
  n, m = T // grid.tokens, D // channels
  x = x.astype(jnp.float32).reshape(B, n, grid.tokens, Hkv, m, channels)
  low = jnp.min(x, axis=(2, 5), keepdims=True) * grid.clip
  high = jnp.max(x, axis=(2, 5), keepdims=True) * grid.clip

  def stored(a):  # As it will be read, so that codes make up for rounding.
    return a.astype(grid.scale_dtype).astype(jnp.float32)

  if grid.mode == 'symmetric':
    scale = jnp.maximum(jnp.abs(low), jnp.abs(high)) / grid.qmax
    scale = stored(jnp.where(scale > 0, scale, 1.0))
    codes = jnp.round(x / jnp.where(scale > 0, scale, 1.0))
    codes = jnp.clip(codes, -grid.qmax, grid.qmax) + grid.qmax
    offset = None
  elif grid.mode == 'minimum':
    scale = stored((high - low) / grid.qmax)
    scale = jnp.where(scale > 0, scale, 1.0)
    offset = stored(low)
    codes = jnp.clip(jnp.round((x - offset) / scale), 0, grid.qmax)
  else:
    zeros = (low == 0) & (high == 0)
    low, high = jnp.where(zeros, -1.0, low), jnp.where(zeros, 1.0, high)
    scale = stored((high - low) / grid.qmax)
    safe = jnp.where(scale > 0, scale, 1.0)
    zero = jnp.round(-low / safe)
    flat = scale == 0
    offset = stored(jnp.where(flat, low, -zero * scale))
    codes = jnp.clip(jnp.round(x / safe) + zero, 0, grid.qmax)
    codes = jnp.where(flat, 0.0, codes)
  params = (B, n, Hkv, m)
  return (
    codes.reshape(B, T, Hkv, D).astype(jnp.uint8),
    scale.reshape(params).astype(grid.scale_dtype),
    None if offset is None else offset.reshape(params).astype(grid.scale_dtype),
  )


def pack(codes: jax.Array, bits: int) -> jax.Array:
  """codes (..., D) uint8 -> (..., D * bits / 8) uint8; 8 bits as they are."""
  if bits == 8:
    return codes
  return packing.pack(codes[..., None], bits, codes.shape[-1])[..., 0]


def unpack(packed: jax.Array, bits: int, head_dim: int) -> jax.Array:
  """Inverse of pack."""
  if bits == 8:
    return packed
  return packing.unpack(packed[..., None], bits, head_dim)[..., 0]


def take(a: jax.Array, first: Any, size: int) -> jax.Array:
  """a[:, first : first + size], first traced."""
  return jax.lax.dynamic_slice_in_dim(a, first, size, axis=1)


def write(
  a: jax.Array, new: jax.Array, slots: jax.Array, run: int = 1
) -> jax.Array:
  """a (B, S, ...) with new (B, T, ...) at slots (B, T); past the end: none.

  run: of so many slots, one behind the other, all are past the end or none is.
    Those that are not are written one by one, in a loop of no turns in most
    steps: a TPU scatters by copying what has its tokens along lanes.
  """
  if run == 1:
    return scatter(a, new, slots)
  (B, T), size = slots.shape, (1, run, *a.shape[2:])
  count = T // run
  new = new.astype(a.dtype).reshape(B * count, *size)
  first = slots[:, ::run].reshape(-1)
  due = first < a.shape[1]
  order = jnp.argsort(~due, stable=True)

  def body(i, a):
    at = order[i]
    start = [at // count, first[at]] + [jnp.int32(0)] * (a.ndim - 2)
    return jax.lax.dynamic_update_slice(a, new[at], start)

  done: jax.Array = jax.lax.fori_loop(0, jnp.sum(due), body, a)
  return done


def scatter(a: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
  """a (B, S, ...) with new (B, T, ...) at slots (B, T); past the end: none.

  Slots (B, T, Hkv) put every head of a token, axis 2, at a place of its own.
  One token a row goes through a kernel where there is one for the array, which
  touches nothing else of it. Short floats are written as bits: CPUs would
  scatter them in float32, which converts, and so copies, the whole array. TPUs
  would copy it to see the bits.
  """
  rows, new, dtype = jnp.arange(a.shape[0])[:, None], new.astype(a.dtype), None
  single = a.ndim == 4 and slots.ndim == 2 and slots.shape[1] == 1
  if single and cache_append.choose(a) != 'xla':
    return cache_append.cache_append(a, new[:, 0], slots[:, 0])
  at: tuple[jax.Array, ...] = (rows, slots)
  if slots.ndim == 3:
    at = (rows[..., None], slots, jnp.arange(a.shape[2])[None, None])
  short = jnp.issubdtype(a.dtype, jnp.floating) and a.dtype.itemsize < 4
  if short and targets.current() not in targets.TARGETS:
    dtype, bits = a.dtype, jnp.uint8 if a.dtype.itemsize == 1 else jnp.uint16
    a, new = (jax.lax.bitcast_convert_type(x, bits) for x in (a, new))
  a = a.at[at].set(new, mode='drop')
  return a if dtype is None else jax.lax.bitcast_convert_type(a, dtype)


def _columns(a: jax.Array) -> jax.Array:
  """(B, size, Hkv, 1) -> (B, Hkv, 1, 1, size), to multiply scores with."""
  return a[..., 0].transpose(0, 2, 1)[:, :, None, None]


def _spread(params: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """(B, n, Hkv, m) -> (B, S, Hkv, D)."""
  params = jnp.repeat(params, shape[1] // params.shape[1], axis=1)
  return jnp.repeat(params, shape[3] // params.shape[3], axis=3)
