"""x (M, K) bf16 @ packed weights (K, N) on TPU; two bodies.

post, for few rows. The cost is reading the weight once.
  Grid    (M/bm, N/bn, K/bk), k innermost; sums in scratch.
  Body    for each unit of U rows (planar.py): unpack to bf16 codes that are off
          by a constant, one dot, and per group of the unit
          sum += (dot - (offset + zero_point) * sum(x)) * scale.
          A unit with g groups multiplies g copies of x, each zero outside of
          its group: at few rows the dot costs what loading the weight into the
          matrix unit costs, so the copies are free, and no group has a dot of
          its own.
  Blocks  x (g, bm, bk) reordered, qvalue (bk*b/8, bn), scale (bk/G, bn),
          out (bm, bn).
  On-chip 2 * (2*g*bm*bk + bk*bn*b/8 + 4*bk*bn/G + 4*bm*bn) + 4*bm*bn.
          M=16, b=4, G=128, bk=8192, bn=512: 5.3 MB.
pre, for many rows. The cost is the matrix unit.
  Grid    the same. Body: for each sub-tile of the weight, codes to
          (code - zero_point) * scale in float32, to bf16, and a dot with all
          rows, so that each is used once, where it was made. Per-column scales
          wait for the end, and the codes are exact.
  On-chip as above with g = 1.
Traffic 2*g*M*K*(N/bn if bk < K else 1) + (K*N*b/8 + 4*K*N/G)*(M/bm) + 2*M*N
        bytes. M=16, K=8192, N=28672, b=4, G=128: 117.4 + 7.3 (float32 scales)
        + 1.2 = 126 MB; in bf16 the weight alone has 470.
Needs   K a multiple of the unit (64 rows at 4 bits, 128 at 2, 256 at 1, 32 at
        8), groups of 32, 64 or 128 or one per column, bf16 x. M is padded to a
        multiple of 16 outside, N to whole blocks by the pipeline; where N is no
        multiple of 128, XLA stores the weight otherwise and copies it first.
Whole   group_size = K is one scale per column of a weight that is packed in one
        tile of any K rows. Its bytes are read as those of the usual tiles: x is
        put into their order, with zeros where the last bytes of the last block
        are not there. The weight is not touched.
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

GROUP_SIZES = (-1, 32, 64, 128)
TUNED = pathlib.Path(__file__).with_name('tuned_tpu.json')
_ROWS = 16  # Of a register of bf16.
_POST_ROWS = 64  # From here on registers do not hold the sums.
_STEP_BYTES = 2 * 2**20  # Weight bytes of a step that hide its fixed costs.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
  """How a call is cut up.

  Attributes:
    bm, bk, bn: rows of x, rows and columns of the weight of a step.
    sub_k, sub_n: of the weight in a dot inside the body; 0 is all. The post
      body has units in place of sub_k.
    unpack: 'words' or 'native' (planar.py); of the post body.
    body: 'post' or 'pre'.
  """

  bm: int
  bk: int
  bn: int
  sub_k: int = 0
  sub_n: int = 0
  unpack: str = 'words'
  body: str = 'post'

  def __post_init__(self):
    for name, allowed in (('unpack', planar.FORMS), ('body', ('post', 'pre'))):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'Block: {name}={getattr(self, name)!r}; allowed {sorted(allowed)}. '
          'Use one of them.'
        )
    for of, part in ((self.bk, self.sub_k), (self.bn, self.sub_n)):
      if of < 1 or part < 0 or (part and of % part):
        raise ValueError(
          f'Block: a sub-tile of {part} in a block of {of}; it must divide it. '
          'Use a divisor, or 0 for all.'
        )


def why_not(x: Any, qvalue: Any, layout: planar.Planar, chip: str) -> str:
  """Why this kernel cannot serve; '' if it can."""
  if chip not in targets.TARGETS:
    return f'chip is {chip!r}; it runs on {sorted(targets.TARGETS)}.'
  if x.dtype != jnp.bfloat16:
    return f'x is {x.dtype}; it takes bfloat16. Cast x.'
  if qvalue.ndim != 2:
    return 'the weight is packed for Hopper; it takes it as stored.'
  if qvalue.dtype not in (jnp.int8, jnp.uint8):
    return f'qvalue is {qvalue.dtype}; it takes integers.'
  layout = _in_tiles(layout)
  if layout.group_size not in GROUP_SIZES:
    return (
      f'group_size={layout.group_size}; it takes {list(GROUP_SIZES)}, where '
      '-1 is one scale per column, as is K.'
    )
  if not layout.unit or not (layout.is_packed or layout.bits == 8):
    least = 32 * layout.fields
    return (
      f'K={layout.K} at bits={layout.bits} in tiles of {layout.tile}; it '
      f'takes multiples of {max(least, 32)}. Pad K when packing.'
    )
  return ''


def weight_only_matmul(
  x: jax.Array,
  qvalue: jax.Array,
  scale: jax.Array,
  zero_point: jax.Array | None,
  layout: planar.Planar,
  out_dtype: Any,
  *,
  chip: str,
  block: Block | None = None,
  interpret: bool = False,
) -> jax.Array:
  """x (M, K), qvalue (rows, N), scale (1 or K/G, N) -> (M, N) of out_dtype.

  Raises:
    NotImplementedError: `why_not` has a reason.
    ValueError: a block that does not fit.
  """
  M, N = x.shape[0], qvalue.shape[-1]
  if reason := why_not(x, qvalue, layout, chip):
    raise NotImplementedError(
      f'weight_only_matmul: pallas_mosaic_tpu: {reason}'
    )
  if layout.group_size == layout.K:
    layout = _in_tiles(layout)
    x = _spread(x, layout)
  if block is None:
    block = pick_block(M, N, layout, scale.dtype, chip)
  check_block(block, N, layout, scale.dtype)
  if scale.dtype == jnp.float16:  # The chip has no such registers.
    scale = scale.astype(jnp.float32)
  x = jnp.pad(x, ((0, -M % block.bm), (0, 0)))
  x = _left(x, layout, block)
  y = _call(x, qvalue, scale, zero_point, layout, out_dtype, block, interpret)
  return y[:M]


def pick_block(
  M: int, N: int, layout: planar.Planar, scale_dtype: Any, chip: str
) -> Block:
  """The block of the tuned table, or a heuristic where it has none.

  The table is one of static schedules (static_schedule.py), keyed by chip,
  bits, group_size, symmetry and whether M is at most 16, 64 or more.
  """
  bm = row_block(M)
  row = _tuned().get(_key(chip, layout, bm))
  if row is not None:
    return _fit(Block(**{**row, 'bm': bm}), N, layout, scale_dtype)
  words = layout.bits == 1 or (layout.bits < 8 and chip in ('v5e', 'v5p'))
  post = bm <= _POST_ROWS
  block = Block(
    bm=bm,
    bk=8192 if post else 2048,
    bn=512,
    sub_k=0 if post else 512,
    sub_n=0 if post else 256,
    unpack='words' if words else 'native',
    body='post' if post else 'pre',
  )
  return _fit(block, N, layout, scale_dtype)


def row_block(M: int) -> int:
  """Rows of a block: all up to 512, then equal parts; multiples of 16."""
  parts = -(-M // 512)
  return -(-M // (parts * _ROWS)) * _ROWS


def legal_bk(layout: planar.Planar, scale_dtype: Any) -> list[int]:
  """Depths of a block, ascending; the last is K."""
  step = math.lcm(layout.unit, 128)
  if layout.group_size > 0:
    rows = 8 * 4 // jnp.dtype(scale_dtype).itemsize
    rows = rows if layout.signed or layout.bits == 1 else 32
    step = math.lcm(step, rows * layout.group_size)
  K = layout.K
  return [b for b in range(step, K, step) if K % b == 0] + [K]


def check_block(
  block: Block, N: int, layout: planar.Planar, scale_dtype: Any
) -> None:
  """Raises ValueError for a block that does not fit the call."""
  legal = legal_bk(layout, scale_dtype)
  if block.bk not in legal:
    raise ValueError(
      f'Block: bk={block.bk} with K={layout.K}, group_size={layout.group_size};'
      f' allowed {legal}. Use one of them.'
    )
  if block.bn % 128 and block.bn != N:
    raise ValueError(
      f'Block: bn={block.bn} with N={N}; it must be a multiple of 128, or N. '
      'Round it.'
    )
  if block.sub_k % layout.unit:
    raise ValueError(
      f'Block: sub_k={block.sub_k} with units of {layout.unit} rows; it must '
      'be a multiple of them. Round it.'
    )
  if block.bm % _ROWS:
    raise ValueError(
      f'Block: bm={block.bm}; it must be a multiple of {_ROWS}. Round it up.'
    )
  if block.body == 'post' and block.unpack == 'native' and layout.bits == 1:
    raise ValueError(
      "Block: unpack='native' with bits=1; no chip has such a type. Use "
      "'words'."
    )


def onchip_bytes(block: Block, layout: planar.Planar, scale_bytes: int) -> int:
  """The docstring's formula."""
  bm, bk, bn = block.bm, block.bk, block.bn
  g = layout.groups_of_unit if block.body == 'post' else 1
  rows = bk // layout.group_size if layout.group_size > 0 else 1
  scales = rows * bn * (scale_bytes + (not layout.signed))
  buffers = 2 * g * bm * bk + bk * bn // layout.fields + scales + 4 * bm * bn
  return 2 * buffers + 4 * bm * bn


def _in_tiles(layout):
  """Of a weight in one tile: the tiles that its bytes are read as.

  K is rounded up to whole registers of bytes; the last of them do not exist.
  """
  bytes_are_full = layout.is_packed or layout.bits == 8
  if layout.group_size != layout.K or not bytes_are_full:
    return layout
  rows = -(-layout.rows // planar.BYTE_ROWS) * planar.BYTE_ROWS
  return dataclasses.replace(layout, K=rows * layout.fields, group_size=-1)


def _spread(x, layout):
  """x (M, K) for a weight in one tile -> (M, layout.K), in the tiles' order.

  Field f of byte row i is row f * rows + i of the one tile. In tiles of T it is
  row f * T / fields + i % (T / fields) of tile i // (T / fields).
  """
  M, F = x.shape[0], layout.fields
  x = x.reshape(M, F, -1)
  x = jnp.pad(x, ((0, 0), (0, 0), (0, layout.rows - x.shape[2])))
  x = x.reshape(M, F, -1, layout.tile // F)  # field, tile, byte row
  return x.transpose(0, 2, 1, 3).reshape(M, layout.K)


def _left(x, layout, block):
  """(M, K) -> (g, M, K): reordered, and cut into groups of a unit."""
  if block.body == 'pre':
    return x[None]
  form = 'native' if layout.bits == 8 else block.unpack
  x = planar.reorder(x, layout, form)
  if layout.groups_of_unit == 1:
    return x[None]
  masks = planar.group_masks(layout, form)  # (g, U)
  masks = jnp.tile(masks, (1, layout.K // layout.unit))
  return jnp.where(masks[:, None], x[None], jnp.zeros((), x.dtype))


def _call(x, qvalue, scale, zero_point, layout, out_dtype, block, interpret):
  (g, M, K), N = x.shape, qvalue.shape[-1]
  bm, bk, bn = block.bm, block.bk, block.bn
  grouped = layout.group_size > 0
  rows = bk // layout.group_size if grouped else 1
  per_k = (lambda i, j, k: (k, j)) if grouped else (lambda i, j, k: (0, j))
  operands = [x, qvalue, scale]
  in_specs = [
    pl.BlockSpec((g, bm, bk), lambda i, j, k: (0, i, k)),
    pl.BlockSpec((bk // layout.fields, bn), lambda i, j, k: (k, j)),
    pl.BlockSpec((rows, bn), per_k),
  ]
  if zero_point is not None:
    operands.append(zero_point)
    in_specs.append(pl.BlockSpec((rows, bn), per_k))
  kernel = functools.partial(
    _kernel,
    body=_pre if block.body == 'pre' else _post,
    layout=layout,
    block=block,
    has_zero=zero_point is not None,
  )
  used = onchip_bytes(block, layout, scale.dtype.itemsize)
  return pl.pallas_call(
    kernel,
    grid=(M // bm, pl.cdiv(N, bn), K // bk),
    in_specs=in_specs,
    out_specs=pl.BlockSpec((bm, bn), lambda i, j, k: (i, j)),
    out_shape=compat.out_struct((M, N), out_dtype, *operands),
    scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
    compiler_params=compat.tpu_params(
      ('parallel', 'parallel', 'arbitrary'), used + used // 2 + 4 * 2**20
    ),
    interpret=compat.interpret_mode(interpret),
    name=f'weight_only_w{layout.bits}',
  )(*operands)


def _kernel(x_ref, q_ref, s_ref, *refs, body, layout, block, has_zero):
  """Sums over k in acc_ref; scale per column and store at the last k."""
  z_ref = refs[0] if has_zero else None
  o_ref, acc_ref = refs[has_zero:]
  k = pl.program_id(2)

  @pl.when(k == 0)
  def _():
    acc_ref[...] = jnp.zeros_like(acc_ref)

  width = block.sub_n or block.bn
  for start in range(0, block.bn, width):
    columns = slice(start, start + width)
    body(x_ref, q_ref, s_ref, z_ref, acc_ref, columns, layout, block)

  @pl.when(k == pl.num_programs(2) - 1)
  def _():
    @pl.loop(0, block.bm // _ROWS)
    def _(r):
      at = pl.ds(pl.multiple_of(r * _ROWS, _ROWS), _ROWS)
      y = acc_ref[at, :]
      if layout.group_size < 0:
        y = y * s_ref[...].astype(jnp.float32)
      if layout.bits == 1 and block.body == 'post':
        y = y * 2.0  # A sign is twice (bit - 1/2).
      o_ref[at, :] = y.astype(o_ref.dtype)


def _post(x_ref, q_ref, s_ref, z_ref, acc_ref, columns, layout, block):
  g, bm, bk = x_ref.shape
  U, grouped = layout.unit, layout.group_size > 0
  rows = U // layout.fields
  form = 'native' if layout.bits == 8 else block.unpack
  unpack = planar.unpack_words if form == 'words' else planar.unpack_native
  offset = layout.offset(form)
  scale = _rows_of(s_ref, columns)
  zero = None if z_ref is None else _rows_of(z_ref, columns)
  corrected = offset != 0.0 or zero is not None
  total = acc_ref[:, columns]
  sums = jnp.zeros((bm, 1), jnp.float32)
  for u in range(bk // U):
    xu = x_ref[:, :, u * U : (u + 1) * U].reshape(g * bm, U)
    w = unpack(q_ref[u * rows : (u + 1) * rows, columns], layout)
    part = _dot(xu, w)  # (g * bm, n)
    if corrected:
      sum_x = jnp.sum(xu.astype(jnp.float32), axis=1, keepdims=True)
    if not grouped:
      total = total + part
      sums = sums + sum_x if corrected else sums
      continue
    for i in range(g):
      row, of = slice(u * g + i, u * g + i + 1), slice(i * bm, (i + 1) * bm)
      p = part[of]
      if corrected:
        p = p - sum_x[of] * (offset if zero is None else zero(row) + offset)
      total = total + p * scale(row)
  if corrected and not grouped:
    total = total - sums * (offset if zero is None else zero(slice(1)) + offset)
  acc_ref[:, columns] = total


def _pre(x_ref, q_ref, s_ref, z_ref, acc_ref, columns, layout, block):
  bk = x_ref.shape[2]
  depth = block.sub_k or bk
  for k in range(0, bk, depth):
    rows = slice(k, k + depth)
    if layout.bits == 8 and layout.group_size < 0 and z_ref is None:
      w = q_ref[rows, columns].astype(jnp.bfloat16)
    else:
      w = _dequantize(q_ref, s_ref, z_ref, rows, columns, layout)
    acc_ref[:, columns] += _dot(x_ref[0, :, rows], w)


def _dequantize(q_ref, s_ref, z_ref, rows, columns, layout):
  """Rows of codes -> bf16, natural order; per-column scales are left out."""
  U, G, F = layout.unit, layout.group_size, layout.fields
  offset = planar.offset_int8(layout)
  scale = _rows_of(s_ref, columns)
  zero = None if z_ref is None else _rows_of(z_ref, columns)

  def centered(codes, row):
    if zero is not None:
      return codes - (zero(row) + offset)
    return codes  # Signed: there is no offset.

  units = []
  for start in range(rows.start, rows.stop, U):
    packed = q_ref[start // F : (start + U) // F, columns]
    codes = planar.unpack_rows(packed, layout)  # (U, n)
    if G < 0:
      units.append(centered(codes, slice(1)).astype(jnp.bfloat16))
      continue
    for i in range(U // G):
      row = slice(start // G + i, start // G + i + 1)
      part = centered(codes[i * G : (i + 1) * G], row) * scale(row)
      units.append(part.astype(jnp.bfloat16))
  return jnp.concatenate(units, axis=0)


def _rows_of(ref, columns):
  """Function of a slice of rows: those of scales or zero points, float32.

  float32 is loaded where it is used; what shares registers is taken apart once.
  """
  if ref.dtype == jnp.float32:
    return lambda row: ref[row, columns]
  block = ref[:, columns]
  if ref.dtype == jnp.uint8:
    block = block.astype(jnp.int32)
  block = block.astype(jnp.float32)
  return lambda row: block[row]


def _dot(x, w):
  return jax.lax.dot_general(
    x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
  )


def _fit(block, N, layout, scale_dtype):
  """The block, cut down to the call: bn to N, bk to a legal depth."""
  bn = block.bn
  if bn > N:
    bn = N if N < 128 else N // 128 * 128
  legal = legal_bk(layout, scale_dtype)
  bk = max([b for b in legal if b <= block.bk], default=legal[0])
  wide = bk * bn // layout.fields
  while wide > 2 * _STEP_BYTES and bn % 256 == 0:  # Only a whole K was legal.
    bn, wide = bn // 2, wide // 2
  sub_n = block.sub_n if block.sub_n and bn % block.sub_n == 0 else 0
  sub_k = block.sub_k if block.sub_k and bk % block.sub_k == 0 else 0
  sub_k = 0 if sub_k % layout.unit else sub_k
  return dataclasses.replace(block, bk=bk, bn=bn, sub_k=sub_k, sub_n=sub_n)


def _key(chip, layout, bm):
  rows = 16 if bm <= 16 else 64 if bm <= _POST_ROWS else 512
  zero = '' if layout.signed or layout.bits == 1 else 'z'
  group = f'g{layout.group_size}' if layout.group_size > 0 else ''
  return f'{chip}/w{layout.bits}{group}{zero}/m{rows}'


@functools.cache
def _tuned():
  """'chip/w4g128/m16' -> fields of a Block."""
  if not TUNED.exists():
    return {}
  return json.loads(TUNED.read_text(encoding='utf-8'))['blocks']
