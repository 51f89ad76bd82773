"""What the TPU compiler scheduled: a table of kernels, chips and blocks.

libtpu writes out the program of a kernel, bundle by bundle, one a cycle. From
it, per step of the grid,

  floor = max(bundles / clock, bytes / bandwidth, roofline)
  roofline = max(multiply-adds / the matrix unit's rate, bytes / bandwidth)

It sees no DMA stall and no overlap of loops: a static schedule, never a time.
A kernel meant to be bound by memory whose bundles outlast its bytes is a
defect.

  python -m pallas_kernels.static_schedule                # all cases
  python -m pallas_kernels.static_schedule --only=v6e/w8  # those so named
  python -m pallas_kernels.static_schedule --page_only    # the page anew

Rows are kept in static_schedule.json, beside what they were compiled with; a
case that is there is compiled again only with --again. Each run writes
docs/tpu_static_schedule.md, and the best block of each kernel, chip and number
of rows to tuned_tpu.json of its folder.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

from pallas_kernels import (
  attention_schedule,
  schedule_dump,
  targets,
  token_schedule,
)

# Cases that count their own bytes and multiply-adds.
OwnCase = attention_schedule.Case | token_schedule.Case
ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = pathlib.Path(__file__).with_name('static_schedule.json')
PAGE = ROOT / 'docs' / 'tpu_static_schedule.md'
_COLUMNS = (
  'bundles',
  'inner',
  'byte_cycles',
  'mxu_cycles',
  'mxu',
  'push',
  'valu',
  'spills',
  'bound',
  'floor_to_roofline',
)


_RATIOS = ('mxu', 'push', 'valu', 'floor_to_roofline')
_HEAD = """# Static schedule of the TPU kernels

Written by `python -m pallas_kernels.static_schedule`; do not edit. libtpu
{libtpu}.

What the TPU compiler scheduled for one step of a kernel's grid, whole K, on one
core. **No TPU ran this and no figure is a time**: a bundle is what a core
issues in a cycle if nothing stalls. Of the blocks that were tried the best is
listed; `pallas_kernels/static_schedule.json` has all.

- `bundles`: of the step, what starts and ends it included; `inner`: from the
  first that feeds the matrix unit to the last that takes a result.
- `byte_cycles`: cycles in which the chip's bandwidth moves the step's bytes;
  `mxu_cycles`: in which its peak rate does its multiply-adds.
- `mxu`: mxu_cycles / inner, at most 1. `push`: how full the inner bundles are
  of loads of weights into the matrix unit, which bounds few rows. `valu`: the
  same of the vector unit.
- `bound`: what outlasts the others. `floor_to_roofline`:
  max(bundles, byte_cycles, mxu_cycles) / max(mxu_cycles, byte_cycles).
- Of decode attention a step is a page of `tokens`, 8 key heads of 128, and
  `bundles` has what starts and ends a row in it; `inner` is a page of many.
- Names: `kv2g32/q4`: a cache of 2 bits with a scale per channel of 32 tokens,
  values in groups of 32 channels and norms, 4 queries a head; without `g` a
  scale per token and head; `kv16` is bfloat16. `w4g128z/m16`: weights of
  4 bits in groups of 128 with zero points, 16
  rows of bfloat16; `w4a8`, `w8f8`: x in int8 or fp8 codes, with `+` quantized
  inside; `nearest_center/d512t1`: width 512, one rank, and so on.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One kernel on one chip with one block.

  Attributes:
    chip: a key of targets.TARGETS.
    op: 'weight_only' or 'quantized'.
    M: rows of x of a step.
    bits, group_size, symmetric: of the weight.
    x_format: 'bf16'; 'int8' or 'float8_e4m3fn' for op='quantized'.
    block: fields of the op's Block but bm, as sorted pairs.
    dynamic: op='quantized': x comes as bf16 and is quantized in the kernel.
  """

  chip: str
  op: str
  M: int
  bits: int
  group_size: int = -1
  symmetric: bool = True
  x_format: str = 'bf16'
  block: tuple[tuple[str, Any], ...] = ()
  dynamic: bool = False

  @property
  def name(self) -> str:
    """Such as 'v5e/w4g128a/m16'; 'a' is asymmetric."""
    x = {'bf16': '', 'int8': 'a8', 'float8_e4m3fn': 'f8'}[self.x_format]
    group = f'g{self.group_size}' if self.group_size > 0 else ''
    zero = '' if self.symmetric else 'z'
    dynamic = '+' if self.dynamic else ''
    return f'{self.chip}/w{self.bits}{x}{group}{zero}{dynamic}/m{self.M}'


def step_bytes(case: Case | OwnCase) -> int:
  """Bytes that a step moves: weight, scales; x and y where it ends with K.

  A step of the compiled program is a whole column block: K is one block.
  """
  if isinstance(case, OwnCase):
    return case.nbytes
  block = dict(case.block)
  bk, bn = block['bk'], block['bn']
  groups = bk // case.group_size if case.group_size > 0 else 1
  weight = bk * bn * case.bits // 8
  return weight + groups * bn * (4 + (not case.symmetric)) + 2 * case.M * bn


def step_macs(case: Case | OwnCase) -> int:
  """Multiply-adds of a step."""
  if isinstance(case, OwnCase):
    return case.macs
  block = dict(case.block)
  return case.M * block['bk'] * block['bn']


def unit_of(case: Case | OwnCase) -> str:
  """Which unit of targets.Target.macs multiplies."""
  if isinstance(case, OwnCase):
    return 'bf16'
  return {'bf16': 'bf16', 'int8': 'int8'}.get(case.x_format, 'fp8')


def row_of(
  case: Case | OwnCase, counts: schedule_dump.Counts
) -> dict[str, Any]:
  """One row of the table, as JSON."""
  target = targets.get(case.chip)
  cycles = step_bytes(case) / target.bandwidth * target.clock
  least = step_macs(case) / target.macs[unit_of(case)]
  return {
    'case': case.name,
    'block': dict(case.block),
    'bundles': counts.bundles,
    'inner': counts.inner,
    'byte_cycles': round(cycles),
    'mxu_cycles': round(least),
    'mxu': round(min(1.0, least / counts.inner), 3),
    'push': round(counts.occupancy('MATPUSH'), 3),
    'valu': round(counts.occupancy('VALU'), 3),
    'spills': counts.spills,
    'bytes': step_bytes(case),
    'bound': _bound(counts.bundles, cycles, least),
    'floor_to_roofline': round(
      max(counts.bundles, cycles, least) / max(least, cycles), 3
    ),
  }


def _bound(bundles, byte_cycles, mxu_cycles):
  """What outlasts the others: 'bytes', 'mxu' or 'bundles'."""
  if byte_cycles >= max(bundles, mxu_cycles):
    return 'bytes'
  return 'mxu' if mxu_cycles >= bundles else 'bundles'


def compile_cases(
  cases: Sequence[Case | OwnCase],
) -> list[dict[str, Any]]:
  """Rows of the cases, {'case', 'block', 'error'} where one does not compile.

  One process compiles them all; where a case ends it, a new one goes on.
  """
  rows: list[dict[str, Any]] = []
  while len(rows) < len(cases):
    rest = cases[len(rows) :]
    before = len(rows)
    with tempfile.TemporaryDirectory() as folder:
      rows += _run_child(rest, folder)
    if len(rows) == before:  # The first of the rest ended the process.
      rows.append(_refused(rest[0], 'the compiler ended'))
  return rows


def _run_child(cases, folder):
  """Yields the rows that a process prints before it ends."""
  flags = (
    f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true '
    f'--xla_mosaic_dump_to={folder}/mosaic'
  )
  asked = [dataclasses.asdict(c) | {'name': c.name} for c in cases]
  child = subprocess.Popen(
    [sys.executable, '-m', 'pallas_kernels.static_schedule_child'],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
    cwd=ROOT,
    env=os.environ
    | {
      'LIBTPU_INIT_ARGS': flags,
      'JAX_PLATFORMS': 'cpu',
      'JAX_ENABLE_COMPILATION_CACHE': '0',
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    },
  )
  assert child.stdin is not None and child.stdout is not None
  with child.stdin as pipe:
    json.dump(asked, pipe)
  for case, line in zip(cases, child.stdout, strict=False):
    found = json.loads(line)
    found.pop('name')
    error = found.pop('error', None)
    if error is None:
      row = row_of(case, schedule_dump.Counts(**found))
    else:
      row = _refused(case, error)
    print(json.dumps(row), flush=True)
    yield row
  child.wait()


def _refused(case, words):
  return {'case': case.name, 'block': dict(case.block), 'error': words}


def best(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """Case: its row of least floor for a weight, without spills if it can be."""
  found: dict[str, dict[str, Any]] = {}
  for row in rows:
    if 'error' in row:
      continue
    kept = found.get(row['case'])
    if kept is None or _rank(row) < _rank(kept):
      found[row['case']] = row
  return found


def _rank(row):
  block = row['block']
  weights = block.get('tokens', 1) * block.get('bk', 1) * block.get('bn', 1)
  floor = max(row['bundles'], row['byte_cycles'], row['mxu_cycles'])
  return row['spills'] > 0, floor / weights, row['bundles'] / weights


def tuned(rows: Iterable[dict[str, Any]], op: str) -> dict[str, Any]:
  """'chip/w4g128/m16' -> block, as pick_block of an op reads it."""
  ops = {case.name: case.op for case in candidates()}
  return {
    name: row['block']
    for name, row in sorted(best(rows).items())
    if ops.get(name) == op
  }


def page(rows: Sequence[dict[str, Any]], libtpu: str) -> str:
  """docs/tpu_static_schedule.md."""
  lines = _HEAD.format(libtpu=libtpu).splitlines()
  for chip in targets.TARGETS:
    mine = {k: v for k, v in best(rows).items() if k.startswith(f'{chip}/')}
    if not mine:
      continue
    head = ['kernel', 'block', *_COLUMNS]
    lines += ['', f'## {chip}', '', _line(head), _line(['---'] * len(head))]
    for name, row in sorted(mine.items()):
      block = ' '.join(f'{k}={v}' for k, v in sorted(row['block'].items()) if v)
      cells = [f'{row[c]:.2f}' if c in _RATIOS else row[c] for c in _COLUMNS]
      lines.append(_line([f'`{name.partition("/")[2]}`', block, *cells]))
  refused = [row for row in rows if 'error' in row]
  if refused:
    lines += ['', '## What the compiler refused', '']
    lines += [
      f'- `{row["case"]}` {json.dumps(row["block"])}: {row["error"]}'
      for row in refused
    ]
  return '\n'.join(lines) + '\n'


def _line(cells):
  return '| ' + ' | '.join(str(cell) for cell in cells) + ' |'


def candidates(only: str = '') -> list[Case | OwnCase]:
  """All cases whose name contains `only`: what the search tries."""
  return [case for case in _cases() if only in case.name]


def _cases():
  for chip in targets.TARGETS:
    for bits, group_size, symmetric in (
      (8, -1, True),
      (4, 128, True),
      (4, 128, False),
      (4, 64, True),
      (4, 32, True),
      (4, -1, True),
      (2, 128, True),
      (1, 128, True),
    ):
      for M, blocks in _weight_only_blocks(chip, bits, group_size):
        for block in blocks:
          yield Case(
            chip=chip,
            op='weight_only',
            M=M,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            block=tuple(sorted(block.items())),
          )
    yield from _quantized_cases(chip)
    yield from token_schedule.cases(chip)
    yield from attention_schedule.cases(chip)


def _weight_only_blocks(chip, bits, group_size):
  """Yields (M, blocks): few rows by unit, many by sub-tile."""
  forms = {1: ('words',), 8: ('native',)}.get(bits, ('words', 'native'))
  if bits == 4 and chip in ('v6e', 'tpu7x'):
    forms = ('native',)  # The words are slower there at every block tried.
  for M in (16, 64):
    if M == 64 and (bits, group_size) not in ((8, -1), (4, 128)):
      continue
    bk = 4096 if bits == 8 else 8192
    yield (
      M,
      [
        {'bk': bk, 'bn': 512, 'sub_n': n, 'unpack': form, 'body': 'post'}
        for form in forms
        for n in ((0,) if M == 16 else (256,))
      ],
    )
  if (bits, group_size) in ((8, -1), (4, 128), (4, -1)):
    yield (
      512,
      [
        {'bk': 2048, 'bn': 512, 'sub_k': k, 'sub_n': 256, 'body': 'pre'}
        for k in ((256, 1024) if bits == 8 else (256,))
      ],
    )


def _quantized_cases(chip):
  native = targets.get(chip).macs
  formats = [('float8_e4m3fn', 8, -1)] if 'fp8' in native else []
  if 'int8' in native:
    formats = [('int8', 8, -1), ('int8', 4, -1), ('int8', 4, 128)]
  for x_format, bits, group_size in formats:
    for M in (32, 512):
      shapes = [(4096, 512, 0, 0)]
      if M > 32:
        deep = 2048 if chip in ('v5e', 'v5p') else 4096
        tiles = ((128, 256), (0, 256)) if bits == 8 else ((128, 256),)
        shapes = [(deep, 512, m, n) for m, n in tiles]
      for bk, bn, m, n in shapes:
        yield Case(
          chip=chip,
          op='quantized',
          M=M,
          bits=bits,
          group_size=group_size,
          x_format=x_format,
          block=(('bk', bk), ('bn', bn), ('sub_m', m), ('sub_n', n)),
        )


def main(argv: Sequence[str] | None = None) -> None:
  """Compiles what is asked for and writes table, page and blocks."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--only', default='', help='part of the names of cases')
  parser.add_argument('--again', action='store_true', help='compile kept cases')
  parser.add_argument(
    '--page_only', action='store_true', help='compile nothing'
  )
  args = parser.parse_args(argv)
  stored: dict[str, Any] = {'rows': []}
  if DATA.exists():
    stored = json.loads(DATA.read_text(encoding='utf-8'))
  rows = {_row_key(row): row for row in stored['rows']}
  if not args.page_only:
    wanted = [
      case
      for case in candidates(args.only)
      if args.again
      or _row_key({'case': case.name, 'block': dict(case.block)}) not in rows
    ]
    stored['libtpu'] = importlib.metadata.version('libtpu')
    for case, row in zip(wanted, compile_cases(wanted), strict=True):
      del case
      rows[_row_key(row)] = row
  stored['rows'] = [rows[key] for key in sorted(rows)]
  _write_json(DATA, stored)
  PAGE.write_text(page(stored['rows'], stored['libtpu']), encoding='utf-8')
  for op, folder in (
    ('weight_only', 'weight_only_matmul'),
    ('quantized', 'quantized_matmul'),
  ):
    path = DATA.with_name(folder) / 'tuned_tpu.json'
    _write_json(path, {'blocks': tuned(stored['rows'], op)})


def _row_key(row):
  return f'{row["case"]} {json.dumps(row["block"], sort_keys=True)}'


def _write_json(path, value):
  path.write_text(json.dumps(value, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
  main()
