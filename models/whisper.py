"""Whisper (Radford et al., 2022, arXiv 2212.04356) as one flat file.

  encoder  x = gelu(conv2(gelu(conv1(log_mel)))) + positions
           block: x = x + attention(ln(x)); x = x + down(gelu(up(ln(x))))
           encoded = ln(x)                                  (B, 1500, C)
  decoder  x = embed(tokens) + positions
           block: as above, with x = x + cross(ln(x), encoded) in between
           logits = ln(x) @ embedding^T

Blocks are numbered through: the encoder's come first. As in models.decoder,
equal neighbours are stacked into runs ('blocks_0', ...) and scanned; a run
never spans both halves, since decoder blocks have parameters for `cross` too.

Generation keeps two caches: the decoder's own keys and values, which grow, and
the keys and values of the encoded audio, which are computed once per clip.

The linears of both halves may be quantized; convolutions, positions, norms and
the embedding, which is also the head, stay float.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from jaxq.kvcache import contiguous
from jaxq.nn import embed, norms
from jaxq.parallel import mesh as mesh_lib
from models import encoder_reduction, family, whisper_blocks

Params = Mapping[str, Any]
Caches = tuple[contiguous.ContiguousCache, ...]
CrossCaches = tuple[whisper_blocks.CrossCache, ...]


class Whisper(nn.Module):
  """A whole model over stacked blocks.

  Attributes:
    config: the model's shape.
    runs: lengths of the runs of equally structured blocks, the encoder's
      first; () is one run for each half.
    dtype: of the activations; logits are always float32.
    implementation: matmul of the linears; None picks.
    token_reducer: drops or merges frames of the audio from layer to layer of
      the encoder (models.encoder_reduction); None: all stay.
  """

  config: whisper_blocks.WhisperConfig
  runs: tuple[int, ...] = ()
  dtype: Any = jnp.float32
  implementation: str | None = None
  token_reducer: Any = None

  def setup(self):
    c = self.config
    encoder_reduction.check(self.token_reducer)
    C = c.hidden_size
    self.conv1 = nn.Conv(C, (3,), padding=1)
    self.conv2 = nn.Conv(C, (3,), strides=2, padding=1)
    self.encoder_positions = embed.Embed(c.max_source, C)
    self.encoder_norm = norms.LayerNorm()
    self.embed = embed.Embed(c.vocab_size, C)
    self.positions = embed.Embed(c.max_position, C)
    self.final_norm = norms.LayerNorm()
    first = len(runs_of(c, self.runs)[0])
    self.blocks = [
      self._run(i < first, length)
      for i, length in enumerate(
        self.runs or (c.encoder_layers, c.decoder_layers)
      )
    ]

  def _run(self, encoder: bool, length: int) -> nn.Module:
    """`length` equal blocks, scanned."""
    scan: Any = {
      'variable_axes': {'params': 0, 'quant': 0},
      'split_rngs': {'params': True},
      'length': length,
    }
    if encoder:
      made: Any = nn.scan(whisper_blocks.EncoderBlock, **scan)
    else:
      axes = (0, nn.broadcast, 0)  # Of encoded, positions and cache.
      made = nn.scan(
        whisper_blocks.DecoderBlock,
        methods={
          '__call__': {**scan, 'in_axes': axes},
          'cross_keys': {**scan, 'in_axes': nn.broadcast},
        },
      )
    return made(self.config, self.implementation)

  def __call__(
    self, features: jax.Array, tokens: jax.Array
  ) -> tuple[jax.Array, None]:
    """features (B, 2 S, mels), tokens (B, T) -> logits (B, T, V) float32."""
    cross = self.listen(features)
    x, _ = self.hidden(tokens, None, None, cross)
    return self.logits(x), None

  def encode(self, features: jax.Array) -> jax.Array:
    """Log-mel features (B, 2 S, mels) -> encoded audio (B, S, C).

    With a token reducer S is smaller.
    """
    return self.encode_sized(features)[0]

  def encode_sized(
    self, features: jax.Array
  ) -> tuple[jax.Array, jax.Array | None]:
    """Like `encode`; also the log of each frame's size (B, S), or None.

    Attention is to add it to the scores of that frame.
    """
    x = self.embed_audio(features)
    if self.token_reducer is None or self.is_initializing():
      for run in self._half(0):
        x, _ = run(x)
      return self.encoder_norm(x), None
    c = self.config
    encoded = encoder_reduction.run(
      whisper_blocks.EncoderBlock(c, self.implementation, parent=None),
      encoder_reduction.layers_of(self._half(0), runs_of(c, self.runs)[0]),
      x,
      self.token_reducer,
    )
    bias = jnp.log(encoded.size) if self.token_reducer.proportional else None
    return self.encoder_norm(encoded.x), bias

  def listen(self, features: jax.Array) -> CrossCaches:
    """Log-mel features (B, 2 S, mels) -> what the decoder attends to."""
    return self.cross_caches(*self.encode_sized(features))

  def embed_audio(self, features: jax.Array) -> jax.Array:
    """Log-mel features (B, 2 S, mels) -> the first block's input (B, S, C)."""
    x = features.astype(self.dtype)
    x = jax.nn.gelu(self.conv1(x), approximate=False)
    x = jax.nn.gelu(self.conv2(x), approximate=False)
    return x + self.encoder_positions(
      whisper_blocks.positions_of(x)[:1]
    ).astype(self.dtype)

  def end_encoder(self, x: jax.Array) -> jax.Array:
    """The last encoder block's output -> encoded audio (B, S, C)."""
    return self.encoder_norm(x)

  def cross_caches(
    self, encoded: jax.Array, bias: jax.Array | None = None
  ) -> CrossCaches:
    """Keys and values of the encoded audio, one stacked cache per run.

    bias: (B, S) float32 that is added to the scores of each frame; None: 0.
    """
    return tuple(run.cross_keys(encoded, bias)[1] for run in self._half(1))

  def hidden(
    self,
    tokens: jax.Array,
    positions: jax.Array | None,
    caches: Caches | None,
    cross: CrossCaches,
  ) -> tuple[jax.Array, Caches | None]:
    """tokens (B, T) -> the last block's output (B, T, C), caches."""
    x = self.embed_tokens(tokens, positions)
    positions = (
      whisper_blocks.positions_of(x) if positions is None else positions
    )
    out: list[Any] = []
    for i, run in enumerate(self._half(1)):
      cache = None if caches is None else caches[i]
      x, cache = run(x, cross[i], positions, cache)
      out.append(cache)
    return x, None if caches is None else tuple(out)

  def embed_tokens(
    self, tokens: jax.Array, positions: jax.Array | None = None
  ) -> jax.Array:
    """tokens (B, T) -> the first decoder block's input (B, T, C)."""
    x = self.embed(tokens).astype(self.dtype)
    positions = (
      whisper_blocks.positions_of(x) if positions is None else positions
    )
    return x + self.positions(positions).astype(self.dtype)

  def logits(self, x: jax.Array) -> jax.Array:
    """The last block's output (..., C) -> logits (..., V) float32."""
    return self.embed.attend(self.final_norm(x))

  def _half(self, half: int) -> list[Any]:
    """The runs of the encoder (0) or of the decoder (1)."""
    first = len(runs_of(self.config, self.runs)[0])
    return self.blocks[first:] if half else self.blocks[:first]


def runs_of(
  config: whisper_blocks.WhisperConfig, runs: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The runs of the encoder and those of the decoder."""
  runs = runs or (config.encoder_layers, config.decoder_layers)
  first = next(
    n for n in range(len(runs)) if sum(runs[:n]) >= config.encoder_layers
  )
  return runs[:first], runs[first:]


def first_carry(
  config: whisper_blocks.WhisperConfig, outside: Params, batch: Params
) -> dict[str, jax.Array]:
  """A batch -> what flows through the encoder's blocks.

  Args:
    config: the model's shape.
    outside: parameters outside the blocks.
    batch: {'features' (B, 2 S, mels) float32, 'tokens' (B, T) int32, 'mask'
      (B, T) bool: False for padding behind a transcript}.
  """
  x: Any = Whisper(config).apply(
    {'params': outside}, batch['features'], method='embed_audio'
  )
  return {'x': x, 'tokens': batch['tokens'], 'mask': batch['mask']}


def decoder_carry(
  config: whisper_blocks.WhisperConfig, i: int, outside: Params, carry: Params
) -> dict[str, jax.Array]:
  """The carry behind the encoder's blocks -> that of the decoder's."""
  del i  # There is one bridge.
  model, variables = Whisper(config), {'params': outside}
  encoded: Any = model.apply(variables, carry['x'], method='end_encoder')
  x: Any = model.apply(variables, carry['tokens'], method='embed_tokens')
  return {'x': x, 'encoded': encoded, 'mask': carry['mask']}


def sharding_rules(
  config: whisper_blocks.WhisperConfig, shards: int
) -> mesh_lib.Rules:
  """How the parameters lie on `shards` devices of the `model` axis.

  Columns (and biases) of q, k, v and up, rows of o and down. Attention is
  replicated where the heads of a half do not divide.

  Raises:
    ValueError: an intermediate size does not divide.
  """
  for half in ('encoder', 'decoder'):
    size = getattr(config, f'{half}_intermediate_size')
    if size % shards:
      raise ValueError(
        f'mesh model:{shards}: {half}_intermediate_size={size} is not a '
        f'multiple of {shards}; choose a model size that divides it.'
      )
  split = not (config.encoder_heads % shards or config.decoder_heads % shards)
  whole = PartitionSpec()
  columns, rows = PartitionSpec(None, 'model'), PartitionSpec('model', None)
  return (
    (r'(attention|cross)/[qkv]_proj/kernel', columns if split else whole),
    (
      r'(attention|cross)/[qv]_proj/bias',
      PartitionSpec('model') if split else whole,
    ),
    (r'(attention|cross)/o_proj/kernel', rows if split else whole),
    (r'mlp/up_proj/kernel', columns),
    (r'mlp/up_proj/bias', PartitionSpec('model')),
    (r'mlp/down_proj/kernel', rows),
  )


def init_caches(
  config: whisper_blocks.WhisperConfig,
  runs: tuple[int, ...],
  batch: int,
  capacity: int,
  dtype: Any = jnp.float32,
) -> Caches:
  """Empty caches of the decoder, one stacked (layers first) per run."""
  heads = config.decoder_heads
  head_dim = config.hidden_size // heads

  def stacked(length):
    cache = contiguous.init(batch, capacity, heads, head_dim, dtype)
    return jax.tree.map(lambda a: jnp.stack([a] * length), cache)

  return tuple(stacked(length) for length in runs_of(config, runs)[1])


FAMILY = family.Family(
  config=whisper_blocks.WhisperConfig.from_hf,
  build=Whisper,
  block_spec=whisper_blocks.block_spec,
  embed=first_carry,
  rules=sharding_rules,
  bridges=lambda config: (config.encoder_layers,),
  bridge=decoder_carry,
)
