"""VQToken's attention: the map of codes, put into the codes.

Zhang and Fu, 2025, https://arxiv.org/abs/2503.16980. `VQAttention`: code k
asks, frame by frame, where it is. Its T rows of memory are

  Linear([share of the frame's cells, mean row, mean column]) + sinusoids(t)

and a layer of self-attention among codes, cross-attention to these rows and a
feed-forward block is added to the codebook. It treats all codes alike (a
permutation of codes permutes the output), gives K tokens for any number of
frames, and is the identity while its output projections are 0.

`ReferenceVQAttention` is the authors' wiring, for parity: a post-norm decoder
layer whose queries are Linear(labels of a frame, as floats) and whose memory is
the codebook. As labels are names and not numbers, those queries carry little.
A third wiring, frame rows Linear(histogram over codes), would tie each code's
number to weights: it is not indifferent to a permutation either.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxq.nn import linear, mlp, norms
from jaxq.tokens import cross_attention, interface


class VQAttention(nn.Module):
  """Codebook in, codebook that knows its map out.

  Attributes:
    num_heads: divides the width.
    ffn: width of the feed-forward block.
    dropout: of what each of the three adds, in training.
  """

  num_heads: int = 8
  ffn: int = 2048
  dropout: float = 0.1

  @nn.compact
  def __call__(
    self,
    codes: jax.Array,
    features: jax.Array,
    mask: jax.Array,
    train: bool = False,
  ) -> jax.Array:
    """(B, K, D), features (B, K, T, 3) of `map_features`, mask -> (B, K, D).

    Args:
      codes: the codebook.
      features: of each code in each frame.
      mask: (B, K) bool, codes in use.
      train: with dropout; needs the rng 'dropout'.
    """
    B, K, D = codes.shape
    T = features.shape[2]
    drop = nn.Dropout(self.dropout, deterministic=not train)

    def attention(name):
      return cross_attention.CrossAttention(
        self.num_heads,
        self.num_heads,
        D // self.num_heads,
        o_bias=True,
        name=name,
      )

    def norm(name):
      return norms.LayerNorm(name=name)

    x = norm('self_norm')(codes)
    out, _ = attention('self_attention')(x, x, mask)
    codes = codes + drop(out)
    rows = linear.QuantDense(D, use_bias=True, name='position')(
      features.astype(codes.dtype)
    )  # (B, K, T, D)
    rows = rows + sinusoids(T, D).astype(codes.dtype)[None, None]
    x = norm('cross_norm')(codes).reshape(B * K, 1, D)
    out, _ = attention('cross_attention')(x, rows.reshape(B * K, T, D))
    codes = codes + drop(out.reshape(B, K, D))
    ffn = mlp.MLP(
      self.ffn, activation='relu', gated=False, use_bias=True, name='mlp'
    )
    return codes + drop(ffn(norm('mlp_norm')(codes)))


class ReferenceVQAttention(nn.Module):
  """The authors' layer: max(T, K) tokens of T frames and K codes.

  Attributes:
    num_heads, ffn: as torch.nn.TransformerDecoderLayer, with ReLU.
  """

  num_heads: int = 8
  ffn: int = 2048

  @nn.compact
  def __call__(self, codes: jax.Array, labels: jax.Array) -> jax.Array:
    """Codes (B, K, D), labels (B, T, n) int32 -> (B, max(T, K), D).

    The shorter of frames and codes is repeated, cyclically, to the longer.

    Raises:
      ValueError: n is not the number of cells that the layer was made for.
    """
    D, n = codes.shape[-1], labels.shape[-1]
    if self.has_variable('params', 'query'):
      made: int = self.get_variable('params', 'query')['kernel'].shape[0]
      if made != n:
        raise ValueError(
          f'ReferenceVQAttention: {n} cells per frame; the layer was made for '
          f'{made}. Resize the frames.'
        )
    L = max(labels.shape[1], codes.shape[1])
    x = linear.QuantDense(D, use_bias=True, name='query')(
      labels.astype(codes.dtype)
    )
    x, memory = (a[:, jnp.arange(L) % a.shape[1]] for a in (x, codes))

    def attention(name, x, memory):
      module = cross_attention.CrossAttention(
        self.num_heads,
        self.num_heads,
        D // self.num_heads,
        o_bias=True,
        name=name,
      )
      return module(x, memory)[0]

    def norm(name, x):
      return norms.LayerNorm(name=name)(x)

    x = norm('self_norm', x + attention('self_attention', x, x))
    x = norm('cross_norm', x + attention('cross_attention', x, memory))
    ffn = mlp.MLP(
      self.ffn, activation='relu', gated=False, use_bias=True, name='mlp'
    )
    return norm('mlp_norm', x + ffn(x))


def map_features(
  assignment: jax.Array, ts: interface.TokenSet, k: int
) -> jax.Array:
  """What the map says of each code in each frame.

  Args:
    assignment: (B, N) int32 codes of the tokens, -1: none.
    ts: the tokens; its grid.
    k: codes, static.

  Returns:
    (B, k, T, 3) float32: the share of the frame's cells, and the mean row and
    column within it in [0, 1]; 0 where the code is not in the frame.
  """
  T, H, W = interface.square_grid(ts)
  B = assignment.shape[0]
  member = jax.nn.one_hot(assignment[:, ts.special :], k, dtype=jnp.float32)
  member = member.reshape(B, T, H, W, k)
  rows = (jnp.arange(H, dtype=jnp.float32) + 0.5) / H
  columns = (jnp.arange(W, dtype=jnp.float32) + 0.5) / W
  number = jnp.sum(member, axis=(2, 3))  # (B, T, k)
  row = jnp.einsum('bthwk,h->btk', member, rows)
  column = jnp.einsum('bthwk,w->btk', member, columns)
  some = jnp.maximum(number, 1.0)
  cells = jnp.sum(ts.mask[:, ts.special :].reshape(B, T, H * W), axis=2)
  cells = jnp.maximum(cells, 1).astype(jnp.float32)[..., None]
  features = jnp.stack([number / cells, row / some, column / some], axis=-1)
  return features.swapaxes(1, 2)


def sinusoids(length: int, width: int) -> jax.Array:
  """Sines, then cosines of 0..length-1: (length, width), base 10000."""
  half = -(-width // 2)
  powers = jnp.arange(half, dtype=jnp.float32) / half
  time = jnp.arange(length, dtype=jnp.float32)
  angles = time[:, None] * (10000.0**-powers)[None]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)[:, :width]


def zero_outputs(params: Mapping[str, Any]) -> dict[str, Any]:
  """The same parameters with every output projection 0: adds nothing."""
  made = {name: dict(part) for name, part in params.items()}
  for name, output in (
    ('self_attention', 'o_proj'),
    ('cross_attention', 'o_proj'),
    ('mlp', 'down_proj'),
  ):
    made[name][output] = jax.tree.map(jnp.zeros_like, made[name][output])
  return made


def check_heads(width: int, num_heads: int) -> None:
  """Raises ValueError unless the heads divide the width."""
  if width % num_heads:
    raise ValueError(
      f'VQAttention: width {width} and num_heads={num_heads}; the heads must '
      'divide the width. Choose another number of heads.'
    )
