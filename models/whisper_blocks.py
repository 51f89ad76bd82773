"""The two kinds of blocks of Whisper, and the shape they come from.

  encoder  x = x + attention(ln(x)); x = x + down(gelu(up(ln(x))))
  decoder  the same with causal attention, and in between
           x = x + cross(ln(x), encoded)

There is no site behind GELU: a scale does not pass it. Keys and values of
`cross` read the encoder's output, whose norm feeds every decoder block, so no
site leads to them either.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxq.kvcache import contiguous
from jaxq.nn import bidirectional, blocks, causal, linear, norms

_CHUNK = 128  # Query rows; their scores fit the cache of a CPU.
_MOST_CHUNKS = 16  # They are unrolled: bounds the program's size.
_ENGLISH_ONLY = 51864  # Size of the vocabulary without language tokens.


@dataclasses.dataclass(frozen=True, kw_only=True)
class WhisperConfig:
  """The shape of a Whisper model.

  vocab_size (V), hidden_size (C): of both halves.
  mels: channels of the log-mel features.
  encoder_layers, encoder_heads, encoder_intermediate_size; decoder_...: the
    halves; head_dim is hidden_size / heads.
  max_source: encoder positions; the features have twice as many frames.
  max_position: decoder positions.
  start_token_id, eos_token_ids: begin and end of a transcript.
  suppress_tokens: never generated; begin_suppress_tokens: not as first token.
  """

  vocab_size: int
  hidden_size: int
  mels: int
  encoder_layers: int
  encoder_heads: int
  encoder_intermediate_size: int
  decoder_layers: int
  decoder_heads: int
  decoder_intermediate_size: int
  max_source: int = 1500
  max_position: int = 448
  start_token_id: int | None = None
  eos_token_ids: tuple[int, ...] = ()
  suppress_tokens: tuple[int, ...] = ()
  begin_suppress_tokens: tuple[int, ...] = ()

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type is int and value < 1:
        raise ValueError(
          f'WhisperConfig: {field.name}={value}; it must be at least 1. Check '
          "the checkpoint's config."
        )
    for half in ('encoder', 'decoder'):
      heads = getattr(self, f'{half}_heads')
      if self.hidden_size % heads:
        raise ValueError(
          f'WhisperConfig: hidden_size={self.hidden_size}, {half}_heads='
          f'{heads}; heads must divide hidden_size. Check the '
          "checkpoint's config."
        )
    special = (
      *self.eos_token_ids,
      *self.suppress_tokens,
      *self.begin_suppress_tokens,
    )
    if special and not 0 <= min(special) <= max(special) < self.vocab_size:
      raise ValueError(
        f'WhisperConfig: token ids {min(special)}..{max(special)} among the '
        f'end and suppressed tokens; allowed are 0..{self.vocab_size - 1}. '
        "Check the checkpoint's config."
      )

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> 'WhisperConfig':
    """From the keys of a Hugging Face config.json."""
    eos = config.get('eos_token_id')
    return cls(
      vocab_size=config['vocab_size'],
      hidden_size=config['d_model'],
      mels=config['num_mel_bins'],
      encoder_layers=config['encoder_layers'],
      encoder_heads=config['encoder_attention_heads'],
      encoder_intermediate_size=config['encoder_ffn_dim'],
      decoder_layers=config['decoder_layers'],
      decoder_heads=config['decoder_attention_heads'],
      decoder_intermediate_size=config['decoder_ffn_dim'],
      max_source=config['max_source_positions'],
      max_position=config['max_target_positions'],
      start_token_id=config.get('decoder_start_token_id'),
      eos_token_ids=(
        () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
      ),
      suppress_tokens=tuple(config.get('suppress_tokens') or ()),
      begin_suppress_tokens=tuple(config.get('begin_suppress_tokens') or ()),
    )

  @property
  def num_layers(self) -> int:
    """Blocks of encoder and decoder."""
    return self.encoder_layers + self.decoder_layers

  @property
  def frames(self) -> int:
    """Of the log-mel features of one window; the convolutions halve them."""
    return 2 * self.max_source

  @property
  def is_multilingual(self) -> bool:
    """Whether the prompt names a language and a task."""
    return self.vocab_size > _ENGLISH_ONLY


@flax.struct.dataclass
class CrossCache:
  """k, v: (B, S, H, D) of the encoded audio, computed once per clip.

  bias: (B, S) float32 that is added to the scores of each key; None: 0.
  """

  k: jax.Array
  v: jax.Array
  bias: jax.Array | None = None


class Attention(nn.Module):
  """Multi-head attention; keys have no bias, as in Whisper.

  Attributes:
    features, num_heads: C, H.
    implementation: matmul of the projections; None picks.
  """

  features: int
  num_heads: int
  implementation: str | None = None

  def setup(self):
    def dense(use_bias):
      return linear.QuantDense(self.features, use_bias, self.implementation)

    self.q_proj = dense(True)
    self.k_proj = dense(False)
    self.v_proj = dense(True)
    self.o_proj = dense(True)

  def keys(self, source: jax.Array) -> CrossCache:
    """Keys and values (B, S, H, D) of a source (B, S, C)."""
    return CrossCache(
      self._heads(self.k_proj(source)), self._heads(self.v_proj(source))
    )

  def __call__(
    self, x: jax.Array, source: CrossCache, mask: jax.Array | None = None
  ) -> jax.Array:
    """x (B, T, C) attends to all of a source -> (B, T, C).

    Args:
      x: the queries' input.
      source: from `keys`.
      mask: (B, T) bool, False where x is padding.
    """
    return self.with_queries(x, source, mask)[0]

  def with_queries(
    self, x: jax.Array, source: CrossCache, mask: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """Like a call; also the queries (B, T, H, D)."""
    q = self._heads(self.q_proj(bidirectional.keep(x, mask)))
    return self._out(attend(q, source), mask), q

  def causal(
    self,
    x: jax.Array,
    positions: jax.Array,
    cache: contiguous.ContiguousCache | None = None,
    mask: jax.Array | None = None,
  ) -> tuple[jax.Array, contiguous.ContiguousCache | None]:
    """x (B, T, C) attends to itself up to each token, and to the cache."""
    x = bidirectional.keep(x, mask)
    q, own = self._heads(self.q_proj(x)), self.keys(x)
    if cache is None:
      out = causal.attention(q, own.k, own.v)
    else:
      cache = contiguous.append(cache, own.k, own.v)
      out = contiguous.attend(cache, q, positions)
    return self._out(out, mask), cache

  def _heads(self, x: jax.Array) -> jax.Array:
    B, T, C = x.shape
    return x.reshape(B, T, self.num_heads, C // self.num_heads)

  def _out(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    B, T, H, D = x.shape
    return self.o_proj(bidirectional.keep(x.reshape(B, T, H * D), mask))


def attend(q: jax.Array, source: CrossCache) -> jax.Array:
  """Attention of q (B, T, H, D) to all of a source -> (B, T, H, D).

  Queries are taken in chunks, so that the largest array is one chunk's scores:
  at 1,500 frames those of all queries are 72 MB a clip. Softmax in float32.
  """
  T, D = q.shape[1], q.shape[3]
  q = q * jnp.asarray(D**-0.5, q.dtype)
  k, v = source.k.astype(q.dtype), source.v.astype(q.dtype)
  outs = []
  size = max(_CHUNK, -(-T // _MOST_CHUNKS))
  for start in range(0, T, size):
    scores = jnp.einsum(
      'bthd,bshd->bhts',
      q[:, start : start + size],
      k,
      preferred_element_type=jnp.float32,
    )
    if source.bias is not None:
      scores += source.bias[:, None, None]
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum(
      'bhts,bshd->bthd',
      weights.astype(v.dtype),
      v,
      preferred_element_type=jnp.float32,
    )
    outs.append((out / total.swapaxes(1, 2)).astype(q.dtype))
  return jnp.concatenate(outs, axis=1)


class EncoderBlock(nn.Module):
  """One block of the encoder; every frame sees every frame."""

  config: WhisperConfig
  implementation: str | None = None

  def setup(self):
    c = self.config
    C, F = c.hidden_size, c.encoder_intermediate_size
    self.input_norm = norms.LayerNorm()
    self.attention = Attention(C, c.encoder_heads, self.implementation)
    self.post_norm = norms.LayerNorm()
    self.mlp = bidirectional.MLP(F, implementation=self.implementation)

  def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
    """(B, S, C) -> (B, S, C), None."""
    x = x + self.attention_output(self.input_norm(x))
    return self.feed(x), None

  def attend(
    self, x: jax.Array, bias: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(B, S, C) -> that behind the attention, and its q and k (B, S, H, D).

    bias: (B, S) float32 that is added to the scores of each key; None: 0.
    """
    normed = self.input_norm(x)
    source = dataclasses.replace(self.attention.keys(normed), bias=bias)
    out, q = self.attention.with_queries(normed, source)
    return x + out, q, source.k

  def feed(self, x: jax.Array) -> jax.Array:
    """What is behind the attention (B, S, C) -> what is behind the MLP."""
    return x + self.mlp(self.post_norm(x))

  def attention_output(self, x: jax.Array) -> jax.Array:
    """The attention's output from its normalised input (B, S, C)."""
    return self.attention(x, self.attention.keys(x))

  def mlp_output(self, x: jax.Array) -> jax.Array:
    """The MLP's output from its normalised input (B, S, C)."""
    return self.mlp(x)


class DecoderBlock(nn.Module):
  """One block of the decoder."""

  config: WhisperConfig
  implementation: str | None = None

  def setup(self):
    c = self.config
    C, F = c.hidden_size, c.decoder_intermediate_size
    self.input_norm = norms.LayerNorm()
    self.attention = Attention(C, c.decoder_heads, self.implementation)
    self.cross_norm = norms.LayerNorm()
    self.cross = Attention(C, c.decoder_heads, self.implementation)
    self.post_norm = norms.LayerNorm()
    self.mlp = bidirectional.MLP(F, implementation=self.implementation)

  def __call__(
    self,
    x: jax.Array,
    encoded: jax.Array | CrossCache,
    positions: jax.Array | None = None,
    cache: contiguous.ContiguousCache | None = None,
    mask: jax.Array | None = None,
  ) -> tuple[jax.Array, contiguous.ContiguousCache | None]:
    """(B, T, C) -> (B, T, C), cache.

    Args:
      x: the block's input.
      encoded: the encoded audio (B, S, C), or its keys and values.
      positions: (B, T) int32; None is 0..T-1.
      cache: of the tokens before x.
      mask: (B, T) bool, False where x is padding behind a row's tokens, so
        that statistics leave it out; None where none is.
    """
    positions = positions_of(x) if positions is None else positions
    if not isinstance(encoded, CrossCache):
      encoded = self.cross.keys(encoded)
    out, cache = self.attention.causal(
      self.input_norm(x), positions, cache, mask
    )
    x = x + out
    x = x + self.cross(self.cross_norm(x), encoded, mask)
    return x + self.mlp(self.post_norm(x), mask), cache

  def cross_keys(
    self, encoded: jax.Array, bias: jax.Array | None = None
  ) -> tuple[jax.Array, CrossCache]:
    """encoded (B, S, C), bias (B, S) -> encoded, its keys and values here."""
    keys = self.cross.keys(encoded)
    return encoded, dataclasses.replace(keys, bias=bias)

  def attention_output(self, x: jax.Array) -> jax.Array:
    """The self-attention's output from its normalised input (B, T, C)."""
    mask = bidirectional.mask_of(x)
    return self.attention.causal(x, positions_of(x), mask=mask)[0]

  def mlp_output(self, x: jax.Array) -> jax.Array:
    """The MLP's output from its normalised input (B, T, C)."""
    return self.mlp(x, bidirectional.mask_of(x))


def block_spec(
  config: WhisperConfig, i: int, implementation: str | None = None
) -> blocks.BlockSpec:
  """What block i of this model tells the calibration."""
  encoder = i < config.encoder_layers
  heads = config.encoder_heads if encoder else config.decoder_heads
  qkv = tuple(f'attention/{n}_proj' for n in 'qkv')
  up, down = 'mlp/up_proj', 'mlp/down_proj'
  inputs = [qkv, ('attention/o_proj',)]  # Linears that read one tensor.
  sites = [
    blocks.Site(
      producer='input_norm', consumers=qkv, method='attention_output'
    ),
    _value_site('attention', heads, config),
  ]
  writers = ['attention/o_proj']
  feeds = [('input_norm', qkv)]
  if not encoder:
    inputs += [
      ('cross/q_proj',),
      ('cross/k_proj', 'cross/v_proj'),
      ('cross/o_proj',),
    ]
    sites += [
      blocks.Site(producer='cross_norm', consumers=('cross/q_proj',)),
      _value_site('cross', heads, config),
    ]
    writers.append('cross/o_proj')
    feeds.append(('cross_norm', ('cross/q_proj',)))
  inputs += [(up,), (down,)]
  sites.append(
    blocks.Site(producer='post_norm', consumers=(up,), method='mlp_output')
  )
  make = EncoderBlock if encoder else DecoderBlock
  return blocks.BlockSpec(
    module=make(config, implementation),
    linears=tuple(
      blocks.Linear(path=path, tap=f'{group[0]}/in')
      for group in inputs
      for path in group
    ),
    sites=tuple(sites),
    residual_out=(*writers, down),
    norms=(*feeds, ('post_norm', (up,))),
    rotated=(*writers, down),
    entries=() if encoder else ('encoded', 'mask'),
  )


def _value_site(name: str, heads: int, config: WhisperConfig) -> blocks.Site:
  return blocks.Site(
    producer=f'{name}/v_proj',
    consumers=(f'{name}/o_proj',),
    heads=(heads, 1, config.hidden_size // heads),
  )


def positions_of(x: jax.Array) -> jax.Array:
  """(B, T, C) -> positions 0..T-1 (B, T) int32."""
  return jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
