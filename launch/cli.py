"""What the launchers share: their flags, how they start, and running tools.

A launcher prints what it made; --apply runs it as well. Nothing is sent
anywhere without --apply. Each has a FlagValues of its own, to which `define`
adds the flags of all, since several have flags of one name.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags

from launch import job as job_lib
from launch import topology

_INSTALL = {  # What a tool comes with.
  'gcloud': 'the Google Cloud CLI',
  'kubectl': 'the Kubernetes tools (gcloud components install kubectl)',
  'sbatch': 'Slurm, or run this on a login node',
  'xpk': 'it with pip install xpk',
}
_HELP = frozenset({'help', 'helpshort', '?', 'h'})


def define(values: flags.FlagValues) -> None:
  """Adds the flags that describe a Job, and --apply."""
  flags.DEFINE_string(
    'job',
    '',
    'The flagfile of the entry point, as in experiments/flags: the one that '
    'runs on a laptop.',
    flag_values=values,
  )
  flags.DEFINE_string(
    'entry_point',
    'calibrate',
    f'Module of experiments/, of {", ".join(sorted(job_lib.ENTRY_POINTS))}.',
    flag_values=values,
  )
  flags.DEFINE_multi_string(
    'override',
    [],
    'A flag that wins over the flagfile, as in mesh=data:16.',
    flag_values=values,
  )
  flags.DEFINE_string(
    'topology',
    None,
    'v5e:4x4, v6e:2x4, tpu7x:2x2x1, h100:16, ...',
    required=True,
    flag_values=values,
  )
  flags.DEFINE_string(
    'image',
    '',
    'The container, built from launch/docker: REGISTRY/NAME:TAG.',
    flag_values=values,
  )
  flags.DEFINE_string(
    'bucket',
    None,
    'Where the output goes: gs://BUCKET/FOLDER.',
    required=True,
    flag_values=values,
  )
  flags.DEFINE_string(
    'name',
    None,
    "Of job and output. Default: the flagfile's name.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    'max_restarts',
    20,
    'Failures after which the job is given up.',
    flag_values=values,
  )
  flags.DEFINE_integer(
    'stop_seconds',
    25,
    'What a process has from SIGTERM to its end. Spot machines have 30.',
    flag_values=values,
  )
  flags.DEFINE_bool(
    'check',
    True,
    'Have the entry point look at its flags before anything else.',
    flag_values=values,
  )
  flags.DEFINE_bool(
    'apply', False, 'Run it, not only print it.', flag_values=values
  )


def run(main: Callable[[], Any], values: flags.FlagValues) -> None:
  """Parses the flags and calls `main`; a mistake is one line and exit code 1.

  It is not experiments.cli.run, which joins the job of the host it runs on.

  Raises:
    SystemExit: always.
  """

  def parse(argv: Sequence[str]) -> list[str]:
    flags.FLAGS(argv[:1])  # absl's own flags, which app.run wants parsed.
    if any(a.startswith('-') and a.lstrip('-') in _HELP for a in argv[1:]):
      print(f'{sys.modules["__main__"].__doc__}\n{values.get_help()}')
      sys.exit(0)
    try:
      rest = values(list(argv))
    except flags.Error as e:
      _fail(f'{e}; --help lists the flags')
    if len(rest) > 1:
      _fail(f'unexpected argument {rest[1]!r}; options are given as --x=y')
    return rest

  def call(argv: Sequence[str]) -> Any:
    del argv
    try:
      return main()
    except (OSError, ValueError, NotImplementedError) as e:
      _fail(str(e))

  app.run(call, flags_parser=parse)


def job(values: flags.FlagValues) -> job_lib.Job:
  """The Job that the flags describe.

  Raises:
    FileNotFoundError, ValueError: as job.Job, read_flagfile, check_arguments.
  """
  arguments = job_lib.read_flagfile(values.job, values.override)
  stem = os.path.splitext(os.path.basename(values.job))[0]
  made = job_lib.Job(
    name=values.name or default_name(stem),
    entry_point=values.entry_point,
    arguments=arguments,
    topology=topology.parse(values.topology),
    image=values.image,
    bucket=values.bucket,
    max_restarts=values.max_restarts,
    stop_seconds=values.stop_seconds,
  )
  if values.check:
    job_lib.check_arguments(made)
  return made


def default_name(stem: str) -> str:
  """'SmolLM2_w4a16' -> 'smollm2-w4a16', which every platform takes."""
  name = re.sub(r'[^a-z0-9]+', '-', stem.lower()).strip('-')[:40].strip('-')
  return name if name[:1].isalpha() else f'job-{name}'[:40].strip('-')


def output_of(command: Sequence[str], *, text: str | None = None) -> str:
  """Runs a tool and returns its stdout; its stderr goes to ours.

  Args:
    command: the tool and its arguments.
    text: its stdin.

  Raises:
    FileNotFoundError: the tool is not there.
    OSError: it failed.
  """
  find(command[0])
  done = subprocess.run(
    list(command), input=text, stdout=subprocess.PIPE, text=True, check=False
  )
  if done.returncode:
    raise OSError(
      f'{command[0]} ended with exit code {done.returncode}; its own message '
      'is above. Mend that and run the same command again.'
    )
  return done.stdout


def run_script(text: str) -> None:
  """Runs a bash script; what it prints is seen as it comes.

  Raises:
    OSError: it failed.
  """
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'job.sh'
    path.write_text(text, encoding='utf-8')
    # Not by stdin: the tools it calls may read that.
    done = subprocess.run(['bash', str(path)], check=False)
  if done.returncode:
    raise OSError(
      f'the script ended with exit code {done.returncode}; its own message is '
      'above. Mend that and run the same command again.'
    )


def find(tool: str) -> None:
  """Raises FileNotFoundError unless a program is on PATH."""
  if shutil.which(tool) is None:
    raise FileNotFoundError(
      f'--apply needs {tool}, which is not on PATH; install '
      f'{_INSTALL.get(tool, tool)}, or leave --apply out and run what is '
      'printed elsewhere.'
    )


def show(text: str) -> None:
  """Prints what was rendered."""
  print(text, end='' if text.endswith('\n') else '\n', flush=True)


def say(text: str) -> None:
  """A line for the person at the terminal."""
  print(text, file=sys.stderr, flush=True)


def _fail(message: str) -> NoReturn:
  print(f'error: {" ".join(message.split())}', file=sys.stderr, flush=True)
  sys.exit(1)
