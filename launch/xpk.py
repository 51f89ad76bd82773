r"""The command lines of xpk (1.16 or later), for TPUs on GKE.

  python -m launch.xpk --job=experiments/flags/smollm2_w4a16_gptq.flags \
      --topology=v5e:4x4 --image=REGISTRY/jaxq:1 --bucket=gs://my-bucket/runs \
      --override=mesh=data:4,model:4 --cluster=my-cluster

Prints a shell script of two commands: the bucket is attached to the cluster as
a storage that all workloads see, which is needed once (--attach), and the
workload is created. --apply runs them. xpk makes a JobSet with Kueue's queue of
it and restarts it, --max_restarts times; after a failure delete the workload
and run the same command again: it goes on with what is in the bucket.
"""

import shlex
from collections.abc import Sequence

from absl import flags

from launch import cli, shell
from launch import job as job_lib

FLAGS = flags.FlagValues()
_CLUSTER = flags.DEFINE_string(
  'cluster',
  None,
  'A cluster that xpk made or adapted.',
  required=True,
  flag_values=FLAGS,
)
_PROJECT = flags.DEFINE_string(
  'project', '', "Default: gcloud's.", flag_values=FLAGS
)
_ZONE = flags.DEFINE_string('zone', '', "Default: gcloud's.", flag_values=FLAGS)
_PRIORITY = flags.DEFINE_enum(
  'priority',
  'medium',
  ['very-low', 'low', 'medium', 'high', 'very-high'],
  'In the queue.',
  flag_values=FLAGS,
)
_ATTACH = flags.DEFINE_bool(
  'attach',
  False,
  'Attach the bucket first: once for a cluster and bucket.',
  flag_values=FLAGS,
)
cli.define(FLAGS)


def attach(
  job: job_lib.Job, *, cluster: str, project: str = '', zone: str = ''
) -> tuple[str, ...]:
  """The command that mounts the bucket in all workloads of a cluster."""
  job_lib.require(job, 'xpk', kind='tpu')
  return (
    *('xpk', 'storage', 'attach', job.bucket_name),
    *_where(cluster, project, zone),
    '--type=gcsfuse',
    f'--bucket={job.bucket_name}',
    f'--mount-point={job_lib.MOUNT}',
    '--auto-mount=true',
    '--readonly=false',
    '--size=1',  # Kubernetes asks for one; a bucket has no size.
  )


def create(
  job: job_lib.Job,
  *,
  cluster: str,
  project: str = '',
  zone: str = '',
  priority: str = 'medium',
) -> tuple[str, ...]:
  """The command that starts the job.

  Args:
    job: what runs.
    cluster, project, zone: where; '' leaves the choice to gcloud's settings.
    priority: in the queue.

  Raises:
    NotImplementedError: GPUs.
    ValueError: the job has no image, or its output is not in a bucket.
  """
  job_lib.require(job, 'xpk', kind='tpu')
  return (
    *('xpk', 'workload', 'create'),
    f'--workload={job.name}',
    *_where(cluster, project, zone),
    f'--tpu-type={job.topology.accelerator_type}',
    '--num-slices=1',
    f'--docker-image={job.image}',
    f'--priority={priority}',
    f'--max-restarts={job.max_restarts}',
    # Beside those that xpk has: 1 is the loss of another host. A mistake ends
    # with it too, which --check finds before.
    '--restart-on-exit-codes=1',
    f'--termination-grace-period-seconds={job.stop_seconds}',
    f'--command={shlex.join(job.command)}',
  )


def render(commands: Sequence[Sequence[str]]) -> str:
  """A shell script of command lines."""
  head = '#!/bin/bash\nset -euo pipefail\n'
  return head + ''.join(f'\n{shell.lines(words)}\n' for words in commands)


def _where(cluster: str, project: str, zone: str) -> list[str]:
  found = {'cluster': cluster, 'project': project, 'zone': zone}
  return [f'--{name}={value}' for name, value in found.items() if value]


def main() -> None:
  """Prints the script, and runs its commands if asked to."""
  job = cli.job(FLAGS)
  place = dict(cluster=_CLUSTER.value, project=_PROJECT.value, zone=_ZONE.value)
  commands = [create(job, priority=_PRIORITY.value, **place)]
  if _ATTACH.value:
    commands.insert(0, attach(job, **place))
  cli.show(render(commands))
  if FLAGS.apply:
    for command in commands:
      cli.say(cli.output_of(command).strip())


if __name__ == '__main__':
  cli.run(main, FLAGS)
