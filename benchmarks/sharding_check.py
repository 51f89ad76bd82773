"""One device against eight: the same calibration of the real model, compared.

  python -m benchmarks.sharding_check --output_dir=out/sharding_check

Runs `experiments.calibrate` twice in processes of their own, on one CPU device
and on eight simulated ones with --mesh=data:2,model:4; flags that are not this
script's go to both, as in --sequences=16. Then it compares the two directories
kernel by kernel, measures both models on one device, and prints a table.

Sums over tokens are taken in another order on a mesh, so Hessians differ in
their last bits. A value that falls on the boundary between two codes (a tie, to
float rounding) may then go either way. GPTQ passes the rest of a column the
other error, and the blocks above see another input, so later codes differ as
well without being ties themselves. Hence three counts per block: codes that
differ by one, by more, and the columns in which any does. The exit code is 1 if

  - scales differ by more than 1e-5 relative,
  - in block 0, whose inputs are the same, more than 1e-4 of the codes differ,
  - in any linear more than --max_fraction of the codes differ, or a tenth of
    that by more than one,
  - token perplexities differ by more than 1e-4 relative.
"""

import argparse
import dataclasses
import os
import pathlib
import subprocess
import sys

import numpy as np

import models
from experiments import evaluation
from jaxq.io import checkpoint
from jaxq.nn import taps
from jaxq.numerics import qarray

MODEL = 'smollm2-135m'
DEFAULTS = (
  '--scheme=W4A16',
  '--group_size=64',
  '--method=gptq',
  '--sequences=8',
)
MESH = 'data:2,model:4'
SCALES, FIRST, PERPLEXITY = 1e-5, 1e-4, 1e-4


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
  found: list[dict[str, Difference]], ratio: float, max_fraction: float
) -> list[str]:
  """What is more than float ties explain, in words; [] if nothing is."""
  out = []
  for i, linears in enumerate(found):
    for path, d in linears.items():
      name = f'blocks.{i}.{path}'
      allowed = FIRST if i == 0 else max_fraction
      if d.scale > SCALES:
        out.append(f'{name}: scales differ by {d.scale:.1e} > {SCALES}')
      if d.fraction > allowed:
        out.append(f'{name}: {d.fraction:.1e} of the codes > {allowed}')
      if d.by_more > max_fraction / 10 * d.codes:
        out.append(f'{name}: {d.by_more} codes differ by more than one')
  if abs(ratio - 1) > PERPLEXITY:
    out.append(f'perplexity ratio {ratio:.6f}, more than {PERPLEXITY} from 1')
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
  command = [sys.executable, '-m', 'experiments.calibrate']
  command += [f'--model={MODEL}', f'--output={output}', '--noevaluate', *flags]
  if devices > 1:
    command.append(f'--mesh={MESH}')
  done = subprocess.run(command, env=env, check=False)
  if done.returncode:
    raise ValueError(
      f'{" ".join(command)} exits with code {done.returncode}; it must '
      'succeed. Its own message is above.'
    )


def main(argv: list[str]) -> None:
  """Runs, compares, prints; exits with 1 if they differ."""
  parser = argparse.ArgumentParser(
    description='Calibration on one device and on eight simulated ones.'
  )
  parser.add_argument('--output_dir', default='out/sharding_check')
  parser.add_argument(
    '--max_fraction',
    type=float,
    default=0.01,
    help='of the codes of a linear above block 0 that may differ',
  )
  parser.add_argument('--eval_tokens', type=int, default=8192)
  options, flags = parser.parse_known_args(argv[1:])
  folder = pathlib.Path(options.output_dir)
  folder.mkdir(parents=True, exist_ok=True)
  one, many = folder / 'one', folder / 'many'
  for output, devices in ((one, 1), (many, 8)):
    calibrate(output, [*DEFAULTS, *flags], devices)
  found = compare(one, many)
  a, b = models.load(str(one)), models.load(str(many))
  windows = evaluation.load_windows(
    a, source='wiki-sample:evaluation', window=2048, tokens=options.eval_tokens
  )
  compared = evaluation.compare(a, b, windows)
  ratio = compared.ratio.value
  print_table(found)
  means = [np.exp(np.mean(p.nll)) for p in (compared.reference, compared.model)]
  print(
    f'token perplexity: one device {means[0]:.5f}, eight {means[1]:.5f}, '
    f'ratio - 1 {ratio - 1:.1e}; {windows.description}'
  )
  wrong = problems(found, ratio, options.max_fraction)
  print('\n'.join(wrong) or 'equal but for float ties and what follows on them')
  sys.exit(bool(wrong))


if __name__ == '__main__':
  cli_main = main
  cli_main(sys.argv)
