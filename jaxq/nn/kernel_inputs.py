"""Inputs of linears that a kernel gives as codes.

A norm or an online rotation, and the quantization of what it gives, are one
pass over memory where a kernel serves both it and the product that follows:

  rotated  hadamard_quantize, for one linear; nn.linear.QuantDense asks
  feed     norm_quantize, for all linears that read a norm; a block asks, with
           the module whose `input_linears` those are

  codes, scale = quantize(f(x));   y = (codes @ w) * scale * w_scale

Linears whose inputs are quantized alike share the codes: dynamic ones, one
scale per token, and inputs in steps (OutlierTune, MergeQuant), whose steps are
in the norm already. Arrays cannot be compared while tracing: where they say
how (linear.SplitInput) each linear has a pass of its own, and static scales of
several linears are left to XLA.

Codes are those of f(x) in float32, which is not rounded to x's dtype in
between as what is stored must be. Gradients pass straight through, as they do
where the product quantizes: `value` is f(x), and without a derivative nothing
reads it, so that a compiler leaves it out. All else reads f(x) itself: taps,
low-rank terms, named implementations, and every platform without the kernels.
"""

import operator
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxq.nn import kernel_matmul
from jaxq.numerics import qarray
from pallas_kernels import compat
from pallas_kernels.hadamard_quantize import api as hadamard_quantize
from pallas_kernels.norm_quantize import api as norm_quantize


@flax.struct.dataclass
class QuantizedInput:
  """x of one linear, or of several that read the same codes.

  codes: (..., K'), int8 or fp8; K' counts the copies of a SplitInput.
  scale: (..., 1) or (1, ..., 1) float32.
  value: (..., K), what was quantized; only derivatives read it.
  copies: (K' - K,) int32, of which channels, K for none; None: K' is K.
  """

  codes: jax.Array
  scale: jax.Array
  value: jax.Array
  copies: jax.Array | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the value."""
    return self.value.shape

  @property
  def dtype(self) -> Any:
    """Of the value, and of the product with a kernel."""
    return self.value.dtype


@flax.struct.dataclass
class Inputs:
  """What the linears of a module read, by their names; all of one value."""

  by_name: dict[str, QuantizedInput]

  def __getitem__(self, name: str) -> QuantizedInput:
    return self.by_name[name]

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the value."""
    return next(iter(self.by_name.values())).shape

  @property
  def dtype(self) -> Any:
    """Of the value."""
    return next(iter(self.by_name.values())).dtype


def feed(norm: nn.Module, x: jax.Array, reader: Any) -> jax.Array | Inputs:
  """norm(x), or its codes where a kernel makes them for all that read it.

  Args:
    norm: nn.norms.RMSNorm or LayerNorm.
    x: (..., K).
    reader: a bound module that hands its input to its children
      `input_linears`, QuantDense layers, and to nothing else.
  """
  value = norm(x)
  if why_not_fed(norm, x, reader):
    return value
  layers = _layers(reader)
  params: Any = norm.variables['params']
  made: list[tuple[Any, QuantizedInput]] = []
  by_name: dict[str, QuantizedInput] = {}
  for name, layer in layers.items():
    how = _how(layer)
    found = [codes for other, codes in made if _alike(how, other)]
    by_name[name] = found[0] if found else _normed(norm, params, x, value, *how)
    made.append((how, by_name[name]))
  return Inputs(by_name)


def rotated(x: jax.Array, turn: Any, act: Any) -> QuantizedInput:
  """turn(x), a linear.OnlineHadamard, quantized as `act` says."""
  codes, scale = hadamard_quantize.hadamard_quantize(
    jax.lax.stop_gradient(x),
    block=turn.size,
    x_format=kernel_matmul.x_format(act.spec),
    implementation=kernel_matmul.named(),
  )
  return QuantizedInput(codes, scale, turn(x))


@jax.custom_vjp
def matmul(x: QuantizedInput, w: qarray.QArray) -> jax.Array:
  """x (..., K') @ w (K', N) -> (..., N) in x.dtype.

  Differentiable with respect to x.value; w is a constant.
  """
  return kernel_matmul.matmul_codes(x.codes, x.scale, w, x.dtype)


def why_not_rotated(layer: nn.Module, x: jax.Array, kernel: Any) -> str:
  """Why no kernel rotates and quantizes x for a QuantDense; '' if one does."""
  found = _layer(layer.variables, layer)
  quant = found['quant']
  if reason := _why_not_read(found, ('hadamard', 'input', 'output')):
    return reason
  if layer.implementation is not None:
    return f'implementation={layer.implementation!r} was asked for.'
  turn, act = quant['hadamard'], quant['input']
  if reason := kernel_matmul.why_not(kernel, act):
    return reason
  if act.scale is not None:
    return 'x has a static scale, with which XLA quantizes as it rotates.'
  if turn.size & (turn.size - 1):
    return f'blocks have {turn.size} channels, no power of two.'
  if x.ndim < 2 or 0 in x.shape:
    return f'x has shape {x.shape}.'
  if hadamard_quantize.choose(x, turn.size) not in kernel_matmul.KERNELS:
    return f'hadamard_quantize leaves x {x.dtype}{x.shape} to XLA.'
  return _why_not_multiplied(x.shape, kernel, act.spec)


def why_not_fed(norm: nn.Module, x: jax.Array, reader: Any) -> str:
  """Why no kernel gives the reader's linears codes of norm(x); '' if one does.

  Arguments are those of `feed`.
  """
  if not hasattr(norm, 'kind'):
    return f'a {type(norm).__name__} is none of the norms of the kernel.'
  if reader.is_initializing():
    return 'its linears have no parameters yet.'
  if reader.implementation is not None:
    return f'implementation={reader.implementation!r} was asked for.'
  if x.ndim < 2 or 0 in x.shape:
    return f'x has shape {x.shape}.'
  if not reader.input_linears:
    return f'not only linears read the input of a {type(reader).__name__}.'
  hows = []
  for name, layer in _layers(reader).items():
    if reason := _why_not_layer(layer, x):
      return f'{name}: {reason}'
    hows.append(_how(layer))
  shared = all(_alike(how, hows[0]) for how in hows)
  if not shared and any(split is None for _, split in hows):
    return 'the linears that read x may quantize it in different ways.'
  return ''


def _why_not_layer(layer: Mapping[str, Any], x: jax.Array) -> str:
  """Why no kernel gives one linear that reads a norm its codes."""
  if reason := _why_not_read(layer, ('input', 'output', 'split')):
    return reason
  (act, split), kernel = _how(layer), layer['params']['kernel']
  in_steps = hasattr(act, 'codes')
  reason = (
    kernel_matmul.why_not_codes(kernel, act.spec)
    if in_steps
    else kernel_matmul.why_not(kernel, act)
  )
  if reason:
    return reason
  K, copies = x.shape[-1], 0
  if split is not None:
    copies = split.src.shape[-1]
    if not in_steps or split.spec != act.spec or split.kept != K:
      return f'its split keeps {split.kept} channels of {K}, of {split.spec}.'
  if norm_quantize.choose(x, copies=copies) not in kernel_matmul.KERNELS:
    return f'norm_quantize leaves x {x.dtype}{x.shape} to XLA.'
  return _why_not_multiplied((*x.shape[:-1], K + copies), kernel, act.spec)


def _why_not_read(layer: Mapping[str, Any], allowed: tuple[str, ...]) -> str:
  """Why a linear must see its input itself, and not as codes."""
  if layer['taps'] or layer['tapped']:
    return 'its taps read x.'
  if 'input' not in layer['quant']:
    return 'x is not quantized.'
  if others := sorted(set(layer['quant']) - set(allowed)):
    return f'{others} of its layer read x.'
  return ''


def _why_not_multiplied(shape: tuple[int, ...], w: Any, spec: Any) -> str:
  if kernel_matmul.choose_codes(shape, w, spec):
    return ''
  return f'no kernel multiplies {spec.dtype} {shape} by w {w.shape}.'


def _layers(reader: Any) -> dict[str, dict[str, Any]]:
  """{name: what a linear of the reader has, by collection}."""
  variables = reader.variables
  return {
    name: _layer(
      {k: tree.get(name, {}) for k, tree in variables.items()}, reader
    )
    for name in reader.input_linears
  }


def _layer(variables: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
  """A linear's collections; 'tapped': whether its taps are to be stored."""
  names = ('params', 'quant', 'taps')
  found = {name: variables.get(name, {}) for name in names}
  return {**found, 'tapped': module.is_mutable_collection('tapped')}


def _how(layer: Mapping[str, Any]) -> tuple[Any, Any]:
  """A linear's ActQuant or StepInput, and its SplitInput or None."""
  return layer['quant']['input'], layer['quant'].get('split')


def _alike(a: Any, b: Any) -> bool:
  """Equal, as far as can be known: the same arrays, if there are any."""
  form: Any = jax.tree.structure(a)
  if form != jax.tree.structure(b):
    return False
  return all(map(operator.is_, jax.tree.leaves(a), jax.tree.leaves(b)))


def _normed(norm, params, x, value, act, split) -> QuantizedInput:
  """Codes of value = norm(x), as a linear with `act` and `split` reads them."""
  in_steps = hasattr(act, 'codes')
  static: Any = jnp.ones((1,), jnp.float32) if in_steps else act.scale
  if static is not None:
    static = jnp.reshape(static, (1,))
  bias = params.get('bias')
  codes, scale = norm_quantize.norm_quantize(
    jax.lax.stop_gradient(x),
    jax.lax.stop_gradient(jnp.asarray(params['scale'])),
    None if bias is None else jax.lax.stop_gradient(jnp.asarray(bias)),
    kind=norm.kind,
    eps=norm.eps,
    x_format=kernel_matmul.x_format(act.spec),
    scale=static,
    gather=None if split is None else split.src,
    offset=None if split is None else split.offset,
    narrow=act.spec.narrow,
    implementation=kernel_matmul.named(),
  )
  if scale is None:
    scale = static.reshape((1,) * x.ndim)
  copies = None if split is None else split.src
  return QuantizedInput(codes, scale, value, copies)


def _forward(x, w):
  residuals = jnp.zeros((), x.dtype), x.codes, x.scale, x.copies, w
  return matmul(x, w), residuals


def _backward(residuals, g):
  like, codes, scale, copies, w = residuals
  dx = jax.lax.dot_general(
    g,
    qarray.dequantize(w).astype(g.dtype),
    (((g.ndim - 1,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )  # (..., K')
  if copies is not None:  # A channel's copies are rounded of the same value.
    K = dx.shape[-1] - copies.shape[0]
    dx = dx[..., :K].at[..., copies].add(dx[..., K:], mode='drop')
  constant = compat.no_cotangent
  x = QuantizedInput(
    constant(codes), constant(scale), dx.astype(like.dtype), constant(copies)
  )
  return x, jax.tree.map(constant, w)


matmul.defvjp(_forward, _backward)
