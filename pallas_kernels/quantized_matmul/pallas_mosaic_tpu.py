"""x (M, K) quantized by row @ int8, int4 or fp8 weights (K, N) on TPU.

Grid    (M/bm, N/bn, K/bk), k innermost, sums in scratch, int32 or float32.
First   at the first step of a row block, x (bm, K) is read once, its rows'
        absmax taken, and its codes kept in scratch for all N/bn and K/bk.
Body    codes (bm, bk) @ w (bk, bn), in sub-tiles; packed weights are unpacked
        to int8 in scratch by shift, mask and exclusive-or. Scales of groups
        multiply a dot each; else nothing but sums happens here.
Last    sums * scale of rows * scale of columns + bias, to the output's dtype.
        A zero point of w leaves as zero_point * sum(codes of a row).
Blocks  x (bm, K), qvalue (bk*b/8, bn), scale (bk/G, bn), out (bm, bn).
On-chip 2 * (2*bm*K + bk*bn*b/8 + 4*bk*bn/G + 4*bm*bn) + bm*K + 4*bm*bn
        + bk*bn where packed. bm=512, K=8192, bk=2048, bn=512, int8: 27 MB.
Traffic 2*M*K + K*N*b/8*(M/bm) + 2*M*N bytes. M=2048, K=8192, N=28672, bm=512:
        34 + 940 + 117 MB for 0.96 TMAC: bm multiply-adds a byte of weight.
Needs   bfloat16 or float32 x; int8 units for integers (v5e, v5p, v6e), fp8 for
        fp8 (TPU7x); groups of multiples of 128, or one scale per column. M is
        padded to a multiple of 32 outside.

int4 x int4 goes through int8: scheduled natively it takes twice the bundles.
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
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compat, planar, targets
from pallas_kernels import rows as rows_lib
from pallas_kernels.quantized_matmul import base

TUNED = pathlib.Path(__file__).with_name('tuned_tpu.json')
_ROWS = rows_lib.ROWS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
  """How a call is cut up.

  Attributes:
    bm, bk, bn: rows of x, rows and columns of the weight of a step.
    sub_m, sub_n: of a dot inside the body; 0 is all.
  """

  bm: int
  bk: int
  bn: int
  sub_m: int = 0
  sub_n: int = 0

  def __post_init__(self):
    for of, part in ((self.bm, self.sub_m), (self.bn, self.sub_n)):
      if of < 1 or part < 0 or (part and of % part):
        raise ValueError(
          f'Block: a sub-tile of {part} in a block of {of}; it must divide it. '
          'Use a divisor, or 0 for all.'
        )


def why_not(x: Any, qvalue: Any, sides: base.Sides, chip: str) -> str:
  """Why this kernel cannot serve; '' if it can."""
  if chip not in targets.TARGETS:
    return f'chip is {chip!r}; it runs on {sorted(targets.TARGETS)}.'
  if qvalue.ndim != 2:
    return 'the weight is packed for Hopper; it takes it as stored.'
  layout, native = sides.layout, targets.get(chip).macs
  need = 'fp8' if sides.is_float else 'int8'
  if need not in native:
    return f'{chip} has no {need} unit, it has {sorted(native)}.'
  if sides.is_float and (layout.bits, layout.signed) != (8, True):
    return f'w has bits={layout.bits}; beside fp8 it must be fp8.'
  if sides.is_float != (qvalue.dtype.name.startswith('float8')):
    return f'qvalue is {qvalue.dtype} and x is {sides.x_format}; both or none.'
  if not sides.codes and x.dtype not in (jnp.bfloat16, jnp.float32):
    return f'x is {x.dtype}; it takes bfloat16 or float32. Cast x.'
  if layout.group_size > 0 and layout.group_size % 128:
    return f'group_size={layout.group_size}; it takes multiples of 128, or -1.'
  if layout.bits < 4:
    return f'bits={layout.bits}; it takes 8 and 4.'
  if not (layout.bits == 8 or layout.is_packed and layout.unit):
    return f'K={layout.K} at 4 bits; it takes multiples of 64.'
  if layout.K % 128:
    return f'K={layout.K}; it takes multiples of 128. Pad K.'
  return ''


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
  """x (M, K), w = (qvalue, scale, zero_point) -> (M, N) of out_dtype.

  Raises:
    NotImplementedError: `why_not` has a reason.
    ValueError: a block that does not fit.
  """
  M, N = x.shape[0], w[0].shape[-1]
  if reason := why_not(x, w[0], sides, chip):
    raise NotImplementedError(f'quantized_matmul: pallas_mosaic_tpu: {reason}')
  block = block or pick_block(M, N, sides, chip)
  check_block(block, N, sides)
  pad = ((0, -M % block.bm), (0, 0))
  x = jnp.pad(x, pad)
  if x_scale is not None:
    wide = jnp.broadcast_to(x_scale.astype(jnp.float32), (M, 1))
    x_scale = jnp.pad(wide, pad)
  if w[1].dtype == jnp.float16:  # The chip has no such registers.
    w = (w[0], w[1].astype(jnp.float32), w[2])
  y = _call(x, x_scale, w, bias, sides, out_dtype, block, interpret)
  return y[:M]


def pick_block(M: int, N: int, sides: base.Sides, chip: str) -> Block:
  """The block of the tuned table, or a heuristic where it has none.

  As many rows at a time, up to 512, as leave two fifths of the memory free.
  """
  parts = -(-M // 512)
  block = _pick_block(M, N, sides, chip, parts)
  target = targets.TARGETS.get(chip, targets.get('v5p'))
  while onchip_bytes(block, sides, 2) > 0.6 * target.vmem and block.bm > _ROWS:
    parts *= 2
    block = _pick_block(M, N, sides, chip, parts)
  return block


def _pick_block(M, N, sides, chip, parts):
  bm = -(-M // (parts * _ROWS)) * _ROWS
  layout = sides.layout
  group = f'g{layout.group_size}' if layout.group_size > 0 else ''
  kind = f'w{layout.bits}{"f8" if sides.is_float else "a8"}{group}'
  row = _tuned().get(f'{chip}/{kind}/m{32 if bm <= 32 else 512}')
  if row is None:
    deep = 4096 if bm <= 64 or chip in ('v6e', 'tpu7x') else 2048
    row = {'bk': deep, 'bn': 512, 'sub_n': 0 if bm <= 64 else 256}
  bn = min(row['bn'], N if N < 128 else N // 128 * 128)
  bk = max([b for b in legal_bk(layout) if b <= row['bk']], default=128)
  sub_m, sub_n = row.get('sub_m', 0), row.get('sub_n', 0)
  return Block(
    bm=bm,
    bk=bk,
    bn=bn,
    sub_m=sub_m if sub_m and bm % sub_m == 0 else 0,
    sub_n=sub_n if sub_n and bn % sub_n == 0 else 0,
  )


def legal_bk(layout: planar.Planar) -> list[int]:
  """Depths of a block, ascending; the last is K."""
  step = 128
  if layout.group_size > 0:
    step = math.lcm(step, 8 * layout.group_size * (1 if layout.signed else 4))
  K = layout.K
  return [b for b in range(step, K, step) if K % b == 0] + [K]


def check_block(block: Block, N: int, sides: base.Sides) -> None:
  """Raises ValueError for a block that does not fit the call."""
  legal = legal_bk(sides.layout)
  if block.bk not in legal:
    raise ValueError(
      f'Block: bk={block.bk} with K={sides.layout.K}, group_size='
      f'{sides.layout.group_size}; allowed {legal}. Use one of them.'
    )
  if block.bm % _ROWS or (block.bn % 128 and block.bn != N):
    raise ValueError(
      f'Block: bm={block.bm}, bn={block.bn} with N={N}; they must be multiples '
      f'of {_ROWS} and of 128 (or bn be N). Round them.'
    )


def onchip_bytes(block: Block, sides: base.Sides, x_bytes: int) -> int:
  """The docstring's formula."""
  layout = sides.layout
  bm, bk, bn = block.bm, block.bk, block.bn
  rows = bk // layout.group_size if layout.group_size > 0 else 1
  x_block = bm * (bk if sides.codes else layout.K) * x_bytes
  buffers = x_block + bk * bn // layout.fields + 5 * rows * bn + 4 * bm * bn
  total = 2 * buffers + 4 * bm * bn + 2 * 512 * bm
  if not sides.codes:
    total += bm * layout.K
  return total + bk * bn * (layout.bits < 8)


def _call(x, x_scale, w, bias, sides, out_dtype, block, interpret):
  layout = sides.layout
  (M, K), N = x.shape, w[0].shape[-1]
  bm, bk, bn = block.bm, block.bk, block.bn
  grouped = layout.group_size > 0
  rows = bk // layout.group_size if grouped else 1
  q_rows = bk // layout.fields
  columns = (lambda i, j, k: (k, j)) if grouped else (lambda i, j, k: (0, j))
  specs = {
    'x': (x, pl.BlockSpec((bm, K), lambda i, j, k: (i, 0))),
    'q': (w[0], pl.BlockSpec((q_rows, bn), lambda i, j, k: (k, j))),
    's': (w[1], pl.BlockSpec((rows, bn), columns)),
  }
  if sides.codes:
    specs['x'] = (x, pl.BlockSpec((bm, bk), lambda i, j, k: (i, k)))
  if x_scale is not None:
    by_row = pl.BlockSpec((bm, 1), lambda i, j, k: (i, 0))
    specs['x_scale'] = (x_scale, by_row)
  if w[2] is not None:
    specs['z'] = (w[2], pl.BlockSpec((rows, bn), columns))
  if bias is not None:
    specs['bias'] = (bias, pl.BlockSpec((1, bn), lambda i, j, k: (0, j)))
  sums = jnp.float32 if sides.is_float or grouped else jnp.int32
  scratch = {'acc': pltpu.VMEM((bm, bn), sums)}
  if not sides.codes:
    scratch['codes'] = pltpu.VMEM((K // bk, bm, bk), sides.code_dtype)
    scratch['row_scale'] = pltpu.VMEM((bm, 1), jnp.float32)
  if layout.bits < 8:
    scratch['w'] = pltpu.VMEM((bk, bn), jnp.int8)
  names = [*specs, 'out', *scratch]

  def kernel(*refs):
    _kernel(dict(zip(names, refs, strict=True)), sides, block)

  operands = [operand for operand, _ in specs.values()]
  used = onchip_bytes(block, sides, x.dtype.itemsize)
  # Codes in scratch are of the row block: its columns follow one another.
  middle = 'parallel' if sides.codes else 'arbitrary'
  return pl.pallas_call(
    kernel,
    grid=(M // bm, pl.cdiv(N, bn), K // bk),
    in_specs=[spec for _, spec in specs.values()],
    out_specs=pl.BlockSpec((bm, bn), lambda i, j, k: (i, j)),
    out_shape=compat.out_struct(
      (M, N), jnp.int32 if sides.raw else out_dtype, *operands
    ),
    scratch_shapes=list(scratch.values()),
    compiler_params=compat.tpu_params(
      ('parallel', middle, 'arbitrary'), used + used // 2 + 4 * 2**20
    ),
    interpret=compat.interpret_mode(interpret),
    name=f'quantized_w{layout.bits}',
  )(*operands)


def _kernel(refs, sides, block):
  layout = sides.layout
  j, k = pl.program_id(1), pl.program_id(2)
  if not sides.codes:

    @pl.when((j == 0) & (k == 0))
    def _quantize_rows():
      _quantize(refs, sides, block)

  @pl.when(k == 0)
  def _():
    refs['acc'][...] = jnp.zeros_like(refs['acc'])

  width = block.sub_n or block.bn
  height = block.sub_m or block.bm
  for n in range(0, block.bn, width):
    columns = slice(n, n + width)
    if layout.bits < 8:
      refs['w'][:, columns] = planar.unpack_int8(refs['q'][:, columns], layout)
      w = refs['w'][:, columns]
    elif not layout.signed:
      w = planar.unpack_int8(refs['q'][:, columns], layout)
    else:
      w = refs['q'][:, columns]
    for m in range(0, block.bm, height):
      of = slice(m, m + height)
      codes = refs['x'][of] if sides.codes else refs['codes'][k, of]
      refs['acc'][of, columns] += _product(codes, w, refs, columns, sides)

  @pl.when(k == pl.num_programs(2) - 1)
  def _():
    _finish(refs, sides, block)


def _product(codes, w, refs, columns, sides):
  """(m, bk) @ (bk, n), less zero points, times the scales of groups."""
  layout = sides.layout
  bk = w.shape[0]
  G = layout.group_size if layout.group_size > 0 else bk
  total: Any = 0
  for g in range(bk // G):
    rows, row = slice(g * G, (g + 1) * G), slice(g, g + 1)
    part = jax.lax.dot_general(
      codes[:, rows],
      w[rows],
      (((1,), (0,)), ((), ())),
      preferred_element_type=jnp.float32 if sides.is_float else jnp.int32,
    )
    if 'z' in refs:
      zero = refs['z'][:, columns].astype(jnp.int32)[row]
      zero = zero + int(planar.offset_int8(layout))
      wide = codes[:, rows].astype(jnp.float32)  # Sums of codes are exact.
      sum_x = jnp.sum(wide, axis=1, keepdims=True).astype(jnp.int32)
      part = part - sum_x * zero
    if layout.group_size > 0:
      scale = refs['s'][:, columns].astype(jnp.float32)[row]
      part = part.astype(jnp.float32) * scale
    total = part if g == 0 else total + part
  return total


def _quantize(refs, sides, block):
  """The rows of x, 32 at a time, to codes and their scale in scratch."""
  K, bk = sides.layout.K, block.bk
  chunk = math.gcd(bk, rows_lib.CHUNK)

  @pl.loop(0, block.bm // _ROWS)
  def _(r):
    rows = pl.ds(pl.multiple_of(r * _ROWS, _ROWS), _ROWS)

    def read(c):
      return refs['x'][rows, c : c + chunk].astype(jnp.float32)

    def write(c, codes):
      refs['codes'][c // bk, rows, c % bk : c % bk + chunk] = codes

    refs['row_scale'][rows, :] = rows_lib.quantize_in_kernel(
      read, write, K, chunk, sides.x_format
    )


def _finish(refs, sides, block):
  """Sums to the output, 32 rows at a time: scale of rows and columns, bias."""
  row_scale = refs['x_scale' if sides.codes else 'row_scale']

  @pl.loop(0, block.bm // _ROWS)
  def _(r):
    at = pl.ds(pl.multiple_of(r * _ROWS, _ROWS), _ROWS)
    y = refs['acc'][at, :]
    if not sides.raw:
      y = y.astype(jnp.float32) * row_scale[at, :]
      if sides.layout.group_size < 0:
        y = y * refs['s'][...].astype(jnp.float32)
      if 'bias' in refs:
        y = y + refs['bias'][...].astype(jnp.float32)
    refs['out'][at, :] = y.astype(refs['out'].dtype)


@functools.cache
def _tuned():
  """'chip/w8a8/m512' -> fields of a Block."""
  if not TUNED.exists():
    return {}
  return json.loads(TUNED.read_text(encoding='utf-8'))['blocks']
