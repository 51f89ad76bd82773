r"""`kill -9` at random moments, the same command again: the same bytes?

  python -m benchmarks.kill_test --kills=5 --work=/tmp/jaxq_kill_test \
      --flagfile=experiments/flags/smollm2_w4a16_gptq.flags

runs the calibration once undisturbed and once killed that many times, each
time started again by the same command, and compares the two output directories
file by file. Exit code 0: every byte is equal. All other flags go to
experiments.calibrate; --noevaluate --sequences=8 are put behind a flagfile, to
keep a run short, and before flags that are given here.
"""

import argparse
import json
import pathlib
import shutil
import sys
from collections.abc import Sequence

from benchmarks import interrupted
from experiments import results

_SHORT = ('--noevaluate', '--sequences=8')


def main(argv: Sequence[str]) -> int:
  """Prints the kills and the verdict; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--kills', type=int, default=5)
  parser.add_argument('--work', default='/tmp/jaxq_kill_test')
  parser.add_argument('--seed', type=int, default=0)
  args, rest = parser.parse_known_args(argv)
  files = [flag for flag in rest if flag.startswith('--flagfile=')]
  others = [flag for flag in rest if flag not in files]
  command = [sys.executable, '-m', 'experiments.calibrate']
  command += [*files, *_SHORT, *others]
  work = pathlib.Path(args.work)
  whole, part = work / 'whole', work / 'killed'
  for output in (whole, part):
    shutil.rmtree(output, ignore_errors=True)
  seconds = interrupted.run([*command, f'--output={whole}'])
  num_blocks = json.loads((whole / 'manifest.json').read_text())['num_blocks']
  kills = interrupted.run_with_kills(
    [*command, f'--output={part}'],
    part,
    num_blocks=num_blocks,
    kills=args.kills,
    block_seconds=seconds / num_blocks,
    seed=args.seed,
  )
  results.print_table([_row(i, kill) for i, kill in enumerate(kills, start=1)])
  a, b = interrupted.digest(whole), interrupted.digest(part)
  different = sorted(n for n in a.keys() | b.keys() if a.get(n) != b.get(n))
  if different:
    print(f'DIFFERENT: {len(different)} files, first {different[:3]}')
    return 1
  print(f'EQUAL: {len(a)} files of {num_blocks} blocks, byte for byte')
  return 0


def _row(i: int, kill: interrupted.Kill) -> results.Row:
  metric = results.Metric
  return results.Row(
    name=f'kill {i}',
    metrics=(
      metric(name='after', value=kill.seconds, unit='s'),
      metric(name='blocks saved', value=kill.blocks),
      metric(name='half-written', value=int(kill.half_written)),
    ),
  )


if __name__ == '__main__':
  try:
    sys.exit(main(sys.argv[1:]))
  except ValueError as e:
    print(f'error: {e}', file=sys.stderr)
    sys.exit(1)
