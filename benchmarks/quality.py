"""The quality table: every method and setting on SmolLM2-135M, by one command.

  python -m benchmarks.quality --work=/tmp/jaxq_quality

Each row is one run of `experiments.calibrate` in a fresh process, evaluated
against the float model on the same windows. Rows that are in the stored JSON
with the same flags are not run again (`--rerun` does), so the command can be
interrupted, and a new row costs one run. Writes docs/quality.json and, from
it, docs/quality.md.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence

from absl import flags

from benchmarks import claims
from experiments import cli, results
from jaxq.io import files

FLAGS = flags.FLAGS

COMMON = ('--model=smollm2-135m', '--eval_window=2048', '--eval_tokens=8192')
DATA_FREE = ('--sequences=8',)  # Nothing is learned from them.
HALF = ('--sequences=32',)  # Ranges settle before Hessians do.
QUARTER = ('--sequences=16',)  # As many as the methods beside have.
ASYMMETRIC = ('--nosymmetric', '--noinput_symmetric')
SETTINGS = {
  'W8A8': ('--scheme=W8A8',),
  'W4': ('--scheme=W4A16', '--group_size=-1'),
  'W4g64': ('--scheme=W4A16', '--group_size=64'),
  'W3g64': ('--scheme=W3A16', '--group_size=64'),
  'W4A4': ('--scheme=W4A4',),
  'W4A8': ('--scheme=W4A8',),
  'W4A4 static': ('--scheme=W4A4_STATIC',),
  'W2': ('--scheme=W2A16', '--group_size=-1'),
  'W1': ('--scheme=W1A16', '--group_size=-1'),
  'W8A8 static': ('--scheme=W8A8_STATIC',),
  'W6A6 static': ('--scheme=W6A6_STATIC', *ASYMMETRIC, *HALF),
  'W6A6': ('--scheme=W6A6', '--nosymmetric', *HALF),
  'W4A4 asymmetric': ('--scheme=W4A4', *ASYMMETRIC),
  'W4g64A6': ('--scheme=W4A6', '--group_size=64', '--nosymmetric'),
  'W4g64A8': ('--scheme=W4A8', '--group_size=64', '--nosymmetric'),
  'W3g64 asymmetric': ('--scheme=W3A16', '--group_size=64', '--nosymmetric'),
}
GPTQ = ('--method=gptq', '--set=gptq.search=mse')
AWQ = ('--method=awq', '--sequences=16')
CLIP = ('--input_clip=0.9',)
ROTATE_GPTQ = ('--method=rotate,gptq', '--set=gptq.search=mse', *CLIP)
AVERAGE = ('--set=activations.observer=average',)
SMOOTH_STATIC = ('--method=smoothquant', *AVERAGE)
OS_PLUS = ('--method=os_plus', '--set=os_plus.sample_sequences=4')
# The paper quantizes q, k and v in the static setting; the rows beside do not.
OS_PLUS_STATIC = (*OS_PLUS, '--set=os_plus.bmm=')
OUTLIERTUNE = ('--method=outliertune', '--set=outliertune.symmetrize=never')
OUTLIERTUNE_GPTQ = '--set=outliertune.weight=gptq'
OUTLIERTUNE_ALIKE = (*OUTLIERTUNE, '--set=outliertune.bmm=')
MERGEQUANT = ('--method=mergequant', *CLIP, *HALF)
MERGEQUANT_PLAIN = (
  *MERGEQUANT,
  '--set=mergequant.clip=none',
  '--set=mergequant.reconstruct=false',
)
MERGEQUANT_ROTATED = (
  '--method=rotate,mergequant',
  '--set=mergequant.rest=dynamic',
  *CLIP,
  *HALF,
)
LLM_FP4 = (
  '--method=llm_fp4',
  '--set=llm_fp4.sample_sequences=4',
  '--set=llm_fp4.n_grid=20',
  '--set=llm_fp4.gamma_low=0.2',
  '--set=llm_fp4.rounds=2',
)
UNSHIFTED = '--set=llm_fp4.preshift=false'
FP_BY_RANGE = (*LLM_FP4, UNSHIFTED, '--set=llm_fp4.rounds=0')
# 16 sequences of 512 tokens and 5 epochs; the paper has 128 of 2048 and 20.
PTQ161 = ('--method=ptq161', '--sequences=16')
PTQ161_MEANS = (*PTQ161, '--set=ptq161.epochs=0')
# On AWQ, which stands beside it. Of the 12 columns that are stored at ranks 4
# and 2 a token takes 6.
QUANT_EXPERTS = (
  '--method=quant_experts',
  '--sequences=16',
  '--set=quant_experts.shared_rank=4',
  '--set=quant_experts.expert_rank=2',
)
ONE_TERM = (*QUANT_EXPERTS[:2], '--set=quant_experts.num_experts=0')
LQER = (*ONE_TERM, '--set=quant_experts.gram=diagonal')
BESIDE_QUANT_EXPERTS = (
  ('RTN', DATA_FREE),
  ('GPTQ', (*GPTQ, *QUARTER)),
  ('AWQ', AWQ),
  ('Quant Experts', QUANT_EXPERTS),
  ('LQER, equal work', (*LQER, '--set=quant_experts.shared_rank=6')),
  ('LQER, equal size', (*LQER, '--set=quant_experts.shared_rank=12')),
  (
    'one whitened term, equal size',
    (*ONE_TERM, '--set=quant_experts.shared_rank=12'),
  ),
)
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
  ('W4A4', 'LLM-FP4', LLM_FP4),
  ('W4A4', 'LLM-FP4, no shifts', (*LLM_FP4, UNSHIFTED)),
  ('W4A4', 'e2m1 by range, static', FP_BY_RANGE),
  ('W4A4', 'rotation + LLM-FP4', ('--method=rotate,llm_fp4', *LLM_FP4[1:])),
  ('W4A4 static', 'RTN', (*AVERAGE, *HALF)),
  ('W4A8', 'RTN', DATA_FREE),
  ('W4A8', 'LLM-FP4', LLM_FP4),
  ('W8A8', 'LLM-FP4', LLM_FP4),
  ('W8A8', 'OutlierTune', OUTLIERTUNE_ALIKE),
  ('W8A8', 'OutlierTune, q k v too', OUTLIERTUNE),
  ('W2', 'RTN', DATA_FREE),
  ('W2', 'GPTQ', (*GPTQ, *QUARTER)),
  ('W1', 'PTQ1.61', (*PTQ161, '--set=ptq161.epochs=5')),
  ('W1', 'PTQ1.61, nothing learned', PTQ161_MEANS),
  (
    'W1',
    'PTQ1.61, nothing learned, random mask',
    (*PTQ161_MEANS, '--set=ptq161.mask=random'),
  ),
  ('W8A8 static', 'RTN', AVERAGE),
  ('W8A8 static', 'SmoothQuant', SMOOTH_STATIC),
  ('W8A8 static', 'OS+', OS_PLUS_STATIC),
  ('W8A8 static', 'OS+, q k v too', OS_PLUS),
  ('W6A6 static', 'RTN', AVERAGE),
  ('W6A6 static', 'SmoothQuant', SMOOTH_STATIC),
  ('W6A6 static', 'OS+', OS_PLUS_STATIC),
  ('W6A6', 'RTN', DATA_FREE),
  ('W6A6', 'SmoothQuant', ('--method=smoothquant',)),
  ('W6A6', 'OutlierTune', OUTLIERTUNE_ALIKE),
  ('W6A6', 'OutlierTune + GPTQ', (*OUTLIERTUNE_ALIKE, OUTLIERTUNE_GPTQ)),
  ('W4A4', 'OutlierTune + GPTQ', (*OUTLIERTUNE_ALIKE, OUTLIERTUNE_GPTQ)),
  ('W4A4', 'MergeQuant', MERGEQUANT),
  (
    'W4A4',
    'MergeQuant, low rank',
    (*MERGEQUANT, '--set=mergequant.rank=32'),
  ),
  (
    'W4A4',
    'MergeQuant, no clipping',
    (*MERGEQUANT, '--set=mergequant.clip=none'),
  ),
  ('W4A4', 'MergeQuant, no clipping or splitting', MERGEQUANT_PLAIN),
  ('W4A4', 'rotation + MergeQuant', MERGEQUANT_ROTATED),
  ('W4A4 asymmetric', 'RTN', DATA_FREE),
  ('W4A4 asymmetric', 'OS+', OS_PLUS),
  *(
    (setting, name, extra)
    for setting in ('W4g64A6', 'W4g64A8', 'W3g64 asymmetric')
    for name, extra in BESIDE_QUANT_EXPERTS
  ),
  *(
    (setting, name, extra)
    for setting in ('W4g64A6', 'W4g64A8')
    for name, extra in (
      ('SmoothQuant', ('--method=smoothquant', *QUARTER)),
      ('rotation + GPTQ', (*ROTATE_GPTQ[:2], *QUARTER)),
      (
        'SmoothQuant + Quant Experts',
        (
          '--method=smoothquant,quant_experts',
          *QUANT_EXPERTS[1:],
          '--set=quant_experts.base=rtn',
        ),
      ),
    )
  ),
)
# A row, then what it should be better than. By the ratio to the float model's
# perplexity: its intervals are paired, without the spread of the articles.
CLAIMS = (
  *(
    (f'{setting}, {method}', f'{setting}, RTN')
    for setting in ('W4', 'W4g64', 'W3g64')
    for method in ('GPTQ', 'AWQ')
  ),
  ('W4A4, rotation + GPTQ', 'W4A4, GPTQ'),
  ('W8A8 static, OS+', 'W8A8 static, SmoothQuant'),
  ('W6A6 static, OS+', 'W6A6 static, SmoothQuant'),
  ('W6A6 static, SmoothQuant', 'W6A6 static, RTN'),
  ('W6A6, OutlierTune', 'W6A6, RTN'),
  ('W6A6, OutlierTune', 'W6A6 static, SmoothQuant'),
  ('W6A6, OutlierTune', 'W6A6, SmoothQuant'),
  ('W8A8, OutlierTune', 'W8A8, RTN'),
  ('W8A8, OutlierTune', 'W8A8, SmoothQuant'),
  ('W4A4, MergeQuant', 'W4A4 static, RTN'),
  ('W4A4, MergeQuant', 'W4A4, GPTQ'),
  ('W4A4, MergeQuant', 'W4A4, rotation'),
  ('W4A4, MergeQuant', 'W4A4, rotation + GPTQ'),
  ('W4A4, MergeQuant', 'W4A4, MergeQuant, no clipping or splitting'),
  ('W4A4, rotation + MergeQuant', 'W4A4, MergeQuant'),
  ('W4A4, LLM-FP4', 'W4A4 static, RTN'),
  ('W4A4, LLM-FP4', 'W4A4, LLM-FP4, no shifts'),
  ('W4A4, LLM-FP4, no shifts', 'W4A4, e2m1 by range, static'),
  ('W4A8, LLM-FP4', 'W4A8, RTN'),
  ('W1, PTQ1.61', 'W2, GPTQ'),
  ('W1, PTQ1.61', 'W1, PTQ1.61, nothing learned'),
  (
    'W1, PTQ1.61, nothing learned',
    'W1, PTQ1.61, nothing learned, random mask',
  ),
  *(
    ('W4g64A8, Quant Experts', f'W4g64A8, {method}')
    for method in ('RTN', 'AWQ', 'LQER, equal work', 'LQER, equal size')
  ),
  *(
    ('W4g64A6, Quant Experts', f'W4g64A6, {method}')
    for method in ('RTN', 'AWQ', 'LQER, equal work', 'LQER, equal size')
  ),
)
COLUMNS = (
  'token perplexity',
  'perplexity ratio',
  'KL',
  'top-1 agreement',
  'word perplexity',
  'bits per byte',
  'bits per weight',
)
COST = ('calibration', 'processor time', 'peak memory')
# What the cost of the others is a ratio to: 64 sequences, in the same store.
YARDSTICK = 'W4g64, GPTQ'
SEQUENCE_LENGTH = 512


def define_flags(
  store: str, page: str, values: flags.FlagValues = FLAGS
) -> None:
  """The flags of a table, with where it is by default; `values` takes them."""
  for name, default, text in (
    ('work', '/tmp/jaxq_quality', 'Where the runs write.'),
    ('store', store, 'The stored results.'),
    ('page', page, 'The page made from them.'),
  ):
    flags.DEFINE_string(name, default, text, values)
  flags.DEFINE_list(
    'only', [], 'Settings to run, such as W4g64; default all.', values
  )
  flags.DEFINE_multi_string(
    'row', [], "Rows to run, such as 'W4, GPTQ'.", values
  )
  flags.DEFINE_bool('rerun', False, 'Run rows that are stored already.', values)


def main(argv: Sequence[str]) -> None:
  """Runs what is missing and writes the page."""
  del argv
  stored = run(
    {
      f'{setting}, {method}': [*COMMON, *SETTINGS[setting], *extra]
      for setting, method, extra in ROWS
    }
  )
  results.write_text(FLAGS.page, page(stored))


def run(rows: Mapping[str, list[str]]) -> dict[str, dict]:
  """What is stored, after running the rows that were asked for and are missing.

  Args:
    rows: {name: flags}; --only goes by the parts of a name between commas.

  Raises:
    ValueError: --row names none of them.
  """
  stored = load(FLAGS.store)
  if unknown := sorted(set(FLAGS.row) - set(rows)):
    raise ValueError(
      f'--row={unknown[0]!r}; allowed {list(rows)}. Use one of them.'
    )
  for name, arguments in rows.items():
    if FLAGS.only and not set(FLAGS.only) & set(name.split(', ')):
      continue
    if FLAGS.row and name not in FLAGS.row:
      continue
    found = stored.get(name, {})
    same = found.get('flags') == arguments and 'row' in found
    if same and not FLAGS.rerun:
      continue
    made = {'flags': arguments, **measure(name, arguments)}
    # Another process may have stored rows meanwhile.
    stored = {**load(FLAGS.store), name: made}
    text = json.dumps(stored, indent=1, ensure_ascii=False)
    results.write_text(FLAGS.store, text + '\n')
  return stored


def page(stored: dict[str, dict]) -> str:
  """docs/quality.md from the stored rows, in the order of ROWS."""
  order = [f'{setting}, {method}' for setting, method, _ in ROWS]
  found = [name for name in order if 'row' in stored.get(name, {})]
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
    'Calibration: 64 sequences of 512 tokens of the calibration articles, 32 '
    'at W6A6 and\nfor MergeQuant, 16 for AWQ, PTQ1.61, Quant Experts and what '
    'stands beside them;\nRTN and rotation alone learn nothing from data. The '
    'flags of every row are below.\n\n'
    f'{claims.table(stored, CLAIMS, "perplexity ratio")}\n'
    'What did not hold, and why, is in [notes.md](notes.md).\n\n'
    f'{cost_table(stored, found)}\n'
    + ''.join(f'- {run}\n' for run in runs)
    + f'\n| row | flags |\n|---|---|\n{commands}\n'
  )


def cost_table(
  stored: dict[str, dict],
  names: Sequence[str],
  *,
  yardstick: str = YARDSTICK,
  length: int = SEQUENCE_LENGTH,
  level: str = '##',
) -> str:
  """What calibrating cost, beside GPTQ: Markdown, a row per measured name.

  The ratio is of processor time, which a machine that does other work as well
  stretches less than the seconds of a clock.

  Args:
    stored: {name: result}.
    names: of those in the table.
    yardstick: the name whose cost is one.
    length: tokens of a sequence.
    level: of the heading.
  """
  costs = {name: _metrics(stored[name]['row']) for name in names}
  whole = costs.get(yardstick, {}).get('processor time')
  lines = [
    f'{level} Cost of calibration',
    '',
    'Of the whole process before evaluation, its imports and compiles as well;',
    'the machine did other work at the same time, so the ratio, to GPTQ '
    f'({yardstick}),',
    'is of processor time.',
    '',
    '| row | tokens | seconds | processor seconds | ratio to GPTQ | peak GB |',
    '|---|---|---|---|---|---|',
  ]
  for name, cost in costs.items():
    if 'processor time' not in cost:
      continue
    tokens = _sequences(stored[name]['flags']) * length
    seconds, used, memory = (cost[column] for column in COST)
    ratio = f'{used / whole:.2f}' if whole else ''
    lines.append(
      f'| {name} | {tokens:,} | {seconds:.0f} | {used:.0f} | {ratio} '
      f'| {memory:.2f} |'
    )
  return '\n'.join(lines) + '\n'


def _metrics(row: dict) -> dict[str, float]:
  return {metric['name']: metric['value'] for metric in row['metrics']}


def _sequences(arguments: Sequence[str]) -> int:
  """What the last --sequences says; the default of calibrate without one."""
  given = [a for a in arguments if a.startswith('--sequences=')]
  return int(given[-1].partition('=')[2]) if given else 64


def measure(name: str, arguments: list[str]) -> dict:
  """One calibration in a fresh process -> what is stored of it.

  That is {'run', 'float', 'row'}, or {'refused'}, why the method cannot serve.

  Raises:
    ValueError: it failed for another reason, such as data that is not there.
  """
  output = pathlib.Path(FLAGS.work) / _directory(name, arguments)
  command = [sys.executable, '-m', 'experiments.calibrate', *arguments]
  command.append(f'--output={output}')
  print('$', ' '.join(command), file=sys.stderr, flush=True)
  if refused := _call(command):
    if refused.partition(':')[0] not in _methods(arguments):
      raise ValueError(f'{name}: {refused}')
    return {'refused': refused}
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


def _methods(arguments: Sequence[str]) -> list[str]:
  """Those of the last --method; its errors begin with one of them."""
  given = [a for a in arguments if a.startswith('--method=')]
  return given[-1].partition('=')[2].split(',') if given else []


def _directory(name: str, arguments: list[str]) -> str:
  """Another one for other flags or code, whose run cannot be gone on with."""
  slug = ''.join(c if c.isalnum() else '_' for c in name)
  of = json.dumps([files.code_hash(), *arguments])
  return f'{slug}_{hashlib.sha256(of.encode()).hexdigest()[:8]}'


def _call(command: list[str]) -> str:
  """Runs it, showing what it says; the one line of its error, '' without."""
  with subprocess.Popen(
    command, env=os.environ, stderr=subprocess.PIPE, text=True
  ) as process:
    assert process.stderr is not None
    line = ''
    for line in process.stderr:
      sys.stderr.write(line)
  kind, _, message = line.strip().partition(': ')
  if process.returncode == 1 and kind == 'error':
    return message
  if process.returncode:
    raise subprocess.CalledProcessError(process.returncode, command)
  return ''


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


def load(path: str) -> dict[str, dict]:
  """The stored rows; none where there is no file yet."""
  file = pathlib.Path(path)
  return json.loads(file.read_text()) if file.exists() else {}


if __name__ == '__main__':
  define_flags('docs/quality.json', 'docs/quality.md')
  cli.run(main)
