"""QuantDense: the one linear layer; it computes with what it is given.

The kernel leaf is a float array (K, N) or a `QArray`. The `quant` collection
may hold, at this layer's path,

  'hadamard': OnlineHadamard -> x is rotated before all else;
  'input': ActQuant          -> x is quantized, statically or per token.

Nothing in the model changes: quantizing is replacing leaves. The input tap
'in' sees x after the rotation and before its quantization, which is what the
kernel is multiplied with.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxq.nn import matmul, taps
from jaxq.numerics import hadamard
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
class OnlineHadamard:
  """x @ H / sqrt(n) over the last axis, in blocks of `size` channels."""

  size: int = flax.struct.field(pytree_node=False)

  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., K) -> (..., K); K must be a multiple of size."""
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // self.size, self.size)
    return hadamard.transform(blocks).reshape(x.shape)


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
    use_bias: whether there is a bias (N,).
    implementation: which matmul; None picks (jaxq.nn.matmul.matmul).
  """

  features: int
  use_bias: bool = False
  implementation: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., K) -> (..., N) in x.dtype; accumulates in float32 or int32."""
    shape = (x.shape[-1], self.features)
    kernel = param(self, 'kernel', nn.initializers.lecun_normal(), shape)
    if self.has_variable('quant', 'hadamard'):
      x = self.get_variable('quant', 'hadamard')(x)
    x = taps.tap(self, 'in', x)
    act: Any = None
    if self.has_variable('quant', 'input'):
      act = self.get_variable('quant', 'input')
    y = matmul.matmul(x, kernel, act, implementation=self.implementation)
    if self.use_bias:
      bias = param(self, 'bias', nn.initializers.zeros, (self.features,))
      y = y + jnp.asarray(bias, y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    return y
