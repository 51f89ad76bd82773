"""Arithmetic of one quantizer: ranges to scales, values to codes and back.

Parameters here already broadcast against the values; qarray.py has the shapes,
the checks and the equations. `scale` is the effective float32 step throughout;
`store_scale` and `load_scale` turn it into what a QArray keeps and back.

XLA replaces x / s, s broadcast, by x * (1 / s) where it sees it, an ulp off and
dependent on the graph around; `divide` keeps the division. On CPU it also
contracts a * b + c, so no product here feeds a sum unless it is exact.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.numerics import formats
from jaxq.numerics import spec as spec_lib

QuantSpec = spec_lib.QuantSpec

_MIN_RANGE = 1e-5
_E4M3 = formats.get('e4m3')
_MIN_TENSOR_SCALE = 2.0**-100  # Keeps tensor scale * 2^-9 a normal number.


def params(
  lo: jax.Array, hi: jax.Array, spec: QuantSpec, outer: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """Effective scale and zero point of ranges lo <= 0 <= hi."""
  if not spec.symmetric:
    empty = (lo == 0) & (hi == 0)
    lo, hi = jnp.where(empty, -1.0, lo), jnp.where(empty, 1.0, hi)
    scale = divide(jnp.maximum(hi - lo, _MIN_RANGE), spec.qmax)
    scale = round_scale(_positive(scale, spec), spec)
    return scale, store_zero_point(divide(-lo, scale), spec)
  absmax = jnp.maximum(-lo, hi)
  if spec.is_mx:
    return formats.mx_scale(absmax, spec.element, spec.scale_rule), None
  if outer is not None:  # nvfp4.
    block = divide(absmax, spec.qmax * outer)
    return formats.rne_saturate(block, _E4M3) * outer, None
  if spec.is_integer:
    absmax = jnp.maximum(absmax, _MIN_RANGE)
  steps = spec.qmax + 0.5 * (spec.scale_rule == 'half')
  scale = _positive(divide(absmax, steps), spec)
  return round_scale(scale, spec), None


def encode(
  x: jax.Array, scale: jax.Array, zero: jax.Array | None, spec: QuantSpec
) -> jax.Array:
  """Codes; scale and zero broadcast against x."""
  if spec.dtype == 'binary':
    return jnp.where(x >= 0, 1, -1).astype(jnp.int8)
  if spec.is_mx:
    # Subnormal inputs count as zero, as they do on CPU and TPU anyway.
    x = jnp.where(jnp.abs(x) < formats.MIN_NORMAL, 0.0, x)
    x = formats.scale_by_exp2(x, -formats.exponent(scale))
  else:
    x = jnp.where(scale > 0, divide(x, scale), 0.0)
  if spec.is_integer:
    code = jnp.round(x)
    code = code if zero is None else code + zero.astype(jnp.float32)
    return jnp.clip(code, spec.qmin, spec.qmax).astype(spec.code_dtype)
  if spec.dtype == 'nf4':
    return formats.encode_nf4(x)
  if spec.code_dtype == 'uint8':
    return formats.encode_bits(x, spec.element)
  return formats.rne_saturate(x, spec.element).astype(spec.code_dtype)


def decode(
  codes: jax.Array, scale: jax.Array, zero: jax.Array | None, spec: QuantSpec
) -> jax.Array:
  """Values; scale and zero broadcast against codes."""
  if spec.dtype == 'nf4':
    value = formats.decode_nf4(codes)
  elif spec.is_float and spec.code_dtype == 'uint8':
    value = formats.decode_bits(codes, spec.element)
  else:
    value = codes.astype(jnp.float32)
  if zero is not None:
    value -= zero.astype(jnp.float32)
  if spec.is_mx:
    return formats.scale_by_exp2(value, formats.exponent(scale))
  return value * scale


def store_scale(
  scale: jax.Array, spec: QuantSpec, outer: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """Effective scale -> scale as stored, tensor scale."""
  scale = jnp.asarray(scale, jnp.float32)
  if spec.is_mx:
    code = jnp.clip(formats.exponent(scale) + 127, 0, 254).astype(jnp.uint8)
    return lax.bitcast_convert_type(code, spec.stored_scale_dtype), None
  if spec.dtype == 'nvfp4':
    if outer is None:
      largest = jnp.max(scale, axis=(-2, -1), keepdims=True)
      outer = _round_tensor_scale(divide(largest, _E4M3.max))
    block = formats.rne_saturate(divide(scale, outer), _E4M3)
    return block.astype(spec.stored_scale_dtype), outer
  return round_scale(scale, spec).astype(spec.stored_scale_dtype), None


def load_scale(
  stored: jax.Array, outer: jax.Array | None, spec: QuantSpec
) -> jax.Array:
  """Inverse of store_scale: the effective float32 scale."""
  if spec.is_mx:
    code = lax.bitcast_convert_type(stored, jnp.uint8)
    return formats.exp2(code.astype(jnp.int32) - 127)
  scale = stored.astype(jnp.float32)
  return scale if outer is None else scale * outer


def store_zero_point(zero_point: jax.Array, spec: QuantSpec) -> jax.Array:
  """Zero point rounded and clipped to the codes, uint8."""
  zero_point = jnp.round(jnp.asarray(zero_point).astype(jnp.float32))
  return jnp.clip(zero_point, 0, spec.qmax).astype(jnp.uint8)


def round_scale(scale: jax.Array, spec: QuantSpec) -> jax.Array:
  """Float32 scale rounded to spec.scale_dtype.

  A cast there and back would not do: XLA may drop it as excess precision.
  """
  if spec.scale_dtype == 'bfloat16':
    return lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)
  if spec.scale_dtype == 'float16':  # reduce_precision would flush subnormals.
    return formats.rne_saturate(scale, formats.FLOAT16)
  return scale


def tensor_scale(x: jax.Array, spec: QuantSpec) -> jax.Array:
  """nvfp4's outer scale of x (..., K, N), float32 (..., 1, 1)."""
  absmax = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True) * spec.clip
  return _round_tensor_scale(divide(absmax, spec.qmax * _E4M3.max))


def shrink(
  lo: jax.Array, hi: jax.Array, ratio: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The range times ratio, rounded before hi - lo can be contracted with it."""
  if isinstance(ratio, float) and ratio == 1.0:
    return lo, hi
  return lax.optimization_barrier((lo * ratio, hi * ratio))


def divide(x: jax.Array, divisor: float | jax.Array) -> jax.Array:
  """x / divisor, never x * (1 / divisor); see the module docstring."""
  # A select on x is no broadcast, so the rewrite does not apply.
  return x / jnp.where(jnp.isnan(x), x, divisor)


def _positive(scale, spec):
  """At least the smallest number of spec.scale_dtype fit for a divisor."""
  half = spec.scale_dtype == 'float16'
  least = formats.FLOAT16.smallest_subnormal if half else formats.MIN_NORMAL
  return jnp.maximum(scale, least)


def _round_tensor_scale(scale):
  """To 20 significant bits, so that products with e4m3 numbers are exact."""
  scale = jnp.maximum(scale, _MIN_TENSOR_SCALE)
  return lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=19)
