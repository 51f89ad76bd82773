r"""Cloud TPU VMs by a queued resource: a script that sees one job through.

  python -m launch.tpu_vm --job=experiments/flags/smollm2_w4a16_gptq.flags \
      --topology=v5e:4x4 --image=REGISTRY/jaxq:1 --bucket=gs://my-bucket/runs \
      --override=mesh=data:4,model:4 --zone=us-west4-a > job.sh

The script asks for the slice, waits, and asks again when the slice is lost
(--spot), until the job has left its exit code in the bucket; then it deletes
the slice and ends with that code. It may be stopped and started at any time: it
goes on with what it finds, and so does the job. --apply runs it.

On each host a startup script, run at every boot, mounts the bucket with Cloud
Storage FUSE and runs the container, again after a failure, --max_restarts
times; the log of each host is copied to the bucket when it is done. TPU7x is
not served by this API: use launch.gke or launch.xpk.
"""

import shlex

from absl import flags

from launch import cli, shell
from launch import job as job_lib

FLAGS = flags.FlagValues()
_ZONE = flags.DEFINE_string(
  'zone',
  None,
  'Of the slice, as in us-west4-a.',
  required=True,
  flag_values=FLAGS,
)
_PROJECT = flags.DEFINE_string(
  'project', '', "Default: gcloud's.", flag_values=FLAGS
)
_SPOT = flags.DEFINE_bool(
  'spot', False, 'A slice that may be taken away.', flag_values=FLAGS
)
_RUNTIME = flags.DEFINE_string(
  'runtime_version', '', "Of the VM. Default: the chip's.", flag_values=FLAGS
)
_SERVICE_ACCOUNT = flags.DEFINE_string(
  'service_account',
  '',
  "That may write the bucket. Default: the project's.",
  flag_values=FLAGS,
)
cli.define(FLAGS)

_RETRY_SECONDS = 30  # Between restarts on a host: others have to notice too.
_POLL_SECONDS = 60
_STARTUP = r"""#!/bin/bash
# Runs on every host of the slice at every boot, as root.
set -uo pipefail

metadata=http://metadata.google.internal/computeMetadata/v1/instance/attributes
worker="$(curl -fsS -H 'Metadata-Flavor: Google' \
  "$metadata/agent-worker-number")"
mount=@MOUNT@
folder=@FOLDER@
log=/var/log/jaxq.log

install_gcsfuse() {
  local index=https://packages.cloud.google.com/apt
  local key=/usr/share/keyrings/cloud.google.asc
  curl -fsS "$index/doc/apt-key.gpg" -o "$key"
  echo "deb [signed-by=$key] $index gcsfuse-$(lsb_release -cs) main" \
    >/etc/apt/sources.list.d/gcsfuse.list
  apt-get -o DPkg::Lock::Timeout=300 update -q
  DEBIAN_FRONTEND=noninteractive \
    apt-get -o DPkg::Lock::Timeout=300 install -qy gcsfuse
}

prepare() {
  mkdir -p "$mount"
  if ! mountpoint -q "$mount"; then
    command -v gcsfuse >/dev/null || install_gcsfuse
    gcsfuse --implicit-dirs @BUCKET@ "$mount" || return
  fi
  mkdir -p "$folder"
  gcloud auth configure-docker @REGISTRY@ --quiet
  docker pull --quiet @IMAGE@
}

run() {
  docker rm --force jaxq >/dev/null 2>&1 # Of a host that was cut off.
  docker run --rm --name=jaxq --privileged --network=host \
    --stop-timeout=@STOP@ --volume="$mount:$mount" \
    @IMAGE@ \
    @COMMAND@
}

code=1
for ((restarts = 0; restarts <= @MAX_RESTARTS@; restarts++)); do
  if prepare && run; then
    code=0
    break
  fi
  echo "jaxq: failure $((restarts + 1)) on host $worker"
  sleep @RETRY@
done >>"$log" 2>&1
cp "$log" "$folder/@NAME@.host$worker.log"
if [[ "$worker" == 0 ]]; then
  echo "$code" >"$folder/@EXIT_CODE@"
fi
"""
_SCRIPT = r"""#!/bin/bash
# Sees @NAME@ through: run it again at any time, it goes on with what it finds.
set -euo pipefail

name=@NAME@
place=(@PLACE@)
exit_code=@EXIT_CODE_URL@

state() {
  local found error
  error="$(mktemp)"
  if found="$(gcloud compute tpus queued-resources describe "$name" \
    "${place[@]}" --format='value(state.state)' 2>"$error")"; then
    echo "$found"
  elif grep -q NOT_FOUND "$error"; then
    echo ABSENT
  else
    cat "$error" >&2
    echo UNKNOWN # Perhaps the network: it is asked again.
  fi
  rm "$error"
}

create() {
  local startup
  startup="$(mktemp)"
  cat >"$startup" <<'END_OF_STARTUP'
@STARTUP@END_OF_STARTUP
  gcloud compute tpus queued-resources create "$name" "${place[@]}" \
    @CREATE@ \
    --metadata-from-file="startup-script=$startup" --async
  rm "$startup"
}

delete() {
  gcloud compute tpus queued-resources delete "$name" "${place[@]}" \
    --force --quiet
}

lost=0
while ((lost <= @MAX_RESTARTS@)); do
  if code="$(gcloud storage cat "$exit_code" 2>/dev/null)"; then
    [[ "$(state)" == ABSENT ]] || delete
    if [[ "$code" != 0 ]]; then
      gcloud storage rm "$exit_code"  # So that the next start tries again.
      echo "error: $name failed; its logs are beside $exit_code" >&2
    fi
    exit "$code"
  fi
  found="$(state)"
  echo "$(date +%T) $name: $found"
  case "$found" in
    ABSENT) create ;;
    FAILED | SUSPENDED)
      lost=$((lost + 1))
      delete
      ;;
  esac
  sleep @POLL@
done
echo "error: the slice was lost $lost times; run this again to go on" >&2
exit 1
"""


def render(
  job: job_lib.Job,
  *,
  zone: str,
  project: str = '',
  spot: bool = False,
  runtime_version: str = '',
  service_account: str = '',
) -> str:
  """The shell script that sees a job through.

  Args:
    job: what runs.
    zone, project: where; '' is the project of gcloud's settings.
    spot: whether the slice may be taken away.
    runtime_version: of the VM; '' is the chip's.
    service_account: of the VM; '' is the project's.

  Raises:
    NotImplementedError: GPUs, or a chip that this API does not serve.
    ValueError: the job has no image, or its output is not in a bucket.
  """
  job_lib.require(job, 'tpu_vm', kind='tpu')
  runtime_version = runtime_version or job.topology.chip.runtime_version
  if not runtime_version:
    raise NotImplementedError(
      f'--topology={job.topology.name}: the Cloud TPU API does not serve this '
      'chip; use launch.gke or launch.xpk.'
    )
  create = [
    f'--node-id={job.name}',
    f'--accelerator-type={job.topology.accelerator_type}',
    f'--runtime-version={runtime_version}',
  ]
  if spot:
    create.append('--spot')
  if service_account:
    create.append(f'--service-account={service_account}')
  place = [f'--zone={zone}', *([f'--project={project}'] if project else [])]
  inside = job.folder.removeprefix(job_lib.MOUNT)
  url = f'gs://{job.bucket_name}{inside}/{_exit_code(job)}'
  return shell.fill(
    _SCRIPT,
    NAME=job.name,
    PLACE=shlex.join(place),
    EXIT_CODE_URL=shlex.quote(url),
    STARTUP=startup(job),
    CREATE=shell.lines(create, 4),
    MAX_RESTARTS=str(job.max_restarts),
    POLL=str(_POLL_SECONDS),
  )


def startup(job: job_lib.Job) -> str:
  """The script that every host runs when it boots."""
  return shell.fill(
    _STARTUP,
    MOUNT=job_lib.MOUNT,
    FOLDER=shlex.quote(job.folder),
    BUCKET=shlex.quote(job.bucket_name),
    REGISTRY=shlex.quote(job.image.partition('/')[0]),
    IMAGE=shlex.quote(job.image),
    COMMAND=shell.lines(job.command, 4),
    STOP=str(job.stop_seconds),
    MAX_RESTARTS=str(job.max_restarts),
    RETRY=str(_RETRY_SECONDS),
    NAME=job.name,
    EXIT_CODE=_exit_code(job),
  )


def _exit_code(job: job_lib.Job) -> str:
  """The file by which the job says that it is over; another for other flags."""
  return f'{job.name}.{job.digest}.exit_code'


def main() -> None:
  """Prints the script, or runs it if asked to."""
  script = render(
    cli.job(FLAGS),
    zone=_ZONE.value,
    project=_PROJECT.value,
    spot=_SPOT.value,
    runtime_version=_RUNTIME.value,
    service_account=_SERVICE_ACCOUNT.value,
  )
  cli.show(script)
  if FLAGS.apply:
    cli.find('gcloud')
    cli.run_script(script)


if __name__ == '__main__':
  cli.run(main, FLAGS)
