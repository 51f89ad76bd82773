"""ggml's quantized blocks in plain Python, a value at a time.

Written from the layout of the structs, as an oracle that shares no code with
the `gguf` package. d is float16; K types have super-blocks of 256 values.
"""

import struct


def dequantize(data: bytes, kind: str) -> list[float]:
  """The values of a whole number of blocks."""
  values, nbytes, block = TYPES[kind]
  del values
  out: list[float] = []
  for start in range(0, len(data), nbytes):
    out += block(data[start : start + nbytes])
  return out


def _half(data: bytes, at: int) -> float:
  return struct.unpack_from('<e', data, at)[0]


def _signed(byte: int) -> int:
  return byte - 256 if byte > 127 else byte


def _bf16(b: bytes) -> list[float]:
  return [struct.unpack('<f', b'\0\0' + b)[0]]


def _q8_0(b: bytes) -> list[float]:
  return [_half(b, 0) * _signed(q) for q in b[2:34]]


def _nibbles(b: bytes) -> list[int]:
  """16 bytes: low halves are values 0..15, high ones 16..31."""
  return [q & 15 for q in b] + [q >> 4 for q in b]


def _q4_0(b: bytes) -> list[float]:
  return [_half(b, 0) * (q - 8) for q in _nibbles(b[2:18])]


def _q4_1(b: bytes) -> list[float]:
  return [_half(b, 0) * q + _half(b, 2) for q in _nibbles(b[4:20])]


def _fifth(b: bytes, at: int) -> list[int]:
  """A uint32 of the fifth bits of 32 values."""
  bits = struct.unpack_from('<I', b, at)[0]
  return [(bits >> i & 1) << 4 for i in range(32)]


def _q5_0(b: bytes) -> list[float]:
  pairs = zip(_nibbles(b[6:22]), _fifth(b, 2), strict=True)
  return [_half(b, 0) * ((low | high) - 16) for low, high in pairs]


def _q5_1(b: bytes) -> list[float]:
  pairs = zip(_nibbles(b[8:24]), _fifth(b, 4), strict=True)
  return [_half(b, 0) * (low | high) + _half(b, 2) for low, high in pairs]


def _scale_min(b: bytes, j: int) -> tuple[int, int]:
  """The j-th of 8 pairs of 6 bits in 12 bytes."""
  if j < 4:
    return b[j] & 63, b[j + 4] & 63
  scale = (b[j + 4] & 15) | (b[j - 4] >> 6) << 4
  return scale, (b[j + 4] >> 4) | (b[j] >> 6) << 4


def _q4_k(b: bytes) -> list[float]:
  out = []
  for j in range(8):  # 32 values each; two neighbours share 32 bytes.
    scale, least = _scale_min(b[4:16], j)
    for i in range(32):
      q = b[16 + j // 2 * 32 + i] >> 4 * (j % 2) & 15
      out.append(_half(b, 0) * scale * q - _half(b, 2) * least)
  return out


def _q5_k(b: bytes) -> list[float]:
  out = []
  for j in range(8):
    scale, least = _scale_min(b[4:16], j)
    for i in range(32):
      q = b[48 + j // 2 * 32 + i] >> 4 * (j % 2) & 15
      q |= (b[16 + i] >> j & 1) << 4
      out.append(_half(b, 0) * scale * q - _half(b, 2) * least)
  return out


def _q6_k(b: bytes) -> list[float]:
  out = []
  for n in range(256):
    half, rest = divmod(n, 128)
    quarter, i = divmod(rest, 32)  # Of 128 values.
    low = b[64 * half + 32 * (quarter % 2) + i] >> 4 * (quarter // 2) & 15
    high = b[128 + 32 * half + i] >> 2 * quarter & 3
    scale = _signed(b[192 + n // 16])
    out.append(_half(b, 208) * scale * ((low | high << 4) - 32))
  return out


# Type: values and bytes of a block, and what takes it apart.
TYPES = {
  'BF16': (1, 2, _bf16),
  'Q8_0': (32, 34, _q8_0),
  'Q4_0': (32, 18, _q4_0),
  'Q4_1': (32, 20, _q4_1),
  'Q5_0': (32, 22, _q5_0),
  'Q5_1': (32, 24, _q5_1),
  'Q4_K': (256, 144, _q4_k),
  'Q5_K': (256, 176, _q5_k),
  'Q6_K': (256, 210, _q6_k),
}
