"""Handwritten digits: 1,797 images of 8 x 8 pixels with their classes.

The test part of Alpaydin and Kaynak's "Optical Recognition of Handwritten
Digits" (UCI, 1998), as it ships inside a package that is never imported: 43
people's digits, of which the first NUM_TRAIN are for training and the rest,
which other people mostly wrote, for testing. They are never mixed.
"""

import dataclasses
import gzip

import numpy as np

from jaxq.data import packaged

NUM_TRAIN = 1297
SIDE = 8  # Pixels.
CLASSES = 10
SPLITS = ('test', 'train')

_PACKAGE = 'digits'
_TOTAL = 1797
_WHITE = 16  # Pixels are counts 0..16.


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Digits:
  """images (N, 8, 8) float32 in 0..1; classes (N,) int32 in 0..9."""

  images: np.ndarray
  classes: np.ndarray

  def of_class(self, digit: int) -> np.ndarray:
    """The indices (n,) of the images of one class."""
    return np.flatnonzero(self.classes == digit)


def load(split: str) -> Digits:
  """The digits of a split: 1,297 of 'train' or 500 of 'test'.

  Raises:
    ValueError: another split, or a file that is not this data.
    ConnectionError: see `packaged.fetch`.
  """
  if split not in SPLITS:
    raise ValueError(f'digits: split={split!r}; allowed are {sorted(SPLITS)}.')
  path = packaged.fetch(_PACKAGE)
  with gzip.open(path, 'rt', encoding='ascii') as f:
    table = np.loadtxt(f, delimiter=',', dtype=np.int32)
  if table.shape != (_TOTAL, SIDE * SIDE + 1):
    raise ValueError(
      f'{path}: holds a table of {table.shape}; the digits are '
      f'{(_TOTAL, SIDE * SIDE + 1)}. Delete the file, so that it is fetched '
      'again.'
    )
  part = slice(0, NUM_TRAIN) if split == 'train' else slice(NUM_TRAIN, None)
  images = table[part, :-1].reshape(-1, SIDE, SIDE).astype(np.float32)
  return Digits(images=images / np.float32(_WHITE), classes=table[part, -1])
