"""Cases of decode attention for the static schedule: a page of a cache.

8 key heads of 128 and 4 queries of each, as Llama-3 8B has. A page is what the
kernel takes in at once; its bundles should not outlast its bytes.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from pallas_kernels import ahead_of_time, stored
from pallas_kernels.decode_attention import api
from pallas_kernels.decode_attention import pallas_mosaic_tpu as tpu

OP = 'decode_attention'
HEADS, HEAD_DIM = 8, 128
_CHIPS = ('v5e', 'v6e', 'tpu7x')
_SLOTS = 8192  # So that a cache stays in HBM, as a real one does.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A page of one format on one chip.

  Attributes:
    chip: a key of targets.TARGETS.
    op: OP.
    bits: of a code; 16: bfloat16.
    group_size: tokens that share a scale of a channel of the keys, and channels
      of a token's values; -1: a scale per token and head.
    queries: of a key head.
    block: fields of tpu.Block, as sorted pairs.
  """

  chip: str
  bits: int
  group_size: int = -1
  queries: int = 4
  block: tuple[tuple[str, int], ...] = ()
  op: str = OP

  @property
  def name(self) -> str:
    """Such as 'v5e/kv2g32/q4'."""
    group = f'g{self.group_size}' if self.group_size > 0 else ''
    return f'{self.chip}/kv{self.bits}{group}/q{self.queries}'

  @property
  def nbytes(self) -> int:
    """Of a page: codes and scales of keys and values."""
    tokens = dict(self.block)['tokens']
    return sum(
      math.prod(shape) * jnp.dtype(dtype).itemsize
      for shape, dtype in _shapes(self.bits, self.group_size, tokens).values()
    )

  @property
  def macs(self) -> int:
    """Multiply-adds of a page that attention asks for."""
    tokens = dict(self.block)['tokens']
    return 2 * tokens * HEADS * HEAD_DIM * self.queries


def cases(chip: str) -> Iterator[Case]:
  """What is compiled for a chip."""
  if chip not in _CHIPS:
    return
  for bits, group_size in (
    (16, -1),
    (8, -1),
    (4, -1),
    (2, -1),
    (2, 32),
    (2, 128),
  ):
    for chunk in (
      (512,) if bits > 4 else (512, 1024 if group_size == 32 else 2048)
    ):
      block = (('chunk', chunk), ('tokens', chunk))
      yield Case(chip=chip, bits=bits, group_size=group_size, block=block)


def compile_case(case: dict[str, Any]) -> None:
  """Compiles the kernel of a case, given as a dict of its fields."""
  bits = case['bits']
  arrays = _shapes(bits, case['group_size'], _SLOTS)
  names = list(arrays)

  def f(q, lengths, *leaves):
    fields: dict[str, dict[str, Any]] = {'k': {}, 'v': {}}
    for name, leaf in zip(names, leaves, strict=True):
      fields[name[0]][name[2:]] = leaf
    center = 127 if bits == 8 else 0
    k, v = (stored.Stored(**fields[x], bits=bits, center=center) for x in 'kv')
    return api.decode_attention(
      q,
      k,
      v,
      lengths,
      implementation='pallas_mosaic_tpu',
      chip=case['chip'],
      block=tpu.Block(**dict(case['block'])),
    )

  q = ((1, 1, HEADS * case['queries'], HEAD_DIM), jnp.bfloat16)
  shapes = [q, ((1,), jnp.int32), *arrays.values()]
  ahead_of_time.compile_for(case['chip'], f, shapes)


def _shapes(bits: int, group_size: int, slots: int) -> dict[str, Any]:
  """'k.codes' ... -> (shape, dtype); 8 bits are symmetric, fewer are not."""
  codes: Any = jnp.bfloat16 if bits == 16 else jnp.uint8
  width = HEAD_DIM * min(bits, 8) // 8
  found: dict[str, Any] = {}
  for name in 'kv':
    found[f'{name}.codes'] = ((1, slots, HEADS, width), codes)
    if bits == 16:
      continue
    scale: tuple[int, ...] = (1, slots, HEADS, 1)
    if group_size > 0 and name == 'k':
      scale = (1, slots // group_size, HEADS, HEAD_DIM)
    elif group_size > 0:
      scale = (1, slots, HEADS, HEAD_DIM // group_size)
    found[f'{name}.scale'] = (scale, jnp.float16)
    if bits < 8:
      found[f'{name}.offset'] = (scale, jnp.float16)
  if group_size > 0:
    found['k.norm'] = ((1, slots, 1, 1), jnp.float32)
  return found
