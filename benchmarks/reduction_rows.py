"""The rows of benchmarks.token_reduction: which reducer, and with what fields.

A row has a name and is measured at some budgets. Those of TRAINED are read from
folders of experiments.train_reducer; several rows may be of one folder, with
other fields: what a reducer is compared with, as a predicted share dealt out at
random, is a row as it is.
"""

import dataclasses
import pathlib
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import reduction_checks as checks
from experiments import (
  mosaic_evaluation,
  token_reduction,
  training,
  training_files,
)
from jaxq.data import mosaic
from jaxq.tokens import cacovid, embedlens, interface, registry

ORACLE = 'quota, oracle frames'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """A row of a trained reducer.

  folder: its name in --reducers, and of its flagfile. fields: of the reducer
  that are other here than there. budgets: at which it is measured; those that
  are not of checks.BUDGETS are for comparisons and stand in no table.
  """

  folder: str
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  budgets: tuple[float, ...] = checks.BUDGETS


_FIRST = checks.BUDGETS[:1]  # Of rows that choose a number themselves.
_CODES = {'codes': 0}  # As many as the budget says.

TRAINED: Mapping[str, Row] = {
  'qtsplus': Row(folder='qtsplus'),
  checks.SHARE: Row(
    folder='qtsplus', fields={'control': 'share'}, budgets=_FIRST
  ),
  checks.HEAVY: Row(folder='qtsplus_10', budgets=_FIRST),
  'cacovid': Row(folder='cacovid'),
  'cacovid, policy alone': Row(folder='cacovid', fields={'importance': 1.0}),
  'tokenflex': Row(
    folder='tokenflex', budgets=(*checks.BUDGETS, *checks.FLEX_BUDGETS)
  ),
  checks.MLP: Row(folder='tokenflex_mlp'),
  'tokenflex, 4 a frame only': Row(folder='tokenflex_4'),
  'tokenflex, 1 a frame only': Row(folder='tokenflex_1'),
  'embedlens': Row(folder='embedlens'),
  checks.ALIVE: Row(
    folder='embedlens', fields={'control': 'alive'}, budgets=_FIRST
  ),
  'vqtoken': Row(folder='vqtoken', fields=_CODES),
  checks.CODES: Row(folder='vqtoken_codes', fields=_CODES),
  checks.IN_SEQUENCE: Row(folder='vqtoken_sequence', fields=_CODES),
  checks.SHUFFLED: Row(
    folder='vqtoken_sequence', fields={**_CODES, 'control': 'shuffled'}
  ),
  checks.SEQUENCE_CODES: Row(folder='vqtoken_codes_sequence', fields=_CODES),
  'tome, decoder trained': Row(folder='tome'),
  'visionzip, decoder trained': Row(folder='visionzip'),
  'random, decoder trained': Row(folder='random'),
}
METHODS = (
  *checks.CONTROLS,
  checks.PEAKS,
  'average_pool',
  'adaptive_pool',
  'bilinear_pool',
  *checks.BLIND,
  *checks.OWN_NUMBER,
  'dycoke',
  *checks.QUERY_AWARE,
  ORACLE,
  *TRAINED,
)


def budgets(name: str) -> tuple[float, ...]:
  """At which a row is measured."""
  if name in TRAINED:
    return TRAINED[name].budgets
  return _FIRST if name in checks.OWN_NUMBER else checks.BUDGETS


def method(
  name: str, ratio: float, trained: training.Trained, reducers: str | None
) -> token_reduction.Method | None:
  """A row's method at a budget; None where it cannot be had.

  reducers: the folder of the trained ones; None: there are none.
  """
  if name in TRAINED:
    return _trained_method(name, ratio, trained, reducers)
  n = trained.model.num_visual
  K = interface.budget_from_ratio(n, ratio).k_max
  reducer, _, place = name.partition(', ')
  if name == checks.PEAKS:
    peaks = cacovid.CaCoVIDConfig(
      budget=ratio, scorer='given', importance=1.0, cap=1.0
    )
    return token_reduction.Method(config=peaks, scores='peaks')
  config = dataclasses.replace(registry.REDUCERS[reducer], budget=ratio)
  fields: dict[str, Any] = {}
  if reducer == 'visionzip':  # A sixth of the budget, as 10 of 64.
    fields = {'contextual': K // 6, 'merge': 'mean'}
  elif reducer.startswith('prumerge'):  # 32 of 576.
    own = name in checks.OWN_NUMBER
    fields = {'adaptive': own, 'neighbours': max(1, n // 18)}
  elif reducer == 'vqtoken_codes':
    fields = {'codebook_of': 'raw', 'codes': K}
  elif reducer == 'dycoke' and ratio < 0.25:
    return None  # One frame of four stays whole.
  elif reducer == 'average_pool' and ratio != 0.25:
    return None  # Windows of 2 x 2.
  elif reducer in ('fastv', 'sparsevlm'):
    layer = int(place.removeprefix('layer '))
    return token_reduction.Method(config=config, layer=layer)
  elif name == ORACLE:
    return token_reduction.Method(config=config, scores='evidence')
  return token_reduction.Method(config=dataclasses.replace(config, **fields))


def _trained_method(
  name: str, ratio: float, trained: training.Trained, reducers: str | None
) -> token_reduction.Method | None:
  """A row of TRAINED; None where its folder is not there."""
  folder = folder_of(name, reducers)
  if folder is None:
    return None
  parsed = token_reduction.parse(str(folder), trained)
  config: Any = parsed.config
  config = dataclasses.replace(config, budget=ratio, **TRAINED[name].fields)
  return dataclasses.replace(parsed, config=config)


def folder_of(name: str, reducers: str | None) -> pathlib.Path | None:
  """Where the reducer of a row is, if it is a trained one and there."""
  if reducers is None or name not in TRAINED:
    return None
  return found(reducers, TRAINED[name].folder)


def found(reducers: str, name: str) -> pathlib.Path | None:
  """A finished folder of this name, or None."""
  folder = pathlib.Path(reducers) / name
  return folder if training_files.is_complete(folder) else None


def differs(
  row: Mapping[str, Any],
  how: Mapping[str, Any] | None,
  conventions: Mapping[str, Any] | None,
) -> bool:
  """Whether a stored row is of another training, or of other videos.

  Args:
    row: as stored.
    how: of checks.how_trained; None: nothing was trained.
    conventions: of its accuracy; None: it has none.
  """
  if row.get('trained') != how:
    return True
  if conventions is None:
    return False
  made = checks.metrics(row)['accuracy']['conventions']
  return any(made.get(name) != value for name, value in conventions.items())


def train_missing(
  model: str, reducers: str | None, methods: Sequence[str]
) -> None:
  """Runs experiments.train_reducer for what rows need and `reducers` has not.

  Args:
    model: folder of experiments.train.
    reducers: folder of the trained ones.
    methods: names of rows; those of no trained reducer are passed over.

  Raises:
    ValueError: no folder.
    subprocess.CalledProcessError: a training failed.
  """
  if reducers is None:
    raise ValueError(
      '--train_missing without --reducers; what is trained needs a folder. '
      'Give --reducers=ROOT.'
    )
  rows = [TRAINED[method] for method in methods if method in TRAINED]
  for name in dict.fromkeys(row.folder for row in rows):
    if found(reducers, name) is not None:
      continue
    print(f'{name} is not in {reducers}: training', file=sys.stderr)
    command = [sys.executable, '-m', 'experiments.train_reducer']
    command += [f'--model={model}', '--eval_videos=0']
    command += [f'--output={pathlib.Path(reducers) / name}']
    command += [f'--flagfile=experiments/flags/mosaicqa_{name}.flags']
    subprocess.run(command, check=True)


def probed(
  used: token_reduction.Method | None,
  trained: training.Trained,
  encoded: Iterable[token_reduction.Encoded],
  videos: int,
  seeds: int,
) -> dict[str, float]:
  """What EmbedLens makes of cells with a digit and of those with noise.

  Args:
    used: EmbedLens, with its probe.
    trained: the model.
    encoded: its test videos.
    videos, seeds: of which they are.

  Returns:
    'noise dropped' and 'digits dropped', shares of the cells; 'auc', of the
    margin by which the nearest word marks a group, for noise; 'nearest' and
    'chance' of embedlens.informative.
  """
  assert used is not None
  config, probe = used.config, used.params
  ratio = dataclasses.replace(config, budget=1.0)
  look = jax.jit(lambda ts: ratio.reduce(ts, params=probe).assignment < 0)
  margin = jax.jit(lambda ts: embedlens.margin(ts.tokens, probe))
  compare = jax.jit(embedlens.informative)
  digits = _digits(trained, videos, seeds)
  dropped, margins, cosines = [], [], []
  for i, batch in enumerate(encoded):
    ts = batch.visual.tokens
    dropped.append(np.asarray(look(ts)))
    margins.append(np.asarray(margin(ts)))
    key = jax.random.fold_in(jax.random.key(0), i)
    cosines.append(np.asarray(compare(ts.tokens, ts.mask, probe, key)))
  gone = np.concatenate(dropped)
  nearest, chance = np.mean(cosines, axis=0)
  return {
    'noise dropped': float(gone[~digits].mean()),
    'digits dropped': float(gone[digits].mean()),
    'auc': auc(np.concatenate(margins), ~digits),
    'nearest': float(nearest),
    'chance': float(chance),
  }


def _digits(trained: training.Trained, videos: int, seeds: int) -> np.ndarray:
  """Which tokens (all videos, N) of the test videos are of a digit's cell."""
  size = trained.model.patch_size
  parts = [
    mosaic.token_evidence(batch['cells'] != mosaic.EMPTY, size)
    for seed in range(seeds)
    for batch in mosaic_evaluation.batches(trained.data, videos, seed)
  ]
  return np.concatenate(parts)


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
  """The chance that a positive one has the higher score; ties count half.

  scores, positive: of one shape, bool the second, with some of either.
  """
  _, place, counts = np.unique(
    scores.ravel(), return_inverse=True, return_counts=True
  )
  ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
  mine = ranks[positive.ravel()]
  n = mine.size
  return float((mine.sum() - n * (n + 1) / 2) / (n * (positive.size - n)))


def tokens_by_kind(measured: token_reduction.Measured) -> dict[str, float]:
  """Mean slots in use, by kind of question."""
  return {
    kind: float(measured.tokens[measured.kinds == i].mean())
    for i, kind in enumerate(mosaic.KINDS)
    if (measured.kinds == i).any()
  }


def by_seed(right: np.ndarray, seeds: int) -> list[float]:
  """Accuracy of each seed's videos; right (videos, Q)."""
  parts: Sequence[np.ndarray] = np.split(right, seeds)
  return [float(part.mean()) for part in parts]
