"""Scheme names, as compressed-tensors uses them.

A scheme says how weights and inputs are stored: W4A16 is 4-bit weights in
groups and float inputs, W8A8 int8 weights per channel and int8 inputs per
token, taken as they come. Any W<b>A<b> works; 16 means float.

Names are those of compressed-tensors' presets, and what they mean too, save
that W8A16 and integer weights with quantized inputs have one scale per channel
here unless a group size is given; there, W8A8 alone is so and the others have
groups of 128. Ours beside theirs: _STATIC, _ASYM after any W<b>A<b>, NF4A16.
FP8_BLOCK (one scale per 128 x 128 block) is read but not made.
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
  input_symmetric: bool = True,
  input_group_size: int | None = None,
) -> Scheme:
  """The scheme of a name.

  Args:
    name: W<bits>A<bits> (W4A16, W8A8, W4A4 ...), the same with _STATIC for one
      calibrated scale per input tensor (W8A8_STATIC) or with _ASYM for weights
      with zero points (W4A16_ASYM), or a name of `fixed()`.
    group_size: of integer weights: values along K that share a scale; -1 one
      scale per channel; None the scheme's own (128 where inputs are float,
      per channel elsewhere).
    symmetric: of integer weights.
    input_clip: factor on the range of integer inputs; QuaRot takes 0.9 at 4
      bits.
    input_symmetric: of integer inputs.
    input_group_size: of integer inputs taken as they come: channels that share
      a scale; None all of a token.

  Raises:
    ValueError: an unknown name, or groups of a calibrated input.
    NotImplementedError: a known one that is not made here.
  """
  upper = name.upper()
  if upper in _NOT_MADE:
    raise NotImplementedError(f'--scheme={name}: {_NOT_MADE[upper]}')
  if upper in fixed():
    return fixed()[upper]
  alias = 'W8A8' if upper == 'INT8' else upper
  match = re.fullmatch(r'W([1-8]|16)A([2-8]|16|FP8)(_STATIC)?(_ASYM)?', alias)
  if (
    not match
    or (match[3] and match[2] in ('16', 'FP8'))
    or (match[4] and match[1] in ('1', '16'))
    or match[1] + match[2] in ('16FP8', '1FP8')
  ):
    raise ValueError(
      f'--scheme={name}; allowed are W<bits>A<bits> with 1 to 8 or 16 bits '
      f'(W4A16, W4A16_ASYM, W8A8, W8A8_STATIC ...), INT8, W<bits>AFP8 and '
      f'{sorted(fixed())}.'
    )
  w_bits = int(match[1])
  fp8_inputs = match[2] == 'FP8'
  a_bits = 16 if fp8_inputs else int(match[2])
  symmetric = symmetric and not match[4]
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
  inputs = None
  if fp8_inputs:
    inputs = spec_lib.QuantSpec(dtype='fp8_e4m3', granularity='token')
  elif a_bits != 16:
    granularity = 'tensor' if match[3] else 'token'
    if match[3] and input_group_size is not None:
      raise ValueError(
        f'--scheme={name} with --input_group_size={input_group_size}; groups '
        'are for inputs taken as they come. Leave _STATIC out, or the groups.'
      )
    inputs = spec_lib.QuantSpec(
      dtype=f'int{a_bits}',
      granularity=granularity if input_group_size is None else 'group',
      group_size=-1 if input_group_size is None else input_group_size,
      symmetric=input_symmetric,
      clip=input_clip,
    )
  return Scheme(
    name=upper,
    weights=weights,
    inputs=inputs,
    static_inputs=bool(match[3]),
  )


def fixed() -> dict[str, Scheme]:
  """The schemes that are no W<b>A<b>, by name."""

  def fp8(granularity):
    return spec_lib.QuantSpec(dtype='fp8_e4m3', granularity=granularity)

  block = {
    name: spec_lib.QuantSpec(dtype=name)
    for name in ('mxfp4', 'mxfp8', 'nf4', 'nvfp4')
  }
  mx_inputs = {  # Taken anew by who runs it: by the library's own rule.
    name: spec_lib.QuantSpec(dtype=name, scale_rule='round')
    for name in ('mxfp4', 'mxfp8')
  }
  # name: (weights, inputs, whether the inputs' scales are calibrated).
  table: dict[str, tuple] = {
    'FP8': (fp8('tensor'), fp8('tensor'), True),
    'FP8_DYNAMIC': (fp8('channel'), fp8('token'), False),
    'MXFP4': (block['mxfp4'], mx_inputs['mxfp4'], False),
    'MXFP4A16': (block['mxfp4'], None, False),
    'MXFP8': (block['mxfp8'], mx_inputs['mxfp8'], False),
    'MXFP8A16': (block['mxfp8'], None, False),
    'NF4A16': (block['nf4'], None, False),
    'NVFP4': (block['nvfp4'], block['nvfp4'], True),
    'NVFP4A16': (block['nvfp4'], None, False),
  }
  return {
    name: Scheme(name=name, weights=w, inputs=a, static_inputs=static)
    for name, (w, a, static) in table.items()
  }


_NOT_MADE = {
  'FP8_BLOCK': (
    'one scale per block of 128 x 128 weights is read and not made here; '
    'choose FP8_DYNAMIC (one per channel) or MXFP8 (one per 32).'
  ),
}
