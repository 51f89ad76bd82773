"""x (M, K) quantized by row @ int8, fp8 or int4 weights (K, N) on Hopper.

Up to 64 rows go through hopper_words' pipeline, which reads the weight once at
the speed of the memory: rows of 8 bits as they are, words of 4 bits unpacked to
int8 in registers, as the chip multiplies no int4. It quantizes x itself, or a
kernel before it does (Block.fused).
  Traffic K*N*b/8 + (K/G)*N*(scale bytes) + 2*M*(K + N), x of each block from
          the L2. M=16, K=8192, N=28672, b=4, one scale per column: 117.4 + 1.2
          MB.
More rows are multiplied by two kernels. The first quantizes: a row's absmax
comes before its first product.
  Grid    (M,); one warpgroup has a row in registers, takes its absmax, rounds.
  Traffic 3*M*K + 4*M bytes of bf16 x; M=K=8192: 201 MB.
The second multiplies:
  Grid    (132,) persistent; tiles (bm, bn) of the output in a snake over both
          axes, so that neighbours share what is in the L2.
  Body    two warpgroups, half of the columns each; wgmma of codes (bm, 128) and
          weights (bn, 128), both along K; sums in int32 or float32 registers.
          One more warpgroup starts copies. In a cluster of two along M the
          weight is read once for both.
  Last    sums * scale of rows * scale of columns + bias, to bf16, to shared
          memory 64 columns at a time, and out.
  On-chip stages * 128 * (bm + bn) + 2 * 128*bm bytes. bm=128, bn=256, 4 stages:
          229 KB of 232.
  Traffic M*K*(N/bn) + K*N*(M/bm) from L2, + 2*M*N.
Needs     hopper.pack_rows of the weight, one scale per column, no zero points;
          K a multiple of 128, N of 128; bf16 or float32 x, or codes. M is
          padded to whole tiles.

Words are unpacked to rows first, 1.5*K*N bytes. Up to 64 rows they may have
groups of 64 or 128.
"""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import (
  compat,
  hopper,
  hopper_blocks,
  hopper_rows,
  hopper_words,
  rows,
)
from pallas_kernels.quantized_matmul import base

plgpu = compat.mosaic_gpu

TUNED = pathlib.Path(__file__).with_name('tuned_gpu.json')
MOST_ROWS = 64  # Of x, beside words.
_GROUP_SIZES = (-1, 64, 128)  # Of words: registers refuse 32 bytes of K.
_BK = 128  # Bytes of a row of a tile: the widest swizzle.
_OUT = 64  # Columns that leave at a time.
_SNAKE = 8  # Tiles of a turn of the snake.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
  """How a call is cut up.

  Attributes:
    bm, bn: rows and columns of a tile of the output.
    stages: copies in flight.
    cluster: tiles along M that share a read of the weight.
  """

  bm: int = 128
  bn: int = 256
  stages: int = 4
  cluster: int = 2

  def __post_init__(self):
    if self.bm % 64 or self.bn % (2 * _OUT) or min(self.bm, self.bn) < 1:
      raise ValueError(
        f'Block: bm={self.bm}, bn={self.bn}; they must be multiples of 64 and '
        'of 128. Round them.'
      )
    if self.cluster not in (1, 2) or self.stages < 2:
      raise ValueError(
        f'Block: cluster={self.cluster}, stages={self.stages}; allowed 1 or 2, '
        'and at least 2. Use those.'
      )
    if (used := self.smem_bytes) > hopper.SMEM_BYTES:
      raise ValueError(
        f'Block: {self.stages} stages of {self.bm} + {self.bn} rows are {used} '
        f'bytes of shared memory; allowed {hopper.SMEM_BYTES}. Use fewer.'
      )

  @property
  def smem_bytes(self) -> int:
    """The docstring's formula."""
    return self.stages * _BK * (self.bm + self.bn) + 4 * _OUT * self.bm


def why_not(x: Any, qvalue: Any, sides: base.Sides, chip: str) -> str:
  """Why this kernel cannot serve; '' if it can."""
  if reason := hopper.why_not(chip):
    return reason
  if not hopper.is_packed(qvalue):
    return (
      'the weight is as stored; it takes hopper.pack_rows of it, or pack_words '
      'of 4 bits.'
    )
  if sides.is_float != (qvalue.dtype.name.startswith('float8')):
    return f'qvalue is {qvalue.dtype} and x is {sides.x_format}; both or none.'
  if not sides.codes and x.dtype not in (jnp.bfloat16, jnp.float32):
    return f'x is {x.dtype}; it takes bfloat16 or float32. Cast x.'
  if qvalue.ndim == 4:
    return _why_not_words(x, qvalue, sides)
  return _why_not_rows(sides, 64 * qvalue.shape[0])


def _why_not_words(x, words, sides):
  layout, M = sides.layout, math.prod(x.shape[:-1])
  if layout.bits != 4 or not layout.signed:
    return (
      f'words of bits={layout.bits}, zero points: {not layout.signed}; it '
      'takes those of 4 bits without zero points.'
    )
  if M > MOST_ROWS:
    return _why_not_rows(sides, 64 * words.shape[0])
  if layout.group_size not in _GROUP_SIZES:
    return (
      f'group_size={layout.group_size}; it takes {list(_GROUP_SIZES)} beside '
      'words, where -1 is one scale per column.'
    )
  return ''


def _why_not_rows(sides, N):
  layout = sides.layout
  if layout.group_size > 0 or not layout.signed:
    return (
      'w has groups or zero points; it takes one scale per column (groups of '
      f'words up to {MOST_ROWS} rows of x).'
    )
  if layout.K % _BK or N % 128:
    return f'K={layout.K}, N={N}; it takes multiples of 128. Pad them.'
  return ''


def pick_block(M: int, N: int) -> Block:
  """The stored block of wide or narrow calls.

  Narrow: too few wide tiles for the processors, or columns they do not divide.
  """
  stored = _tuned()
  wide = Block(**stored['wide'])
  if N % wide.bn or -(-M // wide.bm) * (N // wide.bn) < hopper.SMS:
    return Block(**stored['narrow'])
  return wide


def pick_few_block(
  M: int, N: int, layout: Any, out_dtype: Any = jnp.bfloat16, *, fused: bool
) -> hopper_blocks.Block:
  """The stored block of few rows, cut to the call.

  Args:
    M, N: of the call.
    layout: of the weight.
    out_dtype: of the result.
    fused: whether the kernel quantizes x itself.
  """
  block = hopper_blocks.Block(**_tuned()['few'], fused=fused)
  return hopper_blocks.fit_block(block, M, N, layout, out_dtype, x_bytes=1)


def quantized_matmul(
  x: jax.Array,
  x_scale: jax.Array | None,
  w: tuple[jax.Array, jax.Array, jax.Array | None],
  bias: jax.Array | None,
  sides: base.Sides,
  out_dtype: Any,
  *,
  chip: str,
  block: Block | hopper_blocks.Block | None = None,
  interpret: bool = False,
) -> jax.Array:
  """x (M, K), w = (rows or words, scale, None) -> (M, N) of out_dtype.

  Raises:
    NotImplementedError: `why_not` has a reason, or int32 sums are asked for.
    TypeError: a block of the other pipeline.
    ValueError: a block that does not divide N.
  """
  reason = why_not(x, w[0], sides, chip)
  if sides.raw:
    reason = 'int32 sums of a sharded K are not its output; it scales them.'
  if reason:
    raise NotImplementedError(f'quantized_matmul: pallas_mosaic_gpu: {reason}')
  packed: Any = w[0]
  of_words = packed.ndim == 4
  if x.shape[0] <= MOST_ROWS and (of_words or not isinstance(block, Block)):
    run: Any = _times_few
  else:
    run = _times_many
  return run(x, x_scale, w, bias, sides, out_dtype, block, interpret)


def _times_few(x, x_scale, w, bias, sides, out_dtype, block, interpret):
  """Up to 64 rows."""
  M, N = x.shape[0], w[1].shape[1]
  block = _few_block(block, M, N, sides, out_dtype)
  if w[0].ndim == 4:  # First: XLA may write x in this order at once.
    x = hopper.reorder(x)
  if not block.fused:
    x, x_scale = _codes(x, x_scale, sides, interpret)
  scale = w[1].astype(jnp.float32) if w[1].dtype == jnp.float16 else w[1]
  return hopper_words.product(
    x,
    w[0],
    scale,
    None,
    sides.layout,
    block,
    out_dtype,
    x_scale=x_scale,
    x_format=sides.x_format,
    bias=None if bias is None else bias[0].astype(jnp.float32),
    interpret=interpret,
    name=f'quantized_w{sides.layout.bits}',
  )


def _times_many(x, x_scale, w, bias, sides, out_dtype, block, interpret):
  """More rows, of x and of the weight."""
  (M, K), N = x.shape, w[1].shape[1]
  block = _rows_block(block, M, N)
  codes, x_scale = _codes(x, x_scale, sides, interpret)
  packed = w[0]
  if packed.ndim == 4:
    packed = hopper.rows_of_words(packed, sides.layout)
  pad = -M % (block.bm * block.cluster)
  operands = [
    jnp.pad(codes, ((0, pad), (0, 0))),
    packed.reshape(N, K),
    jnp.pad(x_scale, (0, pad)),
    w[1][0].astype(jnp.float32),
  ]
  if bias is not None:
    operands.append(bias[0].astype(jnp.float32))
  y = _call(operands, sides, block, interpret)
  return y[:M].astype(out_dtype)


def _codes(x, x_scale, sides, interpret):
  """x (M, K) as codes, and their scale (M,) float32."""
  if not sides.codes:
    x, x_scale = quantize_rows(x, sides.x_format, interpret=interpret)
  x_scale = jnp.broadcast_to(x_scale.astype(jnp.float32), (x.shape[0], 1))
  return x, x_scale[:, 0]


def _few_block(block, M, N, sides, out_dtype):
  """The block of few rows, checked."""
  layout = sides.layout
  if block is None:
    fused = not sides.codes and _tuned()['fused_rows'] >= M
    block = pick_few_block(M, N, layout, out_dtype, fused=fused)
  _check_kind(block, hopper_blocks.Block)
  hopper_blocks.check_block(block, M, N, layout, out_dtype, x_bytes=1)
  if block.scale == 'pre' or (block.fused and sides.codes):
    raise ValueError(
      f'Block: scale={block.scale!r}, fused={block.fused} with x as codes: '
      f"{sides.codes}; codes take scale='post', and fused quantizes floats. "
      'Use those.'
    )
  return block


def _rows_block(block, M, N):
  """The block of a product with rows, checked."""
  block = block or pick_block(M, N)
  _check_kind(block, Block)
  if N % block.bn:
    raise ValueError(
      f'Block: bn={block.bn} with N={N}; it must divide it. Use a divisor.'
    )
  return block


def _check_kind(block, kind):
  if not isinstance(block, kind):
    raise TypeError(
      f'Block: {type(block).__module__}.Block; this weight and M take '
      f'{kind.__module__}.Block. Use that, or None.'
    )


def quantize_rows(
  x: jax.Array, x_format: str, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
  """x (M, K) -> codes (M, K), scale (M, 1): rows.quantize in one pass."""
  M, K = x.shape

  def body(x_g, codes_g, scale_g):
    row = jax.lax.axis_index('row')
    codes, scale = hopper_rows.quantize(
      hopper_rows.load(x_g.at[row], K), x_format
    )
    plgpu.store(codes_g.at[row], codes, optimized=False)
    scale_g[row] = scale

  codes, scale = plgpu.kernel(
    body,
    out_type=(
      jax.ShapeDtypeStruct((M, K), rows.code_dtype(x_format)),
      jax.ShapeDtypeStruct((M,), jnp.float32),
    ),
    grid=(M,),
    grid_names=('row',),
    num_threads=1,
    thread_name='wg',
    interpret=plgpu.InterpretGPUParams() if interpret else None,
    kernel_name='quantize_rows',
  )(x)
  return codes, scale[:, None]


def _call(operands, sides, block, interpret):
  x, w = operands[:2]
  M, N = x.shape[0], w.shape[0]
  tiles = M // (block.bm * block.cluster) * (N // block.bn)
  return plgpu.kernel(
    functools.partial(_kernel, sides=sides, block=block),
    out_type=jax.ShapeDtypeStruct((M, N), jnp.bfloat16),
    grid=(min(hopper.SMS // block.cluster, tiles),),
    grid_names=('sm',),
    cluster=(block.cluster,),
    cluster_names=('pair',),
    num_threads=3,
    thread_name='wg',
    interpret=plgpu.InterpretGPUParams() if interpret else None,
    kernel_name=f'quantized_{x.dtype.name}',
  )(*operands)


def _kernel(x_g, w_g, sx_g, sw_g, *refs, sides, block):
  bias_g, o_g = refs if len(refs) == 2 else (None, refs[0])
  (M, K), N = x_g.shape, w_g.shape[0]
  bm, bn, half = block.bm, block.bn, block.bn // 2
  tiles = M // (bm * block.cluster), N // bn
  sums = jnp.float32 if sides.is_float else jnp.int32
  in_tiles = (plgpu.TilingTransform((8, _BK)), plgpu.SwizzleTransform(_BK))
  out_tiles = (plgpu.TilingTransform((8, _OUT)), plgpu.SwizzleTransform(128))

  def pipeline(body, context):
    shared = ('pair',) if block.cluster > 1 else ()
    return plgpu.emit_pipeline_warp_specialized(
      body,
      grid=(K // _BK,),
      memory_registers=hopper.MEMORY_REGISTERS,
      wg_axis='wg',
      num_compute_wgs=2,
      max_concurrent_steps=block.stages,
      compute_context=context,
      in_specs=[
        plgpu.BlockSpec(
          (bm, _BK), lambda k: (0, k), transforms=in_tiles, delay_release=1
        ),
        plgpu.BlockSpec(
          (bn, _BK),
          lambda k: (0, k),
          transforms=in_tiles,
          delay_release=1,
          collective_axes=shared,
        ),
      ],
    )

  nothing = lambda *_, **__: None
  buffers = pipeline(nothing, nothing).get_allocations(x_g, w_g)

  def loop(buffers, o_s):
    wg, pair = jax.lax.axis_index('wg'), jax.lax.axis_index('pair')

    @plgpu.nd_loop((tiles[0] * tiles[1],), collective_axes='sm')
    def _(tile):
      m, n = plgpu.planar_snake(tile.index[0], tiles, 0, _SNAKE)
      row = (m * block.cluster + pair) * bm
      column = n * bn

      def context(run):
        def multiply_and_store(acc):
          run(acc)
          _finish(acc, sx_g, sw_g, bias_g, o_g, o_s, row, column + wg * half)

        pl.run_scoped(multiply_and_store, plgpu.ACC((bm, half), sums))

      def body(_, x_s, w_s, acc):
        plgpu.wgmma(acc, x_s, w_s.at[pl.ds(wg * half, half)].T)
        plgpu.wgmma_wait(1)
        return acc

      pipeline(body, context)(
        x_g.at[pl.ds(row, bm)], w_g.at[pl.ds(column, bn)], allocations=buffers
      )

  pl.run_scoped(
    loop,
    buffers,
    plgpu.SMEM((2, bm, _OUT), jnp.bfloat16, transforms=out_tiles),
    collective_axes='wg',
  )
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _finish(acc, sx_g, sw_g, bias_g, o_g, o_s, row, column):
  """Sums of a warpgroup, scaled, to the output."""
  wg = jax.lax.axis_index('wg')
  bm, width = acc.shape
  across, down = (plgpu.Layout.WGMMA.reduce(axis) for axis in (1, 0))

  def load(ref, at, size, layout):
    return plgpu.load(ref.at[pl.ds(at, size)], layout=layout, optimized=False)

  y = plgpu.layout_cast(acc[...], plgpu.Layout.WGMMA).astype(jnp.float32)
  x_scale = load(sx_g, row, bm, across)
  y = y * jax.lax.broadcast_in_dim(x_scale, y.shape, [0])
  w_scale = load(sw_g, column, width, down)
  y = y * jax.lax.broadcast_in_dim(w_scale, y.shape, [1])
  if bias_g is not None:
    bias = load(bias_g, column, width, down)
    y = y + jax.lax.broadcast_in_dim(bias, y.shape, [1])
  y = y.astype(jnp.bfloat16)
  for start in range(0, width, _OUT):
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # o_s is free again.
    o_s[wg] = y[:, start : start + _OUT]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(
      o_s.at[wg],
      o_g.at[pl.ds(row, bm), pl.ds(column + start, _OUT)],
    )


@functools.cache
def _tuned():
  """'wide', 'narrow' -> fields of a Block."""
  return json.loads(TUNED.read_text(encoding='utf-8'))['blocks']
