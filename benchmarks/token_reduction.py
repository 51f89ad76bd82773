"""The table of token reducers: method x budget, with three controls beside.

  python -m experiments.train --flagfile=experiments/flags/mosaicqa_cpu.flags
  python -m benchmarks.token_reduction --model=FOLDER

MosaicQA first (experiments.token_reduction), then merging and pruning
inside pretrained encoders (benchmarks.encoder_reduction), and what real videos
repeat (benchmarks.video_reduction). Rows that are stored
for this model and setting are not run again (`--rerun` does), so the command
can be interrupted, and a new reducer costs its own rows. Writes
docs/token_reduction.json and, from it, docs/token_reduction.md.

Most reducers are put into the model as they are: their rows show what a method
chooses, not what a model can learn to do with it. Those whose method is a
training, and what they are compared with, are read from --reducers, a folder
with one of experiments.train_reducer for each of benchmarks.reduction_rows:

  python -m benchmarks.token_reduction --model=FOLDER --reducers=ROOT \
      --train_missing

trains those that are not there, each by experiments/flags/mosaicqa_NAME.flags
(half an hour on a CPU core for all). Without --train_missing their rows are
left out. Why some reducers keep more of the evidence and answer fewer questions
is what benchmarks.token_reduction_sinks shows.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from benchmarks import encoder_reduction, video_reduction
from benchmarks import reduction_checks as checks
from benchmarks import reduction_rows as rows_lib
from experiments import (
  cli,
  mosaic_evaluation,
  results,
  token_reduction,
  training,
)

FLAGS = flags.FLAGS
flags.DEFINE_string('model', None, 'Folder of experiments.train.')
flags.DEFINE_string(
  'reducers', None, 'Folder of trained reducers, by name; None: no such rows.'
)
flags.DEFINE_string('store', 'docs/token_reduction.json', 'The stored results.')
flags.DEFINE_string('page', 'docs/token_reduction.md', 'The page from them.')
flags.DEFINE_list('only', [], 'Methods to run; default all.')
flags.DEFINE_list(
  'parts', ['mosaicqa', 'vit', 'whisper', 'video'], 'Parts to run.'
)
flags.DEFINE_integer('videos', 128, 'Test videos of each seed.', lower_bound=1)
flags.DEFINE_integer('seeds', 3, 'Of videos and of what draws.', lower_bound=1)
flags.DEFINE_bool('rerun', False, 'Run rows that are stored already.')
flags.DEFINE_bool(
  'train_missing', False, 'Train the reducers that are not in --reducers.'
)

BUDGETS = checks.BUDGETS
METHODS = rows_lib.METHODS
_ALL = checks.ALL
_KINDS = ('cell', 'presence', 'count', 'order')

Store = dict[str, dict[str, Any]]


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

  def wanted(
    key: str,
    how: Mapping[str, Any] | None = None,
    conventions: Mapping[str, Any] | None = None,
  ) -> bool:
    if FLAGS.rerun or key not in store:
      return True
    return rows_lib.differs(store[key], how, conventions)

  if 'mosaicqa' in FLAGS.parts:
    if FLAGS.model is None:
      raise ValueError(
        '--model not given; the MosaicQA rows need a folder of '
        'experiments.train. Train one, or leave mosaicqa out of --parts.'
      )
    trained = training.load(FLAGS.model, 'video')
    if FLAGS.train_missing:
      methods = FLAGS.only or METHODS
      rows_lib.train_missing(FLAGS.model, FLAGS.reducers, methods)
    _mosaicqa(trained, wanted, keep)
  for part, run in encoder_reduction.PARTS.items():
    if part in FLAGS.parts:
      run(wanted, keep)
  if video_reduction.PART in FLAGS.parts:
    video_reduction.run(wanted, keep)
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
    for ratio in (1.0,) if label == _ALL else rows_lib.budgets(label):
      key = f'MosaicQA {name}, {label}, {ratio:g}'
      used = None
      if label != _ALL:
        used = rows_lib.method(label, ratio, trained, FLAGS.reducers)
        if used is None:
          continue
      folder = rows_lib.folder_of(label, FLAGS.reducers)
      how = None if folder is None else checks.how_trained(folder)
      if not wanted(key, how, conventions):
        continue
      measured = token_reduction.measure(trained, used, encoded)
      row = token_reduction.row(label, trained, used, measured, conventions)
      stored = {
        'part': 'MosaicQA',
        'method': label,
        'budget': ratio,
        'accuracy by seed': rows_lib.by_seed(measured.right, FLAGS.seeds),
        'tokens by kind': rows_lib.tokens_by_kind(measured),
        **dataclasses.asdict(row),
      }
      if label == 'embedlens':
        stored['probe'] = rows_lib.probed(
          used, trained, encoded, FLAGS.videos, FLAGS.seeds
        )
      keep(key, stored | ({'trained': how} if how else {}))
      print(f'{key}: {row["accuracy"].value:.3f}', file=sys.stderr, flush=True)


def page(store: Store) -> str:
  """The Markdown page of the stored rows."""
  rows = [row for row in store.values() if row['part'] == 'MosaicQA']
  parts = ['# Token reduction', '', _PREFACE]
  if rows:
    parts += ['', '## MosaicQA', '', *_preamble(rows)]
    for ratio in BUDGETS:
      parts += ['', f'### {ratio:.0%} of the tokens', '', _table(rows, ratio)]
    parts += ['', '### What was expected', '', _WHY, '', *checks.lines(rows)]
    parts += _how_trained(rows)
  parts += ['', encoder_reduction.page(store), video_reduction.page(store)]
  return '\n'.join(parts).rstrip() + '\n'


_WHY = 'Why, where it was not as expected, is in [notes.md](notes.md).'
_PREFACE = """\
Made by `python -m benchmarks.token_reduction`; do not edit. A reducer is put
into a model that was trained with all tokens. Rows of reducers whose method is
a training, or whose classes have to be found for a model first, stand behind
the others of each budget; how they were trained stands below, and where the
decoder was trained with them. Not in the table: EchoingPixels, PVC, LangDC and
Follow the Flow, which need another model than this one
(`experiments/reducer_training/registry.py`). In brackets: 95 % bootstrap
intervals over videos."""


def _how_trained(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """A line per trained reducer, as its rows have stored it."""
  found = {}
  for row in rows:
    if 'trained' in row:
      found[row['method']] = row['trained']
  if not found:
    return []
  lines = ['', '### How the trained ones were trained', '']
  for name, how in found.items():
    fields = ', '.join(f'{k}={v}' for k, v in how['train'].items())
    schedule = ', '.join(f'{k} {v}' for k, v in how['schedule'].items())
    lines.append(f'- {name}: `{how["reducer"]}`; {fields}; {schedule}.')
  return lines


def _preamble(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  full = checks.find(rows, _ALL, 1.0)
  if full is None:
    return []
  metric = checks.metrics(full)['accuracy']
  made = metric['conventions']
  kinds = ', '.join(
    f'{kind} {checks.metrics(full)[kind]["value"]:.1%}'
    for kind in _KINDS
    if kind in checks.metrics(full)
  )
  verdict = (
    'as is needed'
    if metric['value'] >= mosaic_evaluation.LEAST_ACCURACY
    else 'BELOW the 90 % that a comparison needs'
  )
  return [
    f'{made["data"]}; {made["videos"]} videos of {made["seeds"]} seeds with '
    f'{mosaic_evaluation.QUESTIONS} questions each. With all '
    f'{checks.metrics(full)["tokens"]["value"]:.0f} tokens the accuracy is '
    f'{_interval(metric)} ({kinds}), {verdict}; '
    f'{checks.metrics(full)["time"]["value"]:.2f} ms a video. Evidence '
    'recall: share of the tokens that a question is answered from which are '
    'kept, or merged into a slot of at most '
    f'{token_reduction.LARGEST_SLOT:g}. FLOPs: of the decoder. Time: of '
    'reducer and decoder, as a multiple of the decoder with all tokens; of a '
    'model of this size it is mostly the reducer and says nothing about larger '
    'ones.',
  ]


def _table(rows: Sequence[Mapping[str, Any]], ratio: float) -> str:
  """One budget, the controls first."""
  full = checks.find(rows, _ALL, 1.0)
  lines = []
  shown = [k for k in _KINDS if full and k in checks.metrics(full)]
  head = ['method', 'accuracy', *shown, 'evidence recall', 'tokens', 'FLOPs']
  for name in METHODS:
    row = checks.find(rows, name, ratio)
    if row is None:
      continue
    m = checks.metrics(row)
    cells = [name, _interval(m['accuracy'])]
    cells += [f'{m[k]["value"]:.1%}' if k in m else '' for k in shown]
    cells += [f'{m["evidence recall"]["value"]:.1%}']
    cells += [f'{m["tokens"]["value"]:.1f}', f'{m["FLOPs"]["value"]:.1%}']
    if full is not None:
      cells.append(
        f'{checks.value(row, "time") / checks.value(full, "time"):.2f}x'
      )
    lines.append('| ' + ' | '.join(cells) + ' |')
  head += ['time'] if full is not None else []
  rule = '| --- |' + ' ---: |' * (len(head) - 1)
  return '\n'.join(['| ' + ' | '.join(head) + ' |', rule, *lines])


def _interval(metric: Mapping[str, Any]) -> str:
  text = f'{metric["value"]:.1%}'
  if metric.get('low') is not None:
    text += f' [{metric["low"]:.1%}, {metric["high"]:.1%}]'
  return text


if __name__ == '__main__':
  cli.run(main)
