"""Small floating-point formats in plain arithmetic.

A format of X exponent and M mantissa bits has the values

  (-1)^s * m * 2^(e - M),  1 - bias <= e <= emax,  0 <= m < 2^(M+1)

so rounding |x| to it is one integer rounding of |x| * 2^(M - e), with e the
exponent of x held at 1 - bias from below. The exponent is read from the bits
of x, never from log2, so exact powers of two land in their own bin on every
device. Rounding is half to even and saturates: no infinity is ever made.
(Without mantissa bits "even" is that of the multiple of 2^e: 1.5 * 2^e goes
up.)

e4m3 and e5m2 are the OCP fp8 formats (ml_dtypes float8_e4m3fn, float8_e5m2),
whose top codes are NaN and infinity. Every other eXmY has bias 2^(X-1) - 1 and
no special codes, as e2m1, e2m3 and e3m2 of OCP MX.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

MIN_NORMAL = float(np.finfo(np.float32).tiny)  # 2^-126.
# First code of each format that is not a finite number.
_SPECIAL_CODES = {'e4m3': 0x7F, 'e5m2': 0x7C}

# QLoRA (Dettmers et al., 2023, arXiv 2305.14314), appendix E.
NF4 = np.array(
  [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
  ],
  np.float32,
)
# Halves are exact to 25 bits in float64, so each boundary is rounded once.
_NF4_BOUNDARIES = ((NF4[1:].astype(np.float64) + NF4[:-1]) / 2).astype(
  np.float32
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloatFormat:
  """One sign bit, exp_bits, man_bits.

  Attributes:
    exp_bits: X, at least 1.
    man_bits: M.
    bias: exponent bias.
    max_code: bit pattern of the greatest finite value.
  """

  exp_bits: int
  man_bits: int
  bias: int
  max_code: int

  @property
  def name(self) -> str:
    return f'e{self.exp_bits}m{self.man_bits}'

  @property
  def bits(self) -> int:
    return 1 + self.exp_bits + self.man_bits

  @property
  def emin(self) -> int:
    """Exponent of the least normal number."""
    return 1 - self.bias

  @property
  def emax(self) -> int:
    """Exponent of the greatest finite number."""
    return (self.max_code >> self.man_bits) - self.bias

  @property
  def max(self) -> float:
    """Greatest finite number."""
    mantissa = self.max_code & (2**self.man_bits - 1)
    return (1 + mantissa / 2**self.man_bits) * 2.0**self.emax

  @property
  def smallest_subnormal(self) -> float:
    return 2.0 ** (self.emin - self.man_bits)


@functools.cache
def get(name: str) -> FloatFormat:
  """The format called 'eXmY'.

  Raises:
    ValueError: no such name, or not of 2 to 8 bits.
  """
  match = re.fullmatch(r'e(\d+)m(\d+)', name)
  exp_bits, man_bits = (int(match[1]), int(match[2])) if match else (0, 0)
  if exp_bits < 1 or exp_bits + man_bits > 7:
    raise ValueError(
      f'formats.get: {name!r}; allowed eXmY with X >= 1 and bits = 1 + X + Y '
      "<= 8. Use a name such as 'e2m1', 'e3m2' or 'e4m3'."
    )
  special = _SPECIAL_CODES.get(name, 2 ** (exp_bits + man_bits))
  return FloatFormat(
    exp_bits=exp_bits,
    man_bits=man_bits,
    bias=2 ** (exp_bits - 1) - 1,
    max_code=special - 1,
  )


FLOAT16 = FloatFormat(exp_bits=5, man_bits=10, bias=15, max_code=0x7BFF)


def exponent(x: jax.Array) -> jax.Array:
  """floor(log2 |x|), int32, of float32 x; -127 for zeros and subnormals."""
  bits = lax.bitcast_convert_type(x, jnp.uint32)
  return ((bits >> 23) & 0xFF).astype(jnp.int32) - 127


def exp2(e: jax.Array) -> jax.Array:
  """2^e exactly, float32, for int32 e in [-127, 127] (2^-127 subnormal)."""
  bits = jnp.where(e < -126, 1 << 22, (e + 127) << 23)
  return lax.bitcast_convert_type(bits.astype(jnp.uint32), jnp.float32)


def scale_by_exp2(x: jax.Array, e: jax.Array) -> jax.Array:
  """x * 2^e for e in [-252, 252], by two normal factors.

  2^-127 alone would be subnormal, which XLA flushes to zero on CPU and TPU.
  """
  half = e // 2
  return x * exp2(half) * exp2(e - half)


def rne_saturate(x: jax.Array, fmt: FloatFormat) -> jax.Array:
  """Nearest value of fmt, half to even, saturating; float32 to float32."""
  x = jnp.clip(x, -fmt.max, fmt.max)
  e = jnp.maximum(exponent(x), fmt.emin)
  return jnp.round(x * exp2(fmt.man_bits - e)) * exp2(e - fmt.man_bits)


def encode_bits(x: jax.Array, fmt: FloatFormat) -> jax.Array:
  """rne_saturate as bit patterns: float32 -> uint8 of fmt.bits bits.

  Magnitude codes are consecutive, so a rounding that carries into the exponent
  needs no case of its own: code = (e + bias - 1) * 2^M + m.
  """
  magnitude = jnp.minimum(jnp.abs(x), fmt.max)
  e = jnp.maximum(exponent(magnitude), fmt.emin)
  m = jnp.round(magnitude * exp2(fmt.man_bits - e)).astype(jnp.int32)
  code = ((e - fmt.emin) << fmt.man_bits) + m
  sign = jnp.signbit(x).astype(jnp.int32) << (fmt.bits - 1)
  return (code | sign).astype(jnp.uint8)


def decode_bits(codes: jax.Array, fmt: FloatFormat) -> jax.Array:
  """Inverse of encode_bits: uint8 -> float32; no special codes."""
  codes = codes.astype(jnp.int32)
  field = (codes >> fmt.man_bits) & (2**fmt.exp_bits - 1)
  m = codes & (2**fmt.man_bits - 1)
  m = jnp.where(field > 0, m + 2**fmt.man_bits, m)
  e = jnp.maximum(field, 1) - fmt.bias
  value = m.astype(jnp.float32) * exp2(e - fmt.man_bits)
  return jnp.where((codes >> (fmt.bits - 1)) & 1 > 0, -value, value)


def encode_nf4(x: jax.Array) -> jax.Array:
  """Index of the nearest NF4 level, the lower at a tie; float32 -> uint8."""
  code = jnp.zeros(x.shape, jnp.uint8)
  for boundary in _NF4_BOUNDARIES:
    code += (x > float(boundary)).astype(jnp.uint8)
  return code


def decode_nf4(codes: jax.Array) -> jax.Array:
  """NF4 levels of uint8 indices, float32."""
  return jnp.asarray(NF4)[codes.astype(jnp.int32)]


def mx_scale(absmax: jax.Array, fmt: FloatFormat, rule: str) -> jax.Array:
  """Power-of-two block scale of OCP MX, float32, in [2^-127, 2^127].

  floor: 2^(floor(log2 absmax) - emax). ceil: the least power of two with
  absmax <= max * scale. round: as floor, but the next power of two from 1.75 of
  one on (compressed-tensors). An all-zero block gets 2^-127.
  """
  e = exponent(absmax) - fmt.emax
  if rule == 'round':
    bits = lax.bitcast_convert_type(absmax, jnp.uint32)
    e += ((bits & 0x7FFFFF) >= 0x600000).astype(jnp.int32)
  if rule == 'ceil':
    bits = lax.bitcast_convert_type(absmax, jnp.uint32)
    significand = lax.bitcast_convert_type(
      (bits & 0x7FFFFF) | (127 << 23), jnp.float32
    )
    e += (significand > fmt.max / 2.0**fmt.emax).astype(jnp.int32)
  return exp2(jnp.clip(e, -127, 127))
