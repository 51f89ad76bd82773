r"""A batch file for Slurm: one process per GPU host.

  python -m launch.slurm --job=experiments/flags/smollm2_w4a16_gptq.flags \
      --topology=h100:16 --bucket=/shared/runs --time=12:00:00 \
      --override=mesh=data:4,model:4 > job.sbatch

Prints the file; --apply submits it. JAX finds the hosts by Slurm's variables.
--bucket is a folder that all hosts share (mount a bucket with gcsfuse to use
one). --image is a container for Slurm's pyxis plugin, or the path of a .sqsh
file; without it the submitting shell's Python runs in the submitting folder.

When a host is lost, the time is up or the job fails, it is put back into the
queue, --max_restarts times, and goes on with what is in the folder.
--stop_seconds before the time is up its processes are told to stop (SIGTERM).
"""

import re

from absl import flags

from launch import cli, shell
from launch import job as job_lib

FLAGS = flags.FlagValues()
_TIME = flags.DEFINE_string(
  'time',
  '24:00:00',
  'Limit of one stay in the queue, as in 12:00:00.',
  flag_values=FLAGS,
)
_PARTITION = flags.DEFINE_string(
  'partition', '', "Default: Slurm's.", flag_values=FLAGS
)
_ACCOUNT = flags.DEFINE_string(
  'account', '', "Default: Slurm's.", flag_values=FLAGS
)
cli.define(FLAGS)

_FORMAT = re.compile(r'(\d+-)?\d+(:\d\d){0,2}')
_SCRIPT = r"""#!/bin/bash
@DIRECTIVES@
set -uo pipefail

# One process drives all GPUs of its host; JAX would give it the first alone.
export JAX_LOCAL_DEVICE_IDS=@DEVICES@
restarts="${SLURM_RESTART_COUNT:-0}"
echo "$(date) @NAME@: start $((restarts + 1)) on $SLURM_JOB_NODELIST"

@COMMAND@
code=$?

if ((code != 0 && restarts < @MAX_RESTARTS@)); then
  echo "$(date) @NAME@: exit code $code; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def render(
  job: job_lib.Job,
  *,
  time: str = '24:00:00',
  partition: str = '',
  account: str = '',
) -> str:
  """The batch file.

  Args:
    job: what runs.
    time: limit of one stay in the queue, in Slurm's notation.
    partition, account: '' leaves the choice to Slurm.

  Raises:
    NotImplementedError: TPUs.
    ValueError: a bucket instead of a folder, or a time that Slurm cannot read.
  """
  if job.topology.chip.kind != 'gpu':
    raise NotImplementedError(
      f'--topology={job.topology.name}: launch.slurm is for GPU hosts, as in '
      '--topology=h100:16; use launch.tpu_vm, launch.gke or launch.xpk for '
      'TPUs.'
    )
  if job.in_bucket:
    raise ValueError(
      f'--bucket={job.bucket}: launch.slurm needs the path of a folder that '
      'all hosts share; mount the bucket there (gcsfuse) and give its path.'
    )
  if not _FORMAT.fullmatch(time):
    raise ValueError(
      f"--time={time}: not a time of Slurm's; allowed are MINUTES, "
      'HOURS:MINUTES:SECONDS and DAYS-HOURS, as in --time=12:00:00.'
    )
  gpus = job.topology.chips_per_host
  options = {
    'job-name': job.name,
    'nodes': job.topology.hosts,
    'ntasks-per-node': 1,
    'gpus-per-node': gpus,
    'time': time,
    'partition': partition,
    'account': account,
    'output': f'{job.folder}/{job.name}.slurm.log',
    'open-mode': 'append',
    'signal': f'TERM@{job.stop_seconds}',
    'requeue': None,
  }
  if gpus == job.topology.chip.chips_on_one_host:
    options['exclusive'] = None
  directives = [
    f'#SBATCH --{name}' + ('' if value is None else f'={value}')
    for name, value in options.items()
    if value != ''
  ]
  return shell.fill(
    _SCRIPT,
    DIRECTIVES='\n'.join(directives),
    DEVICES=','.join(map(str, range(gpus))),
    NAME=job.name,
    COMMAND=shell.lines(_step(job)),
    MAX_RESTARTS=str(job.max_restarts),
  )


def _step(job: job_lib.Job) -> list[str]:
  """The command that starts one process on every host."""
  container = []
  if job.image:
    container = [
      f'--container-image={_pyxis(job.image)}',
      f'--container-mounts={job.folder}:{job.folder}',
      '--container-workdir=/jaxq',
    ]
  # Its own processes are killed as soon as one ends badly.
  return ['srun', '--kill-on-bad-exit=1', *container, *job.command]


def _pyxis(image: str) -> str:
  """REGISTRY/NAME:TAG as pyxis reads it, REGISTRY#NAME:TAG."""
  first, slash, rest = image.partition('/')
  registry = slash and ('.' in first or ':' in first)
  return f'{first}#{rest}' if registry else image


def main() -> None:
  """Prints the file, and submits it if asked to."""
  job = cli.job(FLAGS)
  text = render(
    job,
    time=_TIME.value,
    partition=_PARTITION.value,
    account=_ACCOUNT.value,
  )
  cli.show(text)
  if FLAGS.apply:
    cli.say(cli.output_of(['sbatch'], text=text).strip())


if __name__ == '__main__':
  cli.run(main, FLAGS)
