"""Small floats whose format is data: real bias, any split of the bits.

LLM-FP4 (Liu et al., 2023, https://arxiv.org/abs/2310.16836) chooses for every
tensor how many of its bits are mantissa, and a real exponent bias b:

  y = clip(x * 2^b, +-(2 - 2^-M) * 2^(2^E - 1)),  E = bits - 1 - M
  e = max(floor(log2 |y|), 1)
  x' = 2^(e - M) * round(y * 2^(M - e)) * 2^-b

No infinity, no NaN. The bias is kept as scale = 2^-b, and the mantissa bits M
are an array as well, so that layers of different formats run in one compiled
function. With b an integer, e2m1 at b = 1 is OCP's fp4.

Multiplying x by 2^k is the same as adding k to b and multiplying x' by 2^k, to
the bit: a channel's range can be shifted by adding to its exponent, and taken
back in the rows of the kernel that reads it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.numerics import codec, formats, packing, qarray
from jaxq.numerics import spec as spec_lib


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=(
    'qvalue',
    'scale',
    'zero_point',
    'tensor_scale',
    'man_bits',
    'row_shift',
  ),
  meta_fields=('spec', 'shape'),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class FpxArray(qarray.QArray):
  """A QArray of fpx codes with a scale per column.

  Attributes:
    man_bits: (*L, 1, 1) int8, mantissa bits of all codes of a matrix.
    row_shift: (*L, K, 1) int8 or None: row j is smaller by 2^row_shift_j.
  """

  man_bits: jax.Array
  row_shift: jax.Array | None = None

  def __post_init__(self):
    if isinstance(self.row_shift, np.ndarray):
      _check_range(self.row_shift, 127)

  def values(self) -> jax.Array:
    """float32 (*L, K, N)."""
    y = decode(qarray.codes(self), self.man_bits, self.spec.bits) * self.scale
    if self.row_shift is None:
      return y
    return y * formats.exp2(-self.row_shift.astype(jnp.int32))


def spec(bits: int, granularity: str) -> spec_lib.QuantSpec:
  """The spec of floats of that many bits."""
  return spec_lib.QuantSpec(dtype=f'fpx{bits}', granularity=granularity)


def largest(man_bits: Any, bits: int) -> jax.Array:
  """Greatest value at scale 1, float32, shaped as man_bits."""
  M = jnp.asarray(man_bits, jnp.int32)
  top = jnp.left_shift(1, bits - 1 - M) - 1
  return (2.0 - formats.exp2(-M)) * formats.exp2(top)


def round_to(
  x: jax.Array, scale: jax.Array, man_bits: Any, bits: int
) -> jax.Array:
  """Nearest value, half to even on the grid of its exponent, saturating.

  Args:
    x: float32.
    scale: 2^-bias, broadcasts against x, rank kept; or a scalar.
    man_bits: integers, as scale.
    bits: all bits, sign included.
  """
  m, e, M = _round(x, scale, man_bits, bits)
  return m * formats.exp2(e - M) * scale


def encode(
  x: jax.Array, scale: jax.Array, man_bits: Any, bits: int
) -> jax.Array:
  """The codes of `round_to`, uint8: sign, exponent, mantissa."""
  m, e, M = _round(x, scale, man_bits, bits)
  code = jnp.left_shift(e - 1, M) + jnp.abs(m).astype(jnp.int32)
  sign = jnp.signbit(x).astype(jnp.int32) << (bits - 1)
  return (code | sign).astype(jnp.uint8)


def decode(codes: jax.Array, man_bits: Any, bits: int) -> jax.Array:
  """Values of codes at scale 1, float32."""
  M = jnp.asarray(man_bits, jnp.int32)
  codes = codes.astype(jnp.int32)
  magnitude = codes & (2 ** (bits - 1) - 1)
  field = jnp.right_shift(magnitude, M)
  m = magnitude - jnp.left_shift(field, M)
  m = jnp.where(field > 0, m + jnp.left_shift(1, M), m)
  value = m.astype(jnp.float32) * formats.exp2(jnp.maximum(field, 1) - M)
  return jnp.where(codes >> (bits - 1) > 0, -value, value)


def quantize(
  x: jax.Array,
  scale: jax.Array,
  man_bits: jax.Array,
  bits: int,
  row_shift: jax.Array | None = None,
) -> FpxArray:
  """x (K, N), scale (1, N), man_bits (), row_shift (K,) -> FpxArray (K, N).

  Its values are round_to(x, ...), rows divided by 2^row_shift, bit for bit.
  """
  K, N = x.shape
  codes = encode(x, scale, man_bits, bits)
  tile = packing.tile_rows(K)
  if packing.packable(bits, tile):
    codes = packing.pack(codes, bits, tile)
  if row_shift is not None:
    row_shift = row_shift.astype(jnp.int8)[:, None]
  return FpxArray(
    qvalue=codes,
    scale=scale,
    spec=spec(bits, 'channel'),
    shape=(K, N),
    man_bits=jnp.asarray(man_bits, jnp.int8).reshape(1, 1),
    row_shift=row_shift,
  )


def check_shift(shift: Any, man_bits: Any, bits: int) -> None:
  """Refuses stored shifts that the exponent cannot take.

  Args:
    shift: (*L, K), or None; checked where it is a numpy array, as when loaded.
    man_bits: (*L, 1, 1).
    bits: of the format.

  Raises:
    ValueError: there is one.
  """
  if isinstance(shift, np.ndarray) and isinstance(man_bits, np.ndarray):
    exp_bits = bits - 1 - man_bits[..., 0].astype(np.int64)  # (*L, 1)
    _check_range(shift, 2**exp_bits - 1)


def _check_range(shift, top):
  if shift.size and np.any((shift < 0) | (shift > top)):
    raise ValueError(
      f'fpx: shifts from {shift.min()} to {shift.max()}; allowed 0 to '
      f'{np.min(top)}, what the exponent bits can take. The file is damaged; '
      'copy or make it again.'
    )


def _round(x, scale, man_bits, bits):
  """-> signed mantissa, exponent, mantissa bits."""
  M = jnp.asarray(man_bits, jnp.int32)
  scale = jnp.asarray(scale, jnp.float32)
  scale, M = (a.reshape((1,) * (x.ndim - a.ndim) + a.shape) for a in (scale, M))
  top = largest(M, bits)
  y = jnp.clip(codec.divide(x, scale), -top, top)
  e = jnp.maximum(formats.exponent(y), 1)
  return jnp.round(y * formats.exp2(M - e)), e, M
