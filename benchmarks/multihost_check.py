r"""Is a calibration by many processes that of one, whatever happens to them?

  python -m benchmarks.multihost_check --rounds=10 --work=/tmp/jaxq_multihost \
      --flagfile=experiments/flags/smollm2_w4a16_rtn.flags --sequences=8

runs experiments.calibrate (which evaluates too) as one process with eight
simulated devices and as four with two each, on the same mesh, and compares
integers and perplexities. Then, round after round, it kills one process of the
job at random with -9 when a random number of blocks is saved, waits for the
others to end, starts the same command again and compares every byte with the
undisturbed job's; and once it sends SIGTERM to one process.

All other flags go to experiments.calibrate; --inputs=float is put before them,
so that a tie in one block does not reach those above. GPTQ makes up for a tie
in the rest of its column, and more so the less data it has: its perplexity
moves by more than 1e-4 wherever sums are taken in another order (docs/notes.md,
benchmarks.sharding_check), and --max_ties and --max_ratio allow for that.

Exit code 0: integers equal but for ties, perplexities alike, every kill ended
the job in a minute with a reason, and every byte was equal.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence

import numpy as np

from benchmarks import interrupted, local_job
from experiments import evaluation, results
from jaxq.io import checkpoint
from jaxq.nn import taps
from jaxq.numerics import qarray

TIES = 2e-4  # Of all integers.
PERPLEXITY = 1e-4
MINUTE = 60.0


def main(argv: Sequence[str]) -> int:
  """Prints what was seen as tables; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rounds', type=int, default=10)
  parser.add_argument('--processes', type=int, default=4)
  parser.add_argument('--devices', type=int, default=2)
  parser.add_argument('--work', default='/tmp/jaxq_multihost')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--max_ties', type=float, default=TIES)
  parser.add_argument('--max_ratio', type=float, default=PERPLEXITY)
  args, rest = parser.parse_known_args(argv)
  work = pathlib.Path(args.work)
  shutil.rmtree(work, ignore_errors=True)
  calibrate = [sys.executable, '-m', 'experiments.calibrate', '--inputs=float']
  calibrate += rest

  def job(name: str) -> local_job.LocalJob:
    return local_job.LocalJob(
      [*calibrate, f'--output={work / name}'],
      work / f'{name}.log',
      processes=args.processes,
      devices=args.devices,
    )

  _finish(job('job'))
  found = checkpoint.open_checkpoint(work / 'job').run_fingerprint
  mesh = json.loads(found['flags.mesh'])
  mesh = ','.join(f'{axis}:{size}' for axis, size in mesh.items())
  count = args.processes * args.devices
  flags = f'--xla_force_host_platform_device_count={count}'
  interrupted.run(
    [*calibrate, f'--output={work / "alone"}', f'--mesh={mesh}'],
    env={**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
  )
  row, ties, ratio = _compare(work / 'alone', work / 'job')
  results.print_table([row])
  good = ties <= args.max_ties and ratio <= args.max_ratio
  want = interrupted.digest(work / 'job')
  num_blocks = checkpoint.open_checkpoint(work / 'job').num_blocks
  rng = random.Random(args.seed)
  rows = []
  for i in range(args.rounds + 1):
    name = f'round_{i}'
    number = signal.SIGTERM if i == args.rounds else signal.SIGKILL
    target, at = rng.randrange(args.processes), rng.randrange(1, num_blocks)
    running = job(name)
    seconds, codes = _stop(running, work / name, target, at, number)
    reasons = running.reasons()
    _finish(job(name))
    same = interrupted.digest(work / name) == want
    ended = seconds <= MINUTE and 0 not in codes and len(reasons) >= 1
    good = good and same and ended
    rows.append(_row(i, number, target, at, seconds, reasons, same))
    said = f'{name}: exit codes {codes}, {reasons}, equal bytes: {same}'
    print(said, file=sys.stderr, flush=True)
    shutil.rmtree(work / name, ignore_errors=True)
  results.print_table(rows)
  print('EQUAL' if good else 'NOT EQUAL, or not in time: see above')
  return int(not good)


def codes_differ(a: pathlib.Path, b: pathlib.Path) -> tuple[int, int]:
  """How many integers two jaxq directories have, and how many differ."""
  one, two = checkpoint.open_checkpoint(a), checkpoint.open_checkpoint(b)
  count = different = 0
  for i in range(one.num_blocks):
    others = dict(taps.leaves(two.block(i)['params']))
    for path, leaf in taps.leaves(one.block(i)['params']):
      if isinstance(leaf, qarray.QArray):
        x, y = (np.asarray(qarray.codes(q)) for q in (leaf, others[path]))
        count += x.size
        different += int(np.sum(x != y))
  return count, different


def perplexity(output: pathlib.Path) -> float:
  """Of the quantized model, as its run measured it."""
  result = results.load(f'{output}.run/results.json')
  return result.rows[-1][evaluation.PERPLEXITY].value


def _compare(
  alone: pathlib.Path, job: pathlib.Path
) -> tuple[results.Row, float, float]:
  """The row, the share of integers that differ, the perplexities' distance."""
  count, different = codes_differ(alone, job)
  one, many = perplexity(alone), perplexity(job)
  metric = results.Metric
  row = results.Row(
    name='the job against one process',
    metrics=(
      metric(name='integers', value=count),
      metric(name='different', value=different),
      metric(name='perplexity alone', value=one),
      metric(name='perplexity of the job', value=many),
    ),
  )
  return row, different / count, abs(many / one - 1)


def _stop(
  job: local_job.LocalJob,
  output: pathlib.Path,
  target: int,
  blocks: int,
  number: int,
) -> tuple[float, list[int]]:
  """Signals a process when so many blocks are saved: seconds, exit codes."""
  process = job.processes[target]
  try:
    interrupted.wait_until(
      process, lambda: len(list((output / 'blocks').glob('[0-9]*'))) >= blocks
    )
  except ValueError as e:
    job.kill()
    raise ValueError(f'{e} Its lines: {job.reasons()}') from e
  start = time.monotonic()
  process.send_signal(number)
  codes = job.wait(5 * MINUTE)
  return time.monotonic() - start, codes


def _finish(job: local_job.LocalJob) -> None:
  codes = job.wait(24 * 3600)
  if any(codes):
    raise ValueError(
      f'the job failed with {codes}: {json.dumps(job.reasons())}; it must end '
      'by itself. Its logs are beside its output.'
    )


def _row(i, number, target, at, seconds, reasons, same) -> results.Row:
  metric = results.Metric
  return results.Row(
    name=f'{i}: {signal.Signals(number).name} to {target}',
    metrics=(
      metric(name='blocks saved', value=at),
      metric(name='ended after', value=seconds, unit='s'),
      metric(name='reasons', value=len(reasons)),
      metric(name='equal bytes', value=int(same)),
    ),
  )


if __name__ == '__main__':
  try:
    sys.exit(main(sys.argv[1:]))
  except ValueError as e:
    print(f'error: {e}', file=sys.stderr)
    sys.exit(1)
