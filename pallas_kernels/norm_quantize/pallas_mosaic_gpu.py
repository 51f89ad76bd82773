"""norm_quantize on Hopper: a row in registers, codes out.

Grid    (M,); a block is one warpgroup, and has a row: its mean (of a layer
        norm), its mean square, y, the absmax of y, codes. x is read once;
        weight and bias come from the L2. Copied columns are gathered by XLA
        before, (M, S), which has no need of their row's statistics.
On-chip K/128 registers of a thread for x, as many for y; no shared memory but
        that of the sums over warps.
Traffic M*K*(x bytes + 1) + 4*M, and M*S*(2*x bytes + 1) of copies.
        M=2048, K=8192, bf16: 50 MB.
Needs   bf16 or float32 x; K a multiple of 128 up to 16384, S one of 128.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import compat, hopper, hopper_rows, rows

plgpu = compat.mosaic_gpu


def why_not(x: Any, chip: str, copies: int = 0) -> str:
  """Why this kernel cannot serve; '' if it can."""
  if reason := hopper.why_not(chip):
    return reason
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    return f'x is {x.dtype}; it takes bfloat16 or float32. Cast x.'
  longest = hopper_rows.LONGEST
  if x.shape[-1] % 128 or x.shape[-1] > longest:
    return f'K={x.shape[-1]}; it takes multiples of 128 up to {longest}. Pad K.'
  if copies % 128 or copies > longest:
    return f'S={copies} copies; it takes multiples of 128 up to {longest}.'
  return ''


def norm_quantize(
  x: jax.Array,
  weight: jax.Array,
  bias: jax.Array,
  kind: str,
  eps: float,
  x_format: str,
  dynamic: bool,
  gather: jax.Array | None = None,
  narrow: bool = True,
  *,
  chip: str,
  interpret: bool,
) -> tuple[jax.Array, jax.Array | None]:
  """As base.norm_quantize.

  Raises:
    NotImplementedError: `why_not` has a reason.
  """
  (M, K), S = x.shape, 0 if gather is None else gather.shape[0]
  if reason := why_not(x, chip, S):
    raise NotImplementedError(f'norm_quantize: pallas_mosaic_gpu: {reason}')
  operands = [x, weight[0], bias[0]]
  if gather is not None:
    operands.append(jnp.take(x, gather, axis=1, mode='fill', fill_value=0))
  outs = [jax.ShapeDtypeStruct((M, K + S), rows.code_dtype(x_format))]
  if dynamic:
    outs.append(jax.ShapeDtypeStruct((M,), jnp.float32))

  def body(x_g, w_g, b_g, *refs):
    row = jax.lax.axis_index('row')
    codes_g, *scale_g = refs[1:] if S else refs
    values = hopper_rows.load(x_g.at[row], K)
    center = jnp.sum(values) * (1.0 / K) if kind == 'layer' else None
    if center is not None:
      values = values - center
    power = jnp.sum(values * values) * (1.0 / K)
    inverse = jax.lax.rsqrt(power + eps)

    def affine(values, start, size):
      at = pl.ds(start, size)
      w, b = (hopper_rows.load(ref.at[at], size) for ref in (w_g, b_g))
      return values * inverse * w + b

    def store(codes, start, size):
      ref = codes_g.at[row, pl.ds(start, size)]
      plgpu.store(ref, codes, optimized=False)

    y = affine(values, 0, K)
    if dynamic:
      codes, scale = hopper_rows.quantize(y, x_format)
      scale_g[0][row] = scale
    else:
      codes = hopper_rows.encode(y, x_format, narrow)
    store(codes, 0, K)
    if S:  # With static steps only; the place of no channel has weight 0.
      tail = hopper_rows.load(refs[0].at[row], S)
      tail = tail if center is None else tail - center
      y = affine(tail, K, S)
      store(hopper_rows.encode(y, x_format, narrow), K, S)

  found = plgpu.kernel(
    body,
    out_type=tuple(outs),
    grid=(M,),
    grid_names=('row',),
    num_threads=1,
    thread_name='wg',
    interpret=plgpu.InterpretGPUParams() if interpret else None,
    kernel_name='norm_quantize',
  )(*operands)
  return found[0], found[1][:, None] if dynamic else None
