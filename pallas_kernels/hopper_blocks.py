"""How a product of hopper_words is cut up, and what then fits on the chip."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels import hopper, planar

_FRAGMENT = hopper.COLUMNS
_LEAST_STAGES = 4  # Of a part of K, that copies run ahead in.
_REDUCTION = 2048  # Bytes.
_SPLIT_ROWS = 64  # Beyond them partial sums cost more than they save.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
  """How a call is cut up.

  Attributes:
    warpgroups: that compute, 64 columns of the weight each.
    stages: copies in flight.
    split_k: parts of K.
    scale: 'post' or 'pre', of grouped scales.
    fused: rows of x that are to be codes are quantized here, not before.
  """

  warpgroups: int = 4
  stages: int = 4
  split_k: int = 1
  scale: str = 'post'
  fused: bool = False

  def __post_init__(self):
    if not 1 <= self.warpgroups <= 4:  # 256 scales are the most of a copy.
      raise ValueError(
        f'Block: warpgroups={self.warpgroups}; allowed 1 to 4. Use one of them.'
      )
    if self.stages < 2 or self.split_k < 1:
      raise ValueError(
        f'Block: stages={self.stages}, split_k={self.split_k}; they must be at '
        'least 2 and 1. Raise them.'
      )
    if self.scale not in ('post', 'pre'):
      raise ValueError(
        f"Block: scale={self.scale!r}; allowed ['post', 'pre']. Use one."
      )


class Stage(NamedTuple):
  """What a stage holds: rows of the weight, word tiles, pieces, groups."""

  rows: int
  tiles: int
  width: int  # Rows of the weight of a piece: one product.
  groups: int


def stage(layout: planar.Planar) -> Stage:
  """The stage of a layout."""
  rows = 256 if layout.bits == 2 else 128
  width = min(128, layout.group_size) if layout.group_size > 0 else 128
  groups = rows // layout.group_size if layout.group_size > 0 else 0
  tiles = rows // hopper.tile_rows(layout.bits)
  return Stage(rows=rows, tiles=tiles, width=width, groups=groups)


def padded(M: int, x_dtype: Any = jnp.bfloat16) -> int:
  """Mp: rows that a wgmma has; of codes no odd number of eights above 32."""
  unit = 16 if jnp.dtype(x_dtype) == jnp.int8 and M > 32 else 8
  return -(-M // unit) * unit


def fit_block(
  block: Block,
  M: int,
  N: int,
  layout: planar.Planar,
  out_dtype: Any = jnp.bfloat16,
  x_bytes: int = 2,
) -> Block:
  """A block cut to N and to the shared memory.

  Few rows: K is split where the columns alone give fewer blocks than
  processors, as long as every part has four stages.
  """
  warpgroups = next(
    w for w in range(block.warpgroups, 0, -1) if N % (_FRAGMENT * w) == 0
  )
  steps = layout.K // stage(layout).rows
  blocks, split = N // (_FRAGMENT * warpgroups), 1
  while (
    M <= _SPLIT_ROWS
    and blocks * split * 2 <= hopper.SMS + 4
    and steps % (split * 2) == 0
    and steps // (split * 2) >= _LEAST_STAGES
  ):
    split *= 2
  block = dataclasses.replace(block, warpgroups=warpgroups, split_k=split)
  while smem_bytes(block, M, layout, out_dtype, x_bytes) > hopper.SMEM_BYTES:
    if block.stages > 2:
      block = dataclasses.replace(block, stages=block.stages - 1)
    else:
      block = dataclasses.replace(block, warpgroups=block.warpgroups // 2)
  return block


def smem_bytes(
  block: Block,
  M: int,
  layout: planar.Planar,
  out_dtype: Any = jnp.bfloat16,
  x_bytes: int = 2,
) -> int:
  """hopper_words' formula, with scales of 4 bytes and zero points of 2."""
  each, Mp = (
    stage(layout),
    padded(M, jnp.int8 if x_bytes == 1 else jnp.bfloat16),
  )
  columns = _FRAGMENT * block.warpgroups
  words = 4096 * each.tiles * block.warpgroups
  params = columns * each.groups * 6
  buffers = block.stages * (x_bytes * Mp * each.rows + words + params)
  out = 4 if summed_by_xla(block, out_dtype) else 2
  # Ranges of rows, and the scratch that Mosaic keeps for reductions.
  ranges = block.fused * (4 * Mp * block.warpgroups + _REDUCTION)
  return buffers + out * columns * Mp + 16 * block.stages + ranges


def check_block(
  block: Block,
  M: int,
  N: int,
  layout: planar.Planar,
  out_dtype: Any,
  x_bytes: int = 2,
) -> None:
  """Raises ValueError for a block that does not fit the call."""
  steps = layout.K // stage(layout).rows
  if N % (_FRAGMENT * block.warpgroups) or steps % block.split_k:
    raise ValueError(
      f'Block: warpgroups={block.warpgroups}, split_k={block.split_k} with '
      f'N={N} and {steps} stages of K; 64 * warpgroups must divide N, and '
      'split_k the stages. Use divisors.'
    )
  used = smem_bytes(block, M, layout, out_dtype, x_bytes)
  if used > hopper.SMEM_BYTES:
    raise ValueError(
      f'Block: {block.stages} stages of M={M} are {used} bytes of shared '
      f'memory; allowed {hopper.SMEM_BYTES}. Use fewer stages.'
    )


def summed_by_xla(block: Block, out_dtype: Any) -> bool:
  """Whether `product` gives float32 sums (split_k, N, Mp)."""
  return block.split_k > 1 or jnp.dtype(out_dtype) != jnp.bfloat16
