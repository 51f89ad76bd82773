r"""A pod on one machine: a command as several processes that find each other.

  python -m benchmarks.local_job --processes=4 --devices=2 -- \
      python -m experiments.calibrate --flagfile=FILE --output=DIR

Each process has its own simulated CPU devices; they meet on loopback and
compute together through gloo, as hosts do through their network. It shows that
a job is right and how it fails, not how fast it would be: all of them share the
cores of this machine. Exit code: the largest of the processes'.
"""

import argparse
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence


class LocalJob:
  """Processes that were started, with their output in files.

  Attributes:
    processes: in the order of their numbers.
  """

  def __init__(
    self,
    command: Sequence[str],
    logs: pathlib.Path,
    *,
    processes: int = 4,
    devices: int = 2,
    own: Mapping[int, Sequence[str]] | None = None,
    env: Mapping[str, str] | None = None,
    cwds: Sequence[str | os.PathLike] = (),
  ):
    """Starts them.

    Args:
      command: what each runs; the flags of the job are put behind.
      logs: folder for stdout and stderr of each.
      processes: how many.
      devices: simulated ones of each.
      own: {process: further arguments} of single processes.
      env: further variables.
      cwds: where each runs; the last one is that of all others.
    """
    logs.mkdir(parents=True, exist_ok=True)
    self._logs = logs
    self.processes: list[subprocess.Popen] = []
    address = f'127.0.0.1:{free_port()}'
    variables = {
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
      **(env or {}),
    }
    for i in range(processes):
      flags = [
        f'--coordinator_address={address}',
        f'--num_processes={processes}',
        f'--process_id={i}',
      ]
      with (
        open(self._log(i, 'out'), 'w') as out,
        open(self._log(i, 'err'), 'w') as err,
      ):
        self.processes.append(
          subprocess.Popen(
            [*command, *flags, *(own or {}).get(i, ())],
            env=variables,
            cwd=cwds[min(i, len(cwds) - 1)] if cwds else None,
            stdout=out,
            stderr=err,
          )
        )

  def out(self, i: int) -> str:
    """What process i printed."""
    return self._log(i, 'out').read_text('utf-8', errors='replace')

  def err(self, i: int) -> str:
    """What process i wrote to stderr."""
    return self._log(i, 'err').read_text('utf-8', errors='replace')

  def reasons(self) -> list[str]:
    """The lines of all processes that say why the job ended.

    When process 0 dies JAX itself ends the others, and says that a task died.
    """
    labels = ('error: ', 'stopped: ')
    lines = (
      line
      for i in range(len(self.processes))
      for line in self.err(i).split('\n')
    )
    return [
      line
      for line in lines
      if line.startswith(labels) or 'another task died' in line
    ]

  def wait(self, seconds: float = 600.0) -> list[int]:
    """The exit codes, when all have ended.

    Raises:
      TimeoutError: some have not; they are killed.
    """
    deadline = time.monotonic() + seconds
    try:
      for process in self.processes:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired as e:
      running = [i for i, p in enumerate(self.processes) if p.poll() is None]
      raise TimeoutError(
        f'processes {running} still run after {seconds:.0f} s; they were '
        'killed.'
      ) from e
    finally:
      self.kill()
    return [process.returncode for process in self.processes]

  def kill(self) -> None:
    """Kills what still runs."""
    for process in self.processes:
      if process.poll() is None:
        process.kill()
        process.wait()

  def _log(self, i: int, name: str) -> pathlib.Path:
    return self._logs / f'{i}.{name}'


def free_port() -> int:
  """A port that nobody listens at now."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def main(argv: Sequence[str]) -> int:
  """Runs the command behind `--` and passes on what process 0 prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--processes', type=int, default=4)
  parser.add_argument('--devices', type=int, default=2)
  parser.add_argument('command', nargs='+')
  args = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as folder:
    job = LocalJob(
      args.command,
      pathlib.Path(folder),
      processes=args.processes,
      devices=args.devices,
    )
    codes = job.wait(24 * 3600)
    print(job.out(0), end='')
    print(job.err(0), end='', file=sys.stderr)
    for line in job.reasons():
      if line not in job.err(0):
        print(line, file=sys.stderr)
  return max(abs(code) for code in codes)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
