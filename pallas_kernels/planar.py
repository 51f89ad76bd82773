"""The stored layout of packed weights, and how a TPU kernel unpacks it.

Codes of b = 1, 2 or 4 bits, (K, N), are packed along K in tiles of T rows:
field f (bits f*b ..) of byte row i of a tile holds row f*R + i of it, where
R = T*b/8. This is jaxq.numerics.packing for these widths; 8 bits are stored as
they are.

A kernel unpacks a *unit* of U rows at a time, whose bytes fill whole registers
(32 byte rows). It never moves a code to its own row: inside a unit the order of
K is free as long as x has the same, so x is reordered instead, by a transpose
outside of the kernel. Three ways to unpack (`packed` is (U*b/8, n) uint8):

  words   bytes seen as int32, four rows a word. Shift, mask and exclusive-or
          leave the bfloat16 bit patterns of 128 + code in both halves of the
          word, which is seen as two bfloat16 rows: three integer operations for
          two codes, none of them floating. 128 leaves the product as a multiple
          of the sum of x.
  native  bytes seen as int4 or int2, two or four rows a byte, and converted.
  rows    bytes to int8 fields, whose rows are then put where they belong: for
          kernels that need the natural order.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

BITS = (1, 2, 4, 8)
FORMS = ('native', 'words')
_MAX_TILE = 128
BYTE_ROWS = 32  # Rows of a register of bytes.
_NATIVE = {2: 'int2', 4: 'int4', 8: 'int8'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planar:
  """Codes (K, N) of `bits` bits, as they are stored.

  Attributes:
    bits: 1, 2, 4 or 8.
    K: logical rows.
    group_size: rows that share a scale; -1: all of them.
    signed: codes are two's complement; False: unsigned, or signs (1 bit).
  """

  bits: int
  K: int
  group_size: int = -1
  signed: bool = True

  @property
  def tile(self) -> int:
    """Rows packed together: the group, or the greatest 2^i <= 128 in K."""
    if self.group_size > 0:
      return self.group_size
    return min(self.K & -self.K, _MAX_TILE)

  @property
  def fields(self) -> int:
    """Codes of a byte."""
    return 8 // self.bits

  @property
  def rows(self) -> int:
    """Stored rows."""
    return self.K // self.fields

  @property
  def is_packed(self) -> bool:
    """Whether tiles fill whole bytes; else codes are stored one a byte."""
    return self.bits < 8 and self.tile % self.fields == 0

  @property
  def unit(self) -> int:
    """Rows unpacked at a time; 0 if whole registers of bytes never fit K."""
    least = BYTE_ROWS * self.fields
    sizes = [s for s in (256, 128, 64, 32) if s >= least and self.K % s == 0]
    sizes = [s for s in sizes if s % self.tile == 0 and s >= self.tile]
    if not sizes:
      return 0
    # 128 is a pass of the older matrix units, and never less than four groups.
    return min(sizes, key=lambda s: (abs(s - max(128, least)), s))

  @property
  def groups_of_unit(self) -> int:
    """Scales of one column of a unit."""
    return self.unit // self.group_size if self.group_size > 0 else 1

  def offset(self, form: str) -> float:
    """What `form` adds to a code (to a code of 0 or 1, for 1 bit)."""
    half = 2 ** (self.bits - 1)
    if form == 'words':
      if self.bits == 1:
        return 128.5  # And twice the code less one is a sign.
      return 128.0 + half * self.signed
    return 0.0 if self.signed else -float(half)


def unpack(qvalue: jax.Array, layout: Planar) -> jax.Array:
  """Stored codes (rows, N) -> (K, N) int8 if signed or 1 bit, else uint8."""
  if not layout.is_packed:
    return qvalue
  b, T = layout.bits, layout.tile
  N = qvalue.shape[-1]
  packed = qvalue.reshape(layout.K // T, T // layout.fields, N)
  fields = [(packed >> (f * b)) & (2**b - 1) for f in range(layout.fields)]
  codes = jnp.concatenate(fields, axis=1).reshape(layout.K, N)
  if b == 1:
    return 2 * codes.astype(jnp.int8) - 1
  if not layout.signed:
    return codes
  half = 2 ** (b - 1)
  return ((codes ^ half).astype(jnp.int32) - half).astype(jnp.int8)


def reorder(x: jax.Array, layout: Planar, form: str) -> jax.Array:
  """x (M, K) in the order of the rows that `form` unpacks, unit by unit."""
  if layout.bits == 8:
    return x
  M, K = x.shape
  T, F, U = layout.tile, layout.fields, layout.unit
  x = x.reshape(M, K // U, U // T, F, T // F)  # tile, field, byte row
  if form == 'native':
    return x.transpose(0, 1, 2, 4, 3).reshape(M, K)
  x = x.transpose(0, 1, 3, 2, 4)
  x = x.reshape(M, K // U, F, U // F // 4, 2, 2)  # word, half, byte of half
  return x.transpose(0, 1, 2, 5, 3, 4).reshape(M, K)


def group_masks(layout: Planar, form: str) -> jax.Array:
  """(g, U) bool: which rows of a reordered unit are of its i-th group."""
  g, U = layout.groups_of_unit, layout.unit
  group = (jnp.arange(U) // (U // g))[None]  # (1, U), in the natural order
  one = dataclasses.replace(layout, K=U, group_size=U // g if g > 1 else -1)
  if g == 1:
    return jnp.ones((1, U), bool)
  return reorder(group, one, form) == jnp.arange(g)[:, None]


def unpack_words(packed: jax.Array, layout: Planar) -> jax.Array:
  """(U*b/8, n) uint8 -> (U, n) bfloat16: code + offset('words')."""
  b = layout.bits
  words = pltpu.bitcast(packed, jnp.int32)  # (U*b/32, n)
  flip = 2 ** (b - 1) if layout.signed and b > 1 else 0
  mask, pattern = (2**b - 1) * 0x10001, (0x4300 + flip) * 0x10001
  planes = []
  for f in range(layout.fields):
    for low in (0, 8):
      shift = f * b + low
      word = (words >> shift if shift else words) & mask
      planes.append(pltpu.bitcast(word ^ pattern, jnp.bfloat16))
  return jnp.concatenate(planes, axis=0)


def unpack_native(packed: jax.Array, layout: Planar) -> jax.Array:
  """(U*b/8, n) bytes -> (U, n) bfloat16: code + offset('native')."""
  native = getattr(jnp, _NATIVE[layout.bits])
  if not layout.signed:
    packed = _flip_signs(packed, layout.bits)
  if packed.dtype != native:
    packed = pltpu.bitcast(packed, native)
  return packed.astype(jnp.bfloat16)


def unpack_int8(packed: jax.Array, layout: Planar) -> jax.Array:
  """(bytes of whole units, n) -> (their codes, n) int8, natural order.

  Codes come as they are, save unsigned ones of 8 bits: less 128. Fields must
  fill whole registers (`fields_fill_registers`).
  """
  b, T = layout.bits, layout.tile
  if b == 8:
    return packed if layout.signed else _flip_signs(packed, 8)
  words = pltpu.bitcast(packed, jnp.int32)
  W = T // layout.fields // 4  # Words of a tile.
  planes = []
  for t in range(words.shape[0] // W):
    tile = words[t * W : (t + 1) * W]
    planes += [_field(tile, f, layout) for f in range(layout.fields)]
  return jnp.concatenate(planes, axis=0)


def fields_fill_registers(layout: Planar) -> bool:
  """Whether a field of a tile is whole registers of bytes."""
  return layout.bits == 8 or layout.tile // layout.fields % BYTE_ROWS == 0


def offset_int8(layout: Planar) -> float:
  """What `unpack_int8` and `unpack_rows` add to a code."""
  return -128.0 if layout.bits == 8 and not layout.signed else 0.0


def unpack_rows(packed: jax.Array, layout: Planar) -> jax.Array:
  """(unit's bytes, n) -> (U, n) float32 as `unpack_int8`, for any tile."""
  F, T = layout.fields, layout.tile
  if layout.bits == 8:
    return unpack_int8(packed, layout).astype(jnp.float32)
  words = pltpu.bitcast(packed, jnp.int32)
  fields = [  # (U/F, n): rows of field f of all tiles
    _field(words, f, layout).astype(jnp.float32) for f in range(F)
  ]
  R = T // F
  pieces = [
    fields[f][t * R : (t + 1) * R]
    for t in range(layout.unit // T)
    for f in range(F)
  ]
  return jnp.concatenate(pieces, axis=0)


def _field(words: jax.Array, f: int, layout: Planar) -> jax.Array:
  """Field f of the bytes in words: (W, n) int32 -> (4W, n) int8.

  Signs are extended in all four bytes at once: with u = v + h for a signed v,
  (128 + u) - h stays within a byte, and is v once its top bit is inverted.
  """
  b = layout.bits
  shift = f * b
  if b == 1:  # v = 2 u - 1.
    words = (words >> (shift - 1)) if shift else (words << 1)
    words, flip, half = words & _repeat(2), 0, 1
  else:
    words = (words >> shift if shift else words) & _repeat(2**b - 1)
    flip = half = 2 ** (b - 1)
    if not layout.signed:
      return pltpu.bitcast(words, jnp.int8)
  words = (words ^ _repeat(0x80 + flip)) - _repeat(half)
  return pltpu.bitcast(words ^ _repeat(0x80), jnp.int8)


def _flip_signs(packed: jax.Array, bits: int) -> jax.Array:
  """Top bit of every code inverted: unsigned to two's complement, less half."""
  pattern = functools.reduce(
    lambda p, f: p | (2 ** (bits - 1) << (f * bits)), range(8 // bits), 0
  )
  dtype = jnp.int8 if bits == 8 else jnp.uint8
  words = pltpu.bitcast(packed, jnp.int32) ^ _repeat(pattern)
  return pltpu.bitcast(words, dtype)


def _repeat(byte: int) -> int:
  """A byte in all four of a word, as a signed integer."""
  word = byte * 0x01010101
  return word - 2**32 if word >= 2**31 else word
