"""Both sides quantized, in plain JAX: what the kernels must equal.

x is quantized a row at a time (rows.py). Products of integers are summed in
int32, of fp8 in float32, then scaled.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import planar, rows, weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sides:
  """What the two sides are.

  Attributes:
    layout: of the weight.
    x_format: a key of rows.QMAX: what x is quantized to.
    codes: x comes as codes with a scale.
    raw: return the int32 sums; the caller scales them.
  """

  layout: planar.Planar
  x_format: str
  codes: bool = False
  raw: bool = False

  @property
  def is_float(self) -> bool:
    """Whether the codes are fp8."""
    return rows.is_float(self.x_format)

  @property
  def code_dtype(self) -> Any:
    """Dtype of x's codes; int4 is multiplied as int8."""
    return rows.code_dtype(self.x_format)


def quantized_matmul(
  x: jax.Array,
  x_scale: jax.Array | None,
  w: tuple[jax.Array, jax.Array, jax.Array | None],
  bias: jax.Array | None,
  sides: Sides,
  out_dtype: Any,
) -> jax.Array:
  """x (M, K), w = (qvalue, scale, zero_point) -> (M, N) of out_dtype."""
  layout = sides.layout
  if not sides.codes:
    x, x_scale = rows.quantize(x, sides.x_format)
  qvalue, scale, zero_point = w
  codes = weights.codes(qvalue, layout)
  groups = 1 if layout.group_size < 0 else layout.K // layout.group_size
  M, N = x.shape[0], codes.shape[1]
  x_mgk = x.reshape(M, groups, -1)
  w_gkn = codes.reshape(groups, -1, N)
  sums = jnp.float32 if sides.is_float else jnp.int32
  if w_gkn.dtype == jnp.uint8:  # The same distance from its zero point.
    w_gkn = (w_gkn.astype(jnp.int16) - 128).astype(jnp.int8)
  y = jnp.einsum('mgk,gkn->gmn', x_mgk, w_gkn, preferred_element_type=sums)
  if zero_point is not None:
    total = jnp.sum(x_mgk, axis=2, dtype=jnp.int32).T[..., None]  # (g, M, 1)
    y = y - total * (zero_point.astype(jnp.int32) - 128)[:, None]
  if sides.raw:
    return y[0]
  y = jnp.sum(y.astype(jnp.float32) * scale.astype(jnp.float32)[:, None], 0)
  return finish(y, x_scale, bias, out_dtype)


def float_matmul(
  x: jax.Array,
  x_scale: jax.Array | None,
  w: tuple[jax.Array, jax.Array, jax.Array | None],
  bias: jax.Array | None,
  sides: Sides,
  out_dtype: Any,
) -> jax.Array:
  """The same product of the dequantized sides, in x's dtype or bfloat16."""
  dtype = jnp.bfloat16 if sides.codes else x.dtype
  if not sides.codes:
    x, x_scale = rows.quantize(x, sides.x_format)
  assert x_scale is not None  # Codes come with one.
  x = (x.astype(jnp.float32) * x_scale).astype(dtype)
  y = jnp.matmul(
    x,
    dequantize(w, sides.layout).astype(dtype),
    preferred_element_type=jnp.float32,
  )
  return finish(y, 1.0, bias, out_dtype)


def finish(
  y: jax.Array, x_scale: Any, bias: jax.Array | None, out_dtype: Any
) -> jax.Array:
  """(M, N) float32 times the scale of rows, plus bias (1, N)."""
  y = y * x_scale
  if bias is not None:
    y = y + bias.astype(jnp.float32)
  return y.astype(out_dtype)


def dequantize(
  w: tuple[jax.Array, jax.Array, jax.Array | None], layout: planar.Planar
) -> jax.Array:
  """The weight (K, N) in float32."""
  return weights.dequantize(*w, layout)
