"""Codes in 32-bit words, as quantized Hugging Face checkpoints store them.

  dense   a stream of bits, low bits first: code i takes bits i*b .. i*b + b-1,
          across word boundaries; 32 codes fill b words.
  sparse  32 // b codes a word, the rest of it empty.

The two are the same for 1, 2, 4 and 8 bits. NumPy only: these layouts are for
the disk; arrays in memory are packed as jaxq.numerics.packing says.
"""

import numpy as np

_WORD = 32


def count(n: int, bits: int, *, dense: bool = True) -> int:
  """Words that n codes take."""
  if dense:
    return -(-n * bits // _WORD)
  return -(-n // (_WORD // bits))


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
  """codes (..., n) of 0 .. 2^bits - 1 -> dense (..., count(n)) int32.

  Raises:
    ValueError: bits outside 1..8.
  """
  _check(bits)
  *lead, n = codes.shape
  blocks = -(-n // _WORD)
  pad = [(0, 0)] * len(lead) + [(0, blocks * _WORD - n)]
  codes = np.pad(codes, pad).astype(np.uint32)
  codes = codes.reshape(*lead, blocks, _WORD)
  out = np.zeros((*lead, blocks, bits), np.uint32)
  for i in range(_WORD):
    word, low = divmod(i * bits, _WORD)
    out[..., word] |= codes[..., i] << np.uint32(low)
    if low + bits > _WORD:
      out[..., word + 1] |= codes[..., i] >> np.uint32(_WORD - low)
  out = out.reshape(*lead, blocks * bits)[..., : count(n, bits)]
  return np.ascontiguousarray(out).view(np.int32)


def unpack(
  words: np.ndarray, bits: int, n: int, *, dense: bool = True
) -> np.ndarray:
  """(..., count(n)) int32 -> codes (..., n) uint8; the inverse of pack.

  Raises:
    ValueError: bits outside 1..8, or too few words for n codes.
  """
  _check(bits)
  *lead, width = words.shape
  needed = count(n, bits, dense=dense)
  if width < needed:
    raise ValueError(
      f'words.unpack: {width} words; {n} codes of {bits} bits take {needed}. '
      'Fetch the file again.'
    )
  words = np.ascontiguousarray(words).view(np.uint32)[..., :needed]
  mask = np.uint32(2**bits - 1)
  if not dense:
    lows = np.arange(_WORD // bits, dtype=np.uint32) * np.uint32(bits)
    codes = (words[..., None] >> lows) & mask
    return codes.reshape(*lead, -1)[..., :n].astype(np.uint8)
  blocks = -(-needed // bits)
  pad = [(0, 0)] * len(lead) + [(0, blocks * bits - needed)]
  words = np.pad(words, pad).reshape(*lead, blocks, bits)
  out = np.empty((*lead, blocks, _WORD), np.uint8)
  for i in range(_WORD):
    word, low = divmod(i * bits, _WORD)
    code = words[..., word] >> np.uint32(low)
    if low + bits > _WORD:
      code = code | (words[..., word + 1] << np.uint32(_WORD - low))
    out[..., i] = code & mask
  return out.reshape(*lead, blocks * _WORD)[..., :n]


def _check(bits: int) -> None:
  if not 1 <= bits <= 8:
    raise ValueError(f'words: bits={bits}; allowed 1..8.')
