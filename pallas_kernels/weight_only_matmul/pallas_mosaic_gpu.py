"""x (M, K) bf16 @ packed weights (K, N) on Hopper, the weight in registers.

Operands are swapped: y^T (N, M) = w^T (N, K) x^T (K, M), so that the 64 rows of
a wgmma are 64 output features and few tokens cost few columns. w^T comes from
registers, unpacked there (hopper_fragments.py); x^T from shared memory.

Grid    (N / (64 * warpgroups), split_k); a block of threads has `warpgroups`
        that compute, 64 output features each, and one that starts copies.
Stages  128 rows of the weight (256 at 2 bits): words, x (Mp, 128), scales and
        zero points of the groups; a barrier is full when all have come, and
        empty when all warpgroups have read it. Mp is M padded to eights.
Scales  post: a sum per group, times its scale, added in float32; exact.
        pre: the weight times its scale, rounded to bf16, one sum over K; for
        more than 64 rows, whose sums would not fit twice. One scale per column
        needs neither: it multiplies the sum.
Zero    (code - zero_point) is taken in bf16, exactly, before the product.
Split   Where N gives fewer blocks than the chip has processors, K is split, and
        float32 partial sums (split_k, N, Mp) are added by XLA.
On-chip stages * (256*Mp*s + 4096*t*warpgroups + 64*warpgroups*g*bytes) + 128 *
        Mp * warpgroups; s = 1 or 2 128-row halves, t word tiles, g groups of a
        stage. M=16, b=4, G=128, 4 warpgroups, 4 stages: 90 KB.
Traffic K*N*b/8 + (K/G)*N*(scale + zero bytes) + 2*M*(K + N), x of each block
        from the L2.
        M=16, K=8192, N=28672, b=4, G=128, bf16 scales: 117.4 + 3.7 + 1.2 MB.
Needs   words (hopper.pack_words) of 8, 4 or 2 bits, bf16 x, M up to 256 (128
        at 2 bits), K a multiple of a stage; groups of 32, 64, 128 or one per
        column. Above 256 rows dequantizing once and a bf16 product are faster.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import compat, hopper, planar

plgpu = compat.mosaic_gpu

GROUP_SIZES = (-1, 32, 64, 128)
TUNED = pathlib.Path(__file__).with_name('tuned_gpu.json')
_FRAGMENT = 64
_LEAST_STAGES = 4  # Of a part of K, that copies run ahead in.
_SPLIT_ROWS = 64  # Beyond them partial sums cost more than they save.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
  """How a call is cut up.

  Attributes:
    warpgroups: that compute, 64 columns of the weight each.
    stages: copies in flight.
    split_k: parts of K.
    scale: 'post' or 'pre', of grouped scales.
  """

  warpgroups: int = 4
  stages: int = 4
  split_k: int = 1
  scale: str = 'post'

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


class _Stage(NamedTuple):
  """What a stage holds: rows of the weight, word tiles, pieces, groups."""

  rows: int
  tiles: int
  width: int  # Rows of the weight of a piece: one product.
  groups: int


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
  if layout.K % _stage(layout).rows:
    return f'K={layout.K}; it takes multiples of {_stage(layout).rows}. Pad K.'
  return ''


def most_rows(bits: int) -> int:
  """Rows of x whose stages fit; those of 2 bits are twice as deep."""
  return 128 if bits == 2 else 256


def pick_block(
  M: int, N: int, layout: planar.Planar, out_dtype: Any = jnp.bfloat16
) -> Block:
  """The stored block of M's size, cut to N and to the shared memory.

  Few rows: K is split where the columns alone give fewer blocks than
  processors, as long as every part has four stages.
  """
  size = next(m for m in (16, 64, 128, 256) if m >= M)
  block = Block(**_tuned()[f'm{size}'])
  warpgroups = next(
    w for w in range(block.warpgroups, 0, -1) if N % (_FRAGMENT * w) == 0
  )
  steps = layout.K // _stage(layout).rows
  blocks, split = N // (_FRAGMENT * warpgroups), 1
  while (
    M <= _SPLIT_ROWS
    and blocks * split * 2 <= hopper.SMS + 4
    and steps % (split * 2) == 0
    and steps // (split * 2) >= _LEAST_STAGES
  ):
    split *= 2
  block = dataclasses.replace(block, warpgroups=warpgroups, split_k=split)
  while smem_bytes(block, M, layout, out_dtype) > hopper.SMEM_BYTES:
    if block.stages > 2:
      block = dataclasses.replace(block, stages=block.stages - 1)
    else:
      block = dataclasses.replace(block, warpgroups=block.warpgroups // 2)
  return block


def smem_bytes(
  block: Block, M: int, layout: planar.Planar, out_dtype: Any = jnp.bfloat16
) -> int:
  """The docstring's formula, with scales of 4 bytes and zero points of 2."""
  stage, Mp = _stage(layout), _padded(M)
  columns = _FRAGMENT * block.warpgroups
  words = 4096 * stage.tiles * block.warpgroups
  params = columns * stage.groups * 6
  buffers = block.stages * (2 * Mp * stage.rows + words + params)
  out = 4 if _turned_by_xla(block, out_dtype) else 2
  return buffers + out * columns * Mp + 16 * block.stages


def check_block(
  block: Block, M: int, N: int, layout: planar.Planar, out_dtype: Any
) -> None:
  """Raises ValueError for a block that does not fit the call."""
  steps = layout.K // _stage(layout).rows
  if N % (_FRAGMENT * block.warpgroups) or steps % block.split_k:
    raise ValueError(
      f'Block: warpgroups={block.warpgroups}, split_k={block.split_k} with '
      f'N={N} and {steps} stages of K; 64 * warpgroups must divide N, and '
      'split_k the stages. Use divisors.'
    )
  if (used := smem_bytes(block, M, layout, out_dtype)) > hopper.SMEM_BYTES:
    raise ValueError(
      f'Block: {block.stages} stages of M={M} are {used} bytes of shared '
      f'memory; allowed {hopper.SMEM_BYTES}. Use fewer stages.'
    )


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
  x = jnp.pad(x, ((0, _padded(M) - M), (0, 0)))
  if scale.dtype == jnp.float16:
    scale = scale.astype(jnp.float32)
  params = [scale]
  if zero_point is not None:
    # 8-bit words hold code - 128. Integers up to 256 are exact in bfloat16.
    zero = zero_point.astype(jnp.int32) - 128 * (layout.bits == 8)
    params.append(zero.astype(jnp.bfloat16))
  if layout.group_size < 0:
    params = [p[0] for p in params]  # (N,)
  transposed = _turned_by_xla(block, out_dtype)
  y = _call(x, words, params, layout, block, M, transposed, interpret)
  if transposed:  # (split_k, N, Mp) float32
    y = jnp.sum(y, axis=0).T[:M]
  return y.astype(out_dtype)


def _call(x, words, params, layout, block, M, transposed, interpret):
  (Mp, K), N = x.shape, words.shape[0] * _FRAGMENT
  stage, stages, wgs = _stage(layout), block.stages, block.warpgroups
  columns = _FRAGMENT * wgs
  grouped = layout.group_size > 0
  tile = min(stage.width, 64)  # Of bf16: as wide as the swizzle.
  transforms = (
    plgpu.TilingTransform((8, tile)),
    plgpu.SwizzleTransform(2 * tile),
  )
  scratch = {
    'x_s': plgpu.SMEM((stages, Mp, stage.rows), x.dtype, transforms=transforms),
    'w_s': plgpu.SMEM((stages, wgs, stage.tiles, 64, 16), jnp.int32),
    'full': plgpu.Barrier(
      num_arrivals=2 + grouped * len(params), num_barriers=stages
    ),
    'empty': plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
  }
  if grouped:
    for i, p in enumerate(params):
      scratch[f'p{i}_s'] = plgpu.SMEM((stages, stage.groups, columns), p.dtype)
  if transposed:
    out = jax.ShapeDtypeStruct((block.split_k, N, Mp), jnp.float32)
    scratch['o_s'] = plgpu.SMEM((wgs, _FRAGMENT, Mp), jnp.float32)
  else:
    out = jax.ShapeDtypeStruct((M, N), jnp.bfloat16)
    scratch['o_s'] = plgpu.SMEM(
      (wgs, Mp, _FRAGMENT),
      jnp.bfloat16,
      transforms=(plgpu.SwizzleTransform(128),),
    )
  if interpret:  # The interpreter has no products from registers.
    scratch['a_s'] = plgpu.SMEM((wgs, _FRAGMENT, stage.width), x.dtype)
  body = functools.partial(
    _kernel,
    layout=layout,
    block=block,
    steps=K // stage.rows // block.split_k,
    transposed=transposed,
    interpret=interpret,
  )
  return plgpu.kernel(
    body,
    out_type=out,
    grid=(N // columns, block.split_k),
    grid_names=('n', 'split'),
    num_threads=wgs + 1,
    thread_name='wg',
    scratch_types=scratch,
    compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    interpret=plgpu.InterpretGPUParams() if interpret else None,
    kernel_name=f'weight_only_w{layout.bits}',
  )(x, words, *params)


def _kernel(
  x_g, w_g, *refs, layout, block, steps, transposed, interpret, **smem
):
  *params_g, o_g = refs
  stage, stages, wgs = _stage(layout), block.stages, block.warpgroups
  grouped = layout.group_size > 0
  full, empty = smem['full'], smem['empty']
  n, part = jax.lax.axis_index('n'), jax.lax.axis_index('split')
  wg = jax.lax.axis_index('wg')
  columns = _FRAGMENT * wgs

  @pl.when(wg < wgs)
  def _():
    plgpu.set_max_registers(hopper.compute_registers(wgs), action='increase')
    total = _sums(smem, params_g, n, wg, steps, layout, block, interpret)
    o_s = smem['o_s'].at[wg]
    at = n * columns + wg * _FRAGMENT
    if transposed:
      o_s[...] = total
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(o_s, o_g.at[part, pl.ds(at, _FRAGMENT)])
    else:
      M = o_g.shape[0]
      turned = plgpu.layout_cast(
        total.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED
      )
      o_s.T[...] = turned
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(
        o_s.at[pl.ds(0, M)], o_g.at[:, pl.ds(at, _FRAGMENT)]
      )
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  @pl.when(wg == wgs)
  def _():
    plgpu.set_max_registers(hopper.MEMORY_REGISTERS, action='decrease')

    @pl.loop(0, steps)
    def _(i):
      slot, k = jax.lax.rem(i, stages), part * steps + i

      @pl.when(i >= stages)
      def _():
        plgpu.barrier_wait(empty.at[slot])

      copies = [
        (
          w_g.at[pl.ds(n * wgs, wgs), pl.ds(k * stage.tiles, stage.tiles)],
          'w_s',
        ),
        (x_g.at[:, pl.ds(k * stage.rows, stage.rows)], 'x_s'),
      ]
      if grouped:
        rows, cols = (
          pl.ds(k * stage.groups, stage.groups),
          pl.ds(n * columns, columns),
        )
        copies += [
          (p.at[rows, cols], f'p{i}_s') for i, p in enumerate(params_g)
        ]
      for source, name in copies:
        plgpu.copy_gmem_to_smem(source, smem[name].at[slot], full.at[slot])


def _sums(smem, params_g, n, wg, steps, layout, block, interpret):
  """What a warpgroup sums: (64, Mp) float32, scaled."""
  stage, stages = _stage(layout), block.stages
  x_s, w_s, full, empty = (smem[k] for k in ('x_s', 'w_s', 'full', 'empty'))
  Mp = x_s.shape[1]
  grouped, asymmetric = layout.group_size > 0, len(params_g) > 1
  row_layout = plgpu.Layout.WGMMA.reduce(1)
  unpack = _unpacker(layout, interpret)
  acc_type = plgpu.ACC((_FRAGMENT, Mp), jnp.float32)

  def of_column(i):
    """Scale (0) or zero point (1) of this warpgroup's columns: (64,)."""
    at = (n * block.warpgroups + wg) * _FRAGMENT
    ref = params_g[i].at[pl.ds(at, _FRAGMENT)]
    return plgpu.load(ref, layout=row_layout, optimized=False)

  def of_group(i, slot, piece):
    group = piece * stage.width // layout.group_size
    ref = smem[f'p{i}_s'].at[slot, group, pl.ds(wg * _FRAGMENT, _FRAGMENT)]
    return plgpu.load(ref, layout=row_layout)

  zero_of_column = of_column(1) if asymmetric and not grouped else None

  def pieces(slot):
    """The weight of a stage, less its zero points, in bfloat16."""
    words = [
      plgpu.load(w_s.at[slot, wg, i], layout=plgpu.Layout.WGMMA_8BIT)
      for i in range(stage.tiles)
    ]
    found = unpack(*words)
    if not asymmetric:
      return found
    return tuple(
      piece
      - _spread(of_group(1, slot, p) if grouped else zero_of_column, piece)
      for p, piece in enumerate(found)
    )

  def multiply(acc, piece, slot, p):
    x = x_s.at[slot, :, pl.ds(p * stage.width, stage.width)].T
    if interpret:
      smem['a_s'][wg] = piece
      piece = smem['a_s'].at[wg]
    plgpu.wgmma(acc, piece, x)

  def post(i, total):
    slot = jax.lax.rem(i, stages)
    plgpu.barrier_wait(full.at[slot])
    for p, piece in enumerate(pieces(slot)):

      def product(acc, piece=piece, p=p):
        multiply(acc, piece, slot, p)
        return acc[...]  # Waits for the product.

      part = pl.run_scoped(product, acc_type)
      scale = of_group(0, slot, p).astype(jnp.float32)
      total = total + part * _spread(scale, part)
    plgpu.barrier_arrive(empty.at[slot])
    return total

  def one_sum(acc):
    @pl.loop(0, steps)
    def _(i):
      slot = jax.lax.rem(i, stages)
      plgpu.barrier_wait(full.at[slot])
      for p, piece in enumerate(pieces(slot)):
        if grouped:
          scale = of_group(0, slot, p).astype(jnp.bfloat16)
          piece = piece * _spread(scale, piece)
        multiply(acc, piece, slot, p)
      plgpu.wgmma_wait(0)
      plgpu.barrier_arrive(empty.at[slot])

    return acc[...]

  if grouped and block.scale == 'post':
    zeros = plgpu.layout_cast(
      jnp.zeros((_FRAGMENT, Mp), jnp.float32), plgpu.Layout.WGMMA
    )
    return jax.lax.fori_loop(0, steps, post, zeros)
  total = pl.run_scoped(one_sum, acc_type)
  if grouped:
    return total
  return total * _spread(of_column(0).astype(jnp.float32), total)


def _unpacker(layout, interpret):
  """Function of word tiles to pieces (64, width) bfloat16."""
  stage = _stage(layout)
  offset = 2 ** (layout.bits - 1) if layout.signed else 0
  if not interpret:
    from pallas_kernels import hopper_fragments

    return hopper_fragments.unpacker(
      layout.bits, offset, stage.tiles, stage.width
    )

  def unpack(*words):
    # Unsigned 8 bits stay less 128, as the fragments leave them.
    signed = layout.signed or layout.bits == 8
    codes = [hopper.unpack_words(w, layout.bits, signed) for w in words]
    whole = jnp.concatenate(codes, axis=1).astype(jnp.bfloat16)
    return jnp.split(whole, stage.rows // stage.width, axis=1)

  return unpack


def _stage(layout):
  """The stage of a layout."""
  rows = 256 if layout.bits == 2 else 128
  width = min(128, layout.group_size) if layout.group_size > 0 else 128
  groups = rows // layout.group_size if layout.group_size > 0 else 0
  tiles = rows // hopper.tile_rows(layout.bits)
  return _Stage(rows=rows, tiles=tiles, width=width, groups=groups)


def _turned_by_xla(block, out_dtype):
  """Whether the kernel writes float32 sums (split_k, N, Mp)."""
  return block.split_k > 1 or jnp.dtype(out_dtype) != jnp.bfloat16


def _spread(row, like):
  """(64,) -> the shape of `like`, along its first axis."""
  return jax.lax.broadcast_in_dim(row, like.shape, [0])


def _padded(M):
  return -(-M // 8) * 8


@functools.cache
def _tuned():
  """'m16' -> fields of a Block."""
  return json.loads(TUNED.read_text(encoding='utf-8'))['blocks']
