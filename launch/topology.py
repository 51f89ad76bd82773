"""What a topology name stands for: chips, hosts, and each platform's names.

`v5e:4x4` is a TPU slice, `h100:16` a number of GPUs. Everything that a launcher
must know of the hardware is in one table here. Sources: "TPU versions" of the
Cloud TPU documentation, "About TPUs in GKE", and the machine table of xpk 1.16.
"""

import dataclasses
import math
import re

_SHAPES_2D = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_SHAPES_3D = (
  *('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8'),
  *('8x8x16', '8x16x16'),
)
_GPUS_PER_HOST = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One row of the table.

  Attributes:
    kind: 'tpu' or 'gpu'.
    shapes: the slices that exist; of GPUs () for any number that fills hosts.
    chips_per_host: on hosts of a slice of more than one host.
    chips_on_one_host: the largest slice that is a single host.
    devices_per_chip: jax.devices() of a chip (two on tpu7x).
    accelerator: prefix of the accelerator type; '' for GPUs.
    cores_per_chip: what the number in the accelerator type counts, per chip.
    gke_accelerator: the label of the nodes.
    machine_type: of the hosts, with {} for their number of chips.
    runtime_version: of a Cloud TPU VM; '' where that API does not serve the
      chip.
  """

  kind: str
  shapes: tuple[str, ...] = ()
  chips_per_host: int = 4
  chips_on_one_host: int = 4
  devices_per_chip: int = 1
  accelerator: str = ''
  cores_per_chip: int = 1
  gke_accelerator: str
  machine_type: str
  runtime_version: str = ''


CHIPS = {
  'v4': Chip(
    kind='tpu',
    shapes=_SHAPES_3D,
    accelerator='v4',
    cores_per_chip=2,
    gke_accelerator='tpu-v4-podslice',
    machine_type='ct4p-hightpu-{}t',
    runtime_version='tpu-ubuntu2204-base',
  ),
  'v5e': Chip(
    kind='tpu',
    shapes=_SHAPES_2D,
    chips_on_one_host=8,
    accelerator='v5litepod',
    gke_accelerator='tpu-v5-lite-podslice',
    machine_type='ct5lp-hightpu-{}t',
    runtime_version='v2-alpha-tpuv5-lite',
  ),
  'v5p': Chip(
    kind='tpu',
    shapes=_SHAPES_3D,
    accelerator='v5p',
    cores_per_chip=2,
    gke_accelerator='tpu-v5p-slice',
    machine_type='ct5p-hightpu-{}t',
    runtime_version='v2-alpha-tpuv5',
  ),
  'v6e': Chip(
    kind='tpu',
    shapes=_SHAPES_2D,
    chips_on_one_host=8,
    accelerator='v6e',
    gke_accelerator='tpu-v6e-slice',
    machine_type='ct6e-standard-{}t',
    runtime_version='v2-alpha-tpuv6e',
  ),
  'tpu7x': Chip(  # "The Cloud TPU API is not supported on TPU7x."
    kind='tpu',
    shapes=_SHAPES_3D,
    devices_per_chip=2,
    accelerator='tpu7x',
    cores_per_chip=2,
    gke_accelerator='tpu7x',
    machine_type='tpu7x-standard-{}t',
  ),
  'a100': Chip(
    kind='gpu',
    chips_per_host=_GPUS_PER_HOST,
    chips_on_one_host=_GPUS_PER_HOST,
    gke_accelerator='nvidia-a100-80gb',
    machine_type='a2-ultragpu-{}g',
  ),
  'h100': Chip(
    kind='gpu',
    chips_per_host=_GPUS_PER_HOST,
    chips_on_one_host=_GPUS_PER_HOST,
    gke_accelerator='nvidia-h100-80gb',
    machine_type='a3-highgpu-{}g',
  ),
  'h200': Chip(
    kind='gpu',
    chips_per_host=_GPUS_PER_HOST,
    chips_on_one_host=_GPUS_PER_HOST,
    gke_accelerator='nvidia-h200-141gb',
    machine_type='a3-ultragpu-{}g',
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
  """A slice, or a number of GPUs.

  Attributes:
    name: as it was given, 'v5e:4x4'.
    chip: its row of CHIPS.
    shape: '4x4'; of GPUs their number.
    chips, hosts: how many.
    chips_per_host: the same on every host.
  """

  name: str
  chip: Chip
  shape: str
  chips: int
  hosts: int

  @property
  def chips_per_host(self) -> int:
    return self.chips // self.hosts

  @property
  def devices(self) -> int:
    """What jax.devices() has, over all hosts: the size of the mesh."""
    return self.chips * self.chip.devices_per_chip

  @property
  def accelerator_type(self) -> str:
    """Its name for Cloud TPU and xpk, 'v5litepod-16'; '' for GPUs."""
    if self.chip.kind != 'tpu':
      return ''
    return f'{self.chip.accelerator}-{self.chips * self.chip.cores_per_chip}'

  @property
  def machine_type(self) -> str:
    """Of each host, 'ct5lp-hightpu-4t'."""
    return self.chip.machine_type.format(self.chips_per_host)


def parse(name: str) -> Topology:
  """'v5e:4x4' or 'h100:16' -> Topology.

  Raises:
    ValueError: an unknown chip or shape, or a number of GPUs that does not fill
      its hosts.
  """
  key, _, shape = name.partition(':')
  chip = CHIPS.get(key)
  if chip is None or not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', shape):
    raise ValueError(f'--topology={name}: not known; known are {known()}.')
  if chip.kind == 'gpu':
    if 'x' in shape or not _fills_hosts(int(shape), chip):
      raise ValueError(
        f'--topology={name}: hosts have {chip.chips_on_one_host} GPUs; allowed '
        f'are 1, 2, 4, {chip.chips_on_one_host} and its multiples, as in '
        f'{key}:{2 * chip.chips_on_one_host}.'
      )
    chips = int(shape)
  else:
    if shape not in chip.shapes:
      raise ValueError(f'--topology={name}: not known; known are {known()}.')
    chips = math.prod(map(int, shape.split('x')))
  one_host = chips <= chip.chips_on_one_host
  hosts = 1 if one_host else chips // chip.chips_per_host
  return Topology(name=name, chip=chip, shape=shape, chips=chips, hosts=hosts)


def known() -> str:
  """All names, in words."""
  slices = [
    f'{name}:{"|".join(chip.shapes)}'
    for name, chip in CHIPS.items()
    if chip.shapes
  ]
  gpus = [name for name, chip in CHIPS.items() if chip.kind == 'gpu']
  return f'{", ".join(slices)}, and {"|".join(gpus)}:NUMBER of GPUs'


def _fills_hosts(gpus: int, chip: Chip) -> bool:
  one = chip.chips_on_one_host
  return gpus % one == 0 or (gpus < one and one % gpus == 0)
