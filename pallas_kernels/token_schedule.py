"""The kernels of token reduction as cases of the static schedule.

Their steps are no products with a weight, so that they count their own bytes
and multiply-adds. static_schedule compiles them and writes its table.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from pallas_kernels import ahead_of_time
from pallas_kernels.attention_received import api as attention_received
from pallas_kernels.attention_received import pallas_mosaic_tpu as attention_tpu
from pallas_kernels.gather_rows import api as gather_rows
from pallas_kernels.nearest_center import api as nearest_center
from pallas_kernels.nearest_center import pallas_mosaic_tpu as nearest_tpu

OPS = ('attention_received', 'gather_rows', 'nearest_center')
_STEPS = (
  8  # Of every axis of a compiled grid: enough that operands stay in HBM.
)
_BYTES = 2  # Of bfloat16.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One kernel on one chip with one block.

  Attributes:
    chip: a key of targets.TARGETS.
    op: one of OPS.
    D: width of a row.
    top: ranks, of nearest_center.
    block: fields of the op's Block, as sorted pairs; of gather_rows its rows.
  """

  chip: str
  op: str
  D: int
  top: int = 1
  block: tuple[tuple[str, int], ...] = ()

  @property
  def name(self) -> str:
    """Such as 'v5e/nearest_center/d512t1'."""
    ranks = f't{self.top}' if self.op == 'nearest_center' else ''
    return f'{self.chip}/{self.op}/d{self.D}{ranks}'

  @property
  def nbytes(self) -> int:
    """What a step moves; blocks that stay for many steps do not count."""
    fields = dict(self.block)
    if self.op == 'nearest_center':  # The rows stay.
      return fields['bk'] * self.D * _BYTES
    if self.op == 'attention_received':  # The keys stay.
      return fields['bt'] * (self.D * _BYTES + 4)
    # Pairs of rows in, rows out, indices of which each fills a row of lanes.
    return fields['br'] * (3 * self.D * _BYTES + 512)

  @property
  def macs(self) -> int:
    """Multiply-adds of a step."""
    fields = dict(self.block)
    if self.op == 'nearest_center':
      return fields['bn'] * fields['bk'] * self.D
    if self.op == 'attention_received':
      return fields['bt'] * fields['bs'] * self.D
    return 0


def cases(chip: str) -> Iterator[Case]:
  """What is compiled for a chip."""
  make = functools.partial(Case, chip=chip)
  for D, top in ((512, 1), (4096, 3)):
    picked = nearest_tpu.pick_block(8192, 8192, D, _BYTES)
    block = (('bk', picked.bk), ('bn', picked.bn))
    yield make(op='nearest_center', D=D, top=top, block=block)
  keys = attention_tpu.pick_block(4096, 4096)
  block = (('bs', keys.bs), ('bt', keys.bt))
  yield make(op='attention_received', D=128, block=block)
  yield make(op='gather_rows', D=4096, block=(('br', 64),))


def compile_case(case: dict[str, Any]) -> None:
  """Compiles the kernel of a case, given as a dict of its fields."""
  D, block = case['D'], dict(case['block'])
  options = {'implementation': 'pallas_mosaic_tpu', 'chip': case['chip']}
  f: Any
  shapes: list[Any]
  if case['op'] == 'nearest_center':
    f = functools.partial(
      nearest_center.nearest_center,
      top=case['top'],
      block=nearest_tpu.Block(**block),
      **options,
    )
    sizes = (block['bn'], block['bk'])
    shapes = [((_STEPS * n, D), jnp.bfloat16) for n in sizes]
  elif case['op'] == 'attention_received':
    f = functools.partial(
      attention_received.attention_received,
      block=attention_tpu.Block(**block),
      **options,
    )
    T, S = _STEPS * block['bt'], _STEPS * block['bs']
    shapes = [((1, n, 8, D), jnp.bfloat16) for n in (T, S)]
    shapes.append(((1, 8, T), jnp.float32))
  else:
    f = functools.partial(gather_rows.gather_rows, **options)
    R = _STEPS * block['br']
    shapes = [((4 * R, D), jnp.bfloat16), ((R,), jnp.int32)]
  ahead_of_time.compile_for(case['chip'], f, shapes)
