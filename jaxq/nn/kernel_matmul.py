"""Which Pallas kernel serves a linear layer, and its call.

Kernels take plain arrays; this takes them out of QArrays and ActQuants.

  w integers or signs, x floating        weight_only_matmul
  both sides integers, or both fp8       quantized_matmul: x quantized by row
                                         inside, or beforehand if it is static;
                                         codes of kernel_inputs as they are
  w a BinaryArray, x floating            binary_kernel, two calls of the first

`choose` names what it picks: an implementation of pallas_kernels, or '' where
jaxq.nn.matmul serves. On a CPU it is always ''. A TPU's kernels take w as it is
stored, a GPU's as kernel_packing lays it out.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxq.nn import binary_kernel, kernel_weight
from jaxq.numerics import binary, qarray
from pallas_kernels import hopper, planar, rows, targets
from pallas_kernels.quantized_matmul import api as quantized
from pallas_kernels.weight_only_matmul import api as weight_only

KERNELS = ('pallas_mosaic_gpu', 'pallas_mosaic_tpu')
_FP8 = {'fp8_e4m3': 'float8_e4m3fn'}


def choose(x: jax.Array, w: Any, act: Any, chip: str | None = None) -> str:
  """One of KERNELS where it serves best, else ''.

  Args:
    x: (..., K).
    w: kernel of the layer.
    act: how x is quantized, or None.
    chip: the one compiled for; None: the one at hand.
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
      x, w.qvalue, x_format=x_format(act.spec), chip=chip, **fields
    )
  return name if name in KERNELS else ''


def choose_codes(
  shape: tuple[int, ...], w: Any, spec: Any, chip: str | None = None
) -> str:
  """As `choose`, of an x (..., K) that comes as codes of `spec`."""
  if why_not_codes(w, spec):
    return ''
  dtype = rows.code_dtype(x_format(spec))
  codes = jax.ShapeDtypeStruct(shape, dtype)
  fields = {'x_format': x_format(spec), **_weight_fields(w)}
  name = quantized.choose(codes, w.qvalue, chip=chip, **fields)
  return name if name in KERNELS else ''


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
    chip: the one compiled for; None: the one at hand.
    interpret: runs the kernel in Pallas's interpreter.

  Raises:
    NotImplementedError: no kernel serves, with the reason.
  """
  if reason := why_not(w, act):
    raise NotImplementedError(f'kernel_matmul: {reason}')
  if isinstance(w, binary.BinaryArray):
    return binary_kernel.matmul(x, w, chip=chip, interpret=interpret)
  flat = x.reshape(-1, x.shape[-1])
  leaves, options = _call(w, x.dtype, chip, interpret)
  if act is None:
    y = weight_only.weight_only_matmul(flat, *leaves, **options)
  elif act.scale is None:
    y = quantized.quantized_matmul(
      flat, *leaves, x_format=x_format(act.spec), **options
    )
  else:
    codes = qarray.encode(flat, act.scale, None, act.spec)
    y = quantized.quantized_matmul(codes, *leaves, x_scale=act.scale, **options)
  return y.reshape(*x.shape[:-1], w.shape[1])


def matmul_codes(
  codes: jax.Array,
  scale: jax.Array,
  w: Any,
  out_dtype: Any,
  *,
  chip: str | None = None,
  interpret: bool = False,
) -> jax.Array:
  """codes * scale @ w (K, N) by the kernel -> (..., N) of out_dtype.

  Args:
    codes: (..., K), int8 or fp8.
    scale: (..., 1), or as many axes of one element.
    w: kernel of the layer; `why_not_codes` has nothing against it.
    out_dtype: of the product.
    chip: the one compiled for; None: the one at hand.
    interpret: runs the kernel in Pallas's interpreter.
  """
  leaves, options = _call(w, out_dtype, chip, interpret)
  return quantized.quantized_matmul(codes, *leaves, x_scale=scale, **options)


def named(chip: str | None = None) -> str:
  """Which of KERNELS a chip may run; the TPU's where it runs neither.

  Args:
    chip: the one compiled for; None: the one at hand.
  """
  on_gpu = (chip or targets.current()) in hopper.CHIPS
  return 'pallas_mosaic_gpu' if on_gpu else 'pallas_mosaic_tpu'


def x_format(spec: Any) -> str:
  """What kernels call the codes of an input (rows.QMAX)."""
  return _FP8.get(spec.dtype, spec.dtype)


def why_not(w: Any, act: Any) -> str:
  """Why no kernel takes these formats; '' if one does."""
  if isinstance(w, binary.BinaryArray):
    return binary_kernel.why_not(w, act)
  if reason := why_not_weight(w):
    return reason
  if act is None:
    is_fp8 = w.spec.dtype in _FP8
    return 'w is fp8 and x is not quantized.' if is_fp8 else ''
  if not hasattr(act, 'spec') or hasattr(act, 'codes') or hasattr(act, 'fake'):
    return f'x is a {type(act).__name__}; kernels take an ActQuant.'
  if reason := _why_not_formats(w.spec, act.spec):
    return reason
  if act.spec.clip != 1.0 or act.spec.scale_rule != 'floor':
    return 'x has a clip ratio or a scale rule of its own.'
  if act.scale is None and act.spec.granularity != 'token':
    return f'x has one dynamic scale per {act.spec.granularity}, not per token.'
  if act.scale is not None and (act.scale.ndim != 2 or act.scale.size != 1):
    return f'x has a static scale of shape {act.scale.shape}, not (1, 1).'
  return ''


def why_not_codes(w: Any, spec: Any) -> str:
  """Why no kernel takes w and codes of x in the format `spec`."""
  return why_not_weight(w) or _why_not_formats(w.spec, spec)


def why_not_weight(w: Any) -> str:
  """Why no kernel takes w, whatever x is; '' if one may."""
  kinds = (qarray.QArray, kernel_weight.PackedArray)
  if type(w) not in kinds or w.scale.ndim != 2:
    return 'w must be a QArray of one matrix.'
  spec = w.spec
  is_fp8 = spec.dtype in _FP8
  if not (spec.is_integer or spec.dtype == 'binary' or is_fp8):
    return f'w is {spec.dtype}; kernels take integers, binary and fp8_e4m3.'
  if spec.bits not in planar.BITS:
    return f'w has {spec.bits} bits; kernels take {list(planar.BITS)}.'
  if spec.granularity == 'token':
    return 'w has one scale per row; kernels take one per column or group.'
  return ''


def _why_not_formats(w: Any, x: Any) -> str:
  if (w.dtype in _FP8) != (x.dtype in _FP8):
    return f'w is {w.dtype} and x {x.dtype}; both or none is fp8.'
  if x.dtype not in ('int4', 'int8', *_FP8) or not x.symmetric:
    return f'x is {x.dtype}, symmetric={x.symmetric}.'
  return ''


def _call(
  w: qarray.QArray, out_dtype: Any, chip: str | None, interpret: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
  """The weight's arrays and the options of a kernel's call."""
  fields = _weight_fields(w)
  scale = jnp.broadcast_to(w.scale, (w.scale.shape[0], w.shape[1]))
  zero_point = None
  if not fields.pop('symmetric'):
    assert w.zero_point is not None
    zero_point = jnp.broadcast_to(w.zero_point, scale.shape)
  options = {
    'implementation': named(chip),
    'chip': chip,
    'interpret': interpret,
    'out_dtype': out_dtype,
    **fields,
  }
  return (w.qvalue, scale, zero_point), options


def _weight_fields(w: qarray.QArray) -> dict[str, Any]:
  return {
    'bits': w.spec.bits,
    'group_size': w.spec.group_size,
    'symmetric': w.spec.symmetric,
  }
