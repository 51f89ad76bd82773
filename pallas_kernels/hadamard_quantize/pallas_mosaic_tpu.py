"""hadamard_quantize on TPU: the transform as a product on the matrix unit.

Grid    (M/bm,). Body: x (bm, w) @ H (w, w) for each run of w columns, h of them
        but at least 128 and at most 512, into scratch; then 32 rows at a time:
        sums and differences of runs, log2(h / w) an element, and codes.
Blocks  x (bm, K) bf16, H (w, w) bf16, codes (bm, K), scale (bm, 1).
On-chip 2 * (3*bm*K + 512*bm + 2*w*w) + 4*bm*K. bm=128, K=14336, w=128: 19 MB.
Traffic 3*M*K + 512*M + 2*w*w. M=2048, K=14336: 88 + 1 MB.
Needs   bf16 x; K a multiple of 128 and of h; h a power of two.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compat, rows, targets
from pallas_kernels.hadamard_quantize import base

LARGEST = 2**15
_BLOCK_BYTES = 2 * 2**20


def why_not(x: Any, h: int, chip: str) -> str:
  """Why this kernel cannot serve; '' if it can."""
  if chip not in targets.TARGETS:
    return f'chip is {chip!r}; it runs on {sorted(targets.TARGETS)}.'
  if x.dtype != jnp.bfloat16:
    return f'x is {x.dtype}; it takes bfloat16. Cast x.'
  if h > LARGEST:
    return f'block={h}; it takes up to {LARGEST}.'
  if x.shape[-1] % 128:
    return f'K={x.shape[-1]}; it takes multiples of 128. Pad K.'
  return ''


def block_rows(M: int, K: int) -> int:
  """Rows of a block: what fills 2 MiB, at most 256, no more than M needs."""
  fits = _BLOCK_BYTES // (2 * K) // rows.ROWS * rows.ROWS
  need = -(-M // rows.ROWS) * rows.ROWS
  return max(rows.ROWS, min(fits, 256, need))


def hadamard_quantize(
  x: jax.Array, h: int, x_format: str, *, chip: str, interpret: bool
) -> tuple[jax.Array, jax.Array]:
  """x (M, K) -> codes (M, K), scale (M, 1).

  Raises:
    NotImplementedError: `why_not` has a reason.
  """
  if reason := why_not(x, h, chip):
    raise NotImplementedError(f'hadamard_quantize: pallas_mosaic_tpu: {reason}')
  M, K = x.shape
  bm, width = block_rows(M, K), min(max(h, 128), base.WIDTH)
  x = jnp.pad(x, ((0, -M % bm), (0, 0)))
  order = min(h, width)
  H = np.kron(np.eye(width // order, dtype=np.float32), base.matrix(order))
  operands = (x, jnp.asarray(H, jnp.bfloat16))
  by_row = lambda i: (i, 0)
  used = 2 * (3 * bm * K + 512 * bm + 2 * width**2) + 4 * bm * K
  codes, scale = pl.pallas_call(
    functools.partial(_kernel, h=h, x_format=x_format),
    grid=(x.shape[0] // bm,),
    in_specs=[
      pl.BlockSpec((bm, K), by_row),
      pl.BlockSpec((width, width), lambda i: (0, 0)),
    ],
    out_specs=[pl.BlockSpec((bm, K), by_row), pl.BlockSpec((bm, 1), by_row)],
    out_shape=[
      compat.out_struct(x.shape, rows.code_dtype(x_format), *operands),
      compat.out_struct((x.shape[0], 1), jnp.float32, *operands),
    ],
    scratch_shapes=[pltpu.VMEM((bm, K), jnp.float32)],
    compiler_params=compat.tpu_params(('parallel',), used + 8 * 2**20),
    interpret=compat.interpret_mode(interpret),
    name='hadamard_quantize',
  )(*operands)
  return codes[:M], scale[:M]


def _kernel(x_ref, h_ref, codes_ref, scale_ref, y_ref, *, h, x_format):
  bm, K = x_ref.shape
  width = h_ref.shape[0]
  for c in range(0, K, width):
    y = jax.lax.dot_general(
      x_ref[:, c : c + width],
      h_ref[...],
      (((1,), (0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    y_ref[:, c : c + width] = y * h**-0.5
  chunk = math.gcd(K, rows.CHUNK)

  @pl.loop(0, bm // rows.ROWS)
  def _(r):
    at = pl.ds(pl.multiple_of(r * rows.ROWS, rows.ROWS), rows.ROWS)

    for stride in _powers(width, h):
      _butterflies(y_ref, at, stride)

    def write(c, codes):
      codes_ref[at, c : c + chunk] = codes

    scale_ref[at, :] = rows.quantize_in_kernel(
      lambda c: y_ref[at, c : c + chunk], write, K, chunk, x_format
    )


def _powers(start, stop):
  """start, 2 start, 4 start .. below stop."""
  while start < stop:
    yield start
    start *= 2


def _butterflies(y_ref, at, stride):
  """(a, b) -> (a + b, a - b) of every two neighbouring runs of `stride`."""
  for start in range(0, y_ref.shape[1], 2 * stride):
    for c in range(start, start + stride, base.WIDTH):
      low, high = pl.ds(c, base.WIDTH), pl.ds(c + stride, base.WIDTH)
      a, b = y_ref[at, low], y_ref[at, high]
      y_ref[at, low] = a + b
      y_ref[at, high] = a - b
