"""Rows by index on TPU: one copy a row out of HBM, two blocks in flight.

Grid    (B*R/br,). The copies of a block are started while those of the block
        before it are finished: its rows are then times their scale, or zeros,
        and written by the pipeline.
Words   A row of bfloat16 cannot be copied alone: rows 2i and 2i + 1 share the
        words of the chip's memory. x is seen as (N/2, D) 32-bit words, the pair
        is copied, and the half that was asked for is kept.
Blocks  index (br, 1), scale (br, 1), out (br, D); x stays in HBM. The indices
        are also in scalar memory, where copies get their addresses.
On-chip 8*br*D + 2*br*D*bytes + 2048*br. br=64, D=4096, bf16: 3.1 MB.
Traffic R*D*(4 + bytes) + 1024*R: the pairs are twice the rows in bfloat16.
        R=2048, D=4096, bf16: 50 + 2 MB; a copy of x (8192, 4096) moves 134.
Needs   bfloat16 or float32; D a multiple of 128; at least 16 rows in all, of
        bfloat16 an even number. R is padded to whole blocks.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compat, targets

_LEAST = 16  # Rows of x, so that its tiles are whole; and of a register.
_COLUMNS = 512  # That are finished at a time.
_BUDGET = 4 * 2**20  # Bytes of the blocks in flight.
_MOST = 64  # Rows of a block: its copies are unrolled.


def why_not(x: Any, index: Any, chip: str) -> str:
  """Why this kernel cannot serve; '' if it can."""
  del index
  if chip not in targets.TARGETS:
    return f'chip is {chip!r}; it runs on {sorted(targets.TARGETS)}.'
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    return f'x is {x.dtype}; it takes bfloat16 or float32. Cast x.'
  N, D = x.shape[-2:]
  if D % 128:
    return f'D={D}; it takes multiples of 128. Pad D.'
  rows = x.size // D
  if rows < _LEAST or (x.dtype == jnp.bfloat16 and rows % 2):
    return (
      f'x has {rows} rows of {x.dtype}; it takes at least {_LEAST}, and an '
      'even number of bfloat16. Pad N.'
    )
  return ''


def block_rows(R: int, D: int) -> int:
  """Rows of a block: what 4 MiB hold twice, at most 64, no more than needed."""
  fits = _BUDGET // (8 * D) // 16 * 16
  return max(16, min(_MOST, fits, -(-R // 16) * 16))


def gather_rows(
  x: jax.Array,
  index: jax.Array,
  scale: jax.Array | None,
  *,
  chip: str,
  interpret: bool = False,
) -> jax.Array:
  """x (B, N, D), index (B, R), scale (B, R) -> (B, R, D) of x's dtype.

  Raises:
    NotImplementedError: `why_not` has a reason.
  """
  if reason := why_not(x, index, chip):
    raise NotImplementedError(f'gather_rows: pallas_mosaic_tpu: {reason}')
  (B, N, D), R = x.shape, index.shape[1]
  inside = (index >= 0) & (index < N)
  flat = jnp.where(inside, index + N * jnp.arange(B)[:, None], -1).reshape(-1)
  br = block_rows(flat.size, D)
  pad = (0, -flat.size % br)
  flat = jnp.pad(flat, pad, constant_values=-1)
  rows = flat.size
  operands = [flat, x.reshape(B * N, D), flat[:, None]]
  in_specs = [
    pl.BlockSpec(memory_space=pl.ANY),
    pl.BlockSpec((br, 1), lambda g, _: (g, 0)),
  ]
  if scale is not None:
    factor = jnp.pad(scale.astype(jnp.float32).reshape(-1), pad)
    operands.append(factor[:, None])
    in_specs.append(pl.BlockSpec((br, 1), lambda g, _: (g, 0)))
  words = jnp.uint32 if x.dtype == jnp.bfloat16 else x.dtype
  used = (8 + 2 * x.dtype.itemsize) * br * D + 2048 * br
  y = pl.pallas_call(
    functools.partial(
      _kernel, has_scale=scale is not None, unroll=not interpret
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(rows // br,),
      in_specs=in_specs,
      out_specs=pl.BlockSpec((br, D), lambda g, _: (g, 0)),
      scratch_shapes=[
        pltpu.VMEM((2, br, D), words),
        pltpu.SemaphoreType.DMA((2,)),
      ],
    ),
    out_shape=compat.out_struct((rows, D), x.dtype, *operands),
    compiler_params=compat.tpu_params(('arbitrary',), used + 8 * 2**20),
    interpret=compat.interpret_mode(interpret),
    name='gather_rows',
  )(*operands)
  return y[: B * R].reshape(B, R, D)


def _kernel(at_ref, x_ref, index_ref, *refs, has_scale, unroll):
  scale_ref = refs[0] if has_scale else None
  o_ref, rows_ref, arrived = refs[has_scale:]
  g, br = pl.program_id(0), o_ref.shape[0]
  paired = x_ref.dtype == jnp.bfloat16
  source = x_ref.bitcast(jnp.uint32) if paired else x_ref

  def start(block, unroll):
    slot = jax.lax.rem(block, 2)

    @pl.loop(0, br, unroll=unroll)
    def _(r):
      at = jnp.maximum(at_ref[block * br + r], 0)
      row = jax.lax.shift_right_logical(at, 1) if paired else at
      pltpu.make_async_copy(
        source.at[pl.ds(row, 1)],
        rows_ref.at[slot, pl.ds(r, 1)],
        arrived.at[slot],
      ).start()

  pl.when(g == 0)(lambda: start(g, False))
  pl.when(g + 1 < pl.num_programs(0))(lambda: start(g + 1, unroll))
  slot = jax.lax.rem(g, 2)
  block = rows_ref.at[slot]
  pltpu.make_async_copy(block, block, arrived.at[slot]).wait()  # All its bytes.

  # A few registers at a time, so that none are spilled.
  D = o_ref.shape[1]
  width = math.gcd(D, _COLUMNS)
  for r in range(0, br, _LEAST):
    some = slice(r, r + _LEAST)
    index = index_ref[some]  # (16, 1)
    for c in range(0, D, width):
      columns = slice(c, c + width)
      rows = rows_ref[slot, some, columns]
      if paired:  # Row 2i is the low half of a word; bf16 is float32's high.
        odd = (index & 1) == 1
        bits = jnp.where(odd, (rows >> 16) << 16, rows << 16)
        rows = jax.lax.bitcast_convert_type(bits, jnp.float32)
      if scale_ref is not None:
        rows = rows * scale_ref[some]
      kept = jnp.where(index >= 0, rows, 0.0)
      o_ref[some, columns] = kept.astype(o_ref.dtype)
