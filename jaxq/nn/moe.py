"""A sparse layer of experts (Shazeer et al., 2017, arXiv 1701.06538).

  p = softmax(router(x));  y = sum over the k largest p_e of p_e expert_e(x)

An expert is an MLP whose linears are ordinary QuantDense layers with taps of
their own. Those see the tokens routed to the expert, and zeros in place of the
others, so that a Hessian or a maximum counts its own tokens only. All experts
run on all tokens, which costs num_experts / k times the flops of what is
needed: right for calibration and evaluation, not a fast decode path.

Taps of the layer itself: 'in', what the router and the experts read, and
'routed' (B, T, E), 1 where a token goes to an expert and 0 elsewhere, from
which the calibration counts each expert's tokens.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxq.nn import linear, mlp, taps


class SparseMLP(nn.Module):
  """The layer; submodules router and expert_0 .. expert_{E-1}.

  Attributes:
    num_experts, experts_per_token: E, k.
    intermediate_size: F of each expert.
    implementation: matmul of the linears; None picks.
    activation: of mlp.ACTIVATIONS.
    normalize: whether the k probabilities are made to sum to one.
    all_experts: every expert's taps see every token, for a calibration in which
      some experts would see too few; the output is the same.
  """

  # The router and a tap read the input as it is (kernel_inputs.feed).
  input_linears: ClassVar[tuple[str, ...]] = ()
  num_experts: int
  experts_per_token: int
  intermediate_size: int
  implementation: str | None = None
  activation: str = 'silu'
  normalize: bool = True
  all_experts: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, T, C) -> (B, T, C) in x.dtype; routing and the sum in float32."""
    E = self.num_experts
    x = taps.tap(self, 'in', x)
    router = linear.QuantDense(
      E, implementation=self.implementation, name='router'
    )
    p = jax.nn.softmax(router(x).astype(jnp.float32), axis=-1)  # (B, T, E)
    top, index = jax.lax.top_k(p, self.experts_per_token)  # (B, T, k)
    if self.normalize:
      top = top / jnp.sum(top, axis=-1, keepdims=True)
    chosen = jax.nn.one_hot(index, E, dtype=jnp.float32)  # (B, T, k, E)
    weights = jnp.sum(chosen * top[..., None], axis=2)  # (B, T, E)
    routed = taps.tap(self, 'routed', jnp.sum(chosen, axis=2))
    y = jnp.zeros(x.shape, jnp.float32)
    for e in range(E):
      expert = mlp.MLP(
        self.intermediate_size,
        self.implementation,
        self.activation,
        name=f'expert_{e}',
      )
      mask = None if self.all_experts else routed[..., e] > 0
      y = y + weights[..., e, None] * expert(x, mask).astype(jnp.float32)
    return y.astype(x.dtype)
