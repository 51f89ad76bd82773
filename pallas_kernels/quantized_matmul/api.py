"""quantized_matmul: codes times codes, scales after the sum.

  y[m, n] = (sum_k qx[m, k] qw[k, n]) sx[m] sw[n] + bias[n]

x is quantized here, by row, or comes as codes with its scale. int8 x int8 and
int4 (as int8) sum in int32; fp8 x fp8 in float32. Bytes that must move:
2 M K + K N bits / 8 + 2 M N; the float path has 2 M K + 2 K N + 2 M N.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import (
  compat,
  hopper_blocks,
  planar,
  rows,
  targets,
  weights,
)
from pallas_kernels.quantized_matmul import (
  base,
  pallas_mosaic_gpu,
  pallas_mosaic_tpu,
)

IMPLEMENTATIONS = ('float', 'pallas_mosaic_gpu', 'pallas_mosaic_tpu', 'xla')
_OP = 'quantized_matmul'
Block = pallas_mosaic_gpu.Block | hopper_blocks.Block | pallas_mosaic_tpu.Block
_GROUPED_ROWS = 64
_CODES = ('float8_e4m3fn', 'float8_e5m2', 'int8')
_FLOATS = ('bfloat16', 'float16', 'float32')
_KERNELS = {
  'pallas_mosaic_gpu': pallas_mosaic_gpu,
  'pallas_mosaic_tpu': pallas_mosaic_tpu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
  """What of a call is static."""

  sides: base.Sides
  implementation: str
  out_dtype: Any
  chip: str
  block: Block | None
  interpret: bool


def quantized_matmul(
  x: jax.Array,
  qvalue: jax.Array,
  scale: jax.Array,
  zero_point: jax.Array | None = None,
  *,
  bits: int,
  group_size: int = -1,
  x_scale: jax.Array | None = None,
  x_format: str = 'int8',
  bias: jax.Array | None = None,
  out_dtype: Any = None,
  axis_name: str | None = None,
  implementation: str | None = None,
  chip: str | None = None,
  block: Block | None = None,
  interpret: bool = False,
) -> jax.Array:
  """x (..., K) @ w (K, N) with both sides quantized -> (..., N).

  Differentiable with respect to a floating x, straight through its rounding;
  the weight and the bias are constants.

  Args:
    x: floating, quantized here by row; or codes, int8 or fp8, with x_scale.
    qvalue: int8, packed planar int4 or fp8 (planar.py, weights.py); or
      hopper.pack_rows of that, with bits=8, or hopper.pack_words of 4 bits,
      which the GPU form takes.
    scale: (1, N) or (K / group_size, N), floating.
    zero_point: of w: uint8, shaped as scale; None: 0.
    bits: of w: 8, 4, 2 or 1.
    group_size: rows sharing a scale; -1: all.
    x_scale: (..., 1) or (1, 1), of codes.
    x_format: what a floating x is quantized to, a key of rows.QMAX.
    bias: (1, N), or None.
    out_dtype: None: x's, or bfloat16 for codes.
    axis_name: inside a shard_map: the mesh axis K is sharded over. One sum
      crosses devices: of int32 where x_scale is given and w has one scale per
      column (so all shards share them), else of float32; a floating x then has
      a scale per row and shard.
    implementation: one of IMPLEMENTATIONS, or None for what `choose` says.
    chip: the TPU or GPU compiled for; None: the one at hand.
    block: of the implementation; None: tuned or by rule.
    interpret: runs the kernel in Pallas's interpreter, on any platform.

  Raises:
    TypeError, ValueError: arguments that do not fit each other.
    NotImplementedError: the implementation that was named cannot serve.
  """
  layout = weights.check(
    _OP, x, qvalue, scale, zero_point, bits=bits, group_size=group_size
  )
  sides = _sides(x, x_scale, x_format, qvalue, layout)
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f'{_OP}: implementation={implementation!r}; allowed '
      f'{sorted(IMPLEMENTATIONS)} or None. Use one of them.'
    )
  N = scale.shape[-1]
  if bias is not None and bias.shape != (1, N):
    raise ValueError(
      f'{_OP}: bias has shape {bias.shape}; N={N} needs {(1, N)}. Reshape it.'
    )
  if sides.codes:
    x_scale = _flat_scale(x, x_scale)
  flat = x.reshape(-1, x.shape[-1])
  chip = chip or targets.current()
  name = implementation or _choose(flat, qvalue, sides, chip)
  shared = sides.codes and not sides.is_float and layout.group_size < 0
  out = jnp.dtype(out_dtype or (jnp.bfloat16 if sides.codes else x.dtype))
  call = _Call(
    sides=dataclasses.replace(
      sides, raw=axis_name is not None and shared and name != 'float'
    ),
    implementation=name,
    out_dtype=out if axis_name is None else jnp.dtype(jnp.float32),
    chip=chip,
    block=block,
    interpret=interpret,
  )
  w = (qvalue, scale, zero_point)
  y = _matmul(call, flat, x_scale, w, bias if axis_name is None else None)
  if axis_name is not None:
    y = jax.lax.psum(y, axis_name)
    if call.sides.raw:
      y = y.astype(jnp.float32) * scale.astype(jnp.float32) * x_scale
    y = base.finish(y, 1.0, bias, out)
  return y.reshape(*x.shape[:-1], N)


def choose(
  x: Any,
  qvalue: Any,
  *,
  bits: int,
  group_size: int = -1,
  symmetric: bool = True,
  x_format: str = 'int8',
  chip: str | None = None,
) -> str:
  """The name of the implementation that None stands for.

  The kernel on a TPU with units for the format, or on Hopper for a weight that
  is packed for it, where XLA is not to partition it; 'xla' where XLA is, on
  such a TPU. Elsewhere the float path: without units
  integers are slower than bfloat16. So it is for groups and more than 64 rows:
  scales of groups leave the sums to the vector unit, which on v6e takes 3.5
  times what the matrix unit does (docs/tpu_static_schedule.md).

  Args:
    x: array or ShapeDtypeStruct (..., K).
    qvalue: array or ShapeDtypeStruct.
    bits: of w.
    group_size: rows sharing a scale.
    symmetric: whether w has no zero point.
    x_format: as for quantized_matmul.
    chip: the TPU or GPU compiled for; None: the one at hand.
  """
  layout = planar.Planar(
    bits=bits,
    K=x.shape[-1],
    group_size=group_size,
    signed=symmetric and bits > 1,
  )
  codes = x.dtype.name in _CODES
  sides = base.Sides(layout=layout, x_format=x_format, codes=codes)
  return _choose(x, qvalue, sides, chip or targets.current())


def _choose(x, qvalue, sides, chip):
  if sides.layout.group_size > 0 and math.prod(x.shape[:-1]) > _GROUPED_ROWS:
    return 'float'
  for name, kernel in _KERNELS.items():
    if not kernel.why_not(x, qvalue, sides, chip):
      return 'xla' if compat.is_partitioned() else name
  need = 'fp8' if sides.is_float else 'int8'
  known = targets.TARGETS.get(chip)
  return 'xla' if known is not None and need in known.macs else 'float'


def _sides(x, x_scale, x_format, qvalue, layout):
  """Sides of a call, checked."""
  codes = x.dtype.name in _CODES
  if not codes and x.dtype.name not in _FLOATS:
    raise TypeError(
      f'{_OP}: x is {x.dtype}; allowed {sorted(_CODES + _FLOATS)}. Cast it.'
    )
  if codes != (x_scale is not None):
    raise ValueError(
      f'{_OP}: x is {x.dtype} {"without" if codes else "with"} x_scale; codes '
      'come with one and floats without. Give both, or floats alone.'
    )
  if codes:
    x_format = x.dtype.name
  if x_format not in rows.QMAX:
    raise ValueError(
      f'{_OP}: x_format={x_format!r}; allowed {sorted(rows.QMAX)}. Use one of '
      'them.'
    )
  sides = base.Sides(layout=layout, x_format=x_format, codes=codes)
  if sides.is_float != qvalue.dtype.name.startswith('float8'):
    raise TypeError(
      f'{_OP}: qvalue is {qvalue.dtype} and x is {x_format}; both sides must '
      'be integers, or both fp8. Quantize x to the format of w.'
    )
  return sides


def _flat_scale(x, x_scale):
  if x_scale.shape in ((1,) * x_scale.ndim, (*x.shape[:-1], 1)):
    return x_scale.reshape(-1, 1).astype(jnp.float32)
  raise ValueError(
    f'{_OP}: x_scale has shape {x_scale.shape}; x {x.shape} needs '
    f'{(*x.shape[:-1], 1)}, or one value. Reshape it.'
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(call, x, x_scale, w, bias):
  args = (x, x_scale, w, bias, call.sides, call.out_dtype)
  if call.implementation == 'xla':
    return base.quantized_matmul(*args)
  if call.implementation == 'float':
    return base.float_matmul(*args)
  kernel: Any = _KERNELS[call.implementation]
  return kernel.quantized_matmul(
    *args, chip=call.chip, block=call.block, interpret=call.interpret
  )


def _forward(call, x, x_scale, w, bias):
  like = jnp.zeros((), x.dtype)  # Its dtype, as a residual may hold it.
  codes = x if call.sides.codes else None
  return _matmul(call, x, x_scale, w, bias), (like, x_scale, w, bias, codes)


def _backward(call, residuals, g):
  like, x_scale, w, bias, codes = residuals
  rest = (
    compat.no_cotangent(x_scale),
    tuple(compat.no_cotangent(a) for a in w),
    compat.no_cotangent(bias),
  )
  if call.sides.codes:
    return (compat.no_cotangent(codes), *rest)
  weight = base.dequantize(w, call.sides.layout).astype(like.dtype)
  dx = jax.lax.dot_general(
    g.astype(like.dtype),
    weight,
    (((1,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  return (dx.astype(like.dtype), *rest)


_matmul.defvjp(_forward, _backward)
