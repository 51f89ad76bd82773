"""compressed-tensors: its quantization arguments and its tensors, both ways.

A directory in this format (vLLM project, https://github.com/vllm-project/
compressed-tensors, layouts of 0.19) says in config.json, per group of modules,
what weights and inputs are quantized to, and stores each linear as

  pack-quantized        weight_packed int32 (N, ceil(K*b/32)), weight_shape;
                        codes + 2^(b-1) in a dense stream of bits along K
  int-quantized         weight int8 (N, K)
  float-quantized       weight float8_e4m3fn (N, K)
  naive-quantized       as the two above, for floats with float inputs
  nvfp4-pack-quantized  weight_packed uint8 (N, K/2), even k in the low nibble;
                        weight_scale float8_e4m3fn; weight_global_scale
  mxfp4-pack-quantized  the same with weight_scale uint8, biased exponents
  mxfp8-quantized       weight float8_e4m3fn, weight_scale uint8

with weight_scale (N, K/G), (N, 1) or (1,), and weight_zero_point (packed along
N in the packed format). `read` and `write` map these to QArrays (K, N) and
back without touching an integer: a symmetric code is ours, an asymmetric one
and its zero point are ours less 2^(b-1). Scales keep their dtype.

Dynamic integer inputs: the format's step is absmax / (qmax + 1/2), ours absmax
* clip / qmax unless the spec's scale_rule is 'half'. Read, they get that rule;
written, the step must be within 0.5 % of it, which 8 bits are without clipping.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxq.io import words
from jaxq.nn import linear
from jaxq.numerics import packing, qarray
from jaxq.numerics import spec as spec_lib

QuantSpec = spec_lib.QuantSpec
Tensors = Mapping[str, np.ndarray]

VERSION = '0.19.0'  # Whose layouts these are.
PACKED = 'pack-quantized'
FORMATS = (
  'float-quantized',
  'int-quantized',
  'mxfp4-pack-quantized',
  'mxfp8-quantized',
  'naive-quantized',
  'nvfp4-pack-quantized',
  PACKED,
)
# Block formats: what the arguments of weights and inputs say of them.
_BLOCK_ARGS = {
  'mxfp4': (4, 'group', 32, 'torch.uint8'),
  'mxfp8': (8, 'group', 32, 'torch.uint8'),
  'nvfp4': (4, 'tensor_group', 16, 'torch.float8_e4m3fn'),
}
_STRATEGIES = ('block', 'channel', 'group', 'tensor', 'tensor_group', 'token')
_CLIP_SLACK = 0.005


def weight_spec(args: Mapping[str, Any], where: str) -> QuantSpec:
  """The spec of a group's 'weights' arguments, scales taken as float32.

  Weights in blocks of [rows, columns] become groups of `columns`, each block's
  scale repeated over its rows: the same numbers.

  Raises:
    NotImplementedError: nothing of ours stands for these arguments.
  """
  _check_args(args, where)
  if args.get('dynamic'):
    _refuse(where, f'dynamic={args["dynamic"]!r} weights')
  dtype = _dtype(args, where)
  strategy, group_size = _strategy(args), args.get('group_size') or -1
  if strategy == 'block':
    strategy, group_size = 'group', args['block_structure'][1]
  if dtype in _BLOCK_ARGS:
    return QuantSpec(dtype=dtype)
  if strategy not in ('channel', 'group', 'tensor'):
    _refuse(where, f'weights with strategy {strategy!r}')
  return QuantSpec(
    dtype=dtype,
    granularity=strategy,
    group_size=group_size if strategy == 'group' else -1,
    symmetric=bool(args.get('symmetric', True)),
  )


def input_spec(args: Mapping[str, Any], where: str) -> tuple[QuantSpec, bool]:
  """The spec of 'input_activations' arguments, and whether it is static.

  Raises:
    NotImplementedError: nothing of ours stands for these arguments.
  """
  _check_args(args, where)
  dtype, strategy = _dtype(args, where), _strategy(args)
  static = not args.get('dynamic')
  if dtype in _BLOCK_ARGS:
    if static:
      _refuse(where, f'static {dtype} inputs')
    rule = 'round' if dtype in ('mxfp4', 'mxfp8') else 'floor'
    return QuantSpec(dtype=dtype, scale_rule=rule), args['dynamic'] == 'local'
  symmetric = bool(args.get('symmetric', True))
  allowed = ('tensor',) if static else ('group', 'tensor', 'token')
  if strategy not in allowed:
    kind = 'static' if static else 'dynamic'
    _refuse(where, f'{kind} inputs with strategy {strategy!r}')
  half = dtype.startswith('int') and symmetric and not static
  spec = QuantSpec(
    dtype=dtype,
    granularity=strategy,
    group_size=args['group_size'] if strategy == 'group' else -1,
    symmetric=symmetric,
    scale_rule='half' if half else 'floor',
  )
  return spec, static


def args_of(spec: QuantSpec, dynamic: bool | str = False) -> dict[str, Any]:
  """Quantization arguments as compressed-tensors writes them."""
  strategy: str = spec.granularity
  group_size = spec.group_size if strategy == 'group' else None
  scale_dtype = None
  if spec.dtype in _BLOCK_ARGS:
    _, strategy, group_size, scale_dtype = _BLOCK_ARGS[spec.dtype]
  return {
    'actorder': None,
    'block_structure': None,
    'dynamic': dynamic,
    'group_size': group_size,
    'num_bits': spec.bits,
    'observer': None if dynamic is True else 'minmax',
    'observer_kwargs': {},
    'scale_dtype': scale_dtype,
    'strategy': strategy,
    'symmetric': spec.symmetric,
    'type': 'int' if spec.is_integer else 'float',
    'zp_dtype': None if spec.symmetric else 'torch.int8',
  }


def input_args(act: linear.ActQuant) -> dict[str, Any]:
  """'input_activations' arguments of an input quantizer."""
  if act.spec.dtype == 'nvfp4':
    return args_of(act.spec, 'local')
  return args_of(act.spec, act.scale is None)


def format_of(weights: QuantSpec, inputs: QuantSpec | None) -> str:
  """The format of a linear, by compressed-tensors' own rule."""
  if weights.is_block_format:
    packed = '' if weights.dtype == 'mxfp8' else '-pack'
    return f'{weights.dtype}{packed}-quantized'
  if inputs is None:
    return PACKED if weights.is_integer else 'naive-quantized'
  return 'int-quantized' if weights.is_integer else 'float-quantized'


def why_not(spec: QuantSpec) -> str:
  """Why the format cannot hold weights of this spec; '' if it can."""
  if spec.dtype in _BLOCK_ARGS:
    return ''
  if not spec.is_integer and spec.dtype != 'fp8_e4m3':
    return (
      f'its weights are {spec.dtype}; compressed-tensors has int2 to int8, '
      'fp8_e4m3, mxfp4, mxfp8 and nvfp4'
    )
  if spec.granularity == 'token':
    return (
      "its weights have one scale per input channel (granularity='token'); "
      'compressed-tensors has one per tensor, channel or group'
    )
  if spec.granularity == 'tensor' and not spec.symmetric:
    return (
      'its weights have one zero point for the whole tensor; compressed-tensors'
      ' packs zero points per channel or group'
    )
  return ''


def stored_input(act: Any) -> Any:
  """As the format knows it: inputs in steps (OutlierTune) have scale 1."""
  if not isinstance(act, linear.StepInput) or act.spec.narrow:
    return act
  spec = dataclasses.replace(act.spec, granularity='tensor', group_size=-1)
  one: Any = np.ones((1, 1), np.float32)
  return linear.ActQuant(one, None, spec)


def why_not_input(act: Any) -> str:
  """Why the format cannot hold this input quantizer; '' if it can."""
  act = stored_input(act)
  if isinstance(act, linear.StepInput):
    return (
      f'its inputs arrive in steps, as codes of {act.spec.qmin} to '
      f'{act.spec.qmax} (mergequant); compressed-tensors has one code more'
    )
  if not isinstance(act, linear.ActQuant):
    return (
      f'its inputs are quantized by {type(act).__name__}; compressed-tensors '
      'has only scales taken from the input or stored with the linear'
    )
  spec, static = act.spec, act.scale is not None
  if spec.dtype == 'nvfp4' and not static:
    return (
      'its nvfp4 inputs have no calibrated scale; compressed-tensors stores '
      'one (input_global_scale)'
    )
  if spec.dtype in ('mxfp4', 'mxfp8') and spec.scale_rule != 'round':
    return (
      f'its {spec.dtype} inputs have scale_rule={spec.scale_rule!r}; '
      "compressed-tensors has 'round': calibrate with the scheme "
      f'{spec.dtype.upper()}'
    )
  if spec.dtype in ('mxfp4', 'mxfp8', 'nvfp4'):
    return ''
  if not spec.is_integer and spec.dtype != 'fp8_e4m3':
    return (
      f'its inputs are {spec.dtype}; compressed-tensors has int2 to int8, '
      'fp8_e4m3, mxfp4, mxfp8 and nvfp4'
    )
  allowed = ('tensor',) if static else ('group', 'tensor', 'token')
  if spec.granularity not in allowed:
    return (
      f'its {"static" if static else "dynamic"} inputs have one scale per '
      f'{spec.granularity}; compressed-tensors has one per '
      f'{" or ".join(allowed)}'
    )
  clip = 1.0
  if spec.is_integer and spec.symmetric and spec.scale_rule != 'half':
    clip = spec.qmax / (spec.qmax + 0.5)
  if not static and abs(spec.clip / clip - 1) > _CLIP_SLACK:
    return (
      f'its dynamic {spec.dtype} inputs are clipped by {spec.clip:.6g}; '
      f'compressed-tensors has {clip:.6g} there: calibrate with '
      f'--input_clip={clip:.6g}'
    )
  return ''


def read(
  tensors: Tensors, spec: QuantSpec, args: Mapping[str, Any], where: str
) -> qarray.QArray:
  """The kernel (K, N) of one linear.

  Args:
    tensors: of the module, by their own names ('weight_packed', ...).
    spec: from weight_spec(args).
    args: the 'weights' arguments.
    where: the module, for messages.

  Returns:
    A QArray with NumPy leaves.

  Raises:
    ValueError: a tensor is missing or contradicts another.
    NotImplementedError: rows that are not in order (weight_g_idx).
  """
  if 'weight_g_idx' in tensors:
    _refuse(where, 'groups out of order (weight_g_idx)')
  half = 2 ** (spec.bits - 1)
  stored = _get(tensors, 'weight_scale', where)
  if 'weight_packed' in tensors and spec.dtype in ('mxfp4', 'nvfp4'):
    codes = _nibbles(tensors['weight_packed'])  # (N, K)
  elif 'weight_packed' in tensors:
    N, K = (int(n) for n in _get(tensors, 'weight_shape', where))
    packed = tensors['weight_packed']
    dense = packed.shape[-1] == words.count(K, spec.bits)
    unsigned = words.unpack(packed, spec.bits, K, dense=dense)
    codes = _ours(unsigned, spec)
  else:
    codes = _get(tensors, 'weight', where)
    stands = 'int8' if spec.is_integer else spec.code_dtype
    if codes.dtype.name != stands:
      raise ValueError(
        f'{where}: weight is {codes.dtype.name}; {stands} is needed for '
        f'{spec.dtype}, as quantization_status compressed stores it. Save the '
        'model compressed.'
      )
    if spec.is_integer and not spec.symmetric:
      codes = (codes.astype(np.int16) + half).astype(np.uint8)
  N, K = codes.shape
  zero = None
  if not spec.symmetric:
    zero = _get(tensors, 'weight_zero_point', where)
    if 'weight_packed' in tensors:
      dense = zero.shape[0] == words.count(N, spec.bits)
      zero = words.unpack(zero.T, spec.bits, N, dense=dense)  # (K/G, N)
    else:
      zero = _scale_kn(zero, (K, N), spec, args, where).astype(np.int16)
      zero = (zero + half).astype(np.uint8)
  outer = None
  if spec.dtype == 'nvfp4':
    outer = _get(tensors, 'weight_global_scale', where).astype(np.float32)
    outer = (1.0 / outer).reshape(1, 1)
  if spec.is_mx:
    stored = stored.view(ml_dtypes.float8_e8m0fnu)
  scale = _scale_kn(stored, (K, N), spec, args, where)
  return assemble(codes.T, scale, zero, spec, outer)


def write(q: qarray.QArray, format_name: str) -> dict[str, np.ndarray]:
  """The tensors of one linear, inverse of read; `why_not(q.spec)` is ''.

  Args:
    q: kernel (K, N).
    format_name: one of FORMATS.
  """
  spec = q.spec
  half = 2 ** (spec.bits - 1)
  codes = np.asarray(qarray.codes(q)).T  # (N, K)
  scale = np.asarray(q.scale).T
  if spec.granularity == 'tensor':
    scale = scale.reshape(1)
  out: dict[str, np.ndarray] = {}
  zero = None if q.zero_point is None else np.asarray(q.zero_point)
  if format_name in ('mxfp4-pack-quantized', 'nvfp4-pack-quantized'):
    out['weight_packed'] = codes[:, 0::2] | (codes[:, 1::2] << 4)
  elif format_name == PACKED:
    unsigned = codes if zero is not None else codes.astype(np.int16) + half
    out['weight_packed'] = words.pack(unsigned.astype(np.uint8), spec.bits)
    out['weight_shape'] = np.array(codes.shape, np.int64)
    if zero is not None:
      out['weight_zero_point'] = words.pack(zero, spec.bits).T
  else:
    out['weight'] = codes
    if zero is not None:
      out['weight'] = (codes.astype(np.int16) - half).astype(np.int8)
      out['weight_zero_point'] = (zero.T.astype(np.int16) - half).astype(
        np.int8
      )
  if spec.is_mx:
    scale = scale.view(np.uint8)
  out['weight_scale'] = scale
  if spec.dtype == 'nvfp4':
    outer = np.asarray(q.tensor_scale, np.float32).reshape(1)
    out['weight_global_scale'] = 1.0 / outer
  return {name: np.ascontiguousarray(a) for name, a in out.items()}


def read_input(
  tensors: Tensors, args: Mapping[str, Any], where: str
) -> linear.ActQuant:
  """The input quantizer of one linear; its scale is None where dynamic."""
  spec, static = input_spec(args, where)
  if not static:
    return linear.ActQuant(None, None, spec)
  if spec.dtype == 'nvfp4':
    outer: Any = _get(tensors, 'input_global_scale', where).astype(np.float32)
    return linear.ActQuant((1.0 / outer).reshape(1, 1), None, spec)
  scale: Any = _get(tensors, 'input_scale', where).astype(np.float32)
  zero: Any = None
  if not spec.symmetric:
    zero = _get(tensors, 'input_zero_point', where).astype(np.int16)
    zero = (zero.reshape(1, 1) + 2 ** (spec.bits - 1)).astype(np.uint8)
  return linear.ActQuant(scale.reshape(1, 1), zero, spec)


def write_input(act: linear.ActQuant) -> dict[str, np.ndarray]:
  """The tensors of an input quantizer; none where it is dynamic."""
  if act.scale is None:
    return {}
  scale = np.asarray(act.scale, np.float32).reshape(1)
  if act.spec.dtype == 'nvfp4':
    return {'input_global_scale': 1.0 / scale}
  out = {'input_scale': scale}
  if act.zero_point is not None:
    zero = np.asarray(act.zero_point).astype(np.int16).reshape(1)
    zero = (zero - 2 ** (act.spec.bits - 1)).astype(np.int8)
    out['input_zero_point'] = zero
  return out


def assemble(
  codes: np.ndarray,
  scale: np.ndarray,
  zero_point: Any,
  spec: QuantSpec,
  tensor_scale: Any = None,
) -> qarray.QArray:
  """A QArray of codes (K, N) and parameters as stored, none of them rounded.

  The spec's scale_dtype becomes that of `scale`, where the format has a choice.
  """
  if not spec.is_block_format:
    name = scale.dtype.name
    if name not in spec_lib.SCALE_DTYPES:
      name, scale = 'float32', scale.astype(np.float32)
    spec = QuantSpec.from_dict({**spec.to_dict(), 'scale_dtype': name})
  K, N = codes.shape
  tile = packing.tile_rows(K, spec.group_size)
  qvalue: Any = np.ascontiguousarray(codes).astype(spec.code_dtype, copy=False)
  if packing.packable(spec.bits, tile):
    low = qvalue.view(np.uint8) & (2**spec.bits - 1)
    qvalue = jax.device_get(packing.pack(jnp.asarray(low), spec.bits, tile))
  stored: Any = np.ascontiguousarray(scale)
  if zero_point is not None:
    zero_point = np.ascontiguousarray(zero_point)
  q = qarray.QArray(
    qvalue=qvalue,
    scale=stored,
    zero_point=zero_point,
    tensor_scale=tensor_scale,
    spec=spec,
    shape=(K, N),
  )
  qarray.validate(q)
  return q


def _ours(unsigned: np.ndarray, spec: QuantSpec) -> np.ndarray:
  """Codes from 0 to codes as a spec has them: signed where symmetric."""
  if not spec.symmetric:
    return unsigned
  return (unsigned.astype(np.int16) - 2 ** (spec.bits - 1)).astype(np.int8)


def _scale_kn(
  scale: np.ndarray,
  shape: tuple[int, int],
  spec: QuantSpec,
  args: Mapping[str, Any],
  where: str,
) -> np.ndarray:
  """A stored scale or zero point -> (K/G, N), (1, N) or (1, 1)."""
  K, N = shape
  if _strategy(args) == 'block':
    rows = args['block_structure'][0]
    scale = np.repeat(scale, rows, axis=0)[:N]
  want = qarray.scale_shape(shape, spec)
  if scale.size != want[0] * want[1]:
    raise ValueError(
      f'{where}: weight_scale has shape {scale.shape} for weights ({N}, {K}) '
      f'per {spec.granularity}; {want[::-1]} is needed. Fetch the file again.'
    )
  return scale.reshape(want[::-1]).T


def _nibbles(packed: np.ndarray) -> np.ndarray:
  """uint8 (N, K/2) -> codes (N, K), low nibble first."""
  pairs = np.stack([packed & 15, packed >> 4], axis=-1)
  return pairs.reshape(packed.shape[0], -1)


def _dtype(args: Mapping[str, Any], where: str) -> str:
  """Our dtype of quantization arguments."""
  bits, kind = args.get('num_bits', 8), args.get('type', 'int')
  if kind == 'int' and 2 <= bits <= 8:
    return f'int{bits}'
  strategy, group_size = _strategy(args), args.get('group_size')
  if kind == 'float' and bits == 4:
    if strategy == 'tensor_group' and group_size == 16:
      return 'nvfp4'
    if strategy == 'group' and group_size == 32:
      return 'mxfp4'
  if kind == 'float' and bits == 8:
    exponents = str(args.get('scale_dtype')).removeprefix('torch.') == 'uint8'
    return 'mxfp8' if exponents and group_size == 32 else 'fp8_e4m3'
  raise NotImplementedError(
    f'{where}: {bits}-bit {kind} with strategy {strategy!r} and group_size '
    f'{group_size}; allowed are int2 to int8, fp8_e4m3, mxfp4, mxfp8 and nvfp4.'
    ' Use a model of one of these.'
  )


def _strategy(args: Mapping[str, Any]) -> str:
  """The strategy, inferred from the group size where it is not given."""
  given, group_size = args.get('strategy'), args.get('group_size')
  if given:
    return given
  if group_size is None:
    return 'tensor'
  return 'group' if group_size > 0 else 'channel'


def _check_args(args: Mapping[str, Any], where: str) -> None:
  strategy = _strategy(args)
  if strategy not in _STRATEGIES:
    _refuse(where, f'strategy {strategy!r}')
  if args.get('actorder') in ('group', 'dynamic'):
    _refuse(where, "actorder='group'")


def _get(tensors: Tensors, name: str, where: str) -> np.ndarray:
  if name not in tensors:
    raise ValueError(
      f'{where}: tensor {name} is missing; the module has {sorted(tensors)}. '
      'Fetch the file again.'
    )
  return tensors[name]


def _refuse(where: str, what: str) -> None:
  raise NotImplementedError(
    f'{where}: {what}; jaxq cannot compute this. Use a model without it.'
  )
