"""A small vision-language model: ViT, projector, causal decoder, as one file.

  features = final_norm(blocks(patches + positions))       each frame by itself
  visual   = projector(features)                           (B, N, C)
  logits   = decoder([visual, text])[text]                 (B, Q, L, V)

Positions of the decoder are (frame, row, column) under a rotary embedding of
three axes; text goes on behind the largest of them, the same on all axes. So a
token knows its frame by its position alone: whoever drops tokens must keep the
positions of those that stay.

Between projector and decoder lies the seam for token reduction, which
`models.visual_tokens` is about. Several questions about one video share its
tokens and do not see each other.

The ViT is that of `models.vit` on frames of one channel; `probe` reads the
class of a patch's cell off its feature, which is what trains the ViT early.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from jaxq.kvcache import interface as cache_interface
from jaxq.nn import (
  causal,
  embed,
  linear,
  mlp,
  multi_axis_rope,
  norms,
  rope,
  taps,
)
from jaxq.parallel import mesh as mesh_lib
from jaxq.tokens import interface
from models import vit

VERSION = 1  # Of the computation: raised where old checkpoints would not fit.

Params = Mapping[str, Any]
_NEGATIVE = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionLanguageConfig:
  """The shape of a model.

  Attributes:
    variant: of the data it is for; a checkpoint serves no other.
    frames, rows, columns: T frames of rows x columns patches.
    patch_size: pixels of a patch's side.
    vision_size, vision_layers, vision_heads: of the ViT.
    hidden_size, num_layers, num_heads: C, L, H of the decoder.
    mlp_ratio: width of a ViT's MLP over its size, and of the decoder's gated
      one times 3/2.
    vocab_size: V. num_classes: of the probe.
    audio_size: features of a sound token; 0: there is no sound.
    rope_theta: base of the frequencies; small, as positions are.
  """

  variant: str = 'video'
  frames: int = 8
  rows: int = 8
  columns: int = 8
  patch_size: int = 4
  vision_size: int = 128
  vision_layers: int = 4
  vision_heads: int = 4
  hidden_size: int = 192
  num_layers: int = 6
  num_heads: int = 6
  mlp_ratio: int = 4
  vocab_size: int = 128
  num_classes: int = 11
  audio_size: int = 0
  rope_theta: float = 100.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      least = 0 if field.name == 'audio_size' else 1
      if isinstance(value, int) and value < least:
        raise ValueError(
          f'VisionLanguageConfig: {field.name}={value}; it must be at least '
          f'{least}.'
        )
    for size, heads in (
      ('vision_size', 'vision_heads'),
      ('hidden_size', 'num_heads'),
    ):
      if getattr(self, size) % (2 * getattr(self, heads)):
        raise ValueError(
          f'VisionLanguageConfig: {size}={getattr(self, size)}, {heads}='
          f'{getattr(self, heads)}; heads of an even size are needed. Choose a '
          f'multiple of {2 * getattr(self, heads)}.'
        )

  @property
  def grid(self) -> interface.Grid:
    """Of the visual tokens: (T, rows, columns)."""
    return self.frames, self.rows, self.columns

  @property
  def num_visual(self) -> int:
    """N, all visual tokens of a video."""
    return math.prod(self.grid)

  @property
  def text_start(self) -> int:
    """Position of the first token of text, on all axes."""
    return max(self.grid)

  @property
  def head_dim(self) -> int:
    """D of the decoder."""
    return self.hidden_size // self.num_heads

  @property
  def intermediate_size(self) -> int:
    """F of the decoder's gated MLP."""
    return self.hidden_size * self.mlp_ratio * 2 // 3

  @property
  def vision(self) -> vit.VitConfig:
    """The ViT's blocks."""
    return vit.VitConfig(
      hidden_size=self.vision_size,
      intermediate_size=self.vision_size * self.mlp_ratio,
      num_layers=self.vision_layers,
      num_heads=self.vision_heads,
      patch_size=self.patch_size,
      image_size=self.patch_size * max(self.rows, self.columns),
    )


@flax.struct.dataclass
class Context:
  """What text sees before itself: k, v (B, M, H, D), mask (B, M) bool."""

  k: jax.Array
  v: jax.Array
  mask: jax.Array


class Tower(nn.Module):
  """The ViT: frames (B, T, height, width) -> class and patch features."""

  config: VisionLanguageConfig

  def setup(self):
    c = self.config
    self.patches = linear.QuantDense(c.vision_size, use_bias=True)
    self.class_token = embed.Embed(1, c.vision_size)
    self.positions = self.param('positions', _sincos, c)
    self.blocks = [vit.Block(c.vision) for _ in range(c.vision_layers)]
    self.final_norm = norms.LayerNorm(c.vision.norm_eps)

  def __call__(self, frames: jax.Array) -> jax.Array:
    """-> (B * T, 1 + rows * columns, Cv), the class token first.

    Raises:
      ValueError: frames of another size.
    """
    c = self.config
    B, T = frames.shape[:2]
    P = c.patch_size
    if frames.ndim != 4 or frames.shape[2:] != (c.rows * P, c.columns * P):
      raise ValueError(
        f'vision_language: frames of shape {tuple(frames.shape)}; they must be '
        f'(batch, frames, {c.rows * P}, {c.columns * P}). Use the data of '
        f'variant {c.variant!r}.'
      )
    x = frames.reshape(B * T, c.rows, P, c.columns, P).swapaxes(2, 3)
    x = self.patches(x.reshape(B * T, c.rows * c.columns, P * P))
    first = self.class_token(jnp.zeros((B * T, 1), jnp.int32))
    x = jnp.concatenate([first, x], axis=1)
    x = x + self.positions[None]
    for block in self.blocks:
      x, _ = block(x)
    return self.final_norm(x)


class Attention(nn.Module):
  """Attention of the decoder, with positions of several axes."""

  config: VisionLanguageConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array,
    context: Context | None = None,
    questions: int = 1,
    cache: Any = None,
    order: jax.Array | None = None,
  ) -> tuple[jax.Array, Any]:
    """(B, T, C) -> (B, T, C) and the keys and values, or a cache's update.

    Args:
      x: the normalised input.
      positions: (B, T, P) int32.
      context: earlier tokens, which all see; None: none.
      questions: T is so many runs of text that do not see each other.
      cache: instead of a context, a cache that holds it.
      order: (B, T) int32, with a cache: places in it, negative for padding.
    """
    B, T, C = x.shape
    H, D = self.config.num_heads, self.config.head_dim
    turn = rope.Rope(theta=self.config.rope_theta)
    axes = multi_axis_rope.interleaved(D, positions.shape[-1])
    q, k, v = (
      linear.QuantDense(C, name=f'{name}_proj')(x).reshape(B, T, H, D)
      for name in 'qkv'
    )
    q = multi_axis_rope.rotate(q, positions, turn, axes)
    k = multi_axis_rope.rotate(k, positions, turn, axes)
    kept: Any = (k, v)
    if cache is not None:
      assert order is not None
      out, kept = cache.attend(q, k, v, order, cache_interface.Scoring())
    elif context is None:
      out = causal.attention(q, k, v)
    else:
      out, weights = _attend(q, k, v, context, questions)
      taps.tap(self, 'to_context', weights)
    out = linear.QuantDense(C, name='o_proj')(out.reshape(B, T, C))
    return out, kept


class Block(nn.Module):
  """x = x + attention(norm(x)); x = x + mlp(norm(x))."""

  config: VisionLanguageConfig

  def setup(self):
    self.input_norm = norms.RMSNorm()
    self.attention = Attention(self.config)
    self.post_norm = norms.RMSNorm()
    self.mlp = mlp.MLP(self.config.intermediate_size)

  def __call__(
    self, x: jax.Array, positions: jax.Array, *args: Any, **kwargs: Any
  ) -> tuple[jax.Array, Any]:
    """As Attention: (B, T, C) -> (B, T, C), keys and values or an update."""
    out, kept = self.attention(self.input_norm(x), positions, *args, **kwargs)
    x = x + out
    return x + self.mlp(self.post_norm(x)), kept


class VisionLanguage(nn.Module):
  """The whole model. `__call__` is training: all tokens, several questions."""

  config: VisionLanguageConfig

  def setup(self):
    c = self.config
    self.tower = Tower(c)
    self.probe = linear.QuantDense(c.num_classes, use_bias=True)
    self.project_up = linear.QuantDense(c.hidden_size, use_bias=True)
    self.project_down = linear.QuantDense(c.hidden_size, use_bias=True)
    if c.audio_size:
      self.project_audio = linear.QuantDense(c.hidden_size, use_bias=True)
    self.embed = embed.Embed(c.vocab_size, c.hidden_size)
    self.blocks = [Block(c) for _ in range(c.num_layers)]
    self.final_norm = norms.RMSNorm()
    self.head = linear.QuantDense(c.vocab_size)

  def __call__(
    self,
    frames: jax.Array,
    text: jax.Array,
    audio: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Frames (B, T, height, width), text (B, Q, L) -> logits, probe.

    audio: (B, T, A, audio_size), A sound tokens of a frame, if the model hears.

    Returns:
      logits (B, Q, L, V) of what follows each token of text, and the probe's
      (B, N, num_classes), float32.
    """
    features = self.tower(frames)[:, 1:]
    features = features.reshape(frames.shape[0], -1, features.shape[-1])
    tokens, positions = self.project(features), self.visual_positions(frames)
    if audio is not None:
      tokens, positions = self.with_audio(tokens, positions, audio)
    mask = jnp.ones(tokens.shape[:2], bool)
    logits = self.decode(tokens, positions, mask, text)
    return logits, self.probe(features).astype(jnp.float32)

  def features(self, frames: jax.Array) -> jax.Array:
    """Frames (B, T, height, width) -> (B, T, 1 + rows * columns, Cv)."""
    out = self.tower(frames)
    return out.reshape(*frames.shape[:2], *out.shape[1:])

  def classify(self, frames: jax.Array) -> jax.Array:
    """Frames (B, T, height, width) -> the probe's logits (B, N, classes)."""
    features = self.features(frames)[:, :, 1:]
    features = features.reshape(frames.shape[0], -1, features.shape[-1])
    return self.probe(features).astype(jnp.float32)

  def project(self, features: jax.Array) -> jax.Array:
    """Features (B, N, Cv) -> tokens (B, N, C)."""
    return self.project_down(nn.gelu(self.project_up(features)))

  def with_audio(
    self, tokens: jax.Array, positions: jax.Array, audio: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Appends sounds (B, T, A, audio_size), at (frame, slot, 0)."""
    B, T, A, _ = audio.shape
    heard = self.project_audio(audio).reshape(B, T * A, -1)
    frame, slot = jnp.divmod(jnp.arange(T * A), A)
    places = jnp.stack([frame, slot, jnp.zeros_like(slot)], axis=-1)
    places = jnp.broadcast_to(places.astype(jnp.int32)[None], (B, T * A, 3))
    return (
      jnp.concatenate([tokens, heard], axis=1),
      jnp.concatenate([positions, places], axis=1),
    )

  def visual_positions(self, frames: jax.Array) -> jax.Array:
    """(B, N, 3) int32 of all tokens of frames (B, T, ...)."""
    T = frames.shape[1]
    grid = jnp.indices((T, self.config.rows, self.config.columns), jnp.int32)
    positions = grid.reshape(3, -1).T[None]
    return jnp.broadcast_to(positions, (frames.shape[0], *positions.shape[1:]))

  def embed_text(self, text: jax.Array) -> jax.Array:
    """Tokens (..., L) -> (..., L, C)."""
    return self.embed(text)

  def logits(self, x: jax.Array) -> jax.Array:
    """The last block's output (..., C) -> (..., V) float32."""
    return self.head(self.final_norm(x)).astype(jnp.float32)

  def decode(
    self,
    visual: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    text: jax.Array,
  ) -> jax.Array:
    """Visual tokens (B, K, C) and text (B, Q, L) -> logits (B, Q, L, V)."""
    B, Q, L = text.shape
    x = self.embed(text).reshape(B, Q * L, -1)
    _, x = self.layers(
      visual, positions, mask, x, Q, range(self.config.num_layers)
    )
    return self.logits(x.reshape(B, Q, L, -1))

  def layers(
    self,
    visual: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    text: jax.Array,
    questions: int,
    which: range,
  ) -> tuple[jax.Array, jax.Array]:
    """Runs blocks `which` over visual (B, K, C) and text (B, Q * L, C)."""
    places = self._text_positions(text.shape[0], text.shape[1], questions)
    for i in which:
      after, (k, v) = self.blocks[i](visual, positions)
      context = Context(k=k, v=v, mask=mask)
      text, _ = self.blocks[i](text, places, context, questions)
      visual = after
    return visual, text

  def step(
    self,
    x: jax.Array,
    positions: jax.Array,
    order: jax.Array,
    caches: tuple[Any, ...],
  ) -> tuple[jax.Array, tuple[Any, ...]]:
    """x (B, T, C) behind what the caches hold -> (B, T, C), caches.

    Args:
      x: visual tokens, or embedded text.
      positions: (B, T, 3).
      order: (B, T) places in the caches; negative is padding, behind the rest.
      caches: one per layer.
    """
    counts = jnp.sum(order >= 0, axis=1, dtype=jnp.int32)
    out = []
    for block, cache in zip(self.blocks, caches, strict=True):
      x, update = block(x, positions, cache=cache, order=order)
      out.append(cache_interface.append(cache, update, counts))
    return x, tuple(out)

  def _text_positions(self, B: int, T: int, questions: int) -> jax.Array:
    """(B, T, 3) of T = questions * L tokens."""
    places = self.config.text_start + jnp.arange(T) % (T // questions)
    places = places.astype(jnp.int32)[None, :, None]
    return jnp.broadcast_to(places, (B, T, 3))


def sharding_rules(config: VisionLanguageConfig, shards: int) -> mesh_lib.Rules:
  """How parameters lie on `shards` devices of the `model` axis.

  Columns of q, k, v, up and gate, rows of o and down, in both stacks; the
  stack whose heads do not divide has its attention whole.

  Raises:
    ValueError: an MLP's width does not divide.
  """
  widths = {
    'vision': config.vision.intermediate_size,
    'decoder': config.intermediate_size,
  }
  for name, width in widths.items():
    if width % shards:
      raise ValueError(
        f'mesh model:{shards}: the {name} has an MLP of {width}, which is not '
        f'a multiple of {shards}; choose a model size that divides it.'
      )
  columns, rows = PartitionSpec(None, 'model'), PartitionSpec('model', None)
  rules: list[tuple[str, PartitionSpec]] = []
  for prefix, heads in (
    ('tower/', config.vision_heads),
    ('^', config.num_heads),
  ):
    if heads % shards == 0:
      at = f'{prefix}blocks_\\d+/attention/'
      rules += [
        (f'{at}[qkv]_proj/kernel', columns),
        (f'{at}[qkv]_proj/bias', PartitionSpec('model')),
        (f'{at}o_proj/kernel', rows),
      ]
  return (
    *rules,
    (r'mlp/(gate|up)_proj/kernel', columns),
    (r'mlp/up_proj/bias', PartitionSpec('model')),
    (r'mlp/down_proj/kernel', rows),
  )


def _sincos(rng: jax.Array, config: VisionLanguageConfig) -> jax.Array:
  """Where positions start: (1 + rows * columns, Cv), 0 for the class token.

  Sines and cosines of row and column (Beyer et al., 2022, arXiv 2205.01580):
  small random ones take a small model long to tell apart.
  """
  del rng
  C = config.vision_size
  turns = 1 / 100 ** (jnp.arange(-(-C // 4)) / -(-C // 4))
  where = jnp.indices((config.rows, config.columns), jnp.float32)
  angles = where.reshape(2, -1, 1) * turns[None, None]  # (2, N, C / 4)
  table = jnp.concatenate([*jnp.sin(angles), *jnp.cos(angles)], axis=-1)[:, :C]
  return jnp.concatenate([jnp.zeros((1, C)), table])


def _attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  context: Context,
  questions: int,
) -> tuple[jax.Array, jax.Array]:
  """Text over its context and, causally, over its own question.

  Args:
    q, k, v: (B, Q * L, H, D).
    context: (B, M, H, D).
    questions: Q.

  Returns:
    (B, Q * L, H, D), and the weights on the context (B, Q * L, M) float32,
    mean over heads. The two parts have one softmax.
  """
  B, T, H, D = q.shape
  Q, L = questions, T // questions
  q = q * jnp.asarray(D**-0.5, q.dtype)
  far = jnp.einsum(
    'bthd,bmhd->bhtm', q, context.k, preferred_element_type=jnp.float32
  )
  far = jnp.where(context.mask[:, None, None], far, _NEGATIVE)  # (B, H, T, M)
  q, k, v = (a.reshape(B, Q, L, H, D) for a in (q, k, v))
  near = jnp.einsum(
    'bqlhd,bqmhd->bhqlm', q, k, preferred_element_type=jnp.float32
  )
  seen = jnp.tril(jnp.ones((L, L), bool))
  near = jnp.where(seen[None, None, None], near, _NEGATIVE)
  near = near.reshape(B, H, T, L)
  weights = jax.nn.softmax(jnp.concatenate([far, near], axis=-1), axis=-1)
  M = context.k.shape[1]
  far, near = weights[..., :M], weights[..., M:].reshape(B, H, Q, L, L)
  out = jnp.einsum('bhtm,bmhd->bthd', far.astype(v.dtype), context.v)
  own = jnp.einsum('bhqlm,bqmhd->bqlhd', near.astype(v.dtype), v)
  return out + own.reshape(B, T, H, D), jnp.mean(far, axis=1)
