"""Reads what libtpu writes of a scheduled program.

Among the files of `--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true`,
`*-<kernel>*-final_hlo-static-per-bundle-utilization.txt` has a line of
capacities of the units and then one of uses for each bundle, in the order of
the program.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

UNITS = (
  'MATMUL',
  'MATPUSH',
  'XLU',
  'VALU',
  'VPOP',
  'EUP',
  'VLOAD',
  'VLOAD:FILL',
  'VSTORE',
  'VSTORE:SPILL',
  'SALU',
)
_SUFFIX = 'final_hlo-static-per-bundle-utilization.txt'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
  """A program's bundles.

  Attributes:
    bundles: all of them.
    inner: those from the first that feeds the matrix unit to the last that
      takes a result from it (or from the cross-lane unit).
    used: unit of UNITS: uses in all bundles.
    capacity: unit of UNITS: uses that one bundle can hold.
  """

  bundles: int
  inner: int
  used: dict[str, int]
  capacity: dict[str, int]

  def occupancy(self, unit: str) -> float:
    """Uses of a unit, as a part of what the inner bundles can hold."""
    return self.used[unit] / (self.capacity[unit] * self.inner)

  @property
  def spills(self) -> int:
    """Stores of registers that the program ran out of."""
    return self.used['VSTORE:SPILL']


def read(folder: pathlib.Path, kernel: str) -> Counts:
  """Counts of the one program in `folder` whose name starts with `kernel`.

  Raises:
    ValueError: there is none, or more than one.
  """
  found = sorted(folder.glob(f'*-{kernel}*-{_SUFFIX}'))
  if len(found) != 1:
    raise ValueError(
      f'schedule_dump: {len(found)} programs named {kernel}* in {folder}; it '
      'takes one. Dump one compile to an empty folder.'
    )
  return parse(found[0].read_text(encoding='utf-8'))


def parse(text: str) -> Counts:
  """Counts of the text of a utilization file.

  Raises:
    ValueError: it is not of the form this was written for.
  """
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  names = tuple(name.strip() for name in _after(lines, 1).split(','))
  if names != UNITS:
    raise ValueError(
      f'schedule_dump: units {names}; allowed {UNITS}. This libtpu writes '
      'another form: adapt UNITS to it.'
    )
  capacity = dict(zip(UNITS, _numbers(_after(lines, 2)), strict=True))
  bundles = [_numbers(line) for line in lines[4:]]
  fed = [i for i, uses in enumerate(bundles) if uses[0] or uses[1]]
  took = [i for i, uses in enumerate(bundles) if uses[4]]
  totals = [sum(column) for column in zip(*bundles, strict=True)]
  return Counts(
    bundles=len(bundles),
    inner=max(fed + took) - fed[0] + 1 if fed else len(bundles),
    used=dict(zip(UNITS, totals, strict=True)),
    capacity=capacity,
  )


def _after(lines: Sequence[str], i: int) -> str:
  if len(lines) < 5:
    raise ValueError(
      f'schedule_dump: {len(lines)} lines; it needs capacities and at least '
      'one bundle. Dump with --xla_jf_dump_llo_text=true.'
    )
  return lines[i]


def _numbers(line: str) -> list[int]:
  return [int(word) for word in line.split()]
