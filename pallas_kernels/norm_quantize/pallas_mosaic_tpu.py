"""norm_quantize on TPU: rows in, codes out.

Grid    (M/bm,). Body: 32 rows at a time, columns in chunks: sums, then the
        absmax of y, then its codes; x is read from on-chip memory each time.
Blocks  x (bm, K), weight and bias (1, K), codes (bm, K), scale (bm, 1).
On-chip 2 * (bm*K*(x bytes + 1) + 512*bm + 8*K). bm=256, K=8192, bf16: 13 MB.
Traffic M*K*(x bytes + 1) + 512*M + 8*K: a column of scales is stored 128 wide.
        M=2048, K=8192, bf16: 50 + 1 MB.
Needs   bf16 or float32 x; K a multiple of 128. M is padded to one of 32.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import compat, rows, targets

_BLOCK_BYTES = 4 * 2**20


def why_not(x: Any, chip: str) -> str:
  """Why this kernel cannot serve; '' if it can."""
  if chip not in targets.TARGETS:
    return f'chip is {chip!r}; it runs on {sorted(targets.TARGETS)}.'
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    return f'x is {x.dtype}; it takes bfloat16 or float32. Cast x.'
  if x.shape[-1] % 128:
    return f'K={x.shape[-1]}; it takes multiples of 128. Pad K.'
  return ''


def block_rows(M: int, K: int, x_bytes: int) -> int:
  """Rows of a block: what fills 4 MiB, at most 256, no more than M needs."""
  fits = _BLOCK_BYTES // (K * x_bytes) // rows.ROWS * rows.ROWS
  need = -(-M // rows.ROWS) * rows.ROWS
  return max(rows.ROWS, min(fits, 256, need))


def norm_quantize(
  x: jax.Array,
  weight: jax.Array,
  bias: jax.Array,
  kind: str,
  eps: float,
  x_format: str,
  dynamic: bool,
  *,
  chip: str,
  interpret: bool,
) -> tuple[jax.Array, jax.Array | None]:
  """x (M, K); weight, bias (1, K) float32 -> codes (M, K), scale (M, 1).

  Raises:
    NotImplementedError: `why_not` has a reason.
  """
  if reason := why_not(x, chip):
    raise NotImplementedError(f'norm_quantize: pallas_mosaic_tpu: {reason}')
  M, K = x.shape
  bm = block_rows(M, K, x.dtype.itemsize)
  x = jnp.pad(x, ((0, -M % bm), (0, 0)))
  operands = (x, weight, bias)
  by_row = lambda i: (i, 0)
  whole = pl.BlockSpec((1, K), lambda i: (0, 0))
  shapes = [((x.shape[0], K), rows.code_dtype(x_format), (bm, K))]
  if dynamic:
    shapes.append(((x.shape[0], 1), jnp.dtype(jnp.float32), (bm, 1)))
  used = 2 * (bm * K * (x.dtype.itemsize + 1) + 512 * bm + 64 * K)
  out = pl.pallas_call(
    functools.partial(
      _kernel, kind=kind, eps=eps, x_format=x_format, dynamic=dynamic
    ),
    grid=(x.shape[0] // bm,),
    in_specs=[pl.BlockSpec((bm, K), by_row), whole, whole],
    out_specs=[pl.BlockSpec(block, by_row) for _, _, block in shapes],
    out_shape=[
      compat.out_struct(shape, dtype, *operands) for shape, dtype, _ in shapes
    ],
    compiler_params=compat.tpu_params(('parallel',), used + 8 * 2**20),
    interpret=compat.interpret_mode(interpret),
    name='norm_quantize',
  )(*operands)
  return out[0][:M], out[1][:M] if dynamic else None


def _kernel(
  x_ref, w_ref, b_ref, codes_ref, *scale_ref, kind, eps, x_format, dynamic
):
  bm, K = x_ref.shape
  chunk = math.gcd(K, rows.CHUNK)

  @pl.loop(0, bm // rows.ROWS)
  def _(r):
    at = pl.ds(pl.multiple_of(r * rows.ROWS, rows.ROWS), rows.ROWS)

    def load(c):
      return x_ref[at, c : c + chunk].astype(jnp.float32)

    def mean(f):
      total = jnp.zeros((rows.ROWS, chunk), jnp.float32)
      for c in range(0, K, chunk):
        total = total + f(load(c))
      return jnp.sum(total, axis=1, keepdims=True) * (1.0 / K)

    center = mean(lambda x: x) if kind == 'layer' else None

    def centered(x):
      return x if center is None else x - center

    power = mean(lambda x: centered(x) * centered(x))
    inverse = jax.lax.rsqrt(power + eps)

    def normed(c):
      y = centered(load(c)) * inverse
      return y * w_ref[:, c : c + chunk] + b_ref[:, c : c + chunk]

    def write(c, codes):
      codes_ref[at, c : c + chunk] = codes

    if dynamic:
      scale_ref[0][at, :] = rows.quantize_in_kernel(
        normed, write, K, chunk, x_format
      )
    else:
      for c in range(0, K, chunk):
        write(c, rows.encode(normed(c), x_format))
