"""What a method may find in the block that it is given, checked in one place.

Scales and rotations move through float kernels, and they change the inputs of
linears: kernels that are rounded already, and input ranges that are fixed
already, must not be there. Both come from a wrong order in a chain.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxq.nn import blocks, taps
from jaxq.numerics import binary, qarray
from jaxq.numerics import spec as spec_lib

Params = Mapping[str, Any]
Stats = Mapping[str, Mapping[str, Any]]


def require_float(params: Params, paths: Iterable[str], method: str) -> None:
  """Raises where the kernel of a linear is quantized already.

  Args:
    params: the block's parameters.
    paths: of the linears that `method` changes.
    method: its name, for the message.

  Raises:
    ValueError: a kernel is a QArray.
  """
  for path in paths:
    kernel = blocks.kernel_of(params, path)
    if isinstance(kernel, binary.BinaryArray):
      raise ValueError(
        f'{method}: the kernel of {path} is binary already; it must be float. '
        f'Chain {method} before ptq161.'
      )
    if isinstance(kernel, qarray.QArray):
      raise ValueError(
        f'{method}: the kernel of {path} is {kernel.spec.dtype} already; it '
        f'must be float. Chain {method} before the method that rounds.'
      )


def require_dynamic_inputs(
  quant: Params, paths: Iterable[str], method: str
) -> None:
  """Raises where the input range of a linear is fixed already.

  Args:
    quant: the block's `quant` collection.
    paths: of the linears whose inputs `method` changes.
    method: its name, for the message.

  Raises:
    ValueError: an input quantizer is static.
  """
  for path in paths:
    act = taps.get_path(quant, f'{path}/input')
    if act is not None and act.scale is not None:
      raise ValueError(
        f'{method}: the input quantizer of {path} is static, taken before '
        f'{method} changes that input. Chain {method} before the activations, '
        'or quantize them per token.'
      )


def require_tokens(where: str, stats: Stats, method: str, instead: str) -> None:
  """Raises where a Hessian is of fewer tokens than channels.

  Args:
    where: the block's name.
    stats: finished; Hessians are those named 'hessian'.
    method: its name, for the message.
    instead: what to do without as many tokens, for the message.

  Raises:
    ValueError: there is one.
  """
  for tap, named in stats.items():
    if 'hessian' not in named:
      continue
    found: Any = named['hessian']
    found = getattr(found, 'hessian', found)  # One that rounds its inputs.
    tokens, K = int(found.count), found.upper.shape[0]
    if tokens < K:
      raise ValueError(
        f'{method}: the Hessian at {where}/{tap} is of {tokens} calibration '
        f'tokens; K={K} channels need as many. Calibrate with more text, or '
        f'{instead}.'
      )


def require_step_specs(
  weights: spec_lib.QuantSpec,
  inputs: spec_lib.QuantSpec,
  config: str,
  example: str,
) -> None:
  """Raises unless inputs can arrive in steps (nn.linear.StepInput).

  Args:
    weights, inputs: of a config.
    config: its class, for the message.
    example: a scheme that is allowed, for the message.

  Raises:
    ValueError: other inputs than symmetric int4..int8, or other weights than
      integers per channel.
  """
  if not (inputs.is_integer and inputs.symmetric and inputs.bits > 3):
    raise ValueError(
      f'{config}: inputs are {inputs.dtype}, symmetric={inputs.symmetric}; '
      'allowed symmetric int4..int8, whose codes are multiplied as they are. '
      f'Choose a scheme such as {example}.'
    )
  if not weights.is_integer or weights.granularity != 'channel':
    raise ValueError(
      f'{config}: weights are {weights.dtype} per {weights.granularity}; '
      'allowed int2..int8 per channel, the one scale behind an integer matmul. '
      'Give --group_size=-1.'
    )


def require_exact_sums(
  weights: spec_lib.QuantSpec,
  inputs: spec_lib.QuantSpec,
  path: str,
  K: int,
  method: str,
) -> None:
  """Raises where an int32 sum of K products of codes may overflow.

  Args:
    weights, inputs: of the codes.
    path: of the linear, K: its inputs, method: its name; for the message.

  Raises:
    ValueError: it may.
  """
  if K * 2 ** (inputs.bits - 1) * 2**weights.bits >= 2**31:
    raise ValueError(
      f'{method}: {path} sums K={K} products of {inputs.dtype} and '
      f'{weights.dtype}, which may pass 2^31; an int32 sum must not. Use fewer '
      'bits.'
    )
