"""Bidirectional text encoders (BERT) as one flat file, with mean pooling.

  u = norm(h + attention(h)),  h = norm(u + down(gelu(up(u))))   post-norm

Here a block begins with the norm that the published layer before it ends with
(the first one with that of the embeddings), and the last one is `final_norm`:

  h = input_norm(x)
  u = post_norm(shortcut(h) + attention(h))
  x = shortcut(u) + down(gelu(up(u)))

The function is the same. But each norm and all that reads it now lie in one
block, and the residual sum reads it through a Shortcut, so that scales move out
of the norms as they do in a pre-norm model.

A batch is {'tokens' (B, T) int32, 'mask' (B, T) bool}, False for padding, and
'types' (B, T) int32 where a text is a pair. The sentence embedding is the mean
of the last hidden states over real tokens, at length one (Reimers and Gurevych,
2019, arXiv 1908.10084).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxq.nn import bidirectional, blocks, embed, norms, shortcut
from models import family

Batch = Mapping[str, jax.Array]
Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
  """The shape of a BERT encoder.

  vocab_size (V), hidden_size (C), intermediate_size (F), num_layers (L),
  num_heads (H). max_position: rows of the learned positions. type_vocab_size:
  kinds of segments. norm_eps: of the norms. activation: of
  bidirectional.ACTIVATIONS. pad_token_id: what fills a batch up.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  max_position: int = 512
  type_vocab_size: int = 2
  norm_eps: float = 1e-12
  activation: str = 'gelu'
  pad_token_id: int = 0

  def __post_init__(self):
    family.check_config(self)

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> 'EncoderConfig':
    """From the keys of a Hugging Face config.json."""
    return cls(
      vocab_size=config['vocab_size'],
      hidden_size=config['hidden_size'],
      intermediate_size=config['intermediate_size'],
      num_layers=config['num_hidden_layers'],
      num_heads=config['num_attention_heads'],
      max_position=config.get('max_position_embeddings', 512),
      type_vocab_size=config.get('type_vocab_size', 2),
      norm_eps=float(config.get('layer_norm_eps', 1e-12)),
      activation=config.get('hidden_act', 'gelu'),
      pad_token_id=config.get('pad_token_id') or 0,
    )


class Block(nn.Module):
  """One encoder block; everything the calibration works on."""

  config: EncoderConfig
  implementation: str | None = None

  def setup(self):
    c = self.config
    self.input_norm = norms.LayerNorm(c.norm_eps)
    self.attention = bidirectional.SelfAttention(
      c.num_heads, self.implementation
    )
    self.attention_shortcut = shortcut.Shortcut()
    self.post_norm = norms.LayerNorm(c.norm_eps)
    self.mlp = bidirectional.MLP(
      c.intermediate_size, c.activation, self.implementation
    )
    self.mlp_shortcut = shortcut.Shortcut()

  def __call__(
    self, x: jax.Array, mask: jax.Array | None = None
  ) -> tuple[jax.Array, None]:
    """(B, T, C), mask (B, T) bool (False: padding) -> (B, T, C), None."""
    h = self.input_norm(x)
    u = self.attention_shortcut(h) + self.attention(h, mask)
    u = self.post_norm(u)
    return self.mlp_shortcut(u) + self.mlp(u, mask), None

  def attention_output(self, x: jax.Array) -> jax.Array:
    """The attention's output from its input (B, T, C), zero at padding."""
    return self.attention(x, bidirectional.mask_of(x))

  def mlp_output(self, x: jax.Array) -> jax.Array:
    """The MLP's output from its input (B, T, C), zero at padding."""
    return self.mlp(x, bidirectional.mask_of(x))


class Encoder(nn.Module):
  """A whole model over stacked blocks.

  Attributes:
    config: the model's shape.
    runs: lengths of the runs of equally structured blocks, summing to L; ()
      is one run.
    dtype: of the activations; sentence embeddings are always float32.
    implementation: matmul of the linears; None picks.
  """

  config: EncoderConfig
  runs: tuple[int, ...] = ()
  dtype: Any = jnp.float32
  implementation: str | None = None

  def setup(self):
    c = self.config
    self.embed = embed.Embed(c.vocab_size, c.hidden_size)
    self.positions = embed.Embed(c.max_position, c.hidden_size)
    self.types = embed.Embed(c.type_vocab_size, c.hidden_size)
    self.blocks = [
      nn.scan(
        Block,
        variable_axes={'params': 0, 'quant': 0},
        split_rngs={'params': True},
        in_axes=nn.broadcast,
        length=length,
      )(c, self.implementation)
      for length in self.runs or (c.num_layers,)
    ]
    self.final_norm = norms.LayerNorm(c.norm_eps)

  def __call__(self, batch: Batch) -> jax.Array:
    """A batch -> sentence embeddings (B, C) float32 of length one."""
    x = self.hidden(batch).astype(jnp.float32)
    kept = bidirectional.keep(x, batch['mask'])
    count = jnp.sum(batch['mask'], axis=1, keepdims=True, dtype=jnp.float32)
    mean = jnp.sum(kept, axis=1) / jnp.maximum(count, 1.0)  # (B, C)
    norm = jnp.linalg.norm(mean, axis=-1, keepdims=True)
    return mean / jnp.maximum(norm, 1e-12)

  def hidden(self, batch: Batch) -> jax.Array:
    """A batch -> the last hidden states (B, T, C)."""
    carry = self.embed_batch(batch)
    x = carry['x']
    for run in self.blocks:
      x, _ = run(x, carry['mask'])
    return self.final_norm(x)

  def embed_batch(self, batch: Batch) -> dict[str, jax.Array]:
    """A batch -> the first block's input, {'x' (B, T, C), 'mask' (B, T)}.

    Raises:
      ValueError: longer than the learned positions.
    """
    tokens = batch['tokens']
    T, longest = tokens.shape[1], self.config.max_position
    if longest < T:
      raise ValueError(
        f'encoder: sequences of {T} tokens; the model has {longest} positions. '
        'Cut the text into shorter pieces.'
      )
    types = batch.get('types')
    x = self.embed(tokens)
    x = x + self.positions(jnp.arange(T)[None])
    x = x + self.types(jnp.zeros_like(tokens) if types is None else types)
    return {'x': x.astype(self.dtype), 'mask': batch['mask']}


def block_spec(config: EncoderConfig) -> blocks.BlockSpec:
  """What a block of this model tells the calibration."""
  return bidirectional.block_spec(
    Block(config),
    config.num_heads,
    config.hidden_size // config.num_heads,
    shortcuts=('attention_shortcut', 'mlp_shortcut'),
    entries=('mask',),
  )


def _embed(config: EncoderConfig, outside: Params, batch: Batch) -> Any:
  module = Encoder(config)
  return module.apply({'params': outside}, batch, method='embed_batch')


FAMILY = family.Family(
  config=EncoderConfig.from_hf,
  build=lambda config, runs, dtype: Encoder(config, runs, dtype),
  block_spec=lambda config, i: block_spec(config),
  embed=_embed,
  rules=family.encoder_rules,
)
