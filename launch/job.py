"""A Job: one entry point, its flags, and where it is to run.

  python -m experiments.ENTRY_POINT  the flagfile's flags  --output=FOLDER/NAME

Every launcher renders the same Job. Its output lies in a bucket that is mounted
as a folder on every host, so a host, or the whole slice, may be lost: the same
command on another one finds what is finished and goes on from there.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence

from absl import flags

from launch import topology as topology_lib

MOUNT = '/bucket'
# What the launchers send --output to, behind the job's name; None: no --output.
# A new entry point is one line here.
ENTRY_POINTS: dict[str, str | None] = {
  'calibrate': '',
  'evaluate': '.json',
  'generate': None,
  'restore': '',
  'sensitivity': '',
}
_NAME = re.compile(r'[a-z]([-a-z0-9]{0,38}[a-z0-9])?')
_BUCKET = re.compile(r'gs://([a-z0-9][-_.a-z0-9]{1,61}[a-z0-9])(/[^\s]*)?')
_IMAGE = re.compile(r'[\w.:/@-]+')
_OUTPUT = re.compile(r'--?output=')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """What runs where.

  Attributes:
    name: of the job, of its output and of what the platform makes for it.
    entry_point: of ENTRY_POINTS.
    arguments: its flags, '--name=value', in order; from `read_flagfile`.
    topology: from topology.parse.
    image: of the container; '' where the host has jaxq (Slurm only).
    bucket: 'gs://bucket/folder', or, for Slurm, a folder all hosts share.
    max_restarts: failures after which the job is given up. The loss of a host
      that the platform announces does not count where it can be told apart.
    stop_seconds: from SIGTERM to the end of a process.
  """

  name: str
  entry_point: str = 'calibrate'
  arguments: tuple[str, ...] = ()
  topology: topology_lib.Topology
  image: str = ''
  bucket: str
  max_restarts: int = 20
  stop_seconds: int = 25

  def __post_init__(self):
    if not _NAME.fullmatch(self.name):
      raise ValueError(
        f'--name={self.name}: allowed are at most 40 of a-z, 0-9 and -, a '
        'letter first and no - last, as in --name=llama3-w4.'
      )
    if self.entry_point not in ENTRY_POINTS:
      raise ValueError(
        f'--entry_point={self.entry_point}; allowed {sorted(ENTRY_POINTS)}, '
        'the modules of experiments/ that run on a cluster.'
      )
    if self.image and not _IMAGE.fullmatch(self.image):
      raise ValueError(
        f'--image={self.image}: not the name of an image; it reads '
        'REGISTRY/NAME:TAG. Build one from launch/docker and push it.'
      )
    if not (_BUCKET.fullmatch(self.bucket) or self.bucket.startswith('/')):
      raise ValueError(
        f'--bucket={self.bucket}: allowed is gs://BUCKET or gs://BUCKET/FOLDER '
        '(for Slurm, the path of a folder that all hosts share). Make one with '
        'gcloud storage buckets create.'
      )
    for name, least in (('max_restarts', 0), ('stop_seconds', 1)):
      if getattr(self, name) < least:
        raise ValueError(
          f'--{name}={getattr(self, name)}; it must be at least {least}.'
        )
    _check_mesh(self.arguments, self.topology)

  @property
  def in_bucket(self) -> bool:
    """False for a folder that all hosts share."""
    return self.bucket.startswith('gs://')

  @property
  def bucket_name(self) -> str:
    """'bucket' of gs://bucket/folder."""
    return self.bucket.removeprefix('gs://').partition('/')[0]

  @property
  def folder(self) -> str:
    """The path of gs://bucket/folder, or of a shared folder, on every host."""
    if not self.in_bucket:
      return self.bucket.rstrip('/')
    path = self.bucket.removeprefix('gs://').partition('/')[2].strip('/')
    return f'{MOUNT}/{path}' if path else MOUNT

  @property
  def command(self) -> tuple[str, ...]:
    """What every host runs."""
    suffix = ENTRY_POINTS[self.entry_point]
    arguments, output = self.arguments, ()
    if suffix is not None:  # In place of the flagfile's own.
      arguments = tuple(a for a in arguments if not _OUTPUT.match(a))
      output = (f'--output={self.folder}/{self.name}{suffix}',)
    return (
      'python',
      '-m',
      f'experiments.{self.entry_point}',
      *arguments,
      f'--grace_seconds={self.stop_seconds}',
      *output,
    )

  @property
  def digest(self) -> str:
    """Eight digits that tell this command and image from others."""
    text = json.dumps([self.command, self.image])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_flagfile(path: str, overrides: Sequence[str] = ()) -> tuple[str, ...]:
  """The flags of a flagfile and of those it includes, then the overrides.

  Args:
    path: a flagfile, as in experiments/flags.
    overrides: 'name=value' texts; a later flag wins over an earlier one.

  Raises:
    FileNotFoundError: there is no such file, or no path was given.
    ValueError: an override is no name=value.
  """
  if not path or not os.path.isfile(path):
    given = f'--job={path}: no such file' if path else '--job not given'
    raise FileNotFoundError(
      f'{given}; a flagfile of the entry point is needed, as in '
      '--job=experiments/flags/smollm2_w4a16_gptq.flags.'
    )
  for text in overrides:
    if not re.fullmatch(r'[a-z]\w*=.*', text, re.DOTALL):
      raise ValueError(
        f'--override={text}; it reads NAME=VALUE, a flag of the entry point '
        'without its dashes, as in --override=mesh=data:16.'
      )
    if text.startswith('output='):
      raise ValueError(
        f'--override={text}: the output is --bucket/--name, where a restart '
        'finds it; give these instead.'
      )
  try:
    expanded = flags.FlagValues().read_flags_from_files([f'--flagfile={path}'])
  except flags.Error as e:
    raise ValueError(f'--job={path}: {e}; mend the flagfile.') from e
  return (*expanded, *(f'--{text}' for text in overrides))


def check_arguments(job: Job) -> None:
  """Has the entry point parse the flags, without running it.

  Raises:
    ValueError: it refuses them; the message is its own.
  """
  done = subprocess.run(
    [sys.executable, *job.command[1:], '--only_check_args'],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    lines = done.stderr.strip().splitlines() or ['no message']
    raise ValueError(
      f'experiments.{job.entry_point} refuses its flags: '
      f'{lines[-1].removeprefix("error: ")}'
    )


def require(job: Job, launcher: str, *, kind: str) -> None:
  """Refuses what a launcher of the cloud cannot run.

  Args:
    job: what was asked for.
    launcher: its name, for the message.
    kind: 'tpu' or 'any' of Chip.kind.

  Raises:
    NotImplementedError: GPUs, where the launcher is for TPUs.
    ValueError: no image, or a folder instead of a bucket.
  """
  if kind == 'tpu' and job.topology.chip.kind != 'tpu':
    raise NotImplementedError(
      f'--topology={job.topology.name}: launch.{launcher} is for TPUs; use '
      'launch.gke or launch.slurm for GPUs.'
    )
  if not job.image:
    raise ValueError(
      f'--image not given; launch.{launcher} runs a container. Build '
      f'launch/docker/{job.topology.chip.kind}.Dockerfile, push it, and give '
      '--image=REGISTRY/NAME:TAG.'
    )
  if not job.in_bucket:
    raise ValueError(
      f'--bucket={job.bucket}: launch.{launcher} needs gs://BUCKET or '
      'gs://BUCKET/FOLDER; hosts of the cloud share no other folder.'
    )


def _check_mesh(
  arguments: Sequence[str], topology: topology_lib.Topology
) -> None:
  """The mesh of the flags, where they name one, has the devices' number."""
  found = [a for a in arguments if re.match(r'--?mesh=', a)]
  text = found[-1].partition('=')[2] if found else ''
  sizes = [int(size) for size in re.findall(r':\s*(\d+)', text)]
  if sizes and math.prod(sizes) != topology.devices:
    raise ValueError(
      f'--mesh={text} has {math.prod(sizes)} devices and {topology.name} has '
      f'{topology.devices}; give --override=mesh=data:D,model:M with D x M = '
      f'{topology.devices}.'
    )
