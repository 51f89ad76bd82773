"""The MLP of a decoder block, gated or not."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxq.nn import kernel_inputs, linear

# The names are Hugging Face's.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'silu': jax.nn.silu,
  'relu': jax.nn.relu,
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_pytorch_tanh': functools.partial(jax.nn.gelu, approximate=True),
}


class MLP(nn.Module):
  """down(act(gate(x)) * up(x)) (Shazeer, 2020), or down(act(up(x))).

  Attributes:
    intermediate_size: F.
    implementation: matmul of the linears; None picks.
    activation: one of ACTIVATIONS.
    gated: whether there is a gate.
    use_bias: whether the linears have biases.
  """

  intermediate_size: int
  implementation: str | None = None
  activation: str = 'silu'
  gated: bool = True
  use_bias: bool = False

  @property
  def input_linears(self) -> tuple[str, ...]:
    """What reads the input, and nothing else does (kernel_inputs.feed)."""
    return ('gate_proj', 'up_proj') if self.gated else ('up_proj',)

  @nn.compact
  def __call__(
    self,
    x: jax.Array | kernel_inputs.Inputs,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """(B, T, C) -> (B, T, C).

    Args:
      x: the normalised input; Inputs have no mask.
      mask: (B, T) bool; every linear gets zeros where it is False, so that
        statistics count the other tokens only. None: all are real.
    """

    def dense(features, name):
      return linear.QuantDense(
        features, self.use_bias, implementation=self.implementation, name=name
      )

    def keep(x):
      return x if mask is None else jnp.where(mask[..., None], x, 0)

    act, F = ACTIVATIONS[self.activation], self.intermediate_size
    C, x = x.shape[-1], keep(x)
    if self.gated:
      hidden = act(dense(F, 'gate_proj')(x)) * dense(F, 'up_proj')(x)
    else:
      hidden = act(dense(F, 'up_proj')(x))
    return dense(C, 'down_proj')(keep(hidden))
