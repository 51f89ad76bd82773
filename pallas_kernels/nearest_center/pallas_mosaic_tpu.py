"""The best centers of each row on TPU; the scores never leave the chip.

Grid    (N/bn, K/bk), k innermost.
Body    x (bn, D) @ c (bk, D)^T in float32, plus the bias; then, 128 centers at
        a time, into sorted lists of the best `top` of every row and lane. After
        the last k the lanes of a row are merged, `top` times the best of all.
Ties    A later center displaces only what is worse, and what was displaced goes
        before its equals: the lowest index comes first, as in lax.top_k.
Blocks  x (bn, D), c (bk, D), bias (1, bk), values and indices (top, bn): ranks
        are rows, so that the outputs fill whole registers.
On-chip 2 * (bn + bk) * D * bytes + 4*bn*bk + 1024*top*bn + 16*top*bn.
        bn=256, bk=1024, D=4096, bf16: 21 + 1 MB.
Traffic N*D*bytes + K*D*bytes*(N/bn) + 8*top*N. N=6272, K=1024, D=896, bn=256:
        11 + 46 MB for 5.8 GMAC: bn multiply-adds for each element of c.
Needs   bfloat16 or float32 of one kind; top up to 8. Fewer than 128 rows or
        centers are padded to that.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compat, targets

MOST = 8
_LANES = 128
_ROWS = 32  # That are ranked at a time, in registers.
_BUDGET = 24 * 2**20  # Bytes of x and c on the chip.
_LOWEST = float(jnp.finfo(jnp.float32).min)
_NONE = 2**30  # Larger than any index.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
  """How a call is cut up: bn rows, bk centers of a step."""

  bn: int = 256
  bk: int = 1024

  def __post_init__(self):
    for name in ('bn', 'bk'):
      value = getattr(self, name)
      if value < _LANES or value % _LANES:
        raise ValueError(
          f'Block: {name}={value}; it must be a multiple of {_LANES}. Round it '
          'up.'
        )


def why_not(x: Any, c: Any, top: int, chip: str) -> str:
  """Why this kernel cannot serve; '' if it can."""
  if chip not in targets.TARGETS:
    return f'chip is {chip!r}; it runs on {sorted(targets.TARGETS)}.'
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    return f'x is {x.dtype}; it takes bfloat16 or float32. Cast x and c.'
  if top > MOST:
    return f'top={top}; it takes up to {MOST}.'
  least = onchip_bytes(Block(bn=_LANES, bk=_LANES), c.shape[-1], 4, top)
  if least > targets.get(chip).vmem // 2:
    return f'D={c.shape[-1]}; its rows do not fit the chip. Use xla.'
  return ''


def pick_block(N: int, K: int, D: int, itemsize: int) -> Block:
  """As many centers as fit, up to 1024, of 256 rows; no more than there are."""
  bn = min(256, _round_up(N))
  bk = min(1024, _round_up(K))
  while bk > _LANES and 2 * (bn + bk) * D * itemsize > _BUDGET:
    bk = _round_up(bk // 2)
  if 2 * (bn + bk) * D * itemsize > _BUDGET:
    bn = _LANES
  return Block(bn=bn, bk=bk)


def onchip_bytes(block: Block, D: int, itemsize: int, top: int) -> int:
  """The docstring's formula."""
  bn, bk = block.bn, block.bk
  lists = 8 * _LANES * top * bn
  return 2 * (bn + bk) * D * itemsize + 4 * bn * bk + lists + 16 * top * bn


def nearest_center(
  x: jax.Array,
  c: jax.Array,
  bias: jax.Array | None,
  top: int,
  *,
  chip: str,
  block: Block | None = None,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """x (N, D), c (K, D), bias (K,) -> values (N, top), indices (N, top).

  Raises:
    NotImplementedError: `why_not` has a reason.
  """
  if reason := why_not(x, c, top, chip):
    raise NotImplementedError(f'nearest_center: pallas_mosaic_tpu: {reason}')
  (N, D), K = x.shape, c.shape[0]
  block = block or pick_block(N, K, D, x.dtype.itemsize)
  operands = [_at_least(x, block.bn), _at_least(c, block.bk)]
  rows = operands[0].shape[0]
  in_specs = [
    pl.BlockSpec((block.bn, D), lambda n, k: (n, 0)),
    pl.BlockSpec((block.bk, D), lambda n, k: (k, 0)),
  ]
  if bias is not None:
    operands.append(_at_least(bias.astype(jnp.float32), block.bk)[None])
    in_specs.append(pl.BlockSpec((1, block.bk), lambda n, k: (0, k)))
  used = onchip_bytes(block, D, x.dtype.itemsize, top)
  lists = (top, block.bn, _LANES)
  values, indices = pl.pallas_call(
    functools.partial(
      _kernel,
      K=K,
      top=top,
      has_bias=bias is not None,
      unroll=not interpret,
    ),
    grid=(pl.cdiv(rows, block.bn), pl.cdiv(K, block.bk)),
    in_specs=in_specs,
    out_specs=[pl.BlockSpec((top, block.bn), lambda n, k: (0, n))] * 2,
    out_shape=[
      compat.out_struct((top, rows), jnp.float32, *operands),
      compat.out_struct((top, rows), jnp.int32, *operands),
    ],
    scratch_shapes=[
      pltpu.VMEM((block.bn, block.bk), jnp.float32),
      pltpu.VMEM(lists, jnp.float32),
      pltpu.VMEM(lists, jnp.int32),
    ],
    compiler_params=compat.tpu_params(
      ('parallel', 'arbitrary'), used + used // 2 + 8 * 2**20
    ),
    interpret=compat.interpret_mode(interpret),
    name='nearest_center',
  )(*operands)
  return values.T[:N], indices.T[:N]


def _kernel(x_ref, c_ref, *refs, K, top, has_bias, unroll):
  b_ref = refs[0] if has_bias else None
  v_ref, i_ref, s_ref, best_ref, at_ref = refs[has_bias:]
  k, bk = pl.program_id(1), c_ref.shape[0]

  @pl.when(k == 0)
  def _():
    best_ref[...] = jnp.full_like(best_ref, -jnp.inf)
    at_ref[...] = jnp.full_like(at_ref, _NONE)

  s = jax.lax.dot_general(
    x_ref[...],
    c_ref[...],
    (((1,), (1,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )
  s_ref[...] = s if b_ref is None else s + b_ref[...]

  # Unrolled on a chip: rows are independent, and the schedule overlaps them.
  @pl.loop(0, x_ref.shape[0] // _ROWS, unroll=unroll)
  def _(r):
    rows = pl.ds(pl.multiple_of(r * _ROWS, _ROWS), _ROWS)
    _rank(s_ref, best_ref, at_ref, rows, k * bk, K)

  @pl.when(k == pl.num_programs(1) - 1)
  def _():
    for row in range(0, x_ref.shape[0], _LANES):
      rows = slice(row, row + _LANES)
      v_ref[:, rows], i_ref[:, rows] = _merge_lanes(best_ref, at_ref, rows)


def _rank(s_ref, best_ref, at_ref, rows, first, K):
  """Puts the scores of some rows into their lists."""
  top, bk = best_ref.shape[0], s_ref.shape[1]
  best = [best_ref[t, rows] for t in range(top)]
  at = [at_ref[t, rows] for t in range(top)]
  lane = jax.lax.broadcasted_iota(jnp.int32, best[0].shape, 1)
  for start in range(0, bk, _LANES):
    # -inf is what no center has, so that centers left out are ranked too.
    v = jnp.maximum(s_ref[rows, start : start + _LANES], _LOWEST)
    i = first + start + lane
    if K % bk:  # What lies after the last center is never better.
      v = jnp.where(i < K, v, -jnp.inf)
    moved = None
    for t in range(top):
      better = v > best[t]
      moved = better if moved is None else moved | better
      best[t], v = jnp.where(moved, v, best[t]), jnp.where(moved, best[t], v)
      at[t], i = jnp.where(moved, i, at[t]), jnp.where(moved, at[t], i)
  for t in range(top):
    best_ref[t, rows] = best[t]
    at_ref[t, rows] = at[t]


def _merge_lanes(best_ref, at_ref, rows):
  """Lists of 128 rows by lane -> values, indices (top, 128): rows to lanes."""
  top = best_ref.shape[0]
  best = [best_ref[t, rows] for t in range(top)]
  at = [at_ref[t, rows] for t in range(top)]
  rank = jax.lax.broadcasted_iota(jnp.int32, best[0].shape, 1)
  values, indices = jnp.zeros_like(best[0]), jnp.zeros_like(at[0])
  for t in range(top):
    v = jnp.max(best[0], axis=1, keepdims=True)
    i = jnp.min(jnp.where(best[0] == v, at[0], _NONE), axis=1, keepdims=True)
    values = jnp.where(rank == t, v, values)
    indices = jnp.where(rank == t, i, indices)
    taken = at[0] == i
    for r in range(top - 1):
      best[r] = jnp.where(taken, best[r + 1], best[r])
      at[r] = jnp.where(taken, at[r + 1], at[r])
    best[-1] = jnp.where(taken, -jnp.inf, best[-1])
    at[-1] = jnp.where(taken, _NONE, at[-1])
  values = jnp.where(values == _LOWEST, -jnp.inf, values)
  return values.T[:top], indices.T[:top]


def _round_up(n):
  return -(-n // _LANES) * _LANES


def _at_least(x, rows):
  """x with zero rows appended where it has fewer than a block."""
  short = max(rows - x.shape[0], 0)
  return jnp.pad(x, ((0, short),) + ((0, 0),) * (x.ndim - 1))
