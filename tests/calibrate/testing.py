"""A small random decoder and an in-memory store, as the driver sees them."""

import dataclasses
from typing import Any

import jax
import numpy as np

from models import decoder, loading
from tests.models import test_decoder

VOCAB = 64


@dataclasses.dataclass
class ArraySource:
  """Weights of a random small decoder, on the host."""

  config: dict[str, Any]
  outside_params: dict[str, Any]
  blocks: list[dict[str, Any]]

  def outside(self):
    return self.outside_params

  def block(self, i):
    return self.blocks[i]

  def fingerprint(self):
    return 'random'


class MemoryStore:
  """Keeps what the driver saves."""

  def __init__(self):
    self.outside = None
    self.blocks = {}

  def has_outside(self):
    return self.outside is not None

  def save_outside(self, tree):
    self.outside = tree

  def has_block(self, i):
    return i in self.blocks

  def save_block(self, i, tree):
    self.blocks[i] = tree

  def load_block(self, i):
    return self.blocks[i]


def small_model(
  config: decoder.DecoderConfig = test_decoder.CONFIG, seed: int = 0
) -> loading.OpenModel:
  """An OpenModel over random weights."""
  outside, blocks = test_decoder.parts(config, seed)
  host = jax.device_get([block['params'] for block in blocks])
  source = ArraySource({}, jax.device_get(outside), host)
  return loading.OpenModel(config, source, 'random')


def tokens(sequences: int = 8, length: int = 16) -> np.ndarray:
  """Random tokens (sequences, length) int32."""
  rng = np.random.default_rng(0)
  return rng.integers(0, VOCAB, (sequences, length), dtype=np.int32)
