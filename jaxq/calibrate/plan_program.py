"""One compiled program: its bytes, its work and a lower bound on its time.

  bytes        what XLA's memory_analysis says of one device: arguments, outputs
               that are not written over arguments, temporaries
  work         plan_hlo: flops, and what crosses devices
  lower bound  max(flops / peak, bytes / bandwidth, sent / interconnect)

The bound counts arguments and outputs once, whatever the program moves besides,
and lets arithmetic, memory and links work at their peaks side by side. Real
time is longer. A program that does not fit is refused by the TPU's compiler,
which then says what it would take: that is read from its message.
"""

import concurrent.futures
import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jaxq.calibrate import plan_hlo
from jaxq.numerics import chip_specs

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
_FUSION = {'xla_tpu_enable_async_collective_fusion': 'false'}
_OFFLOAD = {  # Collectives of TPU7x run on its SparseCores.
  f'xla_tpu_enable_sparse_core_collective_offload_{kind}': 'false'
  for kind in ('all_gather', 'all_reduce', 'reduce_scatter')
}
# Options under which a jaxlib reads what a newer libtpu made; a libtpu that
# does not know one of them refuses it at once.
_READABLE: tuple[dict[str, str | bool], ...] = (
  {**_FUSION, **_OFFLOAD},
  {**_FUSION},
  {'xla_tpu_enable_latency_hiding_scheduler': 'false'},
)
_FASTER = {'int4': ('int4', 'int8'), 'int8': ('int8',), 'fp8': ('fp8',)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """What a compiler said of one program, in bytes of one device.

  arguments, temporaries: as memory_analysis has them.
  outputs: less those written over arguments.
  work: None of a program that was refused or that cannot be read.
  refused: whether the compiler refused it for its memory.
  """

  arguments: int
  outputs: int
  temporaries: int
  work: plan_hlo.Work | None
  refused: bool = False

  @property
  def total(self) -> int:
    """All bytes it needs on a device."""
    return self.arguments + self.outputs + self.temporaries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
  """A lower bound on the seconds of one call, and what sets it."""

  compute: float
  memory: float
  links: float

  @property
  def seconds(self) -> float:
    """The largest of the three."""
    return max(self.compute, self.memory, self.links)

  @property
  def by(self) -> str:
    """Which one that is."""
    names = ('compute', 'memory', 'links')
    return max(names, key=lambda name: getattr(self, name))


def compile_all(
  lowered: Mapping[str, jax.stages.Lowered],
  arguments: Mapping[str, int],
  mesh: Mesh,
) -> dict[str, Program]:
  """Compiles programs for the devices of `mesh`, some side by side.

  Args:
    lowered: name -> program.
    arguments: name -> bytes of its arguments on a device, for programs that
      the compiler refuses.
    mesh: whose devices they are for.

  Raises:
    jax.errors.JaxRuntimeError: a compiler's error that is not about memory.
  """
  workers = max(1, min(4, os.cpu_count() or 1, len(lowered)))
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    made = pool.map(
      lambda name: measure(lowered[name], arguments[name], mesh), lowered
    )
    return dict(zip(lowered, made, strict=True))


def measure(lowered: jax.stages.Lowered, arguments: int, mesh: Mesh) -> Program:
  """Compiles one program; the arguments are those of `compile_all`.

  Raises:
    jax.errors.JaxRuntimeError: a compiler's error that is not about memory.
  """
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e) or 'hbm' not in str(e):
      raise
    return Program(
      arguments=arguments,
      outputs=0,
      temporaries=max(0, refused_bytes(str(e), arguments) - arguments),
      work=None,
      refused=True,
    )
  memory: Any = compiled.memory_analysis()
  return Program(
    arguments=memory.argument_size_in_bytes,
    outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    work=_work(lowered, compiled, mesh),
  )


def _work(
  lowered: jax.stages.Lowered, compiled: jax.stages.Compiled, mesh: Mesh
) -> plan_hlo.Work | None:
  """What the program does; None if this jaxlib cannot read it.

  libtpu may be newer than jaxlib and use instructions that it does not know. A
  program compiled without them does the same work in another order.
  """
  for options in (None, *_READABLE):
    try:
      if options is not None:
        compiled = lowered.compile(compiler_options=dict(options))
      return plan_hlo.work(compiled.as_text() or '', mesh)
    except jax.errors.JaxRuntimeError:
      continue
  return None


def refused_bytes(message: str, arguments: int) -> int:
  """What a program that the TPU's compiler refused would take.

  Args:
    message: of its RESOURCE_EXHAUSTED error, whose table of the memory it
      would use has lines 'program 21.95G' and 'arguments 3.1G'.
    arguments: bytes of the program's arguments, for a table without them.

  Raises:
    ValueError: there is no figure in it.
  """
  found = {
    name: float(number) * _UNITS[unit]
    for name, number, unit in re.findall(
      r'(program|arguments|Used)\s+([\d.]+)([KMGT]?)B?\b', message
    )
  }
  if 'program' in found:
    return int(found['program'] + (found.get('arguments') or arguments))
  if 'Used' in found:
    return int(found['Used']) + arguments
  raise ValueError(
    f'plan_program.refused_bytes: {message[:200]!r}; a line such as '
    "'program 21.95G' is needed. Report it with the version of libtpu."
  )


def bound(program: Program, chip: chip_specs.ChipSpec, mesh: Mesh) -> Bound:
  """A lower bound on the time of one call.

  Args:
    program: that was compiled.
    chip: peak figures of one device.
    mesh: whose devices it runs on.

  Raises:
    ValueError: the compiler had refused the program, or it cannot be read.
  """
  if program.work is None:
    raise ValueError(
      'plan_program.bound: the program was refused, or cannot be read; only '
      'those that were compiled and read have a bound. Plan for a larger '
      'topology, or with a jaxlib as new as libtpu.'
    )
  compute = 0.0
  for format_, flops in program.work.flops.items():
    names = [n for n in _FASTER.get(format_, ()) if n in chip.peak]
    compute += flops / chip.peak[names[0] if names else 'bf16']
  moved = program.arguments + program.outputs
  sent = sum(sent_bytes(c, mesh) for c in program.work.collectives)
  return Bound(
    compute=compute,
    memory=moved / chip.bandwidth,
    links=sent / chip.interconnect,
  )


def sent_bytes(counted: plan_hlo.Counted, mesh: Mesh) -> float:
  """Bytes a device must send, at least, for a collective and all its runs.

  Of n devices that reduce b bytes each sends 2 b (n - 1) / n; one half of that
  gathers or scatters them, or turns them round.
  """
  collective = counted.collective
  n = math.prod(mesh.shape[axis] for axis in collective.axes)
  share = {
    'all-reduce': 2 * (n - 1) / n,
    'collective-permute': float(n > 1),
  }.get(collective.kind, (n - 1) / n)
  return share * collective.nbytes * counted.count
