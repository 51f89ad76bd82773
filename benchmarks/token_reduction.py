"""The table of token reducers: method x budget, with three controls beside.

  python -m experiments.train --flagfile=experiments/flags/mosaicqa_cpu.flags
  python -m benchmarks.token_reduction --model=FOLDER

MosaicQA first (experiments.token_reduction), then merging and pruning
inside pretrained encoders (benchmarks.encoder_reduction). Rows that are stored
for this model and setting are not run again (`--rerun` does), so the command
can be interrupted, and a new reducer costs its own rows. Writes
docs/token_reduction.json and, from it, docs/token_reduction.md.

No reducer here is trained, nor is the model trained for reduced tokens: what
the table shows is what a method chooses, not what a model can learn to do with
it. Reducers whose method is a training are measured by their own tests.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from benchmarks import encoder_reduction
from experiments import (
  cli,
  mosaic_evaluation,
  results,
  token_reduction,
  training,
)
from jaxq.tokens import interface, registry

FLAGS = flags.FLAGS
flags.DEFINE_string('model', None, 'Folder of experiments.train.')
flags.DEFINE_string('store', 'docs/token_reduction.json', 'The stored results.')
flags.DEFINE_string('page', 'docs/token_reduction.md', 'The page from them.')
flags.DEFINE_list('only', [], 'Methods to run; default all.')
flags.DEFINE_list('parts', ['mosaicqa', 'vit', 'whisper'], 'Parts to run.')
flags.DEFINE_integer('videos', 128, 'Test videos of each seed.', lower_bound=1)
flags.DEFINE_integer('seeds', 3, 'Of videos and of what draws.', lower_bound=1)
flags.DEFINE_bool('rerun', False, 'Run rows that are stored already.')

BUDGETS = (0.5, 0.25, 0.15, 0.1, 0.05)
CONTROLS = ('random', 'uniform', 'frames')
QUERY_AWARE = ('fastv, layer 1', 'fastv, layer 2', 'sparsevlm, layer 1')
ORACLE = 'quota, oracle frames'
BLIND = ('tome', 'visionzip', 'prumerge', 'prumerge_plus', 'vqtoken_codes')
_ALL = 'all tokens'
_KINDS = ('cell', 'presence', 'count', 'order')

Store = dict[str, dict[str, Any]]


def method(
  name: str, ratio: float, trained: training.Trained
) -> token_reduction.Method | None:
  """A row's method at a budget; None where it cannot be had."""
  n = trained.model.num_visual
  K = interface.budget_from_ratio(n, ratio).k_max
  reducer, _, place = name.partition(', ')
  config = dataclasses.replace(registry.REDUCERS[reducer], budget=ratio)
  fields: dict[str, Any] = {}
  if reducer == 'visionzip':  # A sixth of the budget, as 10 of 64.
    fields = {'contextual': K // 6, 'merge': 'mean'}
  elif reducer.startswith('prumerge'):
    fields = {'adaptive': False, 'neighbours': max(1, n // 18)}  # 32 of 576.
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


METHODS = (
  *CONTROLS,
  'average_pool',
  'adaptive_pool',
  'bilinear_pool',
  *BLIND,
  'dycoke',
  *QUERY_AWARE,
  ORACLE,
)


def main(argv: Sequence[str]) -> None:
  """Runs what is missing and writes the page."""
  del argv
  store_path = pathlib.Path(FLAGS.store)
  store: Store = {}
  if store_path.is_file():
    store = json.loads(store_path.read_text('utf-8'))

  def keep(key: str, row: Mapping[str, Any]) -> None:
    store[key] = dict(row)
    results.write_text(store_path, json.dumps(store, indent=1) + '\n')
    results.write_text(FLAGS.page, page(store))

  def wanted(key: str) -> bool:
    return FLAGS.rerun or key not in store

  if 'mosaicqa' in FLAGS.parts:
    if FLAGS.model is None:
      raise ValueError(
        '--model not given; the MosaicQA rows need a folder of '
        'experiments.train. Train one, or leave mosaicqa out of --parts.'
      )
    _mosaicqa(training.load(FLAGS.model), wanted, keep)
  for part, run in encoder_reduction.PARTS.items():
    if part in FLAGS.parts:
      run(wanted, keep)
  results.write_text(FLAGS.page, page(store))
  print(f'{len(store)} rows: {store_path}, {FLAGS.page}')


def _mosaicqa(trained: training.Trained, wanted, keep) -> None:
  """The rows of the model, a row at a time."""
  name = pathlib.Path(FLAGS.model).resolve().name
  encoded = [
    batch
    for seed in range(FLAGS.seeds)
    for batch in token_reduction.encode(trained, FLAGS.videos, seed)
  ]
  conventions = {
    'data': dataclasses.replace(trained.data, split='test').description,
    'videos': FLAGS.videos * FLAGS.seeds,
    'seeds': FLAGS.seeds,
    'model': name,
  }
  for label in (_ALL, *METHODS):
    if FLAGS.only and label not in (_ALL, *FLAGS.only):
      continue
    for ratio in (1.0,) if label == _ALL else BUDGETS:
      key = f'MosaicQA {name}, {label}, {ratio:g}'
      if not wanted(key):
        continue
      how = None if label == _ALL else method(label, ratio, trained)
      if how is None and label != _ALL:
        continue
      measured = token_reduction.measure(trained, how, encoded)
      row = token_reduction.row(label, trained, how, measured, conventions)
      by_seed = np.split(measured.right, FLAGS.seeds)
      keep(
        key,
        {
          'part': 'MosaicQA',
          'method': label,
          'budget': ratio,
          'accuracy by seed': [float(right.mean()) for right in by_seed],
          **dataclasses.asdict(row),
        },
      )
      print(f'{key}: {row["accuracy"].value:.3f}', file=sys.stderr, flush=True)


def page(store: Store) -> str:
  """The Markdown page of the stored rows."""
  rows = [row for row in store.values() if row['part'] == 'MosaicQA']
  parts = ['# Token reduction', '', _PREFACE]
  if rows:
    parts += ['', '## MosaicQA', '', *_preamble(rows)]
    for ratio in BUDGETS:
      parts += ['', f'### {ratio:.0%} of the tokens', '', _table(rows, ratio)]
    parts += ['', '### What was expected', '', *checks(rows)]
  parts += ['', encoder_reduction.page(store)]
  return '\n'.join(parts).rstrip() + '\n'


_PREFACE = """\
Made by `python -m benchmarks.token_reduction`; do not edit. A reducer is put
into a model that was trained with all tokens, and nothing is trained: the
table shows what a method chooses. Reducers whose method is a training
(CaCoVID, QTSplus, EchoingPixels, TokenFLEX, PVC, LangDC, VQToken's map, Follow
the Flow) or whose classes have to be found for a model first (EmbedLens) are
not in it. In brackets: 95 % bootstrap intervals over videos."""


def _preamble(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  full = _find(rows, _ALL, 1.0)
  if full is None:
    return []
  metric = _metrics(full)['accuracy']
  made = metric['conventions']
  kinds = ', '.join(
    f'{kind} {_metrics(full)[kind]["value"]:.1%}'
    for kind in _KINDS
    if kind in _metrics(full)
  )
  verdict = (
    'as is needed'
    if metric['value'] >= mosaic_evaluation.LEAST_ACCURACY
    else 'BELOW the 90 % that a comparison needs'
  )
  return [
    f'{made["data"]}; {made["videos"]} videos of {made["seeds"]} seeds with '
    f'{mosaic_evaluation.QUESTIONS} questions each. With all '
    f'{_metrics(full)["tokens"]["value"]:.0f} tokens the accuracy is '
    f'{_interval(metric)} ({kinds}), {verdict}; '
    f'{_metrics(full)["time"]["value"]:.2f} ms a video. Evidence recall: share '
    'of the tokens that a question is answered from which are kept, or '
    f'merged into a slot of at most {token_reduction.LARGEST_SLOT:g}. FLOPs: '
    'of the decoder. Time: of reducer and decoder, as a multiple of the '
    'decoder with all tokens; of a model of this size it is mostly the reducer '
    'and says nothing about larger ones.',
  ]


def _table(rows: Sequence[Mapping[str, Any]], ratio: float) -> str:
  """One budget, the controls first."""
  full = _find(rows, _ALL, 1.0)
  lines = []
  shown = [k for k in _KINDS if full and k in _metrics(full)]
  head = ['method', 'accuracy', *shown, 'evidence recall', 'tokens', 'FLOPs']
  for name in METHODS:
    row = _find(rows, name, ratio)
    if row is None:
      continue
    m = _metrics(row)
    cells = [name, _interval(m['accuracy'])]
    cells += [f'{m[k]["value"]:.1%}' if k in m else '' for k in shown]
    cells += [f'{m["evidence recall"]["value"]:.1%}']
    cells += [f'{m["tokens"]["value"]:.1f}', f'{m["FLOPs"]["value"]:.1%}']
    if full is not None:
      cells.append(f'{_value(row, "time") / _value(full, "time"):.2f}x')
    lines.append('| ' + ' | '.join(cells) + ' |')
  head += ['time'] if full is not None else []
  rule = '| --- |' + ' ---: |' * (len(head) - 1)
  return '\n'.join(['| ' + ' | '.join(head) + ' |', rule, *lines])


def checks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """What the testbed is expected to show, and what it showed."""
  full, random = _find(rows, _ALL, 1.0), _find(rows, 'random', 0.25)
  out = []
  if full and random:
    drop = _value(full, 'accuracy') - _value(random, 'accuracy')
    high = _metrics(random)['accuracy']['high']
    clear = high < _metrics(full)['accuracy']['low']
    out.append(
      f'- Random tokens at 25 % cost accuracy: {drop:.1%} points, '
      f'{_verdict(clear)}.'
    )
  for ratio in (0.25, 0.1):
    control = _find(rows, 'random', ratio)
    for name in BLIND:
      row = _find(rows, name, ratio)
      if row and control:
        gain = _value(row, 'evidence recall') - _value(
          control, 'evidence recall'
        )
        out.append(
          f'- {name} finds more evidence than random at {ratio:.0%}: '
          f'{gain:+.1%} points, {_verdict(gain > 0)}.'
        )
  for ratio in (0.1, 0.05):
    blind = [r for r in (_find(rows, n, ratio) for n in BLIND) if r]
    aware = [r for r in (_find(rows, n, ratio) for n in QUERY_AWARE) if r]
    if blind and aware:
      best_blind = max(blind, key=lambda r: _value(r, 'accuracy'))
      best_aware = max(aware, key=lambda r: _value(r, 'accuracy'))
      gain = _value(best_aware, 'accuracy') - _value(best_blind, 'accuracy')
      out.append(
        f'- The best that sees the question ({best_aware["method"]}) beats the '
        f'best that does not ({best_blind["method"]}) at {ratio:.0%}: '
        f'{gain:+.1%} points, {_verdict(gain > 0)}.'
      )
  return out


def _verdict(met: bool) -> str:
  return 'as expected' if met else 'NOT as expected'


def _find(
  rows: Sequence[Mapping[str, Any]], method_name: str, ratio: float
) -> Mapping[str, Any] | None:
  for row in rows:
    if row['method'] == method_name and row['budget'] == ratio:
      return row
  return None


def _metrics(row: Mapping[str, Any]) -> dict[str, Any]:
  return {m['name']: m for m in row['metrics']}


def _value(row: Mapping[str, Any], name: str) -> float:
  return float(_metrics(row)[name]['value'])


def _interval(metric: Mapping[str, Any]) -> str:
  text = f'{metric["value"]:.1%}'
  if metric.get('low') is not None:
    text += f' [{metric["low"]:.1%}, {metric["high"]:.1%}]'
  return text


if __name__ == '__main__':
  cli.run(main)
