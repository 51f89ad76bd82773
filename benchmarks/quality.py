"""The quality table: every method and setting on SmolLM2-135M, by one command.

  python -m benchmarks.quality --work=/tmp/jaxq_quality

Each row is one run of `experiments.calibrate` in a fresh process, evaluated
against the float model on the same windows. Rows that are in the stored JSON
with the same flags are not run again (`--rerun` does), so the command can be
interrupted, and a new row costs one run. Writes docs/quality.json and, from
it, docs/quality.md.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence

from absl import flags

from experiments import cli, results

FLAGS = flags.FLAGS
flags.DEFINE_string('work', '/tmp/jaxq_quality', 'Where the runs write.')
flags.DEFINE_string('store', 'docs/quality.json', 'The stored results.')
flags.DEFINE_string('page', 'docs/quality.md', 'The page made from them.')
flags.DEFINE_list('only', [], 'Settings to run, such as W4g64; default all.')
flags.DEFINE_bool('rerun', False, 'Run rows that are stored already.')

COMMON = ('--model=smollm2-135m', '--eval_window=2048', '--eval_tokens=8192')
DATA_FREE = ('--sequences=8',)  # Nothing is learned from them.
SETTINGS = {
  'W8A8': ('--scheme=W8A8',),
  'W4': ('--scheme=W4A16', '--group_size=-1'),
  'W4g64': ('--scheme=W4A16', '--group_size=64'),
  'W3g64': ('--scheme=W3A16', '--group_size=64'),
  'W4A4': ('--scheme=W4A4',),
}
GPTQ = ('--method=gptq', '--set=gptq.search=mse')
AWQ = ('--method=awq', '--sequences=16')
CLIP = ('--input_clip=0.9',)
ROTATE_GPTQ = ('--method=rotate,gptq', '--set=gptq.search=mse', *CLIP)
ROWS = (
  ('W8A8', 'RTN', DATA_FREE),
  ('W8A8', 'SmoothQuant', ('--method=smoothquant',)),
  ('W8A8', 'rotation', ('--method=rotate', *DATA_FREE)),
  ('W4', 'RTN', DATA_FREE),
  ('W4', 'GPTQ', GPTQ),
  ('W4', 'AWQ', AWQ),
  ('W4g64', 'RTN', DATA_FREE),
  ('W4g64', 'GPTQ', GPTQ),
  ('W4g64', 'AWQ', AWQ),
  ('W3g64', 'RTN', DATA_FREE),
  ('W3g64', 'GPTQ', GPTQ),
  ('W3g64', 'AWQ', AWQ),
  ('W4A4', 'RTN', DATA_FREE),
  ('W4A4', 'GPTQ', (*GPTQ, *CLIP)),
  ('W4A4', 'rotation', ('--method=rotate', *DATA_FREE, *CLIP)),
  ('W4A4', 'rotation + GPTQ', ROTATE_GPTQ),
)
COLUMNS = (
  'token perplexity',
  'perplexity ratio',
  'KL',
  'top-1 agreement',
  'word perplexity',
  'bits per byte',
  'bits per weight',
  'calibration',
  'peak memory',
)


def main(argv: Sequence[str]) -> None:
  """Runs what is missing and writes the page."""
  del argv
  stored = _load(FLAGS.store)
  for setting, method, extra in ROWS:
    name = f'{setting}, {method}'
    arguments = [*COMMON, *SETTINGS[setting], *extra]
    if FLAGS.only and setting not in FLAGS.only:
      continue
    if stored.get(name, {}).get('flags') == arguments and not FLAGS.rerun:
      continue
    result = _run(name, arguments)
    stored[name] = {'flags': arguments, **result}
    text = json.dumps(stored, indent=1, ensure_ascii=False)
    results.write_text(FLAGS.store, text + '\n')
  results.write_text(FLAGS.page, page(stored))


def page(stored: dict[str, dict]) -> str:
  """docs/quality.md from the stored rows, in the order of ROWS."""
  order = [f'{setting}, {method}' for setting, method, _ in ROWS]
  found = [name for name in order if name in stored]
  rows = [stored[name]['row'] for name in found]
  parsed = [stored[found[0]]['float'], *rows] if found else []
  table = results.to_markdown([_row(data) for data in parsed])
  runs = sorted({stored[name]['run'] for name in found})
  commands = '\n'.join(
    f'| {name} | `{" ".join(stored[name]["flags"])}` |' for name in found
  )
  return (
    '# Quality\n\n'
    'Made by `python -m benchmarks.quality`; do not edit. "float" is the '
    'packaged file of\nSmolLM2-135M-Instruct dequantized to float32. The file '
    'stores an asymmetric int4\ngrid with groups of 32, so that setting would '
    'be lossless and is not in the table.\nIn brackets: 95 % bootstrap '
    'intervals over blocks of 128 tokens; those of the ratio\nare paired, and '
    'hold for these articles.\n\n'
    f'{table}\n'
    'Calibration: 64 sequences of 512 tokens of the calibration articles, 16 '
    'for AWQ,\nwhose statistics settle early; RTN and rotation alone learn '
    'nothing from data.\nSeconds and memory are of the whole process before '
    'evaluation, on a machine that\ndid other work as well: compare quality, '
    'not seconds.\n\n'
    + ''.join(f'- {run}\n' for run in runs)
    + f'\n| row | flags |\n|---|---|\n{commands}\n'
  )


def _run(name: str, arguments: list[str]) -> dict:
  """One calibration in a fresh process -> what is stored of it."""
  slug = ''.join(c if c.isalnum() else '_' for c in name)
  output = pathlib.Path(FLAGS.work) / slug
  command = [sys.executable, '-m', 'experiments.calibrate', *arguments]
  command.append(f'--output={output}')
  print('$', ' '.join(command), file=sys.stderr, flush=True)
  subprocess.run(command, check=True, env=os.environ)
  log = pathlib.Path(f'{output}.run')
  result = results.load(log / 'results.json')
  reference, row = result.rows
  bits = _bits_per_weight(log / 'blocks.jsonl')
  row = dataclasses.replace(
    row,
    name=name,
    metrics=(*row.metrics, results.Metric(name='bits per weight', value=bits)),
  )
  shutil.rmtree(output)
  run = f'JAX {result.run.jax}, Python {result.run.python}, {result.run.device}'
  return {
    'run': run,
    'float': dataclasses.asdict(dataclasses.replace(reference, name='float')),
    'row': dataclasses.asdict(row),
  }


def _bits_per_weight(path: pathlib.Path) -> float:
  """Of all quantized linears, scales and zero points counted."""
  linears = [
    linear
    for line in path.read_text().splitlines()
    for linear in json.loads(line)['linears']
  ]
  total = sum(linear['bits'] * linear['size'] for linear in linears)
  return total / sum(linear['size'] for linear in linears)


def _row(data: dict) -> results.Row:
  metrics = {m['name']: results.Metric(**m) for m in data['metrics']}
  return results.Row(
    name=data['name'],
    metrics=tuple(metrics[name] for name in COLUMNS if name in metrics),
  )


def _load(path: str) -> dict[str, dict]:
  file = pathlib.Path(path)
  return json.loads(file.read_text()) if file.exists() else {}


if __name__ == '__main__':
  cli.run(main)
