"""Arrays that are read where they are indexed.

A `LazyArray` has the shape and dtype of an array in a file, and none of its
bytes: `array[rows, columns]` reads those. On a mesh each process asks only for
the shards of its own devices (parallel.mesh.place), so that no host ever holds
a whole model, or even a whole block.

  read(index) -> np.ndarray     one slice per axis, all of step 1

`stack`, `astype` and `transpose` of lazy arrays are lazy.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LazyArray:
  """An array behind a function.

  Attributes:
    shape, dtype: of the array.
    read: a slice per axis, with start and stop in the shape -> those values.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[Index], np.ndarray]

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """Number of elements."""
    return int(np.prod(self.shape, dtype=np.int64))

  @property
  def nbytes(self) -> int:
    """Bytes of all of it, in memory."""
    return self.size * self.dtype.itemsize

  def __getitem__(self, index: Any) -> np.ndarray:
    """The values in one slice per leading axis; the others are whole.

    Raises:
      TypeError: an index that is no slice, or has a step.
    """
    index = index if isinstance(index, tuple) else (index,)
    if len(index) > self.ndim or not all(
      isinstance(s, slice) and s.step in (None, 1) for s in index
    ):
      raise TypeError(
        f'LazyArray{self.shape}: index {index!r}; allowed are slices without a '
        'step, at most one per axis. Read it with np.asarray first.'
      )
    index += (slice(None),) * (self.ndim - len(index))
    bounds = [s.indices(n)[:2] for s, n in zip(index, self.shape, strict=True)]
    return self.read(tuple(slice(a, max(a, b)) for a, b in bounds))

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
    """All of it."""
    del copy  # It is always one.
    return np.asarray(self[()], dtype)


def of(array: Any) -> LazyArray:
  """An array in memory as a lazy one; lazy ones as they are."""
  if isinstance(array, LazyArray):
    return array
  array = np.asarray(array)
  return LazyArray(
    shape=array.shape, dtype=array.dtype, read=lambda index: array[index]
  )


def stack(arrays: Sequence[Any]) -> LazyArray:
  """L arrays (...) of one shape and dtype -> (L, ...)."""
  first, *_ = parts = [of(array) for array in arrays]

  def read(index: Index) -> np.ndarray:
    chosen = parts[index[0]]
    shape = tuple(s.stop - s.start for s in index)
    out = np.empty(shape, first.dtype)
    for row, part in zip(out, chosen, strict=True):
      row[...] = part[index[1:]]
    return out

  return LazyArray(
    shape=(len(parts), *first.shape), dtype=first.dtype, read=read
  )


def astype(array: Any, dtype: Any) -> LazyArray:
  """The array in another dtype."""
  array = of(array)
  return LazyArray(
    shape=array.shape,
    dtype=np.dtype(dtype),
    read=lambda index: array.read(index).astype(dtype),
  )


def transpose(array: Any) -> LazyArray:
  """(M, N) -> (N, M)."""
  array = of(array)
  return LazyArray(
    shape=array.shape[::-1],
    dtype=array.dtype,
    read=lambda index: np.ascontiguousarray(array.read(index[::-1]).T),
  )
