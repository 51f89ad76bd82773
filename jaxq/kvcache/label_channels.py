"""Which channels of a head decide q k: Double Sparsity's offline calibration.

  qk   mean_t |q_tj k_tj|, a token's query with its own key, behind positions
  q    mean_t |q_tj|, before positions
  k    mean_t |k_tj|, before positions

Sums over the query heads that share a key head; the largest come first.
Positions mix channel j with j + D/2, so 'q' and 'k' sum the two. The driver
gathers the statistic, one block on the device at a time: `observe` is a
Transform that leaves the block as it is.

Departure: all batches count; the reference keeps those of the last, by mistake.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxq.calibrate import observers
from jaxq.nn import taps
from jaxq.quant import transform

STATS = ('k', 'q', 'qk')
MARK = 'attention/label_statistic'
_TAPS = {
  'k': 'attention/k_proj/out',
  'q': 'attention/q_proj/out',
  'qk': 'attention/qk',
}
_FORMAT, _VERSION = 'jaxq.label_channels', 1


def observe(stat: str) -> transform.Transform:
  """A calibration that changes nothing and gathers `stat` of STATS.

  Every block's `quant` collection gets MARK, what `statistic` reads.

  Raises:
    ValueError: unknown stat.
  """
  if stat not in STATS:
    raise ValueError(f'label_channels: stat={stat!r}; allowed {sorted(STATS)}.')
  tap = _TAPS[stat]

  def apply(block, params, quant, stats):
    del block
    return params, taps.set_path(quant, MARK, stats[tap]['label'].mean)

  return transform.Transform(
    name=f'label channels ({stat})',
    observe=lambda block: {tap: {'label': observers.mean_abs}},
    apply=apply,
  )


def statistic(
  quant: Mapping[str, Any], kv_heads: int, D: int, stat: str
) -> np.ndarray:
  """What `observe` found in a block: (kv_heads, D), over the query group.

  Before positions channels j and j + D / 2 are summed: they will be mixed.
  """
  found = np.asarray(taps.get_path(quant, MARK), np.float64)
  found = found.reshape(kv_heads, -1, D).sum(axis=1)
  if stat != 'qk':
    pairs = found.reshape(kv_heads, 2, D // 2).sum(axis=1)
    found = np.concatenate([pairs, pairs], axis=-1)
  return found


def save(
  path: str | os.PathLike, statistics: np.ndarray, settings: Mapping[str, Any]
) -> None:
  """Writes the channels, largest statistic first.

  Args:
    path: of the JSON file.
    statistics: (layers, Hkv, D).
    settings: JSON data that says of what they are.
  """
  order = np.argsort(-statistics, axis=-1, kind='stable')
  body = {
    'format': _FORMAT,
    'version': _VERSION,
    'settings': dict(settings),
    'order': order.tolist(),
  }
  pathlib.Path(path).write_text(json.dumps(body))


def load(path: str | os.PathLike) -> np.ndarray:
  """(layers, Hkv, D) from `save`.

  Raises:
    FileNotFoundError: no file. ValueError: no file of this format.
  """
  try:
    body = json.loads(pathlib.Path(path).read_text())
    if (body['format'], body['version']) != (_FORMAT, _VERSION):
      raise KeyError(body['format'])
    return np.asarray(body['order'])
  except (KeyError, TypeError, UnicodeDecodeError, ValueError) as e:
    raise ValueError(
      f'{path}: is no file of label channels; one that python -m '
      'experiments.label_channels wrote is needed. Make it again.'
    ) from e
