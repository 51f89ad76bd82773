"""Attention of some tokens to others, for reducers that have weights.

Its leaves are named and shaped as those of `jaxq.nn.attention.Attention`, so
that they can be copied from a decoder block's: a reducer that is to judge a
language model's tokens starts from that model's own attention.
"""

import jax
from flax import linen as nn

from jaxq.nn import linear


class CrossAttention(nn.Module):
  """o(softmax(q k^T / sqrt(D)) v), q of x, k and v of memory; no positions.

  Attributes:
    num_heads, num_kv_heads, head_dim: H, Hkv, D; Hkv divides H.
    qkv_bias, o_bias: which projections have biases.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  qkv_bias: bool = True
  o_bias: bool = False

  @nn.compact
  def __call__(
    self, x: jax.Array, memory: jax.Array, mask: jax.Array | None = None
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """(B, L, C), (B, M, C') -> (B, L, C) and q (B, L, H, D), k (B, M, Hkv, D).

    Args:
      x: what asks.
      memory: what is looked at.
      mask: (B, M) bool, False: nobody looks. A row that is all False gives
        finite values of no meaning.
    """
    H, Hkv, D = self.num_heads, self.num_kv_heads, self.head_dim

    def heads(x, n, name):
      y = linear.QuantDense(n * D, self.qkv_bias, name=f'{name}_proj')(x)
      return y.reshape(*x.shape[:2], n, D)

    q, k, v = heads(x, H, 'q'), heads(memory, Hkv, 'k'), heads(memory, Hkv, 'v')
    seen = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, M)
    out = jax.nn.dot_product_attention(q, k, v, mask=seen)
    out = out.reshape(*x.shape[:2], H * D)
    dense = linear.QuantDense(x.shape[-1], self.o_bias, name='o_proj')
    return dense(out), (q, k)
