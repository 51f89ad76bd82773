"""Which Pallas kernel serves a linear layer, and its call.

Kernels take plain arrays; this takes them out of QArrays and ActQuants.

  w integers or signs, x floating        weight_only_matmul
  both sides integers, or both fp8       quantized_matmul: x quantized by row
                                         inside, or beforehand if it is static
  w a BinaryArray, x floating            binary_kernel, two calls of the first

`choose` names what it picks: an implementation of pallas_kernels, or '' where
jaxq.nn.matmul serves. On a CPU it is always ''.
"""

from typing import Any

import jax

from jaxq.nn import binary_kernel
from jaxq.numerics import binary, qarray
from pallas_kernels import planar
from pallas_kernels.quantized_matmul import api as quantized
from pallas_kernels.weight_only_matmul import api as weight_only

_KERNEL = 'pallas_mosaic_tpu'
_FP8 = {'fp8_e4m3': 'float8_e4m3fn'}


def choose(x: jax.Array, w: Any, act: Any, chip: str | None = None) -> str:
  """'pallas_mosaic_tpu' where its kernel serves best, else ''.

  Args:
    x: (..., K).
    w: kernel of the layer.
    act: how x is quantized, or None.
    chip: the TPU compiled for; None: the one at hand.
  """
  if why_not(w, act):
    return ''
  if isinstance(w, binary.BinaryArray):
    return binary_kernel.choose(x, w, chip)
  fields = _weight_fields(w)
  if act is None:
    name = weight_only.choose(x, w.qvalue, chip=chip, **fields)
  else:
    name = quantized.choose(
      x, w.qvalue, x_format=_x_format(act), chip=chip, **fields
    )
  return name if name == _KERNEL else ''


def matmul(
  x: jax.Array,
  w: Any,
  act: Any,
  *,
  chip: str | None = None,
  interpret: bool = False,
) -> jax.Array:
  """x (..., K) @ w (K, N) by the kernel -> (..., N) in x.dtype.

  Args:
    x: (..., K).
    w: kernel of the layer.
    act: how x is quantized, or None.
    chip: the TPU compiled for; None: the one at hand.
    interpret: runs the kernel in Pallas's interpreter.

  Raises:
    NotImplementedError: no kernel serves, with the reason.
  """
  if reason := why_not(w, act):
    raise NotImplementedError(f'kernel_matmul: {reason}')
  if isinstance(w, binary.BinaryArray):
    return binary_kernel.matmul(x, w, chip=chip, interpret=interpret)
  fields = _weight_fields(w)
  N = w.shape[1]
  symmetric = fields.pop('symmetric')
  scale = jax.numpy.broadcast_to(w.scale, (w.scale.shape[0], N))
  zero_point = None
  if not symmetric:
    assert w.zero_point is not None
    zero_point = jax.numpy.broadcast_to(w.zero_point, scale.shape)
  flat = x.reshape(-1, x.shape[-1])
  options: dict[str, Any] = {
    'implementation': _KERNEL,
    'chip': chip,
    'interpret': interpret,
    'out_dtype': x.dtype,
    **fields,
  }
  if act is None:
    y = weight_only.weight_only_matmul(
      flat, w.qvalue, scale, zero_point, **options
    )
  elif act.scale is None:
    y = quantized.quantized_matmul(
      flat, w.qvalue, scale, zero_point, x_format=_x_format(act), **options
    )
  else:
    codes = qarray.encode(flat, act.scale, None, act.spec)
    y = quantized.quantized_matmul(
      codes, w.qvalue, scale, zero_point, x_scale=act.scale, **options
    )
  return y.reshape(*x.shape[:-1], N)


def why_not(w: Any, act: Any) -> str:
  """Why no kernel takes these formats; '' if one does."""
  if isinstance(w, binary.BinaryArray):
    return binary_kernel.why_not(w, act)
  if type(w) is not qarray.QArray or w.qvalue.ndim != 2:
    return 'w must be a QArray of one matrix.'
  spec = w.spec
  is_fp8 = spec.dtype in _FP8
  if not (spec.is_integer or spec.dtype == 'binary' or is_fp8):
    return f'w is {spec.dtype}; kernels take integers, binary and fp8_e4m3.'
  if spec.bits not in planar.BITS:
    return f'w has {spec.bits} bits; kernels take {list(planar.BITS)}.'
  if spec.granularity == 'token':
    return 'w has one scale per row; kernels take one per column or group.'
  if act is None:
    return 'w is fp8 and x is not quantized.' if is_fp8 else ''
  if not hasattr(act, 'spec') or hasattr(act, 'codes') or hasattr(act, 'fake'):
    return f'x is a {type(act).__name__}; kernels take an ActQuant.'
  if is_fp8 != (act.spec.dtype in _FP8):
    return f'w is {spec.dtype} and x {act.spec.dtype}; both or none is fp8.'
  if act.spec.dtype not in ('int4', 'int8', *_FP8) or not act.spec.symmetric:
    return f'x is {act.spec.dtype}, symmetric={act.spec.symmetric}.'
  if act.spec.clip != 1.0 or act.spec.scale_rule != 'floor':
    return 'x has a clip ratio or a scale rule of its own.'
  if act.scale is None and act.spec.granularity != 'token':
    return f'x has one dynamic scale per {act.spec.granularity}, not per token.'
  if act.scale is not None and (act.scale.ndim != 2 or act.scale.size != 1):
    return f'x has a static scale of shape {act.scale.shape}, not (1, 1).'
  return ''


def _weight_fields(w: qarray.QArray) -> dict[str, Any]:
  return {
    'bits': w.spec.bits,
    'group_size': w.spec.group_size,
    'symmetric': w.spec.symmetric,
  }


def _x_format(act: Any) -> str:
  return _FP8.get(act.spec.dtype, act.spec.dtype)
