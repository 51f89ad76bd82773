"""What a method may find in the block that it is given, checked in one place.

Scales and rotations move through float kernels, and they change the inputs of
linears: kernels that are rounded already, and input ranges that are fixed
already, must not be there. Both come from a wrong order in a chain.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxq.nn import blocks, taps
from jaxq.numerics import binary, qarray

Params = Mapping[str, Any]


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
