"""x (M, K) bf16 @ packed weights (K, N) on Hopper, the weight in registers.

The pipeline, its grid and what it holds on the chip are hopper_words'.

Traffic K*N*b/8 + (K/G)*N*(scale + zero bytes) + 2*M*(K + N), x of each block
        from the L2.
        M=16, K=8192, N=28672, b=4, G=128, bf16 scales: 117.4 + 3.7 + 1.2 MB.
Needs   words (hopper.pack_words) of 8, 4 or 2 bits, bf16 x, M up to 256 (128
        at 2 bits), K a multiple of a stage; groups of 32, 64, 128 or one per
        column. Above 256 rows dequantizing once and a bf16 product are faster.
"""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import hopper, hopper_blocks, hopper_words, planar

Block = hopper_blocks.Block
check_block = hopper_blocks.check_block
GROUP_SIZES = (-1, 32, 64, 128)
TUNED = pathlib.Path(__file__).with_name('tuned_gpu.json')


def why_not(x: Any, qvalue: Any, layout: planar.Planar, chip: str) -> str:
  """Why this kernel cannot serve; '' if it can."""
  if reason := hopper.why_not(chip):
    return reason
  if qvalue.ndim != 4:
    return 'the weight is as stored; it takes hopper.pack_words of it.'
  if x.dtype != jnp.bfloat16:
    return f'x is {x.dtype}; it takes bfloat16. Cast x.'
  most = most_rows(layout.bits)
  if x.shape[-2] > most:
    return f'M={x.shape[-2]} at bits={layout.bits}; it takes up to {most} rows.'
  if layout.group_size not in GROUP_SIZES:
    return (
      f'group_size={layout.group_size}; it takes {list(GROUP_SIZES)}, where '
      '-1 is one scale per column.'
    )
  rows = hopper_blocks.stage(layout).rows
  if layout.K % rows:
    return f'K={layout.K}; it takes multiples of {rows}. Pad K.'
  return ''


def most_rows(bits: int) -> int:
  """Rows of x whose stages fit; those of 2 bits are twice as deep."""
  return 128 if bits == 2 else 256


def pick_block(
  M: int, N: int, layout: planar.Planar, out_dtype: Any = jnp.bfloat16
) -> Block:
  """The stored block of M's size, cut to the call."""
  size = next(m for m in (16, 64, 128, 256) if m >= M)
  block = Block(**_tuned()[f'm{size}'])
  return hopper_blocks.fit_block(block, M, N, layout, out_dtype)


def weight_only_matmul(
  x: jax.Array,
  words: jax.Array,
  scale: jax.Array,
  zero_point: jax.Array | None,
  layout: planar.Planar,
  out_dtype: Any,
  *,
  chip: str,
  block: Block | None = None,
  interpret: bool = False,
) -> jax.Array:
  """x (M, K), words (N/64, K/kt, 64, 16), scale (1 or K/G, N) -> (M, N).

  Raises:
    NotImplementedError: `why_not` has a reason.
    ValueError: a block that does not fit.
  """
  if reason := why_not(x, words, layout, chip):
    raise NotImplementedError(
      f'weight_only_matmul: pallas_mosaic_gpu: {reason}'
    )
  M, N = x.shape[0], scale.shape[1]
  block = block or pick_block(M, N, layout, out_dtype)
  check_block(block, M, N, layout, out_dtype)
  if scale.dtype == jnp.float16:
    scale = scale.astype(jnp.float32)
  if zero_point is not None:
    # 8-bit words hold code - 128. Integers up to 256 are exact in bfloat16.
    zero = zero_point.astype(jnp.int32) - 128 * (layout.bits == 8)
    zero_point = zero.astype(jnp.bfloat16)
  return hopper_words.product(
    x,
    words,
    scale,
    zero_point,
    layout,
    block,
    out_dtype,
    interpret=interpret,
    name=f'weight_only_w{layout.bits}',
  )


@functools.cache
def _tuned():
  """'m16' -> fields of a Block."""
  return json.loads(TUNED.read_text(encoding='utf-8'))['blocks']
