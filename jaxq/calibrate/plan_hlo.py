"""What a compiled program does on one device, read from its HLO text.

XLA's own cost analysis counts the body of a loop once, and a model is a loop
over its layers. Here every computation counts as often as it runs: a loop's
body as often as the loop turns, which XLA writes beside loops whose number of
turns it knows (else its condition is read, else it counts once). A collective
that TPU7x hands to its SparseCores stands in a computation of its own, which a
custom call names.

Counted are multiply-adds, twice, of matmuls, convolutions (as which TPUs write
matmuls) and factorizations, by the format of their operands; elementwise work
is not. Branches of a conditional count nothing: what is counted is a floor.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from jax.sharding import Mesh

from jaxq.parallel import collectives as collectives_lib

_HEAD = re.compile(r'^(ENTRY\s+)?%?([\w.-]+)\s+\(.*->.*\{\s*$')
_LINE = re.compile(r'^\s+(?:ROOT\s+)?%?([\w.-]+) = (.*)$')
_OPCODE = re.compile(r'(?:^|\s)([a-z][a-z0-9-]*)\(')
_SHAPE = re.compile(r'\b([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]')
_CALLED = re.compile(r'\b(body|condition|calls|to_apply)=%?([\w.-]+)')
_LISTED = re.compile(r'\bcalled_computations=\{([^}]*)\}')
_TURNS = re.compile(r'known_trip_count\W+n\W+(\d+)')
_FORMATS = {'s4': 'int4', 'u4': 'int4', 's8': 'int8', 'u8': 'int8'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted:
  """A collective, and how often it runs in one call of the program.

  Its nbytes are those of all its operands or of all its results, whichever are
  more.
  """

  collective: collectives_lib.Collective
  count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """What one call of a program does on one device.

  flops: by format of the operands, as in chip_specs.ChipSpec.peak.
  collectives: what crosses devices.
  unknown_loops: loops that were counted as if they turned once.
  """

  flops: Mapping[str, float]
  collectives: tuple[Counted, ...]
  unknown_loops: int

  @property
  def total_flops(self) -> float:
    """Of all formats."""
    return sum(self.flops.values())

  @property
  def collective_bytes(self) -> int:
    """Of each, times its count."""
    return sum(c.collective.nbytes * c.count for c in self.collectives)


@dataclasses.dataclass(frozen=True)
class _Instruction:
  """opcode(operands), attributes; `text` is the whole line."""

  name: str
  shapes: tuple[tuple[str, tuple[int, ...]], ...]
  opcode: str
  operands: tuple[str, ...]
  text: str


def work(text: str, mesh: Mesh) -> Work:
  """Reads the text of an optimized HLO module for the devices of `mesh`.

  Raises:
    ValueError: it has no entry, or a collective whose groups cannot be read.
  """
  computations, entry = _parse(text)
  counts, unknown = _counts(computations, entry)
  flops: dict[str, float] = {}
  for name, instructions in computations.items():
    known = {i.name: i for i in instructions}
    for instruction in instructions if counts[name] else ():
      found = _flops(instruction, known)
      if found:
        format_ = _format(instruction, known)
        flops[format_] = flops.get(format_, 0.0) + found * counts[name]
  return Work(
    flops=flops,
    collectives=tuple(_collectives(computations, counts, mesh)),
    unknown_loops=unknown,
  )


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  """Computations by name, callees before callers, and the entry's name."""
  computations: dict[str, list[_Instruction]] = {}
  entry = name = ''
  for line in text.splitlines():
    if head := _HEAD.match(line):
      name = head[2]
      computations[name] = []
      entry = name if head[1] else entry
    elif name and (found := _LINE.match(line)):
      computations[name].append(_instruction(found[1], found[2], line))
  if not entry:
    raise ValueError(
      f'plan_hlo.work: no ENTRY in a text of {len(text)} characters; the text '
      'of an optimized HLO module is needed. Give it compiled.as_text().'
    )
  return computations, entry


def _instruction(name: str, rest: str, line: str) -> _Instruction:
  opcode = _OPCODE.search(rest)
  if opcode is None:
    return _Instruction(name, (), '', (), line)
  shapes = tuple(
    (dtype, tuple(int(n) for n in dims.split(',') if n))
    for dtype, dims in _SHAPE.findall(rest[: opcode.start()])
  )
  inside = rest[opcode.end() :].split('), ')[0].rstrip(')')
  operands = tuple(
    part.split()[-1].lstrip('%') for part in inside.split(', ') if part.strip()
  )
  return _Instruction(name, shapes, opcode[1], operands, line)


def _counts(
  computations: Mapping[str, list[_Instruction]], entry: str
) -> tuple[dict[str, int], int]:
  """How often each computation runs, and the number of unknown loops."""
  counts = dict.fromkeys(computations, 0)
  counts[entry] = 1
  unknown = 0
  for name in reversed(list(computations)):  # Callers stand behind callees.
    for instruction in computations[name] if counts[name] else ():
      if instruction.opcode.endswith(('-done', '-update')):
        continue  # They name what their start has called.
      turns = 1
      if instruction.opcode == 'while':
        found = _turns(instruction, computations)
        unknown += found is None
        turns = 1 if found is None else found
      for callee in _callees(instruction):
        if callee in counts:
          counts[callee] += counts[name] * turns
  return counts, unknown


def _turns(
  loop: _Instruction, computations: Mapping[str, list[_Instruction]]
) -> int | None:
  """How often a loop turns; None if it cannot be told."""
  if known := _TURNS.search(loop.text):
    return int(known[1])
  condition = dict(_CALLED.findall(loop.text)).get('condition', '')
  text = '\n'.join(i.text for i in _reached(condition, computations))
  limits = re.findall(r's32\[\]\S* constant\((\d+)\)', text)
  compared = re.findall(r' compare\(.*direction=(\w+)', text)
  if len(limits) == 1 and compared == ['LT']:
    return int(limits[0])  # for i in range(limit), as JAX writes its loops.
  return None


def _reached(
  name: str, computations: Mapping[str, list[_Instruction]]
) -> Iterator[_Instruction]:
  """The instructions of a computation and of those it calls."""
  for instruction in computations.get(name, ()):
    yield instruction
    for callee in _callees(instruction):
      yield from _reached(callee, computations)


def _callees(instruction: _Instruction) -> Iterator[str]:
  """Names of the computations that an instruction runs."""
  for _, name in _CALLED.findall(instruction.text):
    yield name
  for names in _LISTED.findall(instruction.text):
    yield from re.findall(r'[\w.-]+', names)


def _collectives(
  computations: Mapping[str, list[_Instruction]],
  counts: Mapping[str, int],
  mesh: Mesh,
) -> Iterator[Counted]:
  """Every collective, once per channel, with the largest of its counts."""
  chosen: dict[str, tuple[int, int, str]] = {}
  for name, instructions in computations.items():
    known = {i.name: i for i in instructions}
    for instruction in instructions:
      kind = instruction.opcode.removesuffix('-start')
      if kind not in collectives_lib.KINDS or not counts[name]:
        continue
      channel = re.search(r'channel_id=(\d+)', instruction.text)
      key = channel[1] if channel else f'{name} {instruction.name}'
      if counts[name] > chosen.get(key, (0,))[0]:
        size = _moved_bytes(instruction, known)
        chosen[key] = (counts[name], size, instruction.text)
  for count, size, line in chosen.values():
    for collective in collectives_lib.collectives(line, mesh):
      whole = dataclasses.replace(collective, nbytes=size)
      yield Counted(collective=whole, count=count)


def _moved_bytes(
  instruction: _Instruction, known: Mapping[str, _Instruction]
) -> int:
  """Bytes of all operands or of all results, whichever are more.

  XLA merges collectives into one of several arrays, which all count.
  """
  operands = sum(
    _nbytes(_shapes(instruction, known, i))
    for i in range(len(instruction.operands))
  )
  if instruction.opcode == 'collective-permute-start' and operands:
    return operands  # It gives them on, and numbers of its own.
  results = _nbytes(instruction.shapes)
  # Other starts give them on too, but for that of all-reduce.
  if instruction.opcode.endswith('-start') and results > operands:
    results -= operands
  return max(operands, results)


def _nbytes(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> int:
  """Of arrays; ('bf16', (4, 8)) has 64."""
  total = 0
  for dtype, dims in shapes:
    bits = re.search(r'\d+', dtype)
    total += math.prod(dims) * (int(bits[0]) if bits else 8) // 8
  return total


def _flops(
  instruction: _Instruction, known: Mapping[str, _Instruction]
) -> float:
  """Twice the multiply-adds of an instruction; 0 of all but a few kinds."""
  opcode, text = instruction.opcode, instruction.text
  if not instruction.shapes:
    return 0.0
  out = instruction.shapes[0][1]
  if opcode == 'custom-call':
    target = re.search(r'custom_call_target="([^"]*)"', text)
    kind = target[1].lower() if target else ''
    if 'potrf' in kind or 'cholesky' in kind:
      opcode = 'cholesky'
    elif 'trsm' in kind or 'triangular' in kind:
      opcode = 'triangular-solve'
  if opcode == 'cholesky':
    return math.prod(out) * out[-1] / 3
  if opcode not in ('convolution', 'dot', 'triangular-solve'):
    return 0.0
  left = _dims(instruction, known, 0)
  if opcode == 'triangular-solve':
    return float(math.prod(out) * left[-1])
  if opcode == 'dot':
    contracted = _numbers(r'lhs_contracting_dims=\{([\d,]*)\}', text)
    return 2.0 * math.prod(out) * math.prod(left[d] for d in contracted)
  return _convolution_flops(out, left, _dims(instruction, known, 1), text)


def _convolution_flops(
  out: tuple[int, ...],
  left: tuple[int, ...],
  right: tuple[int, ...],
  text: str,
) -> float:
  """Twice the products of a convolution that do not meet padding or holes."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', text)
  if labels is None or not left or not right:
    return 0.0
  lhs, rhs, result = labels.groups()
  pairs = 1
  for d in sorted(c for c in lhs if c.isdigit()):
    i = int(d)
    pairs *= _valid_pairs(
      left[lhs.index(d)],
      right[rhs.index(d)],
      out[result.index(d)],
      stride=_window(text, 'stride', i, 1),
      pad=_window(text, 'pad', i, 0),
      dilate=_window(text, 'lhs_dilate', i, 1),
      spread=_window(text, 'rhs_dilate', i, 1),
    )
  groups = _numbers(r'batch_group_count=(\d+)', text) or [1]
  batch = left[lhs.index('b')] // groups[0]
  return 2.0 * batch * right[rhs.index('i')] * right[rhs.index('o')] * pairs


def _valid_pairs(
  size: int,
  window: int,
  out: int,
  *,
  stride: int,
  pad: int,
  dilate: int,
  spread: int,
) -> int:
  """Pairs (output place, window place) along one axis that meet an input."""
  places = np.arange(out)[:, None] * stride + np.arange(window) * spread - pad
  inside = (places >= 0) & (places <= (size - 1) * dilate)
  return int(np.sum(inside & (places % dilate == 0)))


def _window(text: str, name: str, axis: int, default: int) -> int:
  """A number of window={size=3x3 pad=0_1x1_1 ...}; the low one of a pad."""
  found = re.search(rf'window=\{{[^}}]*\b{name}=([\dx_-]+)', text)
  if found is None:
    return default
  return int(found[1].split('x')[axis].split('_')[0])


def _dims(
  instruction: _Instruction, known: Mapping[str, _Instruction], i: int
) -> tuple[int, ...]:
  """Shape of the i-th operand; () if it cannot be told."""
  shapes = _shapes(instruction, known, i)
  return shapes[0][1] if shapes else ()


def _shapes(instruction, known, i):
  if i >= len(instruction.operands):
    return ()
  operand = known.get(instruction.operands[i])
  return operand.shapes if operand else ()


def _format(
  instruction: _Instruction, known: Mapping[str, _Instruction]
) -> str:
  """The format of both operands; 'bf16' if they differ or are floats.

  Floats of 32 bits are multiplied in one pass of bfloat16 at least.
  """
  formats = set()
  for i in range(2):
    for dtype, _ in _shapes(instruction, known, i)[:1]:
      is_fp8 = dtype.startswith('f8')
      formats.add('fp8' if is_fp8 else _FORMATS.get(dtype, 'bf16'))
  return formats.pop() if len(formats) == 1 else 'bf16'


def _numbers(pattern: str, text: str) -> list[int]:
  found = re.search(pattern, text)
  return [int(n) for n in found[1].split(',') if n] if found else []
