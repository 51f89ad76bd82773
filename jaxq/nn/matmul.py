"""The matmul behind QuantDense: float, weight-only, or both sides quantized.

  float        y = x @ dequantize(w), x fake-quantized where the layer says so.
  integer      y = (q_x @ q_w : int32) * s_x * s_w, for int8 x int8 with one
               scale per token or tensor of x and per column of w.

Both are the same function up to the rounding of the accumulation. `None` picks
'integer' on chips with an int8 matrix unit and 'float' elsewhere: on a CPU the
XLA int8 dot is slower than the float one.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxq.numerics import chips, qarray

IMPLEMENTATIONS = ('float', 'integer')


def matmul(
  x: jax.Array, w: Any, act: Any = None, *, implementation: str | None = None
) -> jax.Array:
  """x (..., K) @ w (K, N) -> (..., N) in x.dtype.

  Args:
    x: activations.
    w: float array or QArray (K, N).
    act: linear.ActQuant, or None for float activations.
    implementation: one of IMPLEMENTATIONS, or None to pick by platform.

  Raises:
    ValueError: unknown implementation.
    NotImplementedError: 'integer' was asked for and the formats do not allow.
  """
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f'matmul: implementation={implementation!r}; allowed '
      f'{sorted(IMPLEMENTATIONS)} or None to pick by platform.'
    )
  reason = _why_not_integer(w, act)
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


def _float(x: jax.Array, w: Any, act: Any) -> jax.Array:
  if act is not None:
    x = qarray.dequantize(quantize_input(x, act), x.dtype).reshape(x.shape)
  kernel = qarray.dequantize(w) if isinstance(w, qarray.QArray) else w
  kernel = jnp.asarray(kernel, x.dtype)
  y = jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
  return y.astype(x.dtype)


def _integer(x: jax.Array, w: qarray.QArray, act: Any) -> jax.Array:
  qx = quantize_input(x, act)
  acc = jnp.matmul(
    qarray.codes(qx), qarray.codes(w), preferred_element_type=jnp.int32
  )  # (T, N) int32
  y = acc.astype(jnp.float32) * qx.scale * w.scale
  return y.astype(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def _why_not_integer(w: Any, act: Any) -> str:
  """Why int8 x int8 with a scale epilogue cannot serve; '' if it can."""
  if act is None or not isinstance(w, qarray.QArray):
    return 'both sides must be quantized; use the float implementation.'
  for side, spec, granularities in (
    ('x', act.spec, ('token', 'tensor')),
    ('w', w.spec, ('channel', 'tensor')),
  ):
    if spec.is_float or not spec.symmetric or spec.bits > 8:
      return (
        f'{side} is {spec.dtype}, symmetric={spec.symmetric}; it needs '
        'symmetric integers of at most 8 bits.'
      )
    if spec.granularity not in granularities:
      return (
        f'{side} has one scale per {spec.granularity}; the epilogue allows '
        f'{granularities}.'
      )
  return ''


def _has_int8_unit() -> bool:
  device = jax.devices()[0]
  if device.platform == 'cpu':
    return False
  return 'int8' in chips.native_formats(chips.chip_of(device))
