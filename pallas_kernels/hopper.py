"""What the kernels for Hopper share: the chip, its weights, its registers.

Weights are re-laid once, when a model is loaded. Two layouts, both exact:

  words  for weights that are unpacked in registers, (N/64, K/kt, 64, 16) int32,
         kt = 512 / bits. A tile is 64 columns of the weight and kt of its rows.
         Word 4t + v of a column, bits 16h + bits*j and on, is row
         v*8P + 8j + 2t + h of the tile, P = 16 / bits: where the fragment of
         wgmma wants it, so that no lane ever gives a value to another. Below 8
         bits the codes are unsigned, half of the range added; 8 bits are two's
         complement.
  rows   for weights that are multiplied as they are, (N/64, 64, K), int8 or
         fp8: 8-bit operands of wgmma run along K.

The kernels were written from measured prototypes, for JAX 0.11 and later. **In
this form they have not run on a card yet**: their tests lower them for CUDA and
run them in Pallas's GPU interpreter.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import planar

CHIPS = ('h100', 'h200')
SMS = 132
SMEM_BYTES = 232448  # Of a block of threads.
MEMORY_REGISTERS = 40  # Of a thread that only starts copies.
COLUMNS = 64  # Of a weight: the rows of a wgmma, to which it is turned.
_WORDS = 16  # Of a column in a tile.
_HALF_WORD = 16


def why_not(chip: str) -> str:
  """Why no kernel of Mosaic GPU can serve; '' if one may."""
  if chip not in CHIPS:
    return f'chip is {chip!r}; it runs on {list(CHIPS)}.'
  if jax.__version_info__ < (0, 11):
    return f'JAX is {jax.__version__}; it needs 0.11 or later.'
  return ''


def start_registers(warpgroups: int) -> int:
  """Registers of a thread as a block of one warpgroup more starts."""
  return 65536 // (128 * (warpgroups + 1)) // 8 * 8


def compute_registers(warpgroups: int, memory: int = MEMORY_REGISTERS) -> int:
  """Registers of a compute thread beside one warpgroup that has `memory`.

  A block of T threads starts with 65536 / T registers each, rounded down to
  eights. What its warpgroups then ask for may not be more in sum: the hardware
  would wait for registers for ever.
  """
  budget = start_registers(warpgroups) * (warpgroups + 1)
  each = (budget - memory) // warpgroups // 8 * 8
  return min(each, 232)


def tile_rows(bits: int) -> int:
  """Rows of the weight in a tile of words."""
  return 32 * _WORDS // bits


def pack_words(qvalue: jax.Array, layout: planar.Planar) -> jax.Array:
  """Stored codes (rows, N) -> words (N/64, K/kt, 64, 16) int32.

  Raises:
    NotImplementedError: 1 bit.
    ValueError: N or K that tiles do not divide.
  """
  b, K, N = layout.bits, layout.K, qvalue.shape[-1]
  kt = tile_rows(b)
  if b == 1:
    raise NotImplementedError(
      'hopper.pack_words: bits=1; allowed [2, 4, 8]. Use the xla form.'
    )
  if N % COLUMNS or K % kt:
    raise ValueError(
      f'hopper.pack_words: K={K}, N={N} at bits={b}; K must be a multiple of '
      f'{kt} and N of {COLUMNS}. Pad the weight.'
    )
  codes = planar.unpack(qvalue, layout).astype(jnp.int32)
  if b < 8:
    codes = codes + _half(b) * layout.signed
  elif not layout.signed:
    codes = codes - 128
  fields = jax.lax.bitcast_convert_type(codes & (2**b - 1), jnp.uint32)
  P = _HALF_WORD // b
  # Column tile, column, row tile; then v, j, t, h.
  fields = fields.T.reshape(N // COLUMNS, COLUMNS, K // kt, 4, P, 4, 2)
  fields = fields.transpose(0, 2, 1, 5, 3, 6, 4)  # ..., t, v, h, j
  shifts = _shifts(b)[None, None, None, None, None]
  words = jnp.sum(fields << shifts, axis=(-2, -1), dtype=jnp.uint32)
  words = words.reshape(N // COLUMNS, K // kt, COLUMNS, _WORDS)
  return jax.lax.bitcast_convert_type(words, jnp.int32)


def unpack_words(words: jax.Array, bits: int, signed: bool) -> jax.Array:
  """words (..., 64, 16) int32 -> codes (..., 64, kt) int32: pack_words undone.

  Of plain JAX, so that the interpreter unpacks with it too.
  """
  P = _HALF_WORD // bits
  lead = words.shape[:-2]
  fields = words.reshape(*lead, COLUMNS, 4, 4, 1, 1)  # t, v
  shifts = (
    _shifts(bits).astype(jnp.int32).reshape((1,) * (len(lead) + 3) + (2, P))
  )
  codes = (fields >> shifts) & (2**bits - 1)  # (..., 64, t, v, h, j)
  at = len(lead) + 1
  order = (*range(at), at + 1, at + 3, at, at + 2)  # ..., v, j, t, h
  codes = codes.transpose(order).reshape(*lead, COLUMNS, tile_rows(bits))
  if bits == 8:
    codes = (codes ^ 128) - 128  # Two's complement.
    return codes if signed else codes + 128
  return codes - _half(bits) * signed


def pack_rows(qvalue: jax.Array, layout: planar.Planar) -> jax.Array:
  """Stored codes (rows, N) -> (N/64, 64, K), int8 or fp8.

  Codes of 4 bits and fewer are widened: the chip has no product of them.

  Raises:
    ValueError: N that 64 does not divide, or unsigned codes.
  """
  N = qvalue.shape[-1]
  if N % COLUMNS or not layout.signed:
    raise ValueError(
      f'hopper.pack_rows: N={N}, zero points: {not layout.signed}; N must be a '
      f'multiple of {COLUMNS} and codes signed. Pad N, or use the xla form.'
    )
  codes = planar.unpack(qvalue, layout)
  return codes.T.reshape(N // COLUMNS, COLUMNS, layout.K)


def rows_of_words(words: jax.Array, layout: planar.Planar) -> jax.Array:
  """pack_words -> pack_rows of signed codes: no code leaves its column."""
  codes = unpack_words(words, layout.bits, layout.signed).astype(jnp.int8)
  return codes.transpose(0, 2, 1, 3).reshape(-1, COLUMNS, layout.K)


def reorder(x: jax.Array) -> jax.Array:
  """x (..., K) in the order in which words of 4 bits give bytes.

  Byte i of block 2v + e (16 bytes of K) of lane t is nibble 2i + e of word v:
  row 32v + 16 (i % 2) + 8e + 2t + i / 2 of the weight, by `pack_words`. K is a
  multiple of 32.
  """
  y = x.reshape(*x.shape[:-1], -1, 2, 2, 4, 2)  # v, i % 2, e, t, i / 2
  at = x.ndim - 1
  order = (*range(at + 1), at + 2, at + 3, at + 4, at + 1)
  return y.transpose(order).reshape(x.shape)


def codes_of(packed: jax.Array, layout: planar.Planar) -> jax.Array:
  """Words or rows -> codes (K, N), as planar.unpack gives them."""
  if packed.ndim == 3:
    return packed.reshape(-1, layout.K).T
  codes = unpack_words(packed, layout.bits, layout.signed)
  codes = codes.transpose(1, 3, 0, 2).reshape(layout.K, -1)
  return codes.astype(jnp.int8 if layout.signed else jnp.uint8)


def is_packed(qvalue: Any) -> bool:
  """Whether a weight is words or rows; stored ones have two axes."""
  if qvalue.ndim == 3:  # Packed bytes are no rows: they may be a stack.
    return qvalue.shape[1] == COLUMNS and qvalue.dtype != jnp.uint8
  return qvalue.ndim == 4


def stored(packed: Any, bits: int, signed: bool) -> jax.ShapeDtypeStruct:
  """What was packed: the stored codes' shape and dtype.

  Args:
    packed: words or rows, or their ShapeDtypeStruct.
    bits: of a code.
    signed: whether there is no zero point.

  Raises:
    ValueError: neither words nor rows of such codes.
  """
  if packed.ndim == 3 and packed.shape[1] == COLUMNS and bits == 8:
    N, K = packed.shape[0] * COLUMNS, packed.shape[2]
    return jax.ShapeDtypeStruct((K, N), packed.dtype)
  if (
    packed.ndim != 4
    or packed.shape[2:] != (COLUMNS, _WORDS)
    or packed.dtype != jnp.int32
    or bits == 1
  ):
    raise ValueError(
      f'hopper: a weight of {packed.dtype} {packed.shape} at bits={bits}; '
      'allowed (rows, N) as stored, pack_words of it (int32), or pack_rows of '
      '8 bits. Pack it with this module.'
    )
  rows = packed.shape[1] * tile_rows(bits) * bits // 8
  dtype = jnp.int8 if bits == 8 and signed else jnp.uint8
  return jax.ShapeDtypeStruct((rows, packed.shape[0] * COLUMNS), dtype)


def _half(bits: int) -> int:
  return 2 ** (bits - 1)


def _shifts(bits: int) -> jax.Array:
  """(2, P) uint32: where field j of half h of a word is."""
  half, field = jnp.arange(2)[:, None], jnp.arange(_HALF_WORD // bits)[None]
  return (_HALF_WORD * half + bits * field).astype(jnp.uint32)
