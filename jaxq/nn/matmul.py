"""The matmul behind QuantDense: float, weight-only, or both sides quantized.

  float        y = x @ dequantize(w), x fake-quantized where the layer says so.
  integer      y = (q_x @ q_w : int32) * s_x * s_w, for int8 x int8 with one
               scale per token or tensor of x and per column of w. A zero point
               of w is taken off as zero_point * sum(q_x).
  kernel       the Pallas kernel of the two formats (kernel_matmul.py).

All are the same function up to the rounding of the accumulation. `None` picks
the kernel where it serves, else 'integer' on chips with an int8 matrix unit and
'float' elsewhere: on a CPU the XLA int8 dot is slower than the float one.

An x in steps (linear.StepInput) has no scale: y = (q_x @ q_w) * s_w. There the
float implementation multiplies the codes too, which are exact in bfloat16, and
both agree to the bit as long as sums stay below 2^24.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxq.nn import kernel_inputs, kernel_matmul
from jaxq.numerics import binary, chips, qarray

IMPLEMENTATIONS = ('float', 'integer', 'kernel')


def matmul(
  x: jax.Array | kernel_inputs.QuantizedInput,
  w: Any,
  act: Any = None,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """x (..., K) @ w (K, N) -> (..., N) in x.dtype.

  Args:
    x: activations; codes of them have their kernel, and nothing is picked.
    w: float array, QArray or BinaryArray (K, N).
    act: linear.ActQuant, StepInput or FpxInput, or None for float activations.
    implementation: one of IMPLEMENTATIONS, or None to pick by platform.

  Raises:
    ValueError: unknown implementation.
    NotImplementedError: 'integer' or 'kernel' was asked for and the formats,
      or the chip, do not allow.
  """
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f'matmul: implementation={implementation!r}; allowed '
      f'{sorted(IMPLEMENTATIONS)} or None to pick by platform.'
    )
  if isinstance(x, kernel_inputs.QuantizedInput):
    return kernel_inputs.matmul(x, w)
  if implementation == 'kernel':
    return kernel_matmul.matmul(x, w, act)
  if implementation is None and kernel_matmul.choose(x, w, act):
    return kernel_matmul.matmul(x, w, act)
  reason = _why_not_integer(w, act, x)
  if implementation == 'integer' and reason:
    raise NotImplementedError(f"matmul: implementation='integer': {reason}")
  if implementation is None:
    native = not reason and _has_int8_unit()
    implementation = 'integer' if native else 'float'
  return (_integer if implementation == 'integer' else _float)(x, w, act)


def quantize_input(x: jax.Array, act: Any) -> qarray.QArray:
  """x (..., K) -> QArray of x flattened to (T, K)."""
  flat = x.reshape(-1, x.shape[-1])
  return qarray.quantize(
    flat, act.spec, scale=act.scale, zero_point=act.zero_point
  )


def fake_input(x: jax.Array, act: Any) -> jax.Array:
  """x (..., K) quantized and back, in x.dtype; groups run along K."""
  flat = x.reshape(-1, x.shape[-1])
  if hasattr(act, 'fake'):  # It rounds in its own way.
    return act.fake(flat).reshape(x.shape).astype(x.dtype)
  if act.spec.granularity != 'group':
    return qarray.dequantize(quantize_input(x, act), x.dtype).reshape(x.shape)
  # A stored scale is nvfp4's tensor scale: those of groups are dynamic.
  params = qarray.find_params(flat.T, act.spec, tensor_scale=act.scale)
  y = qarray.decode(qarray.encode(flat.T, *params, act.spec), *params, act.spec)
  return y.T.reshape(x.shape).astype(x.dtype)


def _float(x: jax.Array, w: Any, act: Any) -> jax.Array:
  if _in_steps(act):
    return _float_steps(x, w, act)
  if act is not None:
    x = fake_input(x, act)
  if isinstance(w, binary.BinaryArray):
    return binary.matmul(x, w)
  kernel = qarray.dequantize(w) if isinstance(w, qarray.QArray) else w
  kernel = jnp.asarray(kernel, x.dtype)
  y = jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
  return y.astype(x.dtype)


def _float_steps(x: jax.Array, w: Any, act: Any) -> jax.Array:
  """x in steps: the codes as floats, and a scale per column if w has one."""
  codes = act.codes(x).astype(x.dtype)
  if not isinstance(w, qarray.QArray) or _why_not_integer(w, act, x):
    return _float(codes, w, None)
  kernel = qarray.codes(w).astype(jnp.float32)
  if w.zero_point is not None:
    kernel = kernel - w.zero_point.astype(jnp.float32)
  y = jnp.matmul(
    codes, kernel.astype(x.dtype), preferred_element_type=jnp.float32
  )
  scale = w.scale.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
  return (y * scale).astype(x.dtype)


def _integer(x: jax.Array, w: qarray.QArray, act: Any) -> jax.Array:
  flat = x.reshape(-1, x.shape[-1])
  in_steps = _in_steps(act)
  qx: Any = None if in_steps else quantize_input(x, act)
  codes = act.codes(flat) if in_steps else qarray.codes(qx)
  kernel, zero = qarray.codes(w), w.zero_point
  if zero is not None:  # uint8 -> int8, the same distance from its zero point.
    kernel = (kernel.astype(jnp.int16) - 128).astype(jnp.int8)
  acc = jnp.matmul(codes, kernel, preferred_element_type=jnp.int32)  # (T, N)
  if zero is not None:
    total = jnp.sum(codes, axis=-1, keepdims=True, dtype=jnp.int32)  # (T, 1)
    acc = acc - total * (zero.astype(jnp.int32) - 128)
  y = acc.astype(jnp.float32)
  if not in_steps:
    y = y * qx.scale
  y = y * w.scale.astype(jnp.float32)
  return y.astype(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def _in_steps(act: Any) -> bool:
  return hasattr(act, 'codes')


def _why_not_integer(w: Any, act: Any, x: jax.Array) -> str:
  """Why int8 x int8 with a scale epilogue cannot serve; '' if it can."""
  if act is None or not isinstance(w, qarray.QArray):
    return 'both sides must be quantized; use the float implementation.'
  for side, spec, granularities in (
    ('x', act.spec, ('token', 'tensor')),
    ('w', w.spec, ('channel', 'tensor')),
  ):
    if not (spec.is_integer and (spec.symmetric or side == 'w')):
      return (
        f'{side} is {spec.dtype}, symmetric={spec.symmetric}; it needs '
        'symmetric integers of at most 8 bits.'
      )
    steps = side == 'x' and _in_steps(act)
    if not steps and spec.granularity not in granularities:
      return (
        f'{side} has one scale per {spec.granularity}; the epilogue allows '
        f'{granularities}.'
      )
  largest = x.shape[-1] * 2 ** (act.spec.bits - 1) * 2**w.spec.bits
  if largest >= 2**31:
    return (
      f'K={x.shape[-1]} products of {act.spec.dtype} and {w.spec.dtype} may '
      'overflow int32; use the float implementation.'
    )
  return ''


def _has_int8_unit() -> bool:
  return 'int8' in chips.native_formats(chips.current())
