"""Parts of safetensors files, read by byte range.

A safetensors file is its header's length (8 bytes), the header (JSON: name ->
dtype, shape and bytes of each tensor) and the tensors, row-major. Rows of a
matrix are one byte range, columns one range per row. Nothing is mapped into
memory, so that what a process holds is what it asked for: of a strip of columns
that is narrow, `_CHUNK` bytes of whole rows more.
"""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes  # noqa: F401  NumPy learns bfloat16 from it.
import numpy as np

from jaxq.io import lazy

_DTYPES = {
  'F64': 'float64',
  'F32': 'float32',
  'F16': 'float16',
  'BF16': 'bfloat16',
}
_CHUNK = 8 << 20  # Bytes of whole rows that are read at once.
_NARROW = 4096  # Bytes of a row below which all of the row is read.


def header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
  """The header of a file, and where the tensors begin.

  Raises:
    ValueError: the file is truncated or damaged.
  """
  size = path.stat().st_size
  with path.open('rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    if not 2 <= length <= size - 8:
      raise ValueError(
        f'{path}: is truncated or damaged (a header of {length} bytes in a '
        f'file of {size}); a whole safetensors file is needed. Fetch it again.'
      )
    try:
      tensors = json.loads(file.read(length))
    except ValueError as e:
      raise ValueError(
        f'{path}: is damaged (its header is not JSON: {e}); a whole '
        'safetensors file is needed. Fetch it again.'
      ) from e
  tensors.pop('__metadata__', None)
  return tensors, 8 + length


def tensors(path: pathlib.Path) -> dict[str, lazy.LazyArray]:
  """The float tensors of a file by name, none of them read."""
  found, begin = header(path)
  out = {}
  for name, entry in found.items():
    if entry['dtype'] not in _DTYPES:
      continue
    dtype = np.dtype(_DTYPES[entry['dtype']])
    shape = tuple(entry['shape'])
    start, stop = entry['data_offsets']
    expected = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if stop - start != expected or begin + stop > path.stat().st_size:
      raise ValueError(
        f'{path}: is truncated or damaged (tensor {name} {shape} has '
        f'{stop - start} bytes and ends at {begin + stop}); a whole '
        'safetensors file is needed. Fetch it again.'
      )
    out[name] = _tensor(path, begin + start, shape, dtype)
  return out


def _tensor(
  path: pathlib.Path, offset: int, shape: tuple[int, ...], dtype: np.dtype
) -> lazy.LazyArray:
  """A tensor as a matrix of rows (shape[0]) and columns (shape[1]) of bytes."""
  deep = int(np.prod(shape[2:], dtype=np.int64)) * dtype.itemsize
  row_nbytes = deep * (shape[1] if len(shape) > 1 else 1)

  def read(index: lazy.Index) -> np.ndarray:
    # What has fewer axes is one column of rows, or one value.
    row, column, *rest = (*index, slice(0, 1), slice(0, 1))[
      : max(2, len(shape))
    ]
    rows, columns = row.stop - row.start, column.stop - column.start
    out = np.empty((rows, columns * deep), np.uint8)
    fd = os.open(path, os.O_RDONLY)
    try:
      start = offset + row.start * row_nbytes
      _fill(fd, path, out, start, row_nbytes, column.start * deep)
    finally:
      os.close(fd)
    values = out.reshape(-1).view(dtype)
    if len(shape) < 2:
      return values.reshape((rows,)[: len(shape)])
    values = values.reshape(rows, columns, *shape[2:])
    return values[(slice(None), slice(None), *rest)]

  return lazy.LazyArray(shape=shape, dtype=dtype, read=read)


def _fill(
  fd: int,
  path: pathlib.Path,
  out: np.ndarray,
  start: int,
  row_nbytes: int,
  left: int,
) -> None:
  """Reads bytes left..left+width of consecutive rows into out (rows, width)."""
  count, width = out.shape
  if width == row_nbytes:
    read_range(fd, path, out.reshape(-1), start)
  elif width >= _NARROW:
    for i in range(count):
      read_range(fd, path, out[i], start + i * row_nbytes + left)
  else:
    step = max(1, _CHUNK // row_nbytes)
    for i, j in _ranges(count, step):
      whole = np.empty((j - i, row_nbytes), np.uint8)
      read_range(fd, path, whole.reshape(-1), start + i * row_nbytes)
      out[i:j] = whole[:, left : left + width]


def _ranges(count: int, step: int) -> Iterator[tuple[int, int]]:
  for i in range(0, count, step):
    yield i, min(i + step, count)


def read_range(
  fd: int, path: pathlib.Path, out: np.ndarray, offset: int
) -> None:
  """Fills out (n,) uint8 from the file."""
  view = out.data
  while view:
    done = os.preadv(fd, [view], offset)
    if not done:
      raise ValueError(
        f'{path}: ends at byte {offset}, inside a tensor; it was changed while '
        'it was read. Fetch it again.'
      )
    view, offset = view[done:], offset + done
