"""The two branches of an encoder block, with biases and padding, and its spec.

Every token sees every token that is not padding (BERT, ViT). The inputs of all
linears are zero at padding, so that statistics taken of them count real tokens
only; what comes out there is of no use.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from jaxq.nn import blocks, linear
from jaxq.parallel import mesh as mesh_lib

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_new': lambda x: jax.nn.gelu(x, approximate=True),
  'gelu_pytorch_tanh': lambda x: jax.nn.gelu(x, approximate=True),
  'relu': jax.nn.relu,
}


class SelfAttention(nn.Module):
  """o(softmax(q k^T / sqrt(D)) v).

  Attributes:
    num_heads: H; divides C.
    implementation: matmul of the projections; None picks.
  """

  num_heads: int
  implementation: str | None = None

  def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """(B, T, C), mask (B, T) bool (False: padding) -> (B, T, C)."""
    return self.with_heads(x, mask)[0]

  @nn.compact
  def with_heads(
    self,
    x: jax.Array,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Like a call; also the queries and keys (B, T, H, D).

    bias: (B, T) float32 that is added to the scores of each key; None: 0.
    """
    B, T, C = x.shape
    H = self.num_heads

    def dense(name):
      return linear.QuantDense(
        C, use_bias=True, implementation=self.implementation, name=name
      )

    x = keep(x, mask)  # A search may replay one of more, split channels.
    q, k, v = (dense(f'{name}_proj')(x).reshape(B, T, H, -1) for name in 'qkv')
    seen = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, T)
    added = None if bias is None else bias[:, None, None, :]
    out = jax.nn.dot_product_attention(q, k, v, bias=added, mask=seen)
    return dense('o_proj')(keep(out.reshape(B, T, -1), mask)), q, k


class MLP(nn.Module):
  """down(activation(up(x))).

  Attributes:
    intermediate_size: F.
    activation: of ACTIVATIONS.
    implementation: matmul of the linears; None picks.
  """

  intermediate_size: int
  activation: str = 'gelu'
  implementation: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """(B, T, C), mask (B, T) bool (False: padding) -> (B, T, C)."""

    def dense(features, name):
      return linear.QuantDense(
        features, use_bias=True, implementation=self.implementation, name=name
      )

    up = dense(self.intermediate_size, 'up_proj')(keep(x, mask))
    hidden = keep(ACTIVATIONS[self.activation](up), mask)
    return dense(x.shape[-1], 'down_proj')(hidden)


def keep(x: jax.Array, mask: jax.Array | None) -> jax.Array:
  """x (B, T, C) with zeros where mask (B, T) is False; None keeps all."""
  if mask is None:
    return x
  return jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))


def mask_of(x: jax.Array) -> jax.Array:
  """The mask (B, T) of an x (B, T, C) that came out of `keep`.

  A search that replays a branch from a sample of its input has nothing else.
  """
  return jnp.any(x != 0, axis=-1)


def block_spec(
  module: nn.Module,
  num_heads: int,
  head_dim: int,
  *,
  shortcuts: tuple[str, str] | None = None,
  entries: tuple[str, ...] = (),
) -> blocks.BlockSpec:
  """The spec of a block input_norm, attention, post_norm, mlp.

  There is no site from up to down: a scale does not pass through the
  activation.

  Args:
    module: the block; has methods attention_output and mlp_output.
    num_heads, head_dim: H, D.
    shortcuts: of a post-norm block, the Shortcut past each branch.
    entries: as in BlockSpec.
  """
  qkv = tuple(f'attention/{n}_proj' for n in 'qkv')
  o, up, down = 'attention/o_proj', 'mlp/up_proj', 'mlp/down_proj'
  past_attention, past_mlp = (
    ((s,) for s in shortcuts) if shortcuts else ((), ())
  )
  return blocks.BlockSpec(
    module=module,
    linears=tuple(
      blocks.Linear(path=path, tap=f'{group[0]}/in')
      for group in (qkv, (o,), (up,), (down,))
      for path in group
    ),
    sites=(
      blocks.Site(
        producer='input_norm',
        consumers=qkv,
        method='attention_output',
        shortcuts=past_attention,
      ),
      blocks.Site(
        producer='attention/v_proj',
        consumers=(o,),
        heads=(num_heads, 1, head_dim),
      ),
      blocks.Site(
        producer='post_norm',
        consumers=(up,),
        method='mlp_output',
        shortcuts=past_mlp,
      ),
    ),
    residual_out=(o, down),
    norms=(('input_norm', qkv), ('post_norm', (up,))),
    rotated=(o, down),
    entries=entries,
  )


def sharding_rules(
  num_heads: int, intermediate_size: int, shards: int
) -> mesh_lib.Rules:
  """How such a block lies on `shards` devices of the `model` axis.

  Columns (and biases) of q, k, v and up, rows of o and down; attention is
  replicated where the heads do not divide.

  Raises:
    ValueError: intermediate_size does not divide.
  """
  if intermediate_size % shards:
    raise ValueError(
      f'mesh model:{shards}: intermediate_size={intermediate_size} is not a '
      f'multiple of {shards}; choose a model size that divides it.'
    )
  columns, rows = PartitionSpec(None, 'model'), PartitionSpec('model', None)
  mlp = (
    (r'mlp/up_proj/kernel', columns),
    (r'mlp/up_proj/bias', PartitionSpec('model')),
    (r'mlp/down_proj/kernel', rows),
  )
  if num_heads % shards:
    return mlp
  return (
    (r'attention/[qkv]_proj/kernel', columns),
    (r'attention/[qkv]_proj/bias', PartitionSpec('model')),
    (r'attention/o_proj/kernel', rows),
    *mlp,
  )
