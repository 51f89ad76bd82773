"""Grouped-query self-attention: rotary or no positions, windows, QK-norms."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxq.kvcache import interface
from jaxq.nn import causal, kernel_inputs, linear, matmul, norms, taps
from jaxq.nn import rope as rope_lib


class Attention(nn.Module):
  """Causal attention: H query heads share Hkv key/value heads.

  Attributes:
    num_heads, num_kv_heads, head_dim: H, Hkv, D; Hkv divides H.
    rope: rotary positions; None where the model has others.
    implementation: matmul of the projections; None picks.
    qkv_bias, o_bias: which projections have biases.
    qk_norm: whether each head of q and of k passes an RMSNorm, before the
      positions.
    norm_eps: of these norms.
    scale: of the scores; None is 1 / sqrt(D).
    window: keys a query sees, itself counted; None is all before it.
    softcap: scores become softcap * tanh(scores / softcap); None leaves them.
  """

  # What reads the input, and nothing else does (kernel_inputs.feed).
  input_linears: ClassVar[tuple[str, ...]] = ('q_proj', 'k_proj', 'v_proj')
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope: rope_lib.Rope | None = rope_lib.Rope()
  implementation: str | None = None
  qkv_bias: bool = False
  o_bias: bool = False
  qk_norm: bool = False
  norm_eps: float = 1e-6
  scale: float | None = None
  window: int | None = None
  softcap: float | None = None

  @nn.compact
  def __call__(
    self,
    x: jax.Array | kernel_inputs.Inputs,
    positions: jax.Array,
    cache: interface.Cache | None = None,
  ) -> tuple[jax.Array, interface.Update | None]:
    """(B, T, C), (B, T) int32 -> (B, T, C) and what the cache is to append."""
    B, T, C = x.shape
    H, Hkv, D = self.num_heads, self.num_kv_heads, self.head_dim

    def dense(features, name, use_bias):
      return linear.QuantDense(
        features, use_bias, implementation=self.implementation, name=name
      )

    def heads(n, name):
      y = dense(n * D, f'{name}_proj', self.qkv_bias)(x).reshape(B, T, n, D)
      if self.qk_norm and name in 'qk':
        y = norms.RMSNorm(self.norm_eps, name=f'{name}_norm')(y)
      if self.rope is not None and name in 'qk':
        y = rope_lib.rotate(y, positions, self.rope)
      return y

    q, k, v = heads(H, 'q'), heads(Hkv, 'k'), heads(Hkv, 'v')
    products = q * jnp.repeat(k, H // Hkv, axis=2)  # Of a token with itself.
    taps.tap(self, 'qk', products.reshape(B, T, H * D))
    if not self.is_initializing():  # For those who make `heads` mutable.
      self.sow('heads', 'q', q)
      self.sow('heads', 'k', k)
    if self.has_variable('quant', 'k_cache'):
      k = matmul.fake_input(k, self.get_variable('quant', 'k_cache'))
    if self.has_variable('quant', 'v_cache'):
      v = matmul.fake_input(v, self.get_variable('quant', 'v_cache'))
    how: Any = {
      'scale': self.scale,
      'window': self.window,
      'softcap': self.softcap,
    }
    if cache is None:
      out, update = causal.attention(q, k, v, **how), None
    else:
      scoring = interface.Scoring(**how)
      out, update = cache.attend(q, k, v, positions, scoring)
    out = out.reshape(B, T, H * D)
    return dense(C, 'o_proj', self.o_bias)(out), update
