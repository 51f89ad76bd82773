"""Words of packed weights to the values of wgmma's register fragments.

What reaches below Pallas stands here, since it is no stable interface: arrays
of registers, and two instructions. With u a field of b bits,

  (word & mask) | 0x4300 in both halves    two bfloat16 of 128 + u, exactly
  fma(that, 1, -(128 + offset))            u - offset, exactly

so two weights take a shift, a logical operation and an FMA. A value of 8 bits
is (128 + its low seven) - (128 + 128 sign). Products of int8 take four weights
of 4 bits in a register, each 16 times its signed value, which is exact:

  (word & 0xf0f0f0f0) ^ 0x80808080
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector

from pallas_kernels import compat, hopper

plgpu = compat.mosaic_gpu
llvm: Any = mgpu_utils.llvm  # jax.extend has no such dialect.
_LAYOUT = plgpu.Layout
# (8 i, 128 j): two rows of eight to a warp, four neighbours to a lane.
ROW_TILES = _LAYOUT.TILED(
  fragmented_array.Tiling(((8, 128), (2, 128), (4,))),
  warp_dims=(-5,),
  lane_dims=(-2,),
  vector_dim=-1,
)
_MAGIC = 0x4300  # The bfloat16 128: its last bit is worth 1.
_BOTH = 0x10001  # Repeats a half word in a word.
_COLUMNS = 8  # Of a register block of the fragment.
_BYTE_COLUMNS = 16  # Of one of bytes.


def unpacker(bits: int, offset: int, tiles: int, width: int) -> Any:
  """The function of word tiles in registers to pieces of the weight.

  Args:
    bits: 8, 4 or 2.
    offset: what is taken from a code: half of the range, or 0.
    tiles: word tiles of a call, (64, 16) int32 each, in Layout.WGMMA_8BIT.
    width: columns of a piece; divides those of the tiles.

  Returns:
    Function of `tiles` arrays to a tuple of (64, width) bfloat16 in
    Layout.WGMMA, in the order of K.
  """
  return _unpacker(
    lambda word, j: _value(word, j, bits, offset),
    each=16 // bits,
    pieces=tiles * hopper.tile_rows(bits) // width,
    blocks=width // _COLUMNS,
    tiles=tiles,
    piece=plgpu.ShapeDtypeStruct((64, width), jnp.bfloat16, _LAYOUT.WGMMA),
  )


def unpacker_of_codes(tiles: int, width: int) -> Any:
  """The function of word tiles of 4 bits to 16 times their codes.

  Args:
    tiles: word tiles of a call, (64, 16) int32 each, in Layout.WGMMA_8BIT.
    width: columns of a piece; divides those of the tiles.

  Returns:
    Function of `tiles` arrays to a tuple of (64, width) int8 in
    Layout.WGMMA_8BIT, along K in the order of hopper.reorder.
  """
  return _unpacker(
    _bytes,
    each=2,
    pieces=tiles * hopper.tile_rows(4) // width,
    blocks=width // _BYTE_COLUMNS,
    tiles=tiles,
    piece=plgpu.ShapeDtypeStruct((64, width), jnp.int8, _LAYOUT.WGMMA_8BIT),
  )


def _unpacker(
  value: Any, *, each: int, pieces: int, blocks: int, tiles: int, piece: Any
) -> Any:
  """The function of word tiles in registers to pieces of the weight.

  Args:
    value: (word, j) to register j of the `each` that a word fills.
    pieces: arrays of the result, `blocks` register blocks each.
    tiles: arrays of words.
    piece: shape, dtype and layout of a piece.
  """

  @plgpu.inline_mgpu(
    arg_types=(_LAYOUT.WGMMA_8BIT,) * tiles, return_type=(piece,) * pieces
  )
  def unpack(_, *words):
    shape = (1, blocks, 1, 1, 2, 1, 1, 1, 1)
    found = [np.empty(shape, dtype=object) for _ in range(pieces)]
    for i, tile in enumerate(words):
      assert tile.registers.shape == (1, 1, 1, 1, 2, 1, 1, 1, 1)
      for half in range(2):  # Rows r and r + 8 of a thread.
        four = tile.registers[0, 0, 0, 0, half, 0, 0, 0, 0]
        for v in range(4):
          word = vector.extract(four, dynamic_position=[], static_position=[v])
          for j in range(each):
            p, block = divmod((4 * i + v) * each + j, blocks)
            found[p][0, block, 0, 0, half, 0, 0, 0, 0] = value(word, j)
    return tuple(
      mgpu.FragmentedArray(
        _registers=registers,
        _layout=piece.layout.to_mgpu(),
        _is_signed=True if jnp.issubdtype(piece.dtype, jnp.integer) else None,
      )
      for registers in found
    )

  return unpack


def _bytes(word, odd):
  """Every other nibble of a word, 16 times its code, as a vector of int8."""
  if not odd:
    word = arith.shli(word, _constant(4))
  word = arith.xori(
    arith.andi(word, _constant(0xF0F0F0F0)), _constant(0x80808080)
  )
  word_type = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
  four_type = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
  return vector.bitcast(four_type, vector.broadcast(word_type, word))


def _value(word, j, bits, offset):
  """Field j of both halves of a word, as a vector of two bfloat16."""
  field = word if j == 0 else arith.shrui(word, _constant(bits * j))
  if bits == 8:
    low = _masked(field, 0x7F)
    sign = _masked(field, 0x80)
    pair = _fma(sign, -1.0, low)
  else:
    pair = _fma(_masked(field, 2**bits - 1), 1.0, -(128.0 + offset))
  word_type = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
  pair_type = ir.VectorType.get((2,), ir.BF16Type.get())
  return vector.bitcast(pair_type, vector.broadcast(word_type, pair))


def _masked(field, mask):
  """(field & mask) | 0x4300 in both halves: one instruction."""
  return llvm.inline_asm(
    ir.IntegerType.get_signless(32),
    [field, _constant(mask * _BOTH), _constant(_MAGIC * _BOTH)],
    'lop3.b32 $0, $1, $2, $3, 0xea;',
    '=r,r,r,r',
  )


def _fma(pair, factor, addend):
  """pair * factor + addend, two bfloat16 at a time."""
  operands = [
    x if isinstance(x, ir.Value) else _constant(_bfloat16_bits(x) * _BOTH)
    for x in (pair, factor, addend)
  ]
  return llvm.inline_asm(
    ir.IntegerType.get_signless(32),
    operands,
    'fma.rn.bf16x2 $0, $1, $2, $3;',
    '=r,r,r,r',
  )


def _bfloat16_bits(x: float) -> int:
  return int(np.float32(x).view(np.uint32)) >> 16


def _constant(x: int) -> Any:
  i32 = ir.IntegerType.get_signless(32)
  signed = int(np.uint32(x).view(np.int32))
  constant: Any = arith.constant  # Its stub is that of a wrapper.
  return constant(i32, ir.IntegerAttr.get(i32, signed))
