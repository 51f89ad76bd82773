"""The statistic behind Double Sparsity's label channels, of a whole model."""

from collections.abc import Mapping
from typing import Any

import numpy as np

import models
from jaxq.calibrate import driver
from jaxq.kvcache import label_channels


class Statistics:
  """What is left of a calibrated block: the statistic in its `quant`."""

  def __init__(self):
    self.blocks: list[Mapping[str, Any]] = []

  def has_outside(self) -> bool:
    return True  # What is outside the blocks is not wanted.

  def save_outside(self, tree: dict[str, Any]) -> None:
    del tree

  def has_block(self, i: int) -> bool:
    return i < len(self.blocks)

  def save_block(self, i: int, tree: dict[str, Any]) -> None:
    del i
    self.blocks.append(tree['quant'])

  def load_block(self, i: int) -> dict[str, Any]:
    raise NotImplementedError(f'block {i}: a run is never taken up again.')


def statistics(
  model: models.OpenModel, tokens: np.ndarray, *, stat: str, batch_size: int
) -> np.ndarray:
  """(layers, Hkv, D) of an opened decoder, the larger the more it counts.

  Args:
    model: from models.open_model.
    tokens: (sequences, T) int32.
    stat: of label_channels.STATS.
    batch_size: divides the sequences.

  Raises:
    NotImplementedError: the model is no decoder.
    ValueError: as the driver.
  """
  if model.family != 'decoder':
    raise NotImplementedError(
      f'label_channels: {model.name} is a {model.family} model; a decoder is '
      'needed, whose cache is read.'
    )
  found = Statistics()
  calibrator = driver.Calibrator(
    model,
    label_channels.observe(stat),
    driver.CalibrationConfig(batch_size=batch_size),
  )
  calibrator.run(tokens, found)
  c = model.config
  return np.stack(
    [
      label_channels.statistic(quant, c.num_kv_heads, c.head_dim, stat)
      for quant in found.blocks
    ]
  )
