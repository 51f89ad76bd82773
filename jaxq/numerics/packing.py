"""Planar packing of codes of 1 to 7 bits into bytes, exactly b bits each.

Codes (..., K, N) are packed along K in tiles of T rows. A b-bit code is cut
into power-of-two bit planes, low bits first: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2,
7 = 4 + 2 + 1. A p-bit plane of a tile takes R = T * p / 8 byte rows: field f
(bits f*p .. f*p + p - 1) of byte row i holds row f * R + i of the tile. The
planes of a tile follow one another. Example, T = 4, b = 4 (R = 2):

  byte row 0 = row 0 | row 2 << 4
  byte row 1 = row 1 | row 3 << 4

Unpacking is shift, mask and concatenate of whole rows: no shuffle inside a
row, and neighbouring columns stay neighbours, so a kernel unpacks by vector
operations. A tile never straddles groups, so a shard that holds whole groups
(or whole tiles) unpacks alone.
"""

import jax
import jax.numpy as jnp

_MAX_TILE = 128


def planes(bits: int) -> tuple[int, ...]:
  """Widths of the bit planes of a code, low bits first: 7 -> (4, 2, 1)."""
  return tuple(p for p in (4, 2, 1) if bits & p)


def tile_rows(K: int, group_size: int = -1) -> int:
  """Rows of a tile: group_size, or the greatest 2^i <= 128 dividing K."""
  return group_size if group_size > 0 else min(K & -K, _MAX_TILE)


def packable(bits: int, tile: int) -> bool:
  """Whether every plane of a tile fills whole byte rows."""
  return bits < 8 and tile % (8 // planes(bits)[-1]) == 0


def pack(codes: jax.Array, bits: int, tile: int) -> jax.Array:
  """codes (..., K, N) uint8 below 2^bits -> (..., K * bits / 8, N) uint8.

  Raises:
    ValueError: bits outside 1..7, or a tile that does not fill whole bytes.
  """
  *lead, K, N = codes.shape
  _check('pack', bits, tile, K)
  codes = codes.reshape(*lead, K // tile, tile, N)
  rows, low = [], 0
  for p in planes(bits):
    fields = 8 // p
    plane = (codes >> low) & (2**p - 1)
    plane = plane.reshape(*lead, K // tile, fields, tile // fields, N)
    byte = plane[..., 0, :, :]
    for f in range(1, fields):
      byte = byte | (plane[..., f, :, :] << (f * p))
    rows.append(byte)
    low += p
  packed = jnp.concatenate(rows, axis=-2)  # (..., K/T, T*bits/8, N)
  return packed.reshape(*lead, K * bits // 8, N)


def unpack(packed: jax.Array, bits: int, tile: int) -> jax.Array:
  """Inverse of pack: (..., K * bits / 8, N) uint8 -> (..., K, N) uint8."""
  *lead, byte_rows, N = packed.shape
  K = byte_rows * 8 // bits
  _check('unpack', bits, tile, K)
  packed = packed.reshape(*lead, K // tile, tile * bits // 8, N)
  codes: jax.Array | int = 0
  low, start = 0, 0
  for p in planes(bits):
    R = tile * p // 8
    byte = packed[..., start : start + R, :]
    fields = [(byte >> (f * p)) & (2**p - 1) for f in range(8 // p)]
    plane = jnp.concatenate(fields, axis=-2) << low  # (..., K/T, T, N)
    codes = plane | codes
    low, start = low + p, start + R
  return jnp.reshape(codes, (*lead, K, N))


def sign_extend(codes: jax.Array, bits: int) -> jax.Array:
  """Two's complement of the low bits: uint8 -> int8."""
  half = 1 << (bits - 1)
  return ((codes ^ half).astype(jnp.int32) - half).astype(jnp.int8)


def _check(name, bits, tile, K):
  if not 1 <= bits <= 7:
    raise ValueError(
      f'packing.{name}: bits={bits}; allowed 1..7. Store 8-bit codes as they '
      'are.'
    )
  if not packable(bits, tile) or K % tile:
    rows = 8 // planes(bits)[-1]
    raise ValueError(
      f'packing.{name}: K={K}, tile={tile}, bits={bits}; tile must divide K '
      f'and be a multiple of {rows}. Use such a tile, or store the codes '
      'unpacked.'
    )
