"""norm_quantize on TPU: rows in, codes out.

Grid    (M/bm,). Body: 32 rows at a time, columns in chunks: sums, then the
        absmax of y, then its codes; x is read from on-chip memory each time.
        S copied columns are x @ one-hot (K, S), which is exact, a chunk of K at
        a time: the matrix unit gathers along lanes, and 2 M K S operations
        are S / N of the product with a weight that follows.
Blocks  x (bm, K), weight and bias (1, K + S), codes (bm, K + S), scale (bm, 1).
On-chip 2 * (bm*K*(x bytes + 1) + 512*bm + 8*K). bm=256, K=8192, bf16: 13 MB.
        Copies: S * (5*bm + 10*512) more.
Traffic M*K*(x bytes + 1) + 512*M + 8*K: a column of scales is stored 128 wide.
        M=2048, K=8192, bf16: 50 + 1 MB.
Needs   bf16 or float32 x; K a multiple of 128, S one up to 512. M is padded to
        a multiple of 32.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compat, rows, targets

LARGEST = 512  # Copied columns.
_BLOCK_BYTES = 4 * 2**20


def why_not(x: Any, chip: str, copies: int = 0) -> str:
  """Why this kernel cannot serve; '' if it can."""
  if chip not in targets.TARGETS:
    return f'chip is {chip!r}; it runs on {sorted(targets.TARGETS)}.'
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    return f'x is {x.dtype}; it takes bfloat16 or float32. Cast x.'
  if x.shape[-1] % 128:
    return f'K={x.shape[-1]}; it takes multiples of 128. Pad K.'
  if copies % 128 or copies > LARGEST:
    return f'S={copies} copies; it takes multiples of 128 up to {LARGEST}.'
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
    raise NotImplementedError(f'norm_quantize: pallas_mosaic_tpu: {reason}')
  bm = block_rows(M, K, x.dtype.itemsize)
  x = jnp.pad(x, ((0, -M % bm), (0, 0)))
  operands: list[Any] = [x, weight, bias]
  by_row, only = lambda i: (i, 0), lambda i: (0, 0)
  whole = pl.BlockSpec((1, K + S), only)
  in_specs = [pl.BlockSpec((bm, K), by_row), whole, whole]
  scratch: list[Any] = []
  if gather is not None:
    operands.append(gather.astype(jnp.int32)[None])
    in_specs.append(pl.BlockSpec((1, S), only))
    scratch.append(pltpu.VMEM((bm, S), jnp.float32))
  shapes = [((x.shape[0], K + S), rows.code_dtype(x_format), (bm, K + S))]
  if dynamic:
    shapes.append(((x.shape[0], 1), jnp.dtype(jnp.float32), (bm, 1)))
  used = 2 * (bm * K * (x.dtype.itemsize + 1) + 512 * bm + 64 * K)
  used += S * (6 * bm + 128 + 10 * rows.CHUNK)
  out = pl.pallas_call(
    functools.partial(
      _kernel,
      kind=kind,
      eps=eps,
      x_format=x_format,
      dynamic=dynamic,
      narrow=narrow,
      copies=S,
    ),
    grid=(x.shape[0] // bm,),
    in_specs=in_specs,
    out_specs=[pl.BlockSpec(block, by_row) for _, _, block in shapes],
    out_shape=[
      compat.out_struct(shape, dtype, *operands) for shape, dtype, _ in shapes
    ],
    scratch_shapes=scratch,
    compiler_params=compat.tpu_params(('parallel',), used + 8 * 2**20),
    interpret=compat.interpret_mode(interpret),
    name='norm_quantize',
  )(*operands)
  return out[0][:M], out[1][:M] if dynamic else None


def _kernel(
  x_ref, w_ref, b_ref, *refs, kind, eps, x_format, dynamic, narrow, copies
):
  if copies:  # With static steps only.
    src_ref, codes_ref, tail_ref = refs
    _gather(x_ref, src_ref, tail_ref)
  else:
    codes_ref, *scale_ref = refs
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

    def normed(x, columns):
      y = centered(x) * inverse
      return y * w_ref[:, columns] + b_ref[:, columns]

    def read(c):
      return normed(load(c), slice(c, c + chunk))

    def write(c, codes):
      codes_ref[at, c : c + chunk] = codes

    if dynamic:
      scale_ref[0][at, :] = rows.quantize_in_kernel(
        read, write, K, chunk, x_format
      )
    else:
      for c in range(0, K, chunk):
        write(c, rows.encode(read(c), x_format, narrow))
    if copies:
      tail = slice(K, K + copies)
      y = normed(tail_ref[at, :], tail)
      codes_ref[at, tail] = rows.encode(y, x_format, narrow)


def _gather(x_ref, src_ref, tail_ref):
  """Columns src (1, S) of x (bm, K) -> tail (bm, S) float32; K gives zeros."""
  (_, K), S = x_ref.shape, src_ref.shape[1]
  chunk = math.gcd(K, rows.CHUNK)
  exact = None if x_ref.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
  for c in range(0, K, chunk):
    places = jax.lax.broadcasted_iota(jnp.int32, (chunk, S), 0) + c
    one_hot = jnp.where(places == src_ref[...], 1.0, 0.0).astype(x_ref.dtype)
    part = jax.lax.dot_general(
      x_ref[:, c : c + chunk],
      one_hot,
      (((1,), (0,)), ((), ())),
      precision=exact,
      preferred_element_type=jnp.float32,
    )
    tail_ref[...] = part if c == 0 else tail_ref[...] + part
