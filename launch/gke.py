r"""A JobSet for Google Kubernetes Engine: one pod per host.

  python -m launch.gke --job=experiments/flags/smollm2_w4a16_gptq.flags \
      --topology=v5e:4x4 --image=REGISTRY/jaxq:1 --bucket=gs://my-bucket/runs \
      --override=mesh=data:4,model:4 --service_account=jaxq > job.yaml

Prints the YAML; --apply gives it to kubectl. Applying it again changes nothing
while the job runs or is done, and starts a failed one afresh: it goes on with
what is in the bucket. The cluster needs JobSet (0.8 or later), the Cloud
Storage FUSE driver, a node pool of the topology and a Kubernetes service
account that may write the bucket. --queue puts the job into a queue of Kueue.

When a pod fails, all are made again, --max_restarts times; a pod that the
cluster takes away (a preempted spot node, maintenance) costs none of them.
"""

from typing import Any

import yaml
from absl import flags

from launch import cli
from launch import job as job_lib

FLAGS = flags.FlagValues()
_QUEUE = flags.DEFINE_string(
  'queue',
  '',
  'LocalQueue of Kueue; none: the job starts at once.',
  flag_values=FLAGS,
)
_NAMESPACE = flags.DEFINE_string(
  'namespace', 'default', 'Of Kubernetes.', flag_values=FLAGS
)
_SERVICE_ACCOUNT = flags.DEFINE_string(
  'service_account',
  'default',
  'Kubernetes service account that may write the bucket.',
  flag_values=FLAGS,
)
_SPOT = flags.DEFINE_bool(
  'spot', False, 'On spot nodes only.', flag_values=FLAGS
)
cli.define(FLAGS)

API_VERSION = 'jobset.x-k8s.io/v1alpha2'
WORKERS = 'hosts'
_COORDINATOR_PORT = 8476
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
_UPLOAD_SECONDS = 30  # For the bucket's sidecar, after the process is gone.


def render(
  job: job_lib.Job,
  *,
  queue: str = '',
  namespace: str = 'default',
  service_account: str = 'default',
  spot: bool = False,
) -> dict[str, Any]:
  """The JobSet as Kubernetes reads it.

  Args:
    job: what runs.
    queue: a LocalQueue of Kueue, or ''.
    namespace, service_account: of the pods.
    spot: spot nodes only.

  Raises:
    ValueError: the job has no image, or its output is not in a bucket.
  """
  job_lib.require(job, 'gke', kind='any')
  hosts = job.topology.hosts
  metadata: dict[str, Any] = {'name': job.name, 'namespace': namespace}
  if queue:
    metadata['labels'] = {'kueue.x-k8s.io/queue-name': queue}
  if job.topology.chip.kind == 'tpu':
    metadata['annotations'] = {  # The pods of one slice, on one slice.
      'alpha.jobset.sigs.k8s.io/exclusive-topology': (
        'cloud.google.com/gke-nodepool'
      )
    }
  return {
    'apiVersion': API_VERSION,
    'kind': 'JobSet',
    'metadata': metadata,
    'spec': {
      'network': {'enableDNSHostnames': True, 'publishNotReadyAddresses': True},
      'failurePolicy': {
        'maxRestarts': job.max_restarts,
        'rules': [
          {
            'name': 'takenAway',
            'action': 'RestartJobSetAndIgnoreMaxRestarts',
            'onJobFailureReasons': ['PodFailurePolicy'],
          }
        ],
      },
      'replicatedJobs': [
        {
          'name': WORKERS,
          'replicas': 1,
          'template': {
            'spec': {
              'completionMode': 'Indexed',
              'completions': hosts,
              'parallelism': hosts,
              'backoffLimit': 0,  # JobSet restarts, all hosts together.
              'podFailurePolicy': {
                'rules': [
                  {
                    'action': 'FailJob',
                    'onPodConditions': [
                      {'type': 'DisruptionTarget', 'status': 'True'}
                    ],
                  }
                ]
              },
              'template': _pod(job, service_account, spot),
            }
          },
        }
      ],
    },
  }


def dump(jobset: dict[str, Any]) -> str:
  """The YAML of a JobSet."""
  return yaml.safe_dump(jobset, sort_keys=False, width=80)


def apply(jobset: dict[str, Any]) -> None:
  """Gives it to kubectl; one that has failed is deleted first.

  Raises:
    FileNotFoundError, OSError: as cli.output_of.
  """
  name = jobset['metadata']['name']
  where = [f'--namespace={jobset["metadata"]["namespace"]}']
  state = cli.output_of(
    ['kubectl', 'get', 'jobset', name, *where, '--ignore-not-found']
    + ['--output=jsonpath={.status.terminalState}']
  )
  if state.strip() == 'Failed':
    cli.say(f'{name} has failed before; it starts afresh.')
    cli.say(
      cli.output_of(['kubectl', 'delete', 'jobset', name, *where]).strip()
    )
  applied = cli.output_of(
    ['kubectl', 'apply', '--filename=-'], text=dump(jobset)
  )
  cli.say(applied.strip())


def _pod(job: job_lib.Job, service_account: str, spot: bool) -> dict[str, Any]:
  """The pod template of a host."""
  topology = job.topology
  tpu = topology.chip.kind == 'tpu'
  if tpu:
    selector = {
      'cloud.google.com/gke-tpu-accelerator': topology.chip.gke_accelerator,
      'cloud.google.com/gke-tpu-topology': topology.shape,
    }
  else:
    selector = {
      'cloud.google.com/gke-accelerator': topology.chip.gke_accelerator
    }
  if spot:
    selector['cloud.google.com/gke-spot'] = 'true'
  resource = 'google.com/tpu' if tpu else 'nvidia.com/gpu'
  limits = {resource: topology.chips_per_host}
  container: dict[str, Any] = {
    'name': 'jaxq',
    'image': job.image,
    'command': list(job.command[:3]),
    'args': list(job.command[3:]) + ([] if tpu else _rendezvous(job)),
    # Of TPUs JAX asks the platform; of GPUs it is told who is who.
    'env': [
      {
        'name': 'HOST_INDEX',
        'valueFrom': {'fieldRef': {'fieldPath': _INDEX}},
      }
    ],
    'ports': [{'containerPort': _COORDINATOR_PORT}],
    'resources': {'requests': limits, 'limits': dict(limits)},
    'volumeMounts': [{'name': 'bucket', 'mountPath': job_lib.MOUNT}],
  }
  return {
    'metadata': {'annotations': {'gke-gcsfuse/volumes': 'true'}},
    'spec': {
      'restartPolicy': 'Never',
      'serviceAccountName': service_account,
      'terminationGracePeriodSeconds': job.stop_seconds + _UPLOAD_SECONDS,
      'nodeSelector': selector,
      'containers': [container],
      'volumes': [
        {
          'name': 'bucket',
          'csi': {
            'driver': 'gcsfuse.csi.storage.gke.io',
            'volumeAttributes': {
              'bucketName': job.bucket_name,
              'mountOptions': 'implicit-dirs',
            },
          },
        }
      ],
    },
  }


def _rendezvous(job: job_lib.Job) -> list[str]:
  """The flags by which GPU hosts find each other; none for a single host."""
  hosts = job.topology.hosts
  if hosts == 1:
    return []
  first = f'{job.name}-{WORKERS}-0-0.{job.name}'
  return [
    f'--coordinator_address={first}:{_COORDINATOR_PORT}',
    f'--num_processes={hosts}',
    '--process_id=$(HOST_INDEX)',
  ]


def main() -> None:
  """Prints the YAML, and applies it if asked to."""
  jobset = render(
    cli.job(FLAGS),
    queue=_QUEUE.value,
    namespace=_NAMESPACE.value,
    service_account=_SERVICE_ACCOUNT.value,
    spot=_SPOT.value,
  )
  cli.show(dump(jobset))
  if FLAGS.apply:
    apply(jobset)


if __name__ == '__main__':
  cli.run(main, FLAGS)
