"""The TPUs that kernels are compiled for: formats, rates, sizes.

Rates are per core, from the vendor's peaks and from what
`pltpu.get_tpu_info_for_chip` says: `macs` multiply-adds a cycle follow from
peak / 2 / clock, and agree with the bundles the compiler schedules (128 rows of
a 512 x 512 int8 product: 256 bundles on v5e, 64 on v6e). TPU7x's clock is not
published: 1.1 GHz is what its peak and its schedule imply together.
"""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
  """A TPU core.

  Attributes:
    topology: a small slice of it, as `topologies.get_topology_desc` names it.
    clock: cycles a second.
    bandwidth: bytes a second between its memory and the core.
    macs: multiply-adds a cycle of the matrix unit by format; a format that is
      not there is not native.
    vmem: bytes of vector memory.
    mxu: rows and columns of a matrix unit.
  """

  topology: str
  clock: float
  bandwidth: float
  macs: dict[str, int]
  vmem: int
  mxu: int


_MIB = 2**20
_V5 = {'bf16': 65536, 'int8': 131072, 'int4': 262144}
TARGETS = {
  'v5e': Target(
    topology='v5e:2x2',
    clock=1.5e9,
    bandwidth=0.82e12,
    macs=_V5,
    vmem=128 * _MIB,
    mxu=128,
  ),
  'v5p': Target(
    topology='v5p:2x2x1',
    clock=1.75e9,
    bandwidth=1.38e12,
    macs=_V5,
    vmem=64 * _MIB,
    mxu=128,
  ),
  'v6e': Target(
    topology='v6e:2x2',
    clock=1.75e9,
    bandwidth=1.64e12,
    macs={'bf16': 262144, 'int8': 524288, 'int4': 1048576},
    vmem=128 * _MIB,
    mxu=256,
  ),
  'tpu7x': Target(
    topology='tpu7x:2x2x1',
    clock=1.1e9,
    bandwidth=3.7e12,
    macs={'bf16': 524288, 'fp8': 1048576},
    vmem=64 * _MIB,
    mxu=256,
  ),
}
# jax.Device.device_kind of each.
_KINDS = {
  'TPU v5 lite': 'v5e',
  'TPU v5e': 'v5e',
  'TPU v5': 'v5p',
  'TPU v5p': 'v5p',
  'TPU v6 lite': 'v6e',
  'TPU v6e': 'v6e',
  'TPU7': 'tpu7x',
  'TPU7x': 'tpu7x',
}


def get(chip: str) -> Target:
  """The target called `chip`.

  Raises:
    ValueError: unknown chip.
  """
  if chip not in TARGETS:
    raise ValueError(
      f'targets: chip={chip!r}; allowed {sorted(TARGETS)}. Use one of them, or '
      'None for the chip at hand.'
    )
  return TARGETS[chip]


def chip_of_kind(kind: str) -> str:
  """The chip whose jax.Device.device_kind this is; '' for any other."""
  return _KINDS.get(kind, '')


def gpu_of_kind(kind: str) -> str:
  """'h100' or 'h200' by the jax.Device.device_kind of a GPU; '' for others."""
  return next((n for n in ('h100', 'h200') if n in kind.lower()), '')


def current() -> str:
  """The chip of the first device, or its platform where it has no name here."""
  device = jax.devices()[0]
  kind = device.device_kind
  return chip_of_kind(kind) or gpu_of_kind(kind) or device.platform
