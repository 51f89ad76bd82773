"""Digits that need no download: a digit d is an even (d + 1) / 11."""

import numpy as np

from jaxq.data import digits as digits_lib

EACH = 3  # Of every class.


def digits(split: str = 'train') -> digits_lib.Digits:
  """EACH digits of every class; those of 'test' have a black corner."""
  classes = np.repeat(np.arange(10, dtype=np.int32), EACH)
  images = np.ones((classes.size, 8, 8), np.float32)
  images *= ((classes + 1) / 11).astype(np.float32)[:, None, None]
  if split == 'test':
    images[:, 0, 0] = 0
  return digits_lib.Digits(images=images, classes=classes)
