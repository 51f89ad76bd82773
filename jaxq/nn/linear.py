"""QuantDense: the one linear layer; it computes with what it is given.

The kernel leaf is a float array (K, N) or a `QArray`. The `quant` collection
may hold, at this layer's path,

  'hadamard': OnlineHadamard -> x is rotated before all else;
  'permute': int32 (K,)      -> so is the order of its channels taken;
  'split': SplitInput        -> x in steps is rounded, large channels several
                                times over;
  'input': ActQuant          -> x is quantized, statically or per token;
           StepInput         -> x is in steps already: rounded, never scaled;
           FpxInput          -> x becomes small floats of a stored format;
  'low_rank': LowRank        -> (x @ a) @ b is added to y;
              RoutedLowRank  -> so are terms that the token chooses
                                (nn.routed_low_rank);
  'output': ActQuant         -> y is quantized (queries, keys and values).

Nothing in the model changes: quantizing is replacing leaves. A bias that was
not there before is added where a method put one. The input tap 'in' sees x
after the rotation and before its quantization, which is what the kernel is
multiplied with; the tap 'out' sees y before its own. Where a kernel rotates and
quantizes in one pass, or a norm came as codes, nothing sees x (kernel_inputs).
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxq.nn import kernel_inputs, matmul, taps
from jaxq.numerics import formats, fpx, hadamard, qarray
from jaxq.numerics import spec as spec_lib


@flax.struct.dataclass
class ActQuant:
  """How a linear's input is quantized.

  scale, zero_point: static parameters, broadcastable to (T, K); None means
    dynamic, taken from each input by the spec's granularity.
  """

  scale: jax.Array | None
  zero_point: jax.Array | None
  spec: spec_lib.QuantSpec = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class StepInput:
  """A linear's input arrives in steps: its producer divides by them.

  It is rounded and clipped to codes and that is all; the steps are in the rows
  of the kernel (OutlierTune, MergeQuant). One scale per channel thus costs
  nothing at run time.

  spec: symmetric integers.
  scale, zero_point: of the codes; constants, as no array is stored.
  """

  spec: spec_lib.QuantSpec = flax.struct.field(pytree_node=False)

  @property
  def scale(self) -> float:
    """One: the input is static."""
    return 1.0

  @property
  def zero_point(self) -> None:
    """None: the codes are symmetric."""
    return None

  def codes(self, x: jax.Array) -> jax.Array:
    """x (..., K) in steps -> its codes, int8."""
    clipped = jnp.clip(jnp.round(x), self.spec.qmin, self.spec.qmax)
    return clipped.astype(self.spec.code_dtype)


@flax.struct.dataclass
class FpxInput:
  """Rounds an input to floats of a stored format with one real bias (LLM-FP4).

  Channel j is multiplied by 2^shift_j before, which is an addition to its
  exponent; the rows of the kernel are smaller by as much.

  scale: (1, 1) float32, 2^-bias. man_bits: (1, 1) int8.
  shift: (K,) int8, or None where what comes before shifts, or nothing does.
  spec: 'fpx3'..'fpx8' per tensor.
  restore: divide by 2^shift_j again: the kernel's rows are as they were.
  """

  scale: jax.Array
  man_bits: jax.Array
  shift: jax.Array | None
  spec: spec_lib.QuantSpec = flax.struct.field(pytree_node=False)
  restore: bool = flax.struct.field(pytree_node=False, default=False)

  def __post_init__(self):
    fpx.check_shift(self.shift, self.man_bits, self.spec.bits)

  @property
  def zero_point(self) -> None:
    """None: floats are symmetric."""
    return None

  def fake(self, x: jax.Array) -> jax.Array:
    """x (T, K) -> float32 (T, K)."""
    x = x.astype(jnp.float32)
    bits = self.spec.bits
    if self.shift is None:
      return fpx.round_to(x, self.scale, self.man_bits, bits)
    shift = self.shift.astype(jnp.int32)[None]
    x = x * formats.exp2(shift)
    y = fpx.round_to(x, self.scale, self.man_bits, bits)
    return y * formats.exp2(-shift) if self.restore else y


@flax.struct.dataclass
class SplitInput:
  """An input in steps (..., K) to codes of K' channels, some of them copies.

  The copies of a channel round it with offsets spread evenly over a step: n of
  them sum to its n-fold, rounded once (Hermite's identity), and each is within
  the range (MergeQuant). No product, no reduction: a gather, a sum, rounding.

  src: (S,) int32, the channels that fill the last S of K' places; the others
    are the first channels in their order. K is a place that holds 0.
  offset: (K',) float32.
  spec: symmetric integers.
  """

  src: jax.Array
  offset: jax.Array
  spec: spec_lib.QuantSpec = flax.struct.field(pytree_node=False)

  @property
  def kept(self) -> int:
    """How many places are channels in their order."""
    return self.offset.shape[-1] - self.src.shape[-1]

  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., K) in steps -> (..., K') whole numbers, in x.dtype."""
    y = self.spread(x.astype(jnp.float32))
    offset = self.offset.reshape((1,) * (x.ndim - 1) + (-1,))
    codes = jnp.clip(jnp.round(y + offset), self.spec.qmin, self.spec.qmax)
    return codes.astype(x.dtype)

  def spread(self, x: jax.Array) -> jax.Array:
    """(..., K) -> (..., K'), unrounded."""
    tail = jnp.take(x, self.src, axis=-1, mode='fill', fill_value=0)
    return jnp.concatenate([x[..., : self.kept], tail], axis=-1)

  def gather(self, kernel: jax.Array, K: int) -> jax.Array:
    """Rows (K', N) of the places -> (K, N) of the channels, summed."""
    zeros = jnp.zeros((K, kernel.shape[1]), kernel.dtype)
    rows = zeros.at[: self.kept].set(kernel[: self.kept])
    return rows.at[self.src].add(kernel[self.kept :], mode='drop')


@flax.struct.dataclass
class LowRank:
  """(x @ a) @ b, beside the kernel; a (K, r), b (r, N), floats or QArrays."""

  a: Any
  b: Any

  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., K) -> (..., N) in x.dtype; computed in a's dtype."""
    a, b = dense(self.a), dense(self.b)
    return ((x.astype(a.dtype) @ a) @ b).astype(x.dtype)

  @property
  def product(self) -> jax.Array:
    """(K, N) float32: what all tokens take."""
    a, b = dense(self.a), dense(self.b)
    return a.astype(jnp.float32) @ b.astype(jnp.float32)


@flax.struct.dataclass
class OnlineHadamard:
  """x @ H / sqrt(n) over the last axis, in blocks of `size` channels."""

  size: int = flax.struct.field(pytree_node=False)

  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., K) -> (..., K); K must be a multiple of size."""
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // self.size, self.size)
    return hadamard.transform(blocks).reshape(x.shape)


def dense(array: Any) -> jax.Array:
  """A float array of an array or a QArray, which gives float32."""
  if isinstance(array, qarray.QArray):
    return qarray.dequantize(array)
  return jnp.asarray(array)


def param(module: nn.Module, name: str, init: Any, shape: tuple) -> Any:
  """`module.param` that also accepts a quantized leaf in place of an array.

  linen compares the leaves of a stored parameter with those of its
  initializer, and a QArray has other leaves; so a stored one is taken as is.
  """
  if module.has_variable('params', name):
    return module.get_variable('params', name)
  return module.param(name, init, shape)


class QuantDense(nn.Module):
  """y = x @ kernel + bias, quantized as its leaves say.

  Attributes:
    features: N.
    use_bias: whether there is a bias (N,) from the start.
    implementation: which matmul; None picks (jaxq.nn.matmul.matmul).
  """

  features: int
  use_bias: bool = False
  implementation: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array | kernel_inputs.Inputs) -> jax.Array:
    """(..., K) -> (..., N) in x.dtype; accumulates in float32 or int32."""
    shape = (x.shape[-1], self.features)
    kernel = param(self, 'kernel', nn.initializers.lecun_normal(), shape)
    act: Any = None
    if self.has_variable('quant', 'input'):
      act = self.get_variable('quant', 'input')
    y = self._product(x, kernel, act)
    if self.use_bias or self.has_variable('params', 'bias'):
      bias = param(self, 'bias', nn.initializers.zeros, (self.features,))
      y = y + jnp.asarray(bias, y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    y = taps.tap(self, 'out', y)
    if self.has_variable('quant', 'output'):
      y = matmul.fake_input(y, self.get_variable('quant', 'output'))
    return y

  @nn.nowrap  # Part of the call: no scope of its own in a profile.
  def _product(self, x: Any, kernel: Any, act: Any) -> jax.Array:
    """x as the layer's entries change it, times the kernel."""
    if isinstance(x, kernel_inputs.Inputs):
      return matmul.matmul(x[str(self.name)], kernel)
    if self.has_variable('quant', 'hadamard'):
      turn: Any = self.get_variable('quant', 'hadamard')
      if not kernel_inputs.why_not_rotated(self, x, kernel):
        return matmul.matmul(kernel_inputs.rotated(x, turn, act), kernel)
      x = turn(x)
    if self.has_variable('quant', 'permute'):
      x = jnp.take(x, self.get_variable('quant', 'permute'), axis=-1)
    if self.has_variable('quant', 'split'):
      x = self.get_variable('quant', 'split')(x)
    x = taps.tap(self, 'in', x)
    y = matmul.matmul(x, kernel, act, implementation=self.implementation)
    if self.has_variable('quant', 'low_rank'):
      y = y + self.get_variable('quant', 'low_rank')(x)
    return y
