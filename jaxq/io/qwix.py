"""A quantized model's tree in the arrays of Qwix (github.com/google/qwix).

Qwix's QArray is qvalue, scale, zero_point with

  value = (qvalue - zero_point) * scale

scale having qvalue's rank and dividing its shape, one qvalue per element (no
packing), and a logical type, qtype. `to_qwix` turns each of our QArrays into a
dict of these, so nothing of Qwix is needed here; with it installed,

  tree = to_qwix(variables['params'], make=qwix.QArray)

gives its own class. The codes are ours. A zero point has the codes' dtype
there, which are signed, so both move down by 2^(b-1). 2 and 4 bits become jnp's
own int2 and int4; 3, 5, 6 and 7 bits are int8 under the qtypes 'int3' to
'int7'. nvfp4's two scales become one, their product.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from jaxq.numerics import binary, qarray

# Our dtype: (dtype of qvalue, qtype).
_TYPES: dict[str, tuple[Any, Any]] = {
  'fp8_e4m3': (jnp.float8_e4m3fn, jnp.float8_e4m3fn),
  'fp8_e5m2': (jnp.float8_e5m2, jnp.float8_e5m2),
  'int2': (jnp.int2, jnp.int2),
  'int3': (jnp.int8, 'int3'),
  'int4': (jnp.int4, jnp.int4),
  'int5': (jnp.int8, 'int5'),
  'int6': (jnp.int8, 'int6'),
  'int7': (jnp.int8, 'int7'),
  'int8': (jnp.int8, jnp.int8),
  'mxfp4': (jnp.float4_e2m1fn, jnp.float4_e2m1fn),
  'mxfp8': (jnp.float8_e4m3fn, jnp.float8_e4m3fn),
  'nvfp4': (jnp.float4_e2m1fn, jnp.float4_e2m1fn),
}


def to_qwix(
  tree: Any, *, make: Callable[..., Any] = dict, path: str = ''
) -> Any:
  """Nested dicts with our QArrays -> the same with Qwix's.

  Args:
    tree: params, stacked or of one block; float leaves are left.
    make: called with qvalue, scale, zero_point and qtype of each.
    path: of the tree, for messages.

  Raises:
    ValueError: a format that Qwix has not; the message names the linear.
  """
  if isinstance(tree, Mapping):
    return {
      key: to_qwix(node, make=make, path=f'{path}.{key}' if path else key)
      for key, node in tree.items()
    }
  if isinstance(tree, binary.BinaryArray):
    raise ValueError(
      f'{path} holds signs and some rows in more bits (ptq161); Qwix gives a '
      'tensor one type. Calibrate with another --method.'
    )
  if not isinstance(tree, qarray.QArray):
    return tree
  return make(**_fields(tree, path))


def _fields(q: qarray.QArray, path: str) -> dict[str, Any]:
  spec = q.spec
  if spec.dtype not in _TYPES:
    raise ValueError(
      f'{path} is {spec.dtype}; Qwix has {sorted(_TYPES)}. Calibrate with one '
      'of these.'
    )
  dtype, qtype = _TYPES[spec.dtype]
  codes, zero = qarray.codes(q), q.zero_point
  scale = qarray.effective_scale(q)
  if zero is not None:
    half = 2 ** (spec.bits - 1)
    codes = codes.astype(jnp.int16) - half
    zero = (zero.astype(jnp.int16) - half).astype(jnp.int8).astype(dtype)
  if spec.dtype in ('mxfp4', 'nvfp4'):
    codes = _E2M1[codes]
  elif spec.is_integer:
    codes = codes.astype(jnp.int8)
  return {
    'qvalue': codes.astype(dtype),
    'scale': scale,
    'zero_point': zero,
    'qtype': qtype,
  }


_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = jnp.array((*_MAGNITUDES, *(-m for m in _MAGNITUDES)), jnp.float32)
