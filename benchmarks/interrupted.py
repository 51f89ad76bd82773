"""Runs a calibration to its end, killed on the way or not.

What benchmarks.kill_test and its small sister in tests/ share: `kill -9` at
seeded random moments, the same command again each time, and a digest of the
output that two runs can be compared by.
"""

import dataclasses
import hashlib
import pathlib
import random
import subprocess
import time
from collections.abc import Callable, Sequence

_POLL = 0.002  # Seconds; a block takes far longer to write.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
  """One kill.

  seconds: since the process was started.
  blocks: that were saved.
  half_written: whether a write was under way.
  """

  seconds: float
  blocks: int
  half_written: bool


def run(command: Sequence[str], **how) -> float:
  """Runs a command to its end; returns the seconds it took.

  Raises:
    ValueError: it failed.
  """
  start = time.perf_counter()
  process = subprocess.Popen(list(command), **how)
  process.communicate()
  if process.returncode:
    raise ValueError(
      f'{" ".join(command)} exits with code {process.returncode}; it must '
      'succeed. Its own message is above.'
    )
  return time.perf_counter() - start


def run_with_kills(
  command: Sequence[str],
  output: pathlib.Path,
  *,
  num_blocks: int,
  kills: int,
  block_seconds: float,
  seed: int = 0,
  **how,
) -> list[Kill]:
  """Runs a command that writes `output` to its end, killed on the way.

  Each kill comes when a random number of blocks is saved, and a random part of
  a block's time later. The numbers grow, so that each run gets further.

  Args:
    command: writes output/blocks/00000, 00001, ... and goes on by itself.
    output: the directory.
    num_blocks: that it writes.
    kills: how many, at most num_blocks.
    block_seconds: about how long a block takes.
    seed: of the moments.
    how: for subprocess.Popen.

  Returns:
    When the process was killed, each time.

  Raises:
    ValueError: a run failed, or ended before its kill.
  """
  rng = random.Random(seed)
  done = []
  for target in sorted(rng.sample(range(num_blocks), kills)):
    start = time.perf_counter()
    process = subprocess.Popen(list(command), **how)
    try:
      wait_until(process, lambda n=target: _saved(output) >= n)
      wait_until(process, _timer(rng.uniform(0, block_seconds)))
    finally:
      process.kill()  # SIGKILL: no handler and no cleanup runs.
    process.communicate()
    done.append(
      Kill(
        seconds=time.perf_counter() - start,
        blocks=_saved(output),
        half_written=any(output.glob('.tmp-*')),
      )
    )
  run(command, **how)
  return done


def wait_until(
  process: subprocess.Popen, condition: Callable[[], bool]
) -> None:
  """Returns when the condition holds.

  Raises:
    ValueError: the process ended before.
  """
  while not condition():
    try:
      code = process.wait(_POLL)
    except subprocess.TimeoutExpired:
      continue
    raise ValueError(
      f'the process ended with code {code} before it was to be stopped; give '
      'it more blocks.'
    )


def digest(folder: pathlib.Path) -> dict[str, str]:
  """SHA-256 of every file under a folder, by its relative name."""
  return {
    path.relative_to(folder).as_posix(): hashlib.sha256(
      path.read_bytes()
    ).hexdigest()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }


def _saved(output: pathlib.Path) -> int:
  """Blocks that are in place."""
  return len(list((output / 'blocks').glob('[0-9]*')))


def _timer(seconds: float) -> Callable[[], bool]:
  end = time.perf_counter() + seconds
  return lambda: time.perf_counter() >= end
