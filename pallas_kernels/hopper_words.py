"""Packed weights times few rows, on Hopper: the pipeline two kernels share.

Operands are swapped: y^T (N, M) = w^T (N, K) x^T (K, M), so that the 64 rows of
a wgmma are 64 output features and few tokens cost few columns. w^T comes from
registers, unpacked there (hopper_fragments.py); x^T from shared memory. x is
bfloat16, with float32 sums, or int8 codes, with int32 sums of 16 times the
code, which a shift and a mask of four words' fields give. Codes of 8 bits, int8
or fp8, are rows, and go from shared memory as they are.

Grid    (N / (64 * warpgroups), split_k); a block of threads has `warpgroups`
        that compute, 64 output features each, and one that starts copies.
Stages  128 rows of the weight (256 at 2 bits): words, x (Mp, 128), scales and
        zero points of the groups; a barrier is full when all have come, and
        empty when all warpgroups have read it. Mp is M padded.
Scales  post: a sum per group, times its scale, added in float32; exact.
        pre: the weight times its scale, rounded to bf16, one sum over K; for
        more than 64 rows, whose sums would not fit twice. One scale per column
        needs neither: it multiplies the sum. So does the scale of a row of x.
Codes   of a fused x are made here. The warpgroups that compute take the absmax
        of its rows, a part of K each, while the first weights are on their way;
        then the other one has bf16 tiles from the L2 through its registers,
        and writes codes where copies of codes would land.
Zero    (code - zero_point) is taken in bf16, exactly, before the product.
Split   Where N gives fewer blocks than the chip has processors, K is split, and
        float32 partial sums (split_k, N, Mp) are added by XLA.
On-chip stages * (Mp*128*s*bytes + 4096*t*warpgroups + 64*warpgroups*g*bytes) +
        128 * Mp * warpgroups; s = 1 or 2 128-row halves, t word tiles, g groups
        of a stage. M=16, b=4, G=128, 4 warpgroups, 4 stages: 90 KB.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import compat, hopper, hopper_blocks, hopper_rows, planar
from pallas_kernels import rows as rows_lib

plgpu = compat.mosaic_gpu

_FRAGMENT = hopper.COLUMNS
_SWIZZLE = 128  # Bytes: the widest.
_BK = 128  # Columns of a tile of codes.


def product(
  x: jax.Array,
  packed: jax.Array,
  scale: jax.Array,
  zero_point: jax.Array | None,
  layout: planar.Planar,
  block: hopper_blocks.Block,
  out_dtype: Any,
  *,
  x_scale: jax.Array | None = None,
  x_format: str = '',
  bias: jax.Array | None = None,
  interpret: bool = False,
  name: str,
) -> jax.Array:
  """x (M, K), words or rows of the weight -> (M, N) of out_dtype.

  Args:
    x: bfloat16; codes, beside words in the order of hopper.reorder; or, with
      block.fused, floats in that order that are to be codes.
    packed: hopper.pack_words, of 4 bits beside codes; pack_rows beside codes.
    scale: (1, N) or (K/G, N), bfloat16 or float32; (1, N) beside rows.
    zero_point: as scale, bfloat16, less 128 at 8 bits; not beside codes.
    layout: of the weight.
    block: that fits.
    out_dtype: of the result.
    x_scale: (M,) float32, of codes.
    x_format: what floats are quantized to where block.fused: of rows.QMAX.
    bias: (N,) float32, beside codes.
    interpret: runs it in Pallas's interpreter.
    name: of the kernel.
  """
  code_dtype = rows_lib.code_dtype(x_format) if block.fused else x.dtype
  M, Mp = x.shape[0], hopper_blocks.padded(x.shape[0], code_dtype)
  x = jnp.pad(x, ((0, Mp - M), (0, 0)))
  params = [scale] if zero_point is None else [scale, zero_point]
  if layout.group_size < 0:
    params = [p[0] for p in params]  # (N,)
  turned = hopper_blocks.summed_by_xla(block, out_dtype)
  ends: list[Any] = []
  if x_scale is not None and not turned:
    ends.append(jnp.pad(x_scale, (0, Mp - M)))
  if bias is not None and not turned:
    ends.append(bias)
  y = _call(
    x,
    packed,
    params,
    ends,
    layout=layout,
    block=block,
    code_dtype=code_dtype,
    x_format=x_format,
    M=M,
    turned=turned,
    interpret=interpret,
    name=name,
  )
  if not turned:
    return y.astype(out_dtype)
  y = jnp.sum(y, axis=0).T[:M]
  y = y if x_scale is None else y * x_scale[:, None]
  y = y if bias is None else y + bias[None]
  return y.astype(out_dtype)


def _call(
  x,
  packed,
  params,
  ends,
  *,
  layout,
  block,
  code_dtype,
  x_format,
  M,
  turned,
  interpret,
  name,
):
  (Mp, K), N = x.shape, packed.shape[0] * _FRAGMENT
  each, stages, wgs = (
    hopper_blocks.stage(layout),
    block.stages,
    block.warpgroups,
  )
  columns = _FRAGMENT * wgs
  grouped = layout.group_size > 0
  size = jnp.dtype(code_dtype).itemsize
  tile = min(each.width, _SWIZZLE // size)
  transforms = (
    plgpu.TilingTransform((8, tile)),
    plgpu.SwizzleTransform(tile * size),
  )
  scratch = {
    'x_s': plgpu.SMEM(
      (stages, Mp, each.rows), code_dtype, transforms=transforms
    ),
    'w_s': plgpu.SMEM((stages, wgs, each.tiles, 64, 16), jnp.int32),
    'full': plgpu.Barrier(
      num_arrivals=2 + grouped * len(params), num_barriers=stages
    ),
    'empty': plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
  }
  if packed.ndim == 3:
    scratch['w_s'] = plgpu.SMEM(
      (stages, wgs, _FRAGMENT, _BK), packed.dtype, transforms=transforms
    )
  if grouped:
    for i, p in enumerate(params):
      scratch[f'p{i}_s'] = plgpu.SMEM((stages, each.groups, columns), p.dtype)
  if block.fused:
    scratch['top_s'] = plgpu.SMEM((wgs, Mp), jnp.float32)
    scratch['ranges'] = plgpu.Barrier(num_arrivals=wgs)
  if turned:
    out = jax.ShapeDtypeStruct((block.split_k, N, Mp), jnp.float32)
    scratch['o_s'] = plgpu.SMEM((wgs, _FRAGMENT, Mp), jnp.float32)
  else:
    out = jax.ShapeDtypeStruct((M, N), jnp.bfloat16)
    scratch['o_s'] = plgpu.SMEM(
      (wgs, Mp, _FRAGMENT),
      jnp.bfloat16,
      transforms=(plgpu.SwizzleTransform(128),),
    )
  if interpret and packed.ndim == 4:  # It has no products from registers.
    scratch['a_s'] = plgpu.SMEM((wgs, _FRAGMENT, each.width), code_dtype)
  body = functools.partial(
    _kernel,
    layout=layout,
    block=block,
    steps=K // each.rows // block.split_k,
    num_params=len(params),
    x_format=x_format,
    turned=turned,
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
    kernel_name=name,
  )(x, packed, *params, *ends)


def _kernel(
  x_g,
  w_g,
  *refs,
  layout,
  block,
  steps,
  num_params,
  x_format,
  turned,
  interpret,
  **smem,
):
  params_g, ends_g, o_g = refs[:num_params], refs[num_params:-1], refs[-1]
  wgs, Mp = block.warpgroups, smem['x_s'].shape[1]
  n, part = jax.lax.axis_index('n'), jax.lax.axis_index('split')
  wg = jax.lax.axis_index('wg')
  # Of a thread that also quantizes: Mp values and their codes.
  memory = max(64, 2 * Mp) if block.fused else hopper.MEMORY_REGISTERS

  @pl.when(wg < wgs)
  def _():
    _take_registers(hopper.compute_registers(wgs, memory), wgs)
    if block.fused:
      hopper_rows.find_ranges(x_g, smem['top_s'], wg)
      plgpu.commit_smem()
      plgpu.barrier_arrive(smem['ranges'])
    total = _sums(smem, params_g, n, wg, steps, layout, block, interpret)
    o_s = smem['o_s'].at[wg]
    at = n * _FRAGMENT * wgs + wg * _FRAGMENT
    total = _finish(total, list(ends_g), at, smem, block, x_format)
    if turned:
      o_s[...] = total
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(o_s, o_g.at[part, pl.ds(at, _FRAGMENT)])
    else:
      M = o_g.shape[0]
      o_s.T[...] = plgpu.layout_cast(
        total.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED
      )
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(
        o_s.at[pl.ds(0, M)], o_g.at[:, pl.ds(at, _FRAGMENT)]
      )
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  @pl.when(wg == wgs)
  def _():
    _take_registers(memory, wgs)
    _feed(x_g, w_g, params_g, smem, n, part, steps, layout, block, x_format)


def _take_registers(count, warpgroups):
  more = count > hopper.start_registers(warpgroups)
  plgpu.set_max_registers(count, action='increase' if more else 'decrease')


def _feed(x_g, w_g, params_g, smem, n, part, steps, layout, block, x_format):
  """Has weights, scales and x come to the stages as they are emptied."""
  each, stages, wgs = (
    hopper_blocks.stage(layout),
    block.stages,
    block.warpgroups,
  )
  columns = _FRAGMENT * wgs
  full, empty = smem['full'], smem['empty']

  def copy(i, with_x):
    slot, k = jax.lax.rem(i, stages), part * steps + i
    tiles = pl.ds(n * wgs, wgs)
    if len(w_g.shape) == 3:
      weight = w_g.at[tiles, :, pl.ds(k * _BK, _BK)]
    else:
      weight = w_g.at[tiles, pl.ds(k * each.tiles, each.tiles)]
    copies = [(weight, 'w_s')]
    if with_x:
      copies.append((x_g.at[:, pl.ds(k * each.rows, each.rows)], 'x_s'))
    if layout.group_size > 0:
      at = pl.ds(k * each.groups, each.groups), pl.ds(n * columns, columns)
      copies += [(p.at[at], f'p{i}_s') for i, p in enumerate(params_g)]
    for source, name in copies:
      plgpu.copy_gmem_to_smem(source, smem[name].at[slot], full.at[slot])

  def wait_until_empty(i):
    @pl.when(i >= stages)
    def _():
      plgpu.barrier_wait(empty.at[jax.lax.rem(i, stages)])

  if not block.fused:

    @pl.loop(0, steps)
    def _(i):
      wait_until_empty(i)
      copy(i, with_x=True)

    return

  @pl.loop(0, min(stages, steps))  # Under way before the ranges are known.
  def _(i):
    copy(i, with_x=False)

  tiles = hopper_rows.tiles()
  plgpu.barrier_wait(smem['ranges'])
  inverse = 1.0 / hopper_rows.scale_of(smem['top_s'], x_format, tiles.reduce(1))

  @pl.loop(0, steps)
  def _(i):
    slot, k = jax.lax.rem(i, stages), part * steps + i
    wait_until_empty(i)

    @pl.when(i >= stages)
    def _():
      copy(i, with_x=False)

    x = plgpu.load(
      x_g.at[:, pl.ds(k * _BK, _BK)], layout=tiles, optimized=False
    ).astype(jnp.float32)
    codes = hopper_rows.encode(x * _spread(inverse, x), x_format)
    plgpu.store(smem['x_s'].at[slot], codes, optimized=False)
    plgpu.commit_smem()
    plgpu.barrier_arrive(full.at[slot])


def _sums(smem, params_g, n, wg, steps, layout, block, interpret):
  """What a warpgroup sums: (64, Mp) float32, scaled by the weight's scales."""
  each, stages = hopper_blocks.stage(layout), block.stages
  x_s, w_s, full, empty = (smem[k] for k in ('x_s', 'w_s', 'full', 'empty'))
  Mp, codes = x_s.shape[1], x_s.dtype != jnp.bfloat16
  by_rows = w_s.dtype != jnp.int32
  grouped, asymmetric = layout.group_size > 0, len(params_g) > 1
  row_layout = plgpu.Layout.WGMMA.reduce(1)
  unpack: Any = None if by_rows else _unpacker(layout, codes, interpret)
  sums = jnp.int32 if x_s.dtype == jnp.int8 else jnp.float32
  acc_type = plgpu.ACC((_FRAGMENT, Mp), sums)

  def of_column(i):
    """Scale (0) or zero point (1) of this warpgroup's columns: (64,)."""
    at = (n * block.warpgroups + wg) * _FRAGMENT
    ref = params_g[i].at[pl.ds(at, _FRAGMENT)]
    return plgpu.load(ref, layout=row_layout, optimized=False)

  def of_group(i, slot, piece):
    group = piece * each.width // layout.group_size
    ref = smem[f'p{i}_s'].at[slot, group, pl.ds(wg * _FRAGMENT, _FRAGMENT)]
    return plgpu.load(ref, layout=row_layout)

  zero_of_column = of_column(1) if asymmetric and not grouped else None

  def pieces(slot):
    """The weight of a stage, less its zero points; beside codes,
    16 times the words' codes.
    """
    if by_rows:
      return (w_s.at[slot, wg],)
    words = [
      plgpu.load(w_s.at[slot, wg, i], layout=plgpu.Layout.WGMMA_8BIT)
      for i in range(each.tiles)
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
    x = x_s.at[slot, :, pl.ds(p * each.width, each.width)].T
    if interpret and not by_rows:
      smem['a_s'][wg] = piece
      piece = smem['a_s'].at[wg]
    plgpu.wgmma(acc, piece, x)

  def scaled(sums, scale):
    scale = scale.astype(jnp.float32)
    if codes and not by_rows:
      scale = scale * (1 / 16)
    sums = sums.astype(jnp.float32)
    return sums * _spread(scale, sums)

  def post(i, total):
    slot = jax.lax.rem(i, stages)
    plgpu.barrier_wait(full.at[slot])
    for p, piece in enumerate(pieces(slot)):

      def one(acc, piece=piece, p=p):
        multiply(acc, piece, slot, p)
        return acc[...]  # Waits for the product.

      part = pl.run_scoped(one, acc_type)
      total = total + scaled(part, of_group(0, slot, p))
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
  return total if grouped else scaled(total, of_column(0))


def _finish(total, ends_g, at, smem, block, x_format):
  """Sums (64, Mp) of codes times the scales of rows of x, plus the bias."""
  of_x = plgpu.Layout.WGMMA.reduce(0)
  x_scale = None
  if block.fused:
    plgpu.barrier_wait(smem['ranges'])
    x_scale = hopper_rows.scale_of(smem['top_s'], x_format, of_x)
  elif ends_g:
    x_scale = plgpu.load(ends_g.pop(0), layout=of_x, optimized=False)
  if x_scale is not None:
    total = total * jax.lax.broadcast_in_dim(x_scale, total.shape, [1])
  if ends_g:
    bias = plgpu.load(
      ends_g[0].at[pl.ds(at, _FRAGMENT)],
      layout=plgpu.Layout.WGMMA.reduce(1),
      optimized=False,
    )
    total = total + _spread(bias, total)
  return total


def _unpacker(layout, codes, interpret):
  """Function of word tiles to pieces (64, width), bfloat16 or int8."""
  each = hopper_blocks.stage(layout)
  offset = 2 ** (layout.bits - 1) if layout.signed else 0
  if not interpret:
    from pallas_kernels import hopper_fragments

    if codes:
      return hopper_fragments.unpacker_of_codes(each.tiles, each.width)
    return hopper_fragments.unpacker(
      layout.bits, offset, each.tiles, each.width
    )

  def unpack(*words):
    # Unsigned 8 bits stay less 128, as the fragments leave them.
    signed = layout.signed or layout.bits == 8
    found = [hopper.unpack_words(w, layout.bits, signed) for w in words]
    whole = jnp.concatenate(found, axis=1)
    if codes:
      whole = (16 * hopper.reorder(whole)).astype(jnp.int8)
    else:
      whole = whole.astype(jnp.bfloat16)
    return jnp.split(whole, each.rows // each.width, axis=1)

  return unpack


def _spread(row, like):
  """(64,) -> the shape of `like`, along its first axis."""
  return jax.lax.broadcast_in_dim(row, like.shape, [0])
