"""x (M, K) quantized by row @ int8 or fp8 weights (K, N) on Hopper.

Two kernels. The first quantizes: a row's absmax comes before its first product.
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

from pallas_kernels import compat, hopper, rows
from pallas_kernels.quantized_matmul import base

plgpu = compat.mosaic_gpu

TUNED = pathlib.Path(__file__).with_name('tuned_gpu.json')
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
  layout = sides.layout
  if qvalue.ndim != 3:
    return 'the weight is as stored; it takes hopper.pack_rows of it.'
  if sides.is_float != (qvalue.dtype.name.startswith('float8')):
    return f'qvalue is {qvalue.dtype} and x is {sides.x_format}; both or none.'
  if not sides.codes and x.dtype not in (jnp.bfloat16, jnp.float32):
    return f'x is {x.dtype}; it takes bfloat16 or float32. Cast x.'
  if layout.group_size > 0 or not layout.signed:
    return 'w has groups or zero points; it takes one scale per column.'
  if layout.K % _BK or qvalue.shape[0] % 2:
    N = 64 * qvalue.shape[0]
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


def quantized_matmul(
  x: jax.Array,
  x_scale: jax.Array | None,
  w: tuple[jax.Array, jax.Array, jax.Array | None],
  bias: jax.Array | None,
  sides: base.Sides,
  out_dtype: Any,
  *,
  chip: str,
  block: Block | None = None,
  interpret: bool = False,
) -> jax.Array:
  """x (M, K), w = (rows (N/64, 64, K), scale, None) -> (M, N) of out_dtype.

  Raises:
    NotImplementedError: `why_not` has a reason, or int32 sums are asked for.
    ValueError: a block that does not divide N.
  """
  reason = why_not(x, w[0], sides, chip)
  if sides.raw:
    reason = 'int32 sums of a sharded K are not its output; it scales them.'
  if reason:
    raise NotImplementedError(f'quantized_matmul: pallas_mosaic_gpu: {reason}')
  (M, K), N = x.shape, w[1].shape[1]
  block = block or pick_block(M, N)
  if N % block.bn:
    raise ValueError(
      f'Block: bn={block.bn} with N={N}; it must divide it. Use a divisor.'
    )
  if not sides.codes:
    x, x_scale = quantize_rows(x, sides.x_format, interpret=interpret)
  assert x_scale is not None  # Codes come with one.
  pad = -M % (block.bm * block.cluster)
  codes = jnp.pad(x, ((0, pad), (0, 0)))
  x_scale = jnp.broadcast_to(x_scale.astype(jnp.float32), (M, 1))[:, 0]
  operands = [
    codes,
    w[0].reshape(N, K),
    jnp.pad(x_scale, (0, pad)),
    w[1][0].astype(jnp.float32),
  ]
  if bias is not None:
    operands.append(bias[0].astype(jnp.float32))
  y = _call(operands, sides, block, interpret)
  return y[:M].astype(out_dtype)


def quantize_rows(
  x: jax.Array, x_format: str, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
  """x (M, K) -> codes (M, K), scale (M, 1): rows.quantize in one pass."""
  M, K = x.shape
  wide = math.gcd(8, K // 128)  # Values of a thread that are side by side.
  layout = plgpu.Layout.WG_STRIDED((K,), vec_size=wide)

  def body(x_g, codes_g, scale_g):
    row = jax.lax.axis_index('row')
    values = plgpu.load(x_g.at[row], layout=layout, optimized=False)
    values = values.astype(jnp.float32)
    codes, scale = _quantize(values, x_format)
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


def _quantize(values, x_format):
  """(K,) float32 -> codes (K,), scale (): as rows.quantize."""
  qmax = float(rows.QMAX[x_format])
  scale = jnp.maximum(jnp.max(jnp.abs(values)), rows.MIN_RANGE) * (1.0 / qmax)
  steps = values * (1.0 / scale)
  if rows.is_float(x_format):
    codes = jnp.minimum(jnp.maximum(steps, -qmax), qmax).astype(x_format)
  else:
    rounded = jax.lax.round(steps, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    codes = jnp.minimum(jnp.maximum(rounded, -qmax), qmax).astype(jnp.int8)
  return codes, scale


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
