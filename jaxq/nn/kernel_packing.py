"""A loaded model's weights, re-laid once for the kernels of its GPU.

`pack` maps a model's variables: every kernel for which a Hopper kernel then
serves the layer becomes a PackedArray (kernel_weight.py),

  x floating     words     weight_only_matmul
  x quantized    rows at 8 bits, words at 4     quantized_matmul

and all else stays as it is: other formats, sizes that tiles do not divide,
other chips, and several devices where XLA is to partition the products. Layers
look at what they were given, so nothing else changes. `unpack` is its inverse,
to the bit: a checkpoint or an export is written of what it gives.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.nn import kernel_matmul, kernel_weight, taps
from jaxq.numerics import qarray
from pallas_kernels import hopper, targets

_NAME = 'kernel'  # Of a linear's weight.


def why_not(chip: str | None = None) -> str:
  """Why nothing is packed for a chip; '' if something may be.

  Args:
    chip: the GPU; None: the one at hand.
  """
  return hopper.why_not(chip or targets.current())


def pack(
  variables: Mapping[str, Any], chip: str | None = None
) -> dict[str, Any]:
  """{'params', 'quant'} with the kernels of linears packed for the chip.

  Args:
    variables: of a model or a block; leaves may be stacked, not lazy.
    chip: the GPU; None: the one at hand.
  """
  if why_not(chip):
    return dict(variables)

  def packed(path, w):
    folder = path.removesuffix(_NAME)
    act = taps.get_path(variables.get('quant', {}), f'{folder}input')
    layout = layout_for(w, act, chip)
    return kernel_weight.pack(w, layout) if layout else w

  return _map_kernels(packed, variables)


def unpack(variables: Mapping[str, Any]) -> dict[str, Any]:
  """{'params', 'quant'} with every PackedArray a QArray again."""

  def unpacked(_, w):
    if isinstance(w, kernel_weight.PackedArray):
      return kernel_weight.unpack(w)
    return w

  return _map_kernels(unpacked, variables)


def layout_for(w: Any, act: Any = None, chip: str | None = None) -> str:
  """What a linear's weight is packed to; '' where it stays as it is stored.

  Args:
    w: kernel of the layer, stacked or not.
    act: the layer's 'input' entry, or None.
    chip: the GPU; None: the one at hand.
  """
  if why_not(chip) or type(w) is not qarray.QArray:
    return ''
  layout = 'rows' if act is not None and w.spec.bits == 8 else 'words'
  axes = w.scale.ndim - 2
  one, act = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape[axes:], a.dtype), (w, act)
  )
  if kernel_matmul.why_not_weight(one):
    return ''
  shape = (1, w.shape[0])  # One token: kernels serve few rows, if any.
  try:
    packed = jax.eval_shape(lambda: kernel_weight.pack(_zeros(one), layout))
  except (ValueError, NotImplementedError):  # Tiles do not divide it.
    return ''
  if hasattr(act, 'codes'):  # In steps: what comes before gives codes.
    served = kernel_matmul.choose_codes(shape, packed, act.spec, chip)
  else:
    x: Any = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    served = kernel_matmul.choose(x, packed, act, chip)
  return layout if served else ''


def _map_kernels(
  f: Callable[[str, Any], Any], variables: Mapping[str, Any]
) -> dict[str, Any]:
  """Variables with f(path, leaf) for every parameter called 'kernel'."""

  def visit(node, path):
    if isinstance(node, Mapping):
      return {
        k: visit(v, f'{path}/{k}' if path else k) for k, v in node.items()
      }
    return f(path, node) if path.rpartition('/')[2] == _NAME else node

  return {**variables, 'params': visit(variables['params'], '')}


def _zeros(tree: Any) -> Any:
  return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree)
