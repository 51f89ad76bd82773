"""Flash attention on TPU, and the sums of its columns.

forward
  Grid    (B, H, T/bq, S/bk), keys innermost; softmax in scratch.
  Body    s = q k^T scale, masked; p = exp(s - m); acc = acc e^(m' - m) + p v.
  A tile that no query of the block sees (above the diagonal, before the
  window, behind the length) is not computed, and the last one that was seen
  stands in for it, so that it is not loaded.
received
  Grid    (B, H, S/bk, T/bq), queries innermost; sum += w exp(s - lse).
  Queries lie at any positions; the newest and oldest of a block of them say
  which tiles it sees.
On-chip 2 * 2 * (2 bq + 2 bk) D + 4 bq (D + 256) + about 3 * 4 bq bk. bq = bk =
        512, D = 128: 1.0 + 0.8 + 3.1 = 5 MB.
Traffic 2 D (2 T + 2 S T / bq / 2) bytes a head, causal. T = S = 8192, bq 512:
        36 MB, against 17 G multiply-adds.
Needs   bfloat16, D 64, 128 or 256. T and S are padded outside to whole blocks;
        q, k and v are transposed to (B, H, T, D), which copies them once.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compat, targets, tiles

_HEAD_DIMS = (64, 128, 256)
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
  """bq, bk: queries and keys of a tile."""

  bq: int = 512
  bk: int = 512

  def __post_init__(self):
    if self.bq % 128 or self.bk % 128 or min(self.bq, self.bk) < 1:
      raise ValueError(
        f'Block: bq={self.bq}, bk={self.bk}; both must be multiples of 128. '
        'Round them.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
  """What of a call is static."""

  bq: int
  bk: int
  group: int
  scale: float
  window: int | None
  softcap: float | None


def why_not(q: Any, k: Any, v: Any, chip: str) -> str:
  """Why this kernel cannot serve; '' if it can."""
  if chip not in targets.TARGETS:
    return f'chip is {chip!r}; it runs on {sorted(targets.TARGETS)}.'
  for name, x in (('q', q), ('k', k), ('v', v)):
    if x.dtype != jnp.bfloat16:
      return f'{name} is {x.dtype}; it takes bfloat16. Cast it.'
  if q.shape[3] not in _HEAD_DIMS:
    return f'head_dim={q.shape[3]}; it takes {list(_HEAD_DIMS)}.'
  return ''


def prefill_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  start: jax.Array,
  lengths: jax.Array,
  *,
  scale: float,
  window: int | None,
  softcap: float | None,
  block: Block | None = None,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """As base.prefill_attention."""
  B, T, H, D = q.shape
  call, q, (k, v), T_pad, S_pad = _prepare(
    q, (k, v), block, scale, window, softcap
  )
  bq, bk = call.bq, call.bk

  def keys(b, h, i, j, start, lengths):
    low, high = _seen_blocks(call, i, start[b], lengths[b])
    return b, jax.lax.div(h, call.group), jnp.clip(j, low, high), 0

  rows = lambda b, h, i, j, *_: (b, h, i, 0)
  out, lse = pl.pallas_call(
    functools.partial(_forward, call=call),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(B, H, T_pad // bq, S_pad // bk),
      in_specs=[
        pl.BlockSpec((1, 1, bq, D), rows),
        pl.BlockSpec((1, 1, bk, D), keys),
        pl.BlockSpec((1, 1, bk, D), keys),
      ],
      out_specs=[
        pl.BlockSpec((1, 1, bq, D), rows),
        pl.BlockSpec((1, 1, bq, tiles.LANES), rows),
      ],
      scratch_shapes=[
        pltpu.VMEM((bq, D), jnp.float32),
        pltpu.VMEM((bq, tiles.LANES), jnp.float32),
        pltpu.VMEM((bq, tiles.LANES), jnp.float32),
      ],
    ),
    out_shape=[
      compat.out_struct((B, H, T_pad, D), q.dtype, q, k, v),
      compat.out_struct((B, H, T_pad, tiles.LANES), jnp.float32, q, k, v),
    ],
    compiler_params=compat.tpu_params(
      ('parallel', 'parallel', 'parallel', 'arbitrary'), 48 * 2**20
    ),
    interpret=compat.interpret_mode(interpret),
    name='prefill_attention',
  )(start, lengths, q, k, v)
  out = out[:, :, :T].transpose(0, 2, 1, 3)
  return out, lse[:, :, :T, 0].transpose(0, 2, 1)


def received(
  q: jax.Array,
  k: jax.Array,
  lse: jax.Array,
  weights: jax.Array,
  positions: jax.Array,
  lengths: jax.Array,
  *,
  scale: float,
  window: int | None,
  softcap: float | None,
  block: Block | None = None,
  interpret: bool = False,
) -> jax.Array:
  """As base.received."""
  B, T, H, D = q.shape
  S = k.shape[1]
  call, q, (k,), T_pad, S_pad = _prepare(q, (k,), block, scale, window, softcap)
  bq, bk = call.bq, call.bk
  # A query that sees nothing, and padding, must not give anything.
  nothing = jnp.isneginf(lse)
  lse = jnp.where(nothing, -_MASKED, lse).transpose(0, 2, 1)
  lse = jnp.pad(lse, ((0, 0), (0, 0), (0, T_pad - T)), constant_values=-_MASKED)
  behind = ((0, 0), (0, T_pad - T))
  weights = jnp.pad(weights.astype(jnp.float32), behind)
  positions = jnp.pad(positions, behind, constant_values=-1)
  blocks = positions.reshape(B, T_pad // bq, bq)
  newest = jnp.max(blocks, axis=2)
  oldest = jnp.min(jnp.where(blocks < 0, newest[..., None], blocks), axis=2)

  def queries(b, h, j, i, *_):
    return b, h, i, 0

  def by_query(b, h, j, i, *_):
    return b, 0, i

  sums = pl.pallas_call(
    functools.partial(_received, call=call),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(B, H, S_pad // bk, T_pad // bq),
      in_specs=[
        pl.BlockSpec((1, 1, bq, D), queries),
        pl.BlockSpec(
          (1, 1, bk, D),
          lambda b, h, j, i, *_: (b, jax.lax.div(h, call.group), j, 0),
        ),
        pl.BlockSpec((1, 1, 1, bq), lambda b, h, j, i, *_: (b, h, 0, i)),
        pl.BlockSpec((1, 1, bq), by_query),
        pl.BlockSpec((1, 1, bq), by_query),
      ],
      out_specs=pl.BlockSpec(
        (1, 1, 1, bk), lambda b, h, j, i, *_: (b, h, 0, j)
      ),
    ),
    out_shape=compat.out_struct((B, H, 1, S_pad), jnp.float32, q, k, lse),
    compiler_params=compat.tpu_params(
      ('parallel', 'parallel', 'parallel', 'arbitrary'), 48 * 2**20
    ),
    interpret=compat.interpret_mode(interpret),
    name='received_attention',
  )(
    newest.reshape(-1),
    oldest.reshape(-1),
    lengths,
    q,
    k,
    lse[:, :, None],
    weights[:, None],
    positions[:, None],
  )
  return sums[:, :, 0, :S]


def _prepare(q, keys, block, scale, window, softcap):
  """Static facts; arrays as (B, heads, whole blocks of tokens, D)."""
  T, S = q.shape[1], keys[0].shape[1]
  block = block or Block()
  bq = min(block.bq, _round(T))
  bk = min(block.bk, _round(S))
  call = _Call(
    bq=bq,
    bk=bk,
    group=q.shape[2] // keys[0].shape[2],
    scale=scale,
    window=window,
    softcap=softcap,
  )

  def whole(x, size):
    x = x.transpose(0, 2, 1, 3)
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % size), (0, 0)))

  T_pad, S_pad = T + -T % bq, S + -S % bk
  return call, whole(q, bq), tuple(whole(x, bk) for x in keys), T_pad, S_pad


def _round(size):
  return -(-size // 128) * 128


def _seen_blocks(call, i, start, length):
  """First and last block of keys that the i-th block of queries may see."""
  newest = jnp.minimum(start + (i + 1) * call.bq, length) - 1
  high = jax.lax.div(jnp.maximum(newest, 0), call.bk)
  if call.window is None:
    return 0, high
  oldest = jnp.maximum(start + i * call.bq - call.window + 1, 0)
  return jnp.minimum(jax.lax.div(oldest, call.bk), high), high


def _sees(call, oldest, newest, j, length):
  """Whether queries from oldest to newest see any key of block j; scalars."""
  seen = (j * call.bk <= newest) & (j * call.bk < length)
  if call.window is not None:
    seen &= (j + 1) * call.bk - 1 > oldest - call.window
  return seen


def _mask(call, row, column, length):
  """What queries at `row` see of keys at `column`, which broadcast."""
  seen = (column <= row) & (column < length)
  if call.window is not None:
    seen &= column > row - call.window
  return seen


def _capped(s, call):
  s = s * call.scale
  if call.softcap is None:
    return s
  return call.softcap * jnp.tanh(s * (1.0 / call.softcap))


def _forward(
  start_ref,
  length_ref,
  q_ref,
  k_ref,
  v_ref,
  out_ref,
  lse_ref,
  acc,
  m,
  total,
  *,
  call,
):
  b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  start, length = start_ref[b], length_ref[b]

  @pl.when(j == 0)
  def _():
    acc[...] = jnp.zeros_like(acc)
    total[...] = jnp.zeros_like(total)
    m[...] = jnp.full_like(m, _MASKED)

  first = start + i * call.bq

  @pl.when(_sees(call, first, first + call.bq - 1, j, length))
  def _():
    s = _capped(tiles.dot(q_ref[0, 0], k_ref[0, 0], 1), call)
    row = first + jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
    column = j * call.bk + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
    s = jnp.where(_mask(call, row, column, length), s, _MASKED)
    before = m[...]
    largest = jnp.maximum(before, jnp.max(s, axis=1, keepdims=True))
    p = jnp.exp(s - tiles.repeat(largest, call.bk))
    shrink = jnp.exp(before - largest)
    m[...] = largest
    total[...] = total[...] * shrink + tiles.fold(p)
    v = tiles.keep_rows(v_ref[0, 0], length - j * call.bk)
    product = tiles.dot(p.astype(v.dtype), v, 0)
    acc[...] = acc[...] * tiles.repeat(shrink, acc.shape[1]) + product

  @pl.when(j == pl.num_programs(3) - 1)
  def _():
    sums = jnp.sum(total[...], axis=1, keepdims=True)
    nothing = m[...] <= _MASKED / 2
    share = jnp.where(nothing, 0.0, 1.0 / sums)
    out = acc[...] * tiles.repeat(share, acc.shape[1])
    out_ref[0, 0] = out.astype(out_ref.dtype)
    lse_ref[0, 0] = jnp.where(nothing, -jnp.inf, m[...] + jnp.log(sums))


def _received(
  newest_ref,
  oldest_ref,
  length_ref,
  q_ref,
  k_ref,
  lse_ref,
  weight_ref,
  position_ref,
  out_ref,
  *,
  call,
):
  b, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  length, block = length_ref[b], b * pl.num_programs(3) + i

  @pl.when(i == 0)
  def _():
    out_ref[...] = jnp.zeros_like(out_ref)

  @pl.when(_sees(call, oldest_ref[block], newest_ref[block], j, length))
  def _():
    # Keys along sublanes: log-sum-exps of queries lie along lanes.
    s = _capped(tiles.dot(k_ref[0, 0], q_ref[0, 0], 1), call)  # (bk, bq)
    p = jnp.exp(s - lse_ref[0, 0])
    column = j * call.bk + jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
    seen = _mask(call, position_ref[0], column, length)
    p = jnp.where(seen, p * weight_ref[0], 0.0)
    # Ones (8, bq) times p^T: a row of sums along lanes; p keeps 16 bits.
    ones = jnp.ones((8, call.bq), jnp.bfloat16)
    high = p.astype(jnp.bfloat16)
    low = (p - high.astype(jnp.float32)).astype(jnp.bfloat16)
    sums = tiles.dot(ones, high, 1) + tiles.dot(ones, low, 1)
    out_ref[0, 0] += sums[:1]
