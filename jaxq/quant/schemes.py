"""Scheme names, as compressed-tensors uses them.

A scheme says how weights and inputs are stored: W4A16 is 4-bit weights in
groups and float inputs, W8A8 int8 weights per channel and int8 inputs per
token, taken as they come. Any W<b>A<b> works; 16 means float.
"""

import dataclasses
import re

from jaxq.numerics import spec as spec_lib

GROUP_SIZE = 128  # compressed-tensors' default for grouped weights.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
  """What weights and inputs become.

  name: as it was asked for.
  weights, inputs: specs; None means float.
  static_inputs: the inputs' scales are calibrated, not taken as they come.
  """

  name: str
  weights: spec_lib.QuantSpec | None
  inputs: spec_lib.QuantSpec | None
  static_inputs: bool = False


def parse(
  name: str,
  *,
  group_size: int | None = None,
  symmetric: bool = True,
  input_clip: float = 1.0,
) -> Scheme:
  """The scheme of a name.

  Args:
    name: W<bits>A<bits> (W4A16, W8A8, W4A4 ...), the same with _STATIC for one
      calibrated scale per input tensor (W8A8_STATIC), FP8_DYNAMIC, MXFP4A16,
      NVFP4A16 or NF4A16.
    group_size: of integer weights: values along K that share a scale; -1 one
      scale per channel; None the scheme's own (128 where inputs are float,
      per channel elsewhere).
    symmetric: of integer weights.
    input_clip: factor on the range of integer inputs; QuaRot takes 0.9 at 4
      bits.

  Raises:
    ValueError: an unknown name.
  """
  upper = name.upper()
  fixed = _fixed().get(upper)
  if fixed is not None:
    return Scheme(name=upper, weights=fixed[0], inputs=fixed[1])
  match = re.fullmatch(r'W([1-8]|16)A([2-8]|16)(_STATIC)?', upper)
  if not match or (match[3] and match[2] == '16'):
    raise ValueError(
      f'--scheme={name}; allowed are W<bits>A<bits> with 1 to 8 or 16 bits '
      f'(W4A16, W8A8, W8A8_STATIC ...) and {sorted(_fixed())}.'
    )
  w_bits, a_bits = int(match[1]), int(match[2])
  if group_size is None:
    group_size = GROUP_SIZE if w_bits < 8 and a_bits == 16 else -1
  weights = (
    None
    if w_bits == 16
    else spec_lib.QuantSpec(
      dtype='binary' if w_bits == 1 else f'int{w_bits}',
      granularity='channel' if group_size == -1 else 'group',
      group_size=group_size,
      symmetric=symmetric or w_bits == 1,
    )
  )
  inputs = (
    None
    if a_bits == 16
    else spec_lib.QuantSpec(
      dtype=f'int{a_bits}',
      granularity='tensor' if match[3] else 'token',
      clip=input_clip,
    )
  )
  return Scheme(
    name=upper,
    weights=weights,
    inputs=inputs,
    static_inputs=bool(match[3]),
  )


def _fixed() -> dict[str, tuple[spec_lib.QuantSpec, spec_lib.QuantSpec | None]]:
  """The schemes that are no W<b>A<b>: name -> (weights, inputs)."""

  def block(dtype, size):
    return spec_lib.QuantSpec(dtype=dtype, granularity='group', group_size=size)

  fp8_w = spec_lib.QuantSpec(dtype='fp8_e4m3', granularity='channel')
  fp8_a = spec_lib.QuantSpec(dtype='fp8_e4m3', granularity='token')
  return {
    'FP8_DYNAMIC': (fp8_w, fp8_a),
    'MXFP4A16': (block('mxfp4', 32), None),
    'NVFP4A16': (block('nvfp4', 16), None),
    'NF4A16': (block('nf4', 64), None),
  }
