"""One device against eight: the same calibration of the real model, compared.

  python -m benchmarks.sharding_check --output_dir=out/sharding_check

Runs `experiments.calibrate` twice in processes of their own, on one CPU device
and on eight simulated ones with --mesh=data:2,model:4; --flag is passed on to
both, as in --flag=--sequences=16. Then it compares the two directories kernel
by kernel, measures both models on one device, and prints a table.

Sums are taken in another order on a mesh, so activations and Hessians differ in
their last bits. A value that lies, to float rounding, on the boundary between
two codes (a tie) may then go either way, and GPTQ makes the rest of its column
up for the other error. So the table counts codes that differ by one, by more,
and the columns in which any does: a column that differs holds a tie.

The default is --inputs=float: every block then sees the same inputs, and what
differs in it comes of its own ties. With --inputs=quantized the first tie
changes the input of all blocks above, by far more than float rounding, and
GPTQ amplifies it: the two runs part, as runs on two samples do, and only
perplexities can be compared.

With --flag=--reproducible both take the same sums in the same order: no code
and no scale may differ, whatever --inputs.

--double is the control: both runs in float64 (benchmarks/double_precision.py).
If the codes that differ are ties of float32 sums and nothing else, hardly any
is left.

Exit code 1 if

  - with --reproducible, anything differs,
  - scales differ by more than 1e-5 relative,
  - with --inputs=float, more than --max_columns of a block's columns differ,
  - token perplexities differ by more than --max_ratio relative.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags

import models
from experiments import cli, evaluation
from jaxq.io import checkpoint
from jaxq.nn import taps
from jaxq.numerics import qarray

FLAGS = flags.FLAGS
flags.DEFINE_string('output_dir', 'out/sharding_check', 'Where to write.')
flags.DEFINE_multi_string(
  'flag', [], 'Passed on to both runs, as in --flag=--sequences=16.'
)
flags.DEFINE_float(
  'max_columns', 0.02, 'Share of the columns of a block with a tie.'
)
flags.DEFINE_float(
  'max_ratio', 1e-4, 'Relative difference of the perplexities.'
)
flags.DEFINE_bool('double', False, 'Both runs in float64.')
flags.DEFINE_integer('eval_tokens', 8192, 'In windows of 2048.')

MODEL = 'smollm2-135m'
DEFAULTS = (
  '--scheme=W4A16',
  '--group_size=64',
  '--method=gptq',
  '--sequences=8',
  '--inputs=float',
)
MESH = 'data:2,model:4'
MAX_SCALE = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
  """Between two QArrays.

  codes, by_one, by_more: how many there are, differ by one, by more.
  columns, touched: how many there are, and with a code that differs.
  scale: largest relative difference of a step.
  """

  codes: int
  by_one: int
  by_more: int
  columns: int
  touched: int
  scale: float

  @property
  def fraction(self) -> float:
    """Of the codes that differ."""
    return (self.by_one + self.by_more) / self.codes


def difference(a: qarray.QArray, b: qarray.QArray) -> Difference:
  """Compares two QArrays of one spec and shape."""
  steps = [np.asarray(qarray.effective_scale(q)) for q in (a, b)]
  codes = [np.asarray(qarray.codes(q)).astype(np.int32) for q in (a, b)]
  distance = np.abs(codes[0] - codes[1])
  return Difference(
    codes=distance.size,
    by_one=int(np.sum(distance == 1)),
    by_more=int(np.sum(distance > 1)),
    columns=distance.shape[-1],
    touched=int(np.sum(np.any(distance, axis=0))),
    scale=float(np.max(np.abs(steps[0] - steps[1]) / steps[0])),
  )


def compare(
  one: pathlib.Path, many: pathlib.Path
) -> list[dict[str, Difference]]:
  """For each block: path of a kernel -> how it differs."""
  opened = [checkpoint.open_checkpoint(path) for path in (one, many)]
  out = []
  for i in range(opened[0].num_blocks):
    a, b = (o.block(i)['params'] for o in opened)
    out.append(
      {
        path: difference(leaf, taps.get_path(b, path))
        for path, leaf in taps.leaves(a)
        if isinstance(leaf, qarray.QArray)
      }
    )
  return out


def problems(
  found: list[dict[str, Difference]],
  ratio: float,
  own_ties: bool,
  reproducible: bool,
) -> list[str]:
  """What is more than float ties explain, in words; [] if nothing is.

  Args:
    found: of `compare`.
    ratio: of the perplexities.
    own_ties: whether differences of a block come of its own ties alone.
    reproducible: whether there may be any.
  """
  out = []
  for i, linears in enumerate(found):
    scale = max(d.scale for d in linears.values())
    touched = sum(d.touched for d in linears.values())
    columns = sum(d.columns for d in linears.values())
    if reproducible and (touched or scale):
      out.append(f'blocks.{i}: {touched} columns differ, or scales ({scale})')
    if scale > MAX_SCALE:
      out.append(f'blocks.{i}: scales differ by {scale:.1e} > {MAX_SCALE}')
    if own_ties and touched > FLAGS.max_columns * columns:
      out.append(
        f'blocks.{i}: {touched} of {columns} columns differ, more than '
        f'--max_columns={FLAGS.max_columns}'
      )
  if abs(ratio - 1) > FLAGS.max_ratio:
    out.append(
      f'perplexities differ by {abs(ratio - 1):.1e} relative, more than '
      f'--max_ratio={FLAGS.max_ratio}'
    )
  return out


def print_table(found: list[dict[str, Difference]]) -> None:
  """One line per block, and the worst linear of each."""
  print('| block | codes | by one | by more | columns | worst linear | scale |')
  print('|---|---|---|---|---|---|---|')
  for i, linears in enumerate(found):
    all_ = list(linears.values())
    total = {
      f: sum(getattr(d, f) for d in all_)
      for f in ('codes', 'by_one', 'by_more', 'columns', 'touched')
    }
    worst = max(linears, key=lambda path: linears[path].fraction)
    print(
      f'| {i} | {total["codes"]} | {total["by_one"]} | {total["by_more"]} | '
      f'{total["touched"]} of {total["columns"]} | '
      f'{worst.removesuffix("/kernel")} {linears[worst].fraction:.1e} | '
      f'{max(d.scale for d in all_):.1e} |'
    )


def calibrate(output: pathlib.Path, flags: list[str], devices: int) -> None:
  """Runs experiments.calibrate in a process with that many CPU devices.

  Raises:
    ValueError: it failed.
  """
  env = os.environ | {'JAX_PLATFORMS': 'cpu'}
  count = f'--xla_force_host_platform_device_count={devices}'
  env['XLA_FLAGS'] = f'{env.get("XLA_FLAGS", "")} {count}'.strip()
  command = [sys.executable, '-m']
  if FLAGS.double:
    command.append('benchmarks.double_precision')
  command.append('experiments.calibrate')
  command += [f'--model={MODEL}', f'--output={output}', '--noevaluate', *flags]
  if devices > 1:
    command.append(f'--mesh={MESH}')
  done = subprocess.run(command, env=env, check=False)
  if done.returncode:
    raise ValueError(
      f'{" ".join(command)} exits with code {done.returncode}; it must '
      'succeed. Its own message is above.'
    )


def main(argv: Sequence[str]) -> int:
  """Runs, compares, prints; returns 1 if they differ."""
  del argv
  jax.config.update('jax_platforms', 'cpu')
  folder = pathlib.Path(FLAGS.output_dir)
  folder.mkdir(parents=True, exist_ok=True)
  one, many = folder / 'one', folder / 'many'
  passed_on = [*DEFAULTS, *FLAGS.flag]
  for output, devices in ((one, 1), (many, 8)):
    calibrate(output, passed_on, devices)
  found = compare(one, many)
  print_table(found)
  a, b = models.load(str(one)), models.load(str(many))
  windows = evaluation.load_windows(
    a, source='wiki-sample:evaluation', window=2048, tokens=FLAGS.eval_tokens
  )
  compared = evaluation.compare(a, b, windows)
  assert compared.reference is not None
  ratio = compared.ratio
  values = [
    float(np.exp(np.mean(p.nll))) for p in (compared.reference, compared.model)
  ]
  print(
    f'token perplexity: one device {values[0]:.5f}, eight {values[1]:.5f}; '
    f'ratio - 1: {ratio.value - 1:.1e} ({ratio.low - 1:.1e} .. '
    f'{ratio.high - 1:.1e}); {windows.description}'
  )
  inputs = [f for f in passed_on if f.startswith('--inputs=')][-1]
  reproducible = '--reproducible' in passed_on
  wrong = problems(found, ratio.value, inputs == '--inputs=float', reproducible)
  equal = 'equal' if reproducible else 'equal but for float ties'
  print('\n'.join(wrong) or equal)
  return int(bool(wrong))


if __name__ == '__main__':
  cli.run(main)
