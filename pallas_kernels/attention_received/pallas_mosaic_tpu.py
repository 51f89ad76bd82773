"""Attention received on TPU; the weights never leave the registers' memory.

Grid    (B, H, S/bs, T/bt), t innermost.
Body    k (bs, D) @ q (bt, D)^T: keys are rows and queries lanes, so that lse is
        a row to subtract. exp, then sums (or maxima) of lanes that are 128
        apart, in scratch (bs, 128). After the last t one transpose, and the 128
        that are left are taken together over sublanes.
Blocks  q (bt, D), k (bs, D), lse (1, bt), out (1, bs). Heads are columns: q is
        seen as (B, T, H*D), k as (B, S, Hkv*D), so nothing is transposed.
On-chip 2 * (bt + bs) * D * bytes + 8*bt*bs + 512*bs + 64*(bt + bs).
        bt=512, bs=1024, D=128, bf16: 0.8 + 4.2 + 0.5 MB.
Traffic B * (H*S*D*bytes + H*T*D*bytes*(S/bs)) + 4*B*H*(T*(S/bs) + S).
        B=1, H=32, T=S=4096, D=128, bs=1024: 34 + 134 + 3 MB; 2 GB of weights.
Causal  Blocks that no row sees are skipped.
Needs   bfloat16 or float32. D is padded to a multiple of 128 (as the chip's
        memory does), T to a multiple of bt; fewer than 128 keys to that.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compat, targets

_LANES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
  """How a call is cut up: bt queries, bs keys of a step."""

  bt: int = 512
  bs: int = 1024

  def __post_init__(self):
    for name in ('bt', 'bs'):
      value = getattr(self, name)
      if value < _LANES or value % _LANES:
        raise ValueError(
          f'Block: {name}={value}; it must be a multiple of {_LANES}. Round it '
          'up.'
        )


def why_not(q: Any, k: Any, chip: str) -> str:
  """Why this kernel cannot serve; '' if it can."""
  del k
  if chip not in targets.TARGETS:
    return f'chip is {chip!r}; it runs on {sorted(targets.TARGETS)}.'
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    return f'q is {q.dtype}; it takes bfloat16 or float32. Cast q and k.'
  return ''


def pick_block(T: int, S: int) -> Block:
  """512 queries and 1024 keys, or as many as there are.

  Queries are cut into equal parts, so that little of the last is padding.
  """
  parts = -(-T // 512)
  return Block(
    bt=_round_up(-(-T // parts)),
    bs=min(1024, max(_LANES, S // _LANES * _LANES)),
  )


def onchip_bytes(block: Block, D: int, itemsize: int) -> int:
  """The docstring's formula."""
  bt, bs = block.bt, block.bs
  rows = 2 * 8 * 4 * (bt + bs)  # lse and out, padded to eight sublanes.
  return 2 * (bt + bs) * D * itemsize + 8 * bt * bs + 4 * _LANES * bs + rows


def attention_received(
  q: jax.Array,
  k: jax.Array,
  lse: jax.Array,
  *,
  reduce: str,
  scale: float,
  causal: bool,
  chip: str,
  block: Block | None = None,
  interpret: bool = False,
) -> jax.Array:
  """q (B, T, H, D), k (B, S, Hkv, D), lse (B, H, T) -> (B, H, S) float32.

  Raises:
    NotImplementedError: `why_not` has a reason.
  """
  if reason := why_not(q, k, chip):
    raise NotImplementedError(
      f'attention_received: pallas_mosaic_tpu: {reason}'
    )
  B, T, H, _ = q.shape
  S, Hkv = k.shape[1:3]
  block = block or pick_block(T, S)
  bt, bs = block.bt, block.bs
  q = _heads_as_columns(q, -T % bt)
  k = _heads_as_columns(k, max(bs - S, 0))
  # Rows of padding do not count, as those with an infinite lse.
  lse = jnp.where(jnp.isfinite(lse), lse, jnp.inf)
  lse = jnp.pad(lse, ((0, 0), (0, 0), (0, -T % bt)), constant_values=jnp.inf)[
    :, :, None
  ]
  S_padded, D = k.shape[1], q.shape[2] // H
  per_kv = H // Hkv
  operands = (q, k, lse)
  kernel = functools.partial(
    _kernel, reduce=reduce, scale=scale, ahead=S - T if causal else None
  )
  used = onchip_bytes(block, D, q.dtype.itemsize)
  received = pl.pallas_call(
    kernel,
    grid=(B, H, pl.cdiv(S_padded, bs), q.shape[1] // bt),
    in_specs=[
      pl.BlockSpec((None, bt, D), lambda b, h, s, t: (b, t, h)),
      pl.BlockSpec(
        (None, bs, D), lambda b, h, s, t: (b, s, jax.lax.div(h, per_kv))
      ),
      pl.BlockSpec((None, None, 1, bt), lambda b, h, s, t: (b, h, 0, t)),
    ],
    out_specs=pl.BlockSpec(
      (None, None, 1, bs), lambda b, h, s, t: (b, h, 0, s)
    ),
    out_shape=compat.out_struct((B, H, 1, S_padded), jnp.float32, *operands),
    scratch_shapes=[pltpu.VMEM((bs, _LANES), jnp.float32)],
    compiler_params=compat.tpu_params(
      ('parallel', 'parallel', 'parallel', 'arbitrary'),
      used + used // 2 + 8 * 2**20,
    ),
    interpret=compat.interpret_mode(interpret),
    name='attention_received',
  )(*operands)
  return received[:, :, 0, :S]


def _kernel(q_ref, k_ref, lse_ref, o_ref, acc_ref, *, reduce, scale, ahead):
  bs, bt = k_ref.shape[0], q_ref.shape[0]
  s, t = pl.program_id(2) * bs, pl.program_id(3) * bt
  join = jnp.add if reduce == 'sum' else jnp.maximum

  @pl.when(pl.program_id(3) == 0)
  def _():
    acc_ref[...] = jnp.zeros_like(acc_ref)

  # A causal block counts if its last row sees its first key.
  @pl.when(True if ahead is None else t + bt - 1 + ahead >= s)
  def _():
    logits = jax.lax.dot_general(
      k_ref[...],
      q_ref[...],
      (((1,), (1,)), ((), ())),
      precision=jax.lax.Precision.HIGHEST
      if q_ref.dtype == jnp.float32
      else None,
      preferred_element_type=jnp.float32,
    )  # (bs, bt)
    lse = lse_ref[...]
    # Whatever is in rows that do not count, and in padding, even NaN.
    p = jnp.where(lse < jnp.inf, jnp.exp(scale * logits - lse), 0.0)
    if ahead is not None:
      key = s + jax.lax.broadcasted_iota(jnp.int32, p.shape, 0)
      row = t + jax.lax.broadcasted_iota(jnp.int32, p.shape, 1)
      p = jnp.where(key <= row + ahead, p, 0.0)
    total = acc_ref[...]
    for start in range(0, bt, _LANES):
      total = join(total, p[:, start : start + _LANES])
    acc_ref[...] = total

  @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
  def _():
    lanes = acc_ref[...].T  # (128, bs)
    over = jnp.sum if reduce == 'sum' else jnp.max
    o_ref[...] = over(lanes, axis=0, keepdims=True)


def _heads_as_columns(x, rows):
  """(B, T, H, D) -> (B, T + rows, H * D'), D' a multiple of 128."""
  B, T, H, D = x.shape
  x = jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, -D % _LANES)))
  return x.reshape(B, T + rows, -1)


def _round_up(n):
  return -(-n // _LANES) * _LANES
