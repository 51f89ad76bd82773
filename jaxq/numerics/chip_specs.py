"""What each chip holds and how fast it can be at most: the vendors' figures.

These are peaks: a time made from them is a lower bound and nothing else. A
gigabyte is 1e9 bytes throughout. Where a vendor counts a TPU's memory in GiB it
is read as GB, which leaves 4 to 7 % for what the runtime keeps to itself.

Sources, read in 2026:

  v4, v5e, v5p, v6e, tpu7x   https://cloud.google.com/tpu/docs/<chip>: memory,
    its bandwidth, peaks for bf16, int8 and fp8, and the bidirectional ICI
    bandwidth of a chip, of which half is `interconnect`. v4's, which that page
    leaves out: 6 links of 50 GB/s (Jouppi et al., 2023, arXiv 2304.01433).
    int4 is twice int8, as `pltpu.get_tpu_info` has it.
  a100, h100, h200, t4       NVIDIA's data sheets of the A100 80GB SXM, H100
    SXM, H200 SXM and T4, without sparsity; `interconnect` is half of NVLink's
    total (of PCIe's for T4). Between hosts it is less, so that times that count
    it stay lower bounds.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChipSpec:
  """Peak figures of one chip.

  memory: bytes of its main memory.
  bandwidth: bytes per second to and from it.
  peak: multiply-adds per second, twice, by format of the operands: 'bf16'
    always, and of 'fp8', 'int8', 'int4' those that are faster.
  interconnect: bytes per second that it can send to other chips, over all of
    its links.
  """

  memory: float
  bandwidth: float
  peak: Mapping[str, float]
  interconnect: float


_SPECS = {
  'a100': ChipSpec(
    memory=80e9,
    bandwidth=2.039e12,
    peak={'bf16': 312e12, 'int8': 624e12},
    interconnect=300e9,
  ),
  'h100': ChipSpec(
    memory=80e9,
    bandwidth=3.35e12,
    peak={'bf16': 989.4e12, 'fp8': 1978.9e12, 'int8': 1978.9e12},
    interconnect=450e9,
  ),
  'h200': ChipSpec(
    memory=141e9,
    bandwidth=4.8e12,
    peak={'bf16': 989.4e12, 'fp8': 1978.9e12, 'int8': 1978.9e12},
    interconnect=450e9,
  ),
  't4': ChipSpec(
    memory=16e9,
    bandwidth=320e9,
    peak={'bf16': 65e12, 'int8': 130e12},  # float16: it has no bfloat16.
    interconnect=16e9,
  ),
  'tpu7x': ChipSpec(
    memory=192e9,
    bandwidth=7380e9,
    peak={'bf16': 2307e12, 'fp8': 4614e12},
    interconnect=600e9,
  ),
  'v4': ChipSpec(
    memory=32e9,
    bandwidth=1200e9,
    peak={'bf16': 275e12},
    interconnect=300e9,
  ),
  'v5e': ChipSpec(
    memory=16e9,
    bandwidth=819e9,
    peak={'bf16': 197e12, 'int8': 393e12, 'int4': 786e12},
    interconnect=200e9,
  ),
  'v5p': ChipSpec(
    memory=95e9,
    bandwidth=2765e9,
    peak={'bf16': 459e12, 'int8': 918e12, 'int4': 1836e12},
    interconnect=600e9,
  ),
  'v6e': ChipSpec(
    memory=32e9,
    bandwidth=1638e9,
    peak={'bf16': 918e12, 'int8': 1836e12, 'int4': 3672e12},
    interconnect=400e9,
  ),
}


def chips() -> tuple[str, ...]:
  """Names of the chips with figures, sorted."""
  return tuple(sorted(_SPECS))


def of(chip: str) -> ChipSpec:
  """The figures of a chip.

  Args:
    chip: 'v5e', 'h100', ...; as in chips.native_formats.

  Raises:
    ValueError: there are none for it.
  """
  if chip not in _SPECS:
    raise ValueError(
      f'chip_specs.of: chip={chip!r}; allowed {sorted(_SPECS)}. Use one of '
      'them, or add its figures and their source to the table.'
    )
  return _SPECS[chip]
