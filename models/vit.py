"""Vision transformers with layer scale (the shape of DINOv2) as one flat file.

  x = [class token, patches @ kernel + bias] + positions
  for block:
    x = x + s1 * attention(norm(x))
    x = x + s2 * down(gelu(up(norm(x))))
  features = norm(x)

Oquab et al., 2023, arXiv 2304.07193. s1 and s2 are one learned factor per
channel. Positions are learned on a grid (37 x 37 at 518 pixels and patches of
14); an image of another size gets them by bicubic interpolation, with the
kernel of a = -0.75 and without smoothing, as PyTorch does.

A batch is images (B, height, width, 3) float32, normalised; both sides are
multiples of the patch size.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxq.nn import bidirectional, blocks, embed, linear, norms
from models import encoder_reduction, family

Params = Mapping[str, Any]
_CUBIC = -0.75  # The free parameter of the bicubic kernel.


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitConfig:
  """The shape of a vision transformer.

  hidden_size (C), intermediate_size (F), num_layers (L), num_heads (H).
  patch_size: pixels of a patch's side (P). image_size: side of the images that
  the grid of positions is for. norm_eps: of the norms. activation: of
  bidirectional.ACTIVATIONS.
  """

  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  patch_size: int = 14
  image_size: int = 518
  norm_eps: float = 1e-6
  activation: str = 'gelu'

  def __post_init__(self):
    family.check_config(self)
    if self.image_size % self.patch_size:
      raise ValueError(
        f'VitConfig: image_size={self.image_size}, patch_size='
        f'{self.patch_size}; the second must divide the first. Check the '
        'configuration.'
      )

  @property
  def grid(self) -> int:
    """Patches along a side of the image that positions are for."""
    return self.image_size // self.patch_size

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> 'VitConfig':
    """From the keys of a Hugging Face config.json (Dinov2Config)."""
    size = config['hidden_size']
    return cls(
      hidden_size=size,
      intermediate_size=int(size * config.get('mlp_ratio', 4)),
      num_layers=config['num_hidden_layers'],
      num_heads=config['num_attention_heads'],
      patch_size=config.get('patch_size', 14),
      image_size=config.get('image_size', 518),
      norm_eps=float(config.get('layer_norm_eps', 1e-6)),
      activation=config.get('hidden_act', 'gelu'),
    )


class LayerScale(nn.Module):
  """x * scale, one factor per channel (Touvron et al., 2021)."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., C) -> (..., C)."""
    scale = linear.param(self, 'scale', nn.initializers.ones, (x.shape[-1],))
    return x * jnp.asarray(scale, x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class Block(nn.Module):
  """One block; everything the calibration works on."""

  config: VitConfig
  implementation: str | None = None

  def setup(self):
    c = self.config
    self.input_norm = norms.LayerNorm(c.norm_eps)
    self.attention = bidirectional.SelfAttention(
      c.num_heads, self.implementation
    )
    self.attention_scale = LayerScale()
    self.post_norm = norms.LayerNorm(c.norm_eps)
    self.mlp = bidirectional.MLP(
      c.intermediate_size, c.activation, self.implementation
    )
    self.mlp_scale = LayerScale()

  def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
    """(B, T, C) -> (B, T, C), None."""
    x = x + self.attention_scale(self.attention(self.input_norm(x)))
    return self.feed(x), None

  def attend(
    self, x: jax.Array, bias: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(B, T, C) -> that behind the attention, and its q and k (B, T, H, D).

    bias: (B, T) float32 that is added to the scores of each key; None: 0.
    """
    out, q, k = self.attention.with_heads(self.input_norm(x), bias=bias)
    return x + self.attention_scale(out), q, k

  def feed(self, x: jax.Array) -> jax.Array:
    """What is behind the attention (B, T, C) -> what is behind the MLP."""
    return x + self.mlp_scale(self.mlp(self.post_norm(x)))

  def attention_output(self, x: jax.Array) -> jax.Array:
    """The attention's output from its normalised input (B, T, C)."""
    return self.attention(x)

  def mlp_output(self, x: jax.Array) -> jax.Array:
    """The MLP's output from its normalised input (B, T, C)."""
    return self.mlp(x)


class Vit(nn.Module):
  """A whole model over stacked blocks.

  Attributes:
    config: the model's shape.
    runs: lengths of the runs of equally structured blocks, summing to L; ()
      is one run.
    dtype: of the activations; features are always float32.
    implementation: matmul of the linears; None picks.
    token_reducer: drops or merges patches from layer to layer
      (models.encoder_reduction); None: all stay.
  """

  config: VitConfig
  runs: tuple[int, ...] = ()
  dtype: Any = jnp.float32
  implementation: str | None = None
  token_reducer: Any = None

  def setup(self):
    c = self.config
    encoder_reduction.check(self.token_reducer)
    self.patches = linear.QuantDense(c.hidden_size, use_bias=True)
    self.class_token = embed.Embed(1, c.hidden_size)
    self.positions = embed.Embed(1 + c.grid**2, c.hidden_size)
    self.blocks = [
      nn.scan(
        Block,
        variable_axes={'params': 0, 'quant': 0},
        split_rngs={'params': True},
        length=length,
      )(c, self.implementation)
      for length in self.runs or (c.num_layers,)
    ]
    self.final_norm = norms.LayerNorm(c.norm_eps)

  def __call__(self, images: jax.Array) -> jax.Array:
    """images (B, height, width, 3) -> features of the class token (B, C)."""
    return self.hidden(images)[:, 0].astype(jnp.float32)

  def hidden(self, images: jax.Array) -> jax.Array:
    """images -> features (B, 1 + patches, C), the class token first.

    With a token reducer there are fewer patches.
    """
    x = self.embed_images(images)
    if self.token_reducer is None or self.is_initializing():
      for run in self.blocks:
        x, _ = run(x)
      return self.final_norm(x)
    return self.final_norm(self.reduced(x).x)

  def reduced(self, x: jax.Array) -> encoder_reduction.Encoded:
    """The first block's input -> the last one's output, fewer tokens."""
    c = self.config
    layers = encoder_reduction.layers_of(
      self.blocks, self.runs or (c.num_layers,)
    )
    block = Block(c, self.implementation, parent=None)
    return encoder_reduction.run(
      block, layers, x, self.token_reducer, special=1
    )

  def embed_images(self, images: jax.Array) -> jax.Array:
    """images (B, height, width, 3) -> the first block's input (B, T, C).

    Raises:
      ValueError: another shape, or sides that are no multiples of patch_size.
    """
    rows, columns = self._patches_of(images.shape)
    P, B = self.config.patch_size, images.shape[0]
    x = images.astype(self.dtype).reshape(B, rows, P, columns, P, 3)
    x = x.transpose(0, 1, 3, 2, 4, 5)  # (B, rows, columns, P, P, 3)
    x = self.patches(x.reshape(B, rows * columns, P * P * 3))
    first = self.class_token(jnp.zeros((B, 1), jnp.int32)).astype(self.dtype)
    x = jnp.concatenate([first, x], axis=1)
    return x + self._positions(rows, columns).astype(self.dtype)[None]

  def _patches_of(self, shape: tuple[int, ...]) -> tuple[int, int]:
    P = self.config.patch_size
    if len(shape) != 4 or shape[-1] != 3:
      raise ValueError(
        f'vit: images of shape {tuple(shape)}; they must be (batch, height, '
        'width, 3). Convert them to RGB.'
      )
    if shape[1] % P or shape[2] % P:
      raise ValueError(
        f'vit: images of {shape[1]} x {shape[2]} pixels; both sides must be '
        f'multiples of {P}. Resize or crop them.'
      )
    return shape[1] // P, shape[2] // P

  def _positions(self, rows: int, columns: int) -> jax.Array:
    """(1 + rows * columns, C)."""
    table = jnp.asarray(self.positions.embedding)
    side = self.config.grid
    if (rows, columns) == (side, side):
      return table
    grid = table[1:].reshape(side, side, -1)
    grid = jnp.einsum(
      'rs,ct,stk->rck',
      jnp.asarray(bicubic(side, rows), grid.dtype),
      jnp.asarray(bicubic(side, columns), grid.dtype),
      grid,
      precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.concatenate([table[:1], grid.reshape(rows * columns, -1)])


def bicubic(size: int, new_size: int) -> np.ndarray:
  """The matrix (new_size, size) of bicubic interpolation along one axis.

  Pixel centres at halves, edges repeated, no smoothing when it shrinks: what
  torch.nn.functional.interpolate(mode='bicubic') computes.
  """
  centre = (np.arange(new_size) + 0.5) * size / new_size - 0.5
  first = np.floor(centre).astype(int)
  matrix = np.zeros((new_size, size))
  for offset in (-1, 0, 1, 2):
    index = first + offset
    d = np.abs(centre - index)
    near = (_CUBIC + 2) * d**3 - (_CUBIC + 3) * d**2 + 1
    far = _CUBIC * (d**3 - 5 * d**2 + 8 * d - 4)
    weight = np.where(d <= 1, near, far)
    rows = np.arange(new_size)
    np.add.at(matrix, (rows, np.clip(index, 0, size - 1)), weight)
  return matrix


def block_spec(config: VitConfig) -> blocks.BlockSpec:
  """What a block of this model tells the calibration."""
  return bidirectional.block_spec(
    Block(config), config.num_heads, config.hidden_size // config.num_heads
  )


def _embed(config: VitConfig, outside: Params, images: jax.Array) -> Any:
  module = Vit(config)
  return module.apply({'params': outside}, images, method='embed_images')


FAMILY = family.Family(
  config=VitConfig.from_hf,
  build=lambda config, runs, dtype: Vit(config, runs, dtype),
  block_spec=lambda config, i: block_spec(config),
  embed=_embed,
  rules=family.encoder_rules,
)
