"""What attention kernels do with tiles of registers.

A register holds 8 rows of 128 lanes of 32 bits, or 16 rows of bfloat16.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

LANES = 128


def keep_columns(x: jax.Array, left: Any) -> jax.Array:
  """x (D, C) bfloat16 with zeros from column `left` on, whatever was there."""
  words = pltpu.bitcast(x, jnp.int32)
  column = jax.lax.broadcasted_iota(jnp.int32, words.shape, 1)
  words = jnp.where(column < left, words, 0)
  return pltpu.bitcast(words, jnp.bfloat16)


def keep_rows(x: jax.Array, left: Any) -> jax.Array:
  """x (R, D) bfloat16 with zeros from row `left` on, whatever was there."""
  words = pltpu.bitcast(x, jnp.int32)  # Rows 2 i and 2 i + 1, low and high.
  row = 2 * jax.lax.broadcasted_iota(jnp.int32, words.shape, 0)
  low = jnp.where(row < left, words & 0xFFFF, 0)
  high = jnp.where(row + 1 < left, words & -0x10000, 0)
  return pltpu.bitcast(low | high, jnp.bfloat16)


def fold(x: jax.Array) -> jax.Array:
  """(M, columns) -> (M, 128): lanes of equal place are summed."""
  width = min(LANES, x.shape[1])
  parts = [x[:, c : c + width] for c in range(0, x.shape[1], width)]
  total = functools.reduce(jnp.add, parts)
  if width < LANES:
    total = jnp.pad(total, ((0, 0), (0, LANES - width)))
  return total


def repeat(x: jax.Array, columns: int) -> jax.Array:
  """(M, 128), equal along lanes -> (M, columns)."""
  if columns <= LANES:
    return x[:, :columns]
  return jnp.concatenate([x] * (columns // LANES), axis=1)


def dot(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
  """x (M, K) with y contracted along `axis`, float32 sums."""
  return jax.lax.dot_general(
    x, y, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
  )


def divisor(of: int, most: int) -> int:
  """The greatest power of two that divides `of`, at most max(16, most)."""
  size = of & -of
  while size > max(16, most):
    size //= 2
  return size
