"""Quantization of rows: in plain JAX, and as a part of TPU kernels.

  s = max(absmax, 1e-5) / qmax      code = clip(round(x * (1 / s)))

half to even; fp8 codes are cast instead of rounded. Both forms are the same
arithmetic, so codes agree to the bit. int4 codes are int8 of at most 7.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

MIN_RANGE = 1e-5
QMAX = {'int8': 127, 'int4': 7, 'float8_e4m3fn': 448, 'float8_e5m2': 57344}
CHUNK = 512  # Columns that a kernel holds in registers, of 32 rows.
ROWS = 32  # Of a register of bytes.


def is_float(x_format: str) -> bool:
  """Whether codes are fp8."""
  return x_format.startswith('float8')


def code_dtype(x_format: str) -> Any:
  """Dtype of codes."""
  return jnp.dtype(x_format if is_float(x_format) else 'int8')


def quantize(x: jax.Array, x_format: str) -> tuple[jax.Array, jax.Array]:
  """x (M, K) floating -> codes (M, K), scale (M, 1) float32."""
  x = x.astype(jnp.float32)
  scale = _scale(jnp.max(jnp.abs(x), axis=1, keepdims=True), x_format)
  return encode(x * (1.0 / scale), x_format), scale


def encode(x: jax.Array, x_format: str, narrow: bool = True) -> jax.Array:
  """x float32, in steps -> codes of its shape.

  Integers are at least -qmax, or, not narrow, -qmax - 1.
  """
  qmax = float(QMAX[x_format])
  if is_float(x_format):
    return jnp.clip(x, -qmax, qmax).astype(x_format)
  # By way of int32, which the vector unit has.
  codes = jnp.clip(jnp.round(x), -qmax - (not narrow), qmax)
  return codes.astype(jnp.int32).astype(jnp.int8)


def quantize_in_kernel(
  read: Callable[[int], jax.Array],
  write: Callable[[int, jax.Array], None],
  K: int,
  chunk: int,
  x_format: str,
) -> jax.Array:
  """Quantizes 32 rows, a chunk of columns at a time, in two passes.

  Args:
    read: first column -> (32, chunk) float32.
    write: first column, codes (32, chunk).
    K: columns.
    chunk: divides K.
    x_format: a key of QMAX.

  Returns:
    The scale (32, 1).
  """
  top = jnp.zeros((ROWS, chunk), jnp.float32)
  for c in range(0, K, chunk):
    top = jnp.maximum(top, jnp.abs(read(c)))
  scale = _scale(jnp.max(top, axis=1, keepdims=True), x_format)
  inverse = 1.0 / scale
  for c in range(0, K, chunk):
    write(c, encode(read(c) * inverse, x_format))
  return scale


def _scale(absmax: jax.Array, x_format: str) -> jax.Array:
  return jnp.maximum(absmax, MIN_RANGE) * (1.0 / QMAX[x_format])
