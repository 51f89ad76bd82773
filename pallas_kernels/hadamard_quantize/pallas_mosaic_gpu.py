"""hadamard_quantize on Hopper: a row as a matrix of runs of 128, on wgmma.

  y = L @ (X @ H),  X (B, 128) the row, B = K / 128

H is I x H_h of blocks up to 128, and H_128 of larger ones, whose other factor
L = I x H_{h/128} adds and subtracts whole runs (Kronecker). Entries are -1, 0
and 1, so bfloat16 holds them. X @ H reaches L as two bfloat16, a value and what
it lacks: relative 2^-17 is lost, where float32 would lose 2^-24.

Grid    (2 * 132,) persistent over rows; a block is one warpgroup. Two of them
        on a processor cover each other's copies.
Body    X by a copy into shared memory, whose rows from B on stay zero; wgmma
        (Bp, 128) @ (128, 128), Bp = B padded to 64; L twice if h > 128; the
        absmax of all registers; codes to shared memory, and out.
On-chip 32 KB of H; 3*128*Bp of X and codes; 2*Bp*Bp + 4*128*Bp of L and the two
        halves. K=14336, h=2048: 178 KB; up to 128: 81 KB.
Traffic 3*M*K + 4*M. M=2048, K=14336: 88 MB.
Needs   bf16 x; K a multiple of 1024 up to 16384, and of h.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels import compat, hopper, hopper_rows, rows
from pallas_kernels.hadamard_quantize import base

plgpu = compat.mosaic_gpu

_RUN = 128  # Columns of X.
_BLOCKS = 2  # Of a processor.


def why_not(x: Any, h: int, chip: str) -> str:
  """Why this kernel cannot serve; '' if it can."""
  if reason := hopper.why_not(chip):
    return reason
  if x.dtype != jnp.bfloat16:
    return f'x is {x.dtype}; it takes bfloat16. Cast x.'
  K, longest = x.shape[-1], hopper_rows.LONGEST
  if K % (8 * _RUN) or longest < K:
    return f'K={K}; it takes multiples of {8 * _RUN} up to {longest}. Pad K.'
  return ''


def hadamard_quantize(
  x: jax.Array, h: int, x_format: str, *, chip: str, interpret: bool
) -> tuple[jax.Array, jax.Array]:
  """x (M, K) -> codes (M, K), scale (M, 1).

  Raises:
    NotImplementedError: `why_not` has a reason.
  """
  if reason := why_not(x, h, chip):
    raise NotImplementedError(f'hadamard_quantize: pallas_mosaic_gpu: {reason}')
  (M, K), B = x.shape, x.shape[1] // _RUN
  Bp = -(-B // 64) * 64
  inner, outer = min(h, _RUN), max(h // _RUN, 1)
  operands = [x.reshape(M, B, _RUN), _repeated(inner, _RUN // inner, _RUN)]
  scratch = {
    'x_s': _tiles(Bp, _RUN),
    'h_s': _tiles(_RUN, _RUN),
    'o_s': plgpu.SMEM(
      (Bp, _RUN),
      rows.code_dtype(x_format),
      transforms=(
        plgpu.TilingTransform((8, _RUN)),
        plgpu.SwizzleTransform(128),
      ),
    ),
    'ready': plgpu.Barrier(),
  }
  if outer > 1:
    operands.append(_repeated(outer, B // outer, Bp))
    scratch |= {
      'l_s': _tiles(Bp, Bp),
      'high_s': _tiles(Bp, _RUN),
      'low_s': _tiles(Bp, _RUN),
    }
  codes, scale = plgpu.kernel(
    functools.partial(_kernel, h=h, x_format=x_format),
    out_type=(
      jax.ShapeDtypeStruct((M, B, _RUN), rows.code_dtype(x_format)),
      jax.ShapeDtypeStruct((M,), jnp.float32),
    ),
    grid=(min(_BLOCKS * hopper.SMS, M),),
    grid_names=('sm',),
    num_threads=1,
    thread_name='wg',
    scratch_types=scratch,
    interpret=plgpu.InterpretGPUParams() if interpret else None,
    kernel_name='hadamard_quantize',
  )(*operands)
  return codes.reshape(M, K), scale[:, None]


def _kernel(x_g, h_g, *refs, h, x_format, **smem):
  *l_g, codes_g, scale_g = refs
  M, B = x_g.shape[:2]
  x_s, h_s, o_s, ready = (smem[k] for k in ('x_s', 'h_s', 'o_s', 'ready'))
  Bp = x_s.shape[0]
  x_s[...] = jnp.zeros(x_s.shape, x_s.dtype)  # What no copy reaches.
  plgpu.commit_smem()

  def fetch(source, target):
    plgpu.copy_gmem_to_smem(source, target, ready)
    plgpu.barrier_wait(ready)

  fetch(h_g, h_s)
  if l_g:
    fetch(l_g[0], smem['l_s'])

  def times(*pairs):
    """The sum of products, (Bp, 128) float32."""

    def run(acc):
      for a, b in pairs:
        plgpu.wgmma(acc, a, b)
      return acc[...]

    return pl.run_scoped(run, plgpu.ACC((Bp, _RUN), jnp.float32))

  @plgpu.nd_loop((M,), collective_axes='sm')
  def _(at):
    (row,) = at.index
    fetch(x_g.at[row], x_s.at[pl.ds(0, B)])
    y = times((x_s, h_s))
    if l_g:
      high_s, low_s = smem['high_s'], smem['low_s']
      high = y.astype(jnp.bfloat16)
      high_s[...] = high
      low_s[...] = (y - high.astype(jnp.float32)).astype(jnp.bfloat16)
      plgpu.commit_smem()
      y = times((smem['l_s'], high_s), (smem['l_s'], low_s))
    codes, scale = hopper_rows.quantize(y * h**-0.5, x_format)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # o_s is free again.
    o_s[...] = codes
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(o_s.at[pl.ds(0, B)], codes_g.at[row])
    scale_g[row] = scale

  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _tiles(height, width):
  """Shared memory of bf16 (height, width), as wgmma takes it."""
  return plgpu.SMEM(
    (height, width),
    jnp.bfloat16,
    transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)),
  )


def _repeated(order, times, size):
  """I x H_order in the corner of a (size, size) matrix of bfloat16."""
  out = np.zeros((size, size), np.float32)
  n = order * times
  out[:n, :n] = np.kron(np.eye(times, dtype=np.float32), base.matrix(order))
  return jnp.asarray(out, jnp.bfloat16)
