"""Grouped-query self-attention with rotary positions."""

import jax
from flax import linen as nn

from jaxq.kvcache import contiguous
from jaxq.nn import causal, linear, rope


class Attention(nn.Module):
  """Causal attention: H query heads share Hkv key/value heads.

  Attributes:
    num_heads, num_kv_heads, head_dim: H, Hkv, D; Hkv divides H.
    rope_theta: base of the rotary frequencies.
    implementation: matmul of the projections; None picks.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 10000.0
  implementation: str | None = None

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array,
    cache: contiguous.ContiguousCache | None = None,
  ) -> tuple[jax.Array, contiguous.ContiguousCache | None]:
    """(B, T, C), (B, T) int32 -> (B, T, C) and the cache with T more tokens."""
    B, T, C = x.shape
    H, Hkv, D = self.num_heads, self.num_kv_heads, self.head_dim

    def dense(features, name):
      return linear.QuantDense(
        features, implementation=self.implementation, name=name
      )

    q = dense(H * D, 'q_proj')(x).reshape(B, T, H, D)
    k = dense(Hkv * D, 'k_proj')(x).reshape(B, T, Hkv, D)
    v = dense(Hkv * D, 'v_proj')(x).reshape(B, T, Hkv, D)
    q = rope.rotate(q, positions, self.rope_theta)
    k = rope.rotate(k, positions, self.rope_theta)
    if cache is None:
      out = causal.attention(q, k, v)
    else:
      cache = contiguous.append(cache, k, v)
      out = contiguous.attend(cache, q, positions)
    return dense(C, 'o_proj')(out.reshape(B, T, H * D)), cache
