"""QuantSpec: what a tensor is quantized to, as one hashable value.

A spec says which numbers are allowed (`dtype`), which elements share a scale
(`granularity`, `group_size`) and how the scale is taken (`symmetric`, `narrow`,
`clip`, `scale_dtype`, `scale_rule`). It holds no array, so it can be a static
argument of `jax.jit`, a dictionary key and a line of JSON.
"""

import dataclasses
import functools
import re
from typing import Any

from jaxq.numerics import formats

GRANULARITIES = ('channel', 'group', 'tensor', 'token')
SCALE_DTYPES = ('bfloat16', 'float16', 'float32')
SCALE_RULES = ('ceil', 'floor', 'half', 'round')

# Block formats: element format, fixed group size, dtype of the stored scales.
_BLOCK_FORMATS = {
  'mxfp4': ('e2m1', 32, 'float8_e8m0fnu'),
  'mxfp8': ('e4m3', 32, 'float8_e8m0fnu'),
  'mxfp8_e5m2': ('e5m2', 32, 'float8_e8m0fnu'),
  'nvfp4': ('e2m1', 16, 'float8_e4m3fn'),
}
_NAMED_FLOATS = {
  'fp8_e4m3': 'e4m3',
  'fp8_e5m2': 'e5m2',
  'fp4_e2m1': 'e2m1',
  # The split of a jaxq.numerics.fpx.FpxArray is data; this is that of others.
  **{f'fpx{bits}': f'e2m{bits - 3}' for bits in range(3, 9)},
}
_NATIVE_FP8 = {'e4m3': 'float8_e4m3fn', 'e5m2': 'float8_e5m2'}
_NF4_GROUP_SIZE = 64
DTYPES = tuple(
  sorted(
    [f'int{bits}' for bits in range(2, 9)]
    + ['binary', 'eXmY', 'nf4']
    + list(_NAMED_FLOATS)
    + list(_BLOCK_FORMATS)
  )
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
  """How to quantize the trailing two axes (K, N) of an array.

  Attributes:
    dtype: 'int2'..'int8', 'binary', 'fp8_e4m3', 'fp8_e5m2', 'fp4_e2m1', any
      'eXmY' of at most 8 bits (such as 'e3m2'), 'mxfp4', 'mxfp8' (e4m3
      elements), 'mxfp8_e5m2', 'nvfp4', 'nf4' or 'fpx3'..'fpx8', floats whose
      split into exponent and mantissa is stored with them (fpx.FpxArray).
    granularity: which elements share a scale; x is (..., K, N).
      'tensor': all of a matrix, scale (..., 1, 1).
      'channel': a column, scale (..., 1, N).
      'token': a row, scale (..., K, 1).
      'group': group_size rows of a column, scale (..., K/G, N).
      Left empty: 'group' for the block formats and nf4, else 'channel'.
    group_size: G, for 'group' only. The block formats have their own (mx 32,
      nvfp4 16; nf4 takes 64 when none is given).
    symmetric: integers only. False: unsigned codes with a zero point.
    narrow: symmetric integers only: codes [-qmax, qmax], not [-qmax-1, qmax].
    clip: in (0, 1], the clip ratio: the range is multiplied by it.
    scale_dtype: stored dtype of scales, one of SCALE_DTYPES; the mx formats
      and nvfp4 prescribe theirs and ignore this.
    scale_rule: mx: 'floor' (OCP MX v1.0) may saturate a block's largest
      elements by up to 25 %; 'ceil' is the least power of two that does not;
      'round', as compressed-tensors, goes up from 1.75 of a power of two on.
      Symmetric integers: 'half' divides the range by qmax + 1/2, not by qmax,
      as compressed-tensors does: the largest code gets its whole step.
  """

  dtype: str
  granularity: str = ''
  group_size: int = -1
  symmetric: bool = True
  narrow: bool = False
  clip: float = 1.0
  scale_dtype: str = 'float32'
  scale_rule: str = 'floor'

  def __post_init__(self):
    self._check_dtype()
    if not self.granularity:
      grouped = self.is_block_format or self.dtype == 'nf4'
      object.__setattr__(self, 'granularity', 'group' if grouped else 'channel')
    _check_choice('granularity', self.granularity, GRANULARITIES)
    _check_choice('scale_dtype', self.scale_dtype, SCALE_DTYPES)
    _check_choice('scale_rule', self.scale_rule, SCALE_RULES)
    self._check_group_size()
    if not 0.0 < self.clip <= 1.0:
      raise ValueError(
        f'QuantSpec: clip={self.clip}; allowed 0 < clip <= 1. Use 1.0 to keep '
        'the whole range.'
      )
    if not self.symmetric and not self.is_integer:
      raise ValueError(
        f'QuantSpec: symmetric=False with dtype={self.dtype!r}; only int2..int8'
        ' have a zero point. Use symmetric=True.'
      )
    if self.scale_rule == 'round' and not self.is_mx:
      raise ValueError(
        f"QuantSpec: scale_rule='round' with dtype={self.dtype!r}; it is for "
        "the mx formats. Use 'floor'."
      )
    if self.scale_rule == 'half' and not (self.is_integer and self.symmetric):
      raise ValueError(
        f"QuantSpec: scale_rule='half' with dtype={self.dtype!r}, symmetric="
        f"{self.symmetric}; 'half' is for symmetric int2..int8. Use 'floor'."
      )
    if self.narrow and not (self.is_integer and self.symmetric):
      raise ValueError(
        f'QuantSpec: narrow=True with dtype={self.dtype!r}, symmetric='
        f'{self.symmetric}; narrow is for symmetric int2..int8. Use '
        'narrow=False.'
      )

  def _check_dtype(self):
    if not isinstance(self.dtype, str):
      raise TypeError(
        f'QuantSpec: dtype={self.dtype!r} is a {type(self.dtype).__name__}; '
        f'allowed the names {list(DTYPES)}. Use one of them.'
      )
    if self.dtype in DTYPES and self.dtype != 'eXmY':
      return
    if match := re.fullmatch(r'u?int(\d+)', self.dtype):
      raise ValueError(
        f'QuantSpec: dtype={self.dtype!r} (bits={match[1]}); allowed int2..int8'
        ". Use 'binary' for 1 bit, and symmetric=False for unsigned codes."
      )
    if not re.fullmatch(r'e\d+m\d+', self.dtype):
      raise ValueError(
        f'QuantSpec: dtype={self.dtype!r}; allowed {list(DTYPES)}, where eXmY '
        "stands for names such as 'e3m2'. Use one of them."
      )
    formats.get(self.dtype)  # Raises when out of range.

  def _check_group_size(self):
    fixed = _BLOCK_FORMATS.get(self.dtype, (None, None))[1]
    if fixed is not None:
      if self.granularity != 'group' or self.group_size not in (-1, fixed):
        raise ValueError(
          f'QuantSpec: dtype={self.dtype!r} with granularity='
          f'{self.granularity!r}, group_size={self.group_size}; {self.dtype} '
          f'has groups of {fixed}. Leave both out.'
        )
      object.__setattr__(self, 'group_size', fixed)
    elif self.granularity != 'group':
      if self.group_size != -1:
        raise ValueError(
          f'QuantSpec: group_size={self.group_size} with granularity='
          f'{self.granularity!r}; group_size belongs to granularity='
          "'group'. Use that, or leave group_size out."
        )
    elif self.dtype == 'nf4' and self.group_size == -1:
      object.__setattr__(self, 'group_size', _NF4_GROUP_SIZE)
    elif self.group_size < 1:
      raise ValueError(
        f"QuantSpec: granularity='group' with group_size={self.group_size}; "
        "allowed 1 or more. Give group_size (such as 64), or use 'channel' for "
        'one scale per column.'
      )

  @property
  def is_integer(self) -> bool:
    """True for int2..int8 (not binary)."""
    return self.dtype.startswith('int')

  @property
  def is_block_format(self) -> bool:
    """True for the mx formats and nvfp4, whose scales are themselves coded."""
    return self.dtype in _BLOCK_FORMATS

  @property
  def is_mx(self) -> bool:
    """True for the mx formats: scales are powers of two."""
    return self.dtype.startswith('mxfp')

  @property
  def is_float(self) -> bool:
    """True where the elements are small floating-point numbers."""
    return not (self.is_integer or self.dtype in ('binary', 'nf4'))

  @functools.cached_property
  def element(self) -> formats.FloatFormat:
    """The floating-point format of the elements, where is_float."""
    if self.is_block_format:
      return formats.get(_BLOCK_FORMATS[self.dtype][0])
    return formats.get(_NAMED_FLOATS.get(self.dtype, self.dtype))

  @property
  def bits(self) -> int:
    """Bits per element, metadata not counted."""
    if self.is_integer:
      return int(self.dtype[3:])
    if self.dtype == 'binary':
      return 1
    return 4 if self.dtype == 'nf4' else self.element.bits

  @property
  def qmin(self) -> int | float:
    """Least value of an unscaled element."""
    if self.is_integer:
      return -self.qmax - (not self.narrow) if self.symmetric else 0
    return -self.qmax

  @property
  def qmax(self) -> int | float:
    """Greatest value of an unscaled element; the range is divided by it."""
    if self.is_integer:
      return 2 ** (self.bits - self.symmetric) - 1
    if self.is_float:
      return self.element.max
    return 1

  @property
  def code_dtype(self) -> str:
    """Dtype of unpacked codes: int8, uint8, float8_e4m3fn or float8_e5m2.

    int8: signed integers, and -1 or +1 for binary. uint8: integers with a zero
    point, nf4 indices, and bit patterns of the other float formats.
    """
    if self.dtype == 'binary' or (self.is_integer and self.symmetric):
      return 'int8'
    if self.is_float:
      return _NATIVE_FP8.get(self.element.name, 'uint8')
    return 'uint8'

  @property
  def stored_scale_dtype(self) -> str:
    """Dtype of the scales as stored in a QArray."""
    if self.is_block_format:
      return _BLOCK_FORMATS[self.dtype][2]
    return self.scale_dtype

  def to_dict(self) -> dict[str, Any]:
    """The fields as a JSON-ready dictionary."""
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

  @classmethod
  def from_dict(cls, fields: dict[str, Any]) -> 'QuantSpec':
    """Inverse of to_dict; absent fields take their defaults."""
    known = sorted(f.name for f in dataclasses.fields(cls))
    unknown = sorted(set(fields) - set(known))
    if unknown:
      raise ValueError(
        f'QuantSpec.from_dict: fields {unknown}; allowed {known}. Remove or '
        'rename the others.'
      )
    if 'dtype' not in fields:
      raise ValueError(
        f'QuantSpec.from_dict: fields {sorted(fields)}; dtype is needed. Add '
        f'one of {list(DTYPES)}.'
      )
    return cls(**fields)


def _check_choice(name, value, allowed):
  if value not in allowed:
    raise ValueError(
      f'QuantSpec: {name}={value!r}; allowed {sorted(allowed)}. Use one of '
      'them.'
    )
