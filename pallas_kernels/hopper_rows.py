"""Rows in the registers of a warpgroup of Hopper, and their codes.

The arithmetic is that of rows.py, to the bit. A row of K values lies in
Layout.WG_STRIDED: a thread has K / 128 of them, up to 8 side by side, so that
loads and stores of a warp are contiguous. Several rows lie in tiles of (8,
128), two to a warp, whose sums along a row never leave it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import compat, rows

plgpu = compat.mosaic_gpu

LONGEST = 16384  # Columns: 128 registers of a thread.
_CHUNK = 512  # Columns of 8 rows whose absmax is taken at a time.


def load(ref: Any, K: int) -> jax.Array:
  """(K,) of global memory -> registers, float32; K is a multiple of 128."""
  wide = math.gcd(8, K // 128)
  layout = plgpu.Layout.WG_STRIDED((K,), vec_size=wide)
  return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)


def quantize(values: jax.Array, x_format: str) -> tuple[jax.Array, jax.Array]:
  """float32 in registers -> codes of its shape, scale ()."""
  top = jnp.abs(values)
  while top.ndim:  # Mosaic GPU infers no layout for several axes at once.
    top = jnp.max(top, axis=-1)
  scale = _scale(top, x_format)
  return encode(values * (1.0 / scale), x_format), scale


def encode(steps: jax.Array, x_format: str, narrow: bool = True) -> jax.Array:
  """float32 in steps, in registers -> codes: as rows.encode."""
  qmax = float(rows.QMAX[x_format])
  if rows.is_float(x_format):
    return jnp.minimum(jnp.maximum(steps, -qmax), qmax).astype(x_format)
  rounded = jax.lax.round(steps, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
  least = -qmax - (not narrow)
  return jnp.minimum(jnp.maximum(rounded, least), qmax).astype(jnp.int8)


def tiles() -> Any:
  """The layout of several rows."""
  from pallas_kernels import hopper_fragments

  return hopper_fragments.ROW_TILES


def find_ranges(x_g: Any, top_s: Any, warpgroup: jax.Array) -> None:
  """The absmax of rows over a warpgroup's part of K, to top_s[warpgroup].

  Reductions run along lanes alone: those across warps share one scratch, which
  several warpgroups may not use at a time.

  Args:
    x_g: (M, K) floating, in global memory; 8 divides M, 128 K.
    top_s: (warpgroups, M) float32, in shared memory.
    warpgroup: which.
  """
  (M, K), warpgroups = x_g.shape, top_s.shape[0]
  parts = warpgroups if K % (128 * warpgroups) == 0 else 1  # Or all take all.
  size = K // parts
  chunk = math.gcd(size, _CHUNK)
  start = jax.lax.rem(warpgroup, parts) * size
  for row in range(0, M, 8):

    def widen(i, top, row=row):
      at = pl.ds(row, 8), pl.ds(start + i * chunk, chunk)
      x = plgpu.load(x_g.at[at], layout=tiles(), optimized=False)
      return jnp.maximum(top, jnp.abs(x.astype(jnp.float32)))

    zeros = plgpu.layout_cast(jnp.zeros((8, chunk), jnp.float32), tiles())
    top = jax.lax.fori_loop(0, size // chunk, widen, zeros)
    found = top_s.at[warpgroup, pl.ds(row, 8)]
    plgpu.store(found, jnp.max(top, axis=1), optimized=False)


def scale_of(top_s: Any, x_format: str, layout: Any) -> jax.Array:
  """The scales (M,) of the ranges that the warpgroups found.

  Args:
    top_s: (warpgroups, M) float32, in shared memory.
    x_format: a key of rows.QMAX.
    layout: of the result.
  """
  tops = [
    plgpu.load(top_s.at[i], layout=layout, optimized=False)
    for i in range(top_s.shape[0])
  ]
  return _scale(functools.reduce(jnp.maximum, tops), x_format)


def _scale(top, x_format):
  return jnp.maximum(top, rows.MIN_RANGE) * (1.0 / rows.QMAX[x_format])
