"""Topologies by name: their chips, their devices, and the meshes they allow.

  v5e:16x16   a TPU slice: libtpu compiles for it on any x86 Linux host
  h100:8      so many GPUs, or cpu:8 CPUs: XLA's CPU backend compiles for as
              many simulated devices, whose temporaries are not a GPU's

A chip of TPU7x is two devices, each with half of everything.
"""

import dataclasses
import functools
import importlib.util
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import psutil
from jax.experimental import topologies
from jax.sharding import AbstractMesh

from jaxq.numerics import chip_specs

_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = (
  '2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8',
)  # fmt: skip
_COUNTS = tuple(str(2**i) for i in range(10))
# The topologies that are listed and searched, small ones first.
KNOWN: dict[str, tuple[str, ...]] = {
  'v4': _CUBES,
  'v5e': _FLAT,
  'v5p': _CUBES,
  'v6e': _FLAT,
  'tpu7x': _CUBES,
  'a100': _COUNTS,
  'h100': _COUNTS,
  'h200': _COUNTS,
  't4': _COUNTS,
  'cpu': _COUNTS,
}
TPUS = ('v4', 'v5e', 'v5p', 'v6e', 'tpu7x')
_DEVICES_PER_CHIP = {'tpu7x': 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
  """What a name says, without opening anything.

  chip: of KNOWN.
  size: as in the name: '16x16', '8'.
  """

  chip: str
  size: str

  @property
  def name(self) -> str:
    """'v5e:16x16'."""
    return f'{self.chip}:{self.size}'

  @property
  def is_tpu(self) -> bool:
    """Whether libtpu compiles for it."""
    return self.chip in TPUS

  @property
  def num_chips(self) -> int:
    """256 for 16x16."""
    return math.prod(int(n) for n in self.size.split('x'))

  @property
  def num_devices(self) -> int:
    """What JAX sees: two devices per chip of TPU7x, else one."""
    return self.num_chips * _DEVICES_PER_CHIP.get(self.chip, 1)

  @property
  def compiler(self) -> str:
    """What compiles for it, in words."""
    if self.is_tpu:
      return 'the TPU compiler of libtpu'
    text = f"XLA's CPU backend for {self.num_devices} simulated devices"
    if self.chip != 'cpu':
      text += ", whose temporaries are not a GPU's"
    return text

  @property
  def device(self) -> chip_specs.ChipSpec | None:
    """Peak figures of one device; None of a CPU."""
    if self.chip == 'cpu':
      return None
    chip, parts = chip_specs.of(self.chip), _DEVICES_PER_CHIP.get(self.chip, 1)
    return chip_specs.ChipSpec(
      memory=chip.memory / parts,
      bandwidth=chip.bandwidth / parts,
      peak={name: peak / parts for name, peak in chip.peak.items()},
      interconnect=chip.interconnect / parts,
    )

  @property
  def memory(self) -> float:
    """Bytes of one device; simulated ones share this host's memory."""
    if self.device is not None:
      return self.device.memory
    return psutil.virtual_memory().total / self.num_devices


def parse(name: str) -> Topology:
  """The topology of a name.

  Raises:
    ValueError: unreadable, or of an unknown chip; the message lists the known.
  """
  match = re.fullmatch(r'(\w+):([1-9]\d*(?:x[1-9]\d*)*)', name.strip().lower())
  if match is None or match[1] not in KNOWN:
    raise ValueError(unknown(name))
  chip, size = match.groups()
  dims = size.count('x') + 1
  if dims != KNOWN[chip][0].count('x') + 1:
    raise ValueError(unknown(name))
  return Topology(chip=chip, size=size)


def unknown(name: str) -> str:
  """The message for a topology that is not known."""
  listed = [
    f'{chip}:{{{",".join(sizes)}}}'
    for chip, sizes in KNOWN.items()
    if chip in TPUS
  ]
  others = [f'{chip}:COUNT' for chip in sorted(set(KNOWN) - set(TPUS))]
  return (
    f'--topology={name} is not known; known are {", ".join(listed)} and '
    f'{", ".join(others)}. Give one of them, as in --topology=v5e:4x4.'
  )


@functools.cache
def devices(topology: Topology) -> tuple[Any, ...]:
  """Devices to compile for; none of them need be there.

  Raises:
    ValueError: libtpu knows no such topology, or is not installed; or this
      process has not so many simulated devices.
  """
  if not topology.is_tpu:
    found = jax.devices('cpu')
    if len(found) < topology.num_devices:
      raise ValueError(
        f'--topology={topology.name} needs {topology.num_devices} simulated '
        f'devices and this process has {len(found)}; set XLA_FLAGS='
        f'--xla_force_host_platform_device_count={topology.num_devices}.'
      )
    return tuple(found[: topology.num_devices])
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError(
      f'--topology={topology.name} is planned with the compiler of libtpu, '
      "which is not installed; install it with pip install 'jaxq[tpu-aot]'."
    )
  try:
    found = topologies.get_topology_desc(topology.name, platform='tpu').devices
  except Exception as e:  # Of several kinds.
    if topology.size in KNOWN[topology.chip]:
      raise ValueError(
        f'--topology={topology.name}: libtpu does not give it '
        f'({str(e).splitlines()[0][:200]}); see that no other process holds '
        'libtpu, or use another version of it.'
      ) from e
    raise ValueError(unknown(topology.name)) from e
  return tuple(found)


def meshes(num_devices: int) -> Iterator[dict[str, int]]:
  """Every {'data': d, 'model': m} with d * m devices, small m first."""
  for model in range(1, num_devices + 1):
    if num_devices % model == 0:
      yield {'data': num_devices // model, 'model': model}


def abstract_mesh(shape: Mapping[str, int]) -> AbstractMesh:
  """A mesh without devices, for what only asks for its shape."""
  return AbstractMesh(tuple(shape.values()), tuple(shape))


def candidates(asked: Topology) -> list[Topology]:
  """Topologies to look through for a smaller or larger one.

  Those of the same chip first, then other chips of its kind, each by number of
  chips.
  """
  kind = TPUS if asked.is_tpu else tuple(set(KNOWN) - set(TPUS) - {'cpu'})
  own = [Topology(chip=asked.chip, size=size) for size in KNOWN[asked.chip]]
  others = [
    Topology(chip=chip, size=size)
    for chip in sorted(kind)
    for size in KNOWN[chip]
    if chip != asked.chip
  ]
  if asked.chip == 'cpu':
    others = []
  return own + sorted(others, key=lambda t: (t.num_chips, t.name))
