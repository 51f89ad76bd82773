"""PVC's progressive encoder: the last layers of a ViT look back in time.

Yang et al., CVPR 2025, arXiv 2412.09613. Frames x (B, T, P, C), class token
among the P, at relative times tau in [0, 1]; e = TE(tau):

  x = x + s1 spatial(ada(x, e))     within a frame
  x = x + temporal(ada(x, e))       within a place, over frames up to this one
  x = x + s2 mlp(ada(x, e))
  ada(x, e) = layer_norm(x) (1 + gamma(e)) + beta(e)

Layers below are plain and see frames apart. Causal, so a frame adds what frames
before it have not said, and frames can come one by one (`Stream`). An image is
a video of the same frame: temporal attention over equal frames changes nothing,
and the time in ada is what makes its passes differ.

gamma, beta and the temporal output begin at 0: the encoder begins as the ViT it
is made of (`from_vit`). Order, initialisation and L = 12 are ours; the released
model file was not at hand. Parameters that a ViT has are named as in
models.vit.Block; the others hold 'time' or 'temporal' in their path.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxq.nn import bidirectional, linear, norms

Params = Mapping[str, Any]
_MAX_PERIOD = 10_000.0
_TIME_SCALE = 1000.0  # Sinusoids resolve steps of 1, tau has steps of 1 / T.


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
  """num_layers: L, the last ones of the ViT. num_heads, intermediate_size: its.

  norm_eps: of the norms. activation: of bidirectional.ACTIVATIONS. sinusoid:
  width of the time's sinusoids, even.
  """

  num_layers: int = 12
  num_heads: int = 16
  intermediate_size: int = 4096
  norm_eps: float = 1e-6
  activation: str = 'gelu'
  sinusoid: int = 256

  def __post_init__(self):
    if self.num_layers < 1 or self.sinusoid < 2 or self.sinusoid % 2:
      raise ValueError(
        f'EncoderConfig: num_layers={self.num_layers}, sinusoid='
        f'{self.sinusoid}; at least 1 layer and an even width are needed. Use '
        '12 and 256.'
      )


class TimeEmbedding(nn.Module):
  """TE: sinusoids of 1000 tau, then two linears with SiLU between.

  Attributes:
    features: C. sinusoid: width of the sinusoids.
  """

  features: int
  sinusoid: int = 256

  @nn.compact
  def __call__(self, tau: jax.Array) -> jax.Array:
    """tau (B, T) float32 -> (B, T, C)."""
    half = self.sinusoid // 2
    rates = _TIME_SCALE * _MAX_PERIOD ** (-np.arange(half) / half)
    angles = tau[..., None] * jnp.asarray(rates, jnp.float32)[None, None]
    x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    x = jax.nn.silu(linear.QuantDense(self.features, True, name='up')(x))
    return linear.QuantDense(self.features, True, name='down')(x)


class Modulation(nn.Module):
  """x (1 + gamma(e)) + beta(e), linear in silu(e), the identity at first.

  Its linear stays float: it has one row per frame.
  """

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
    """x (B, T, ..., C), time (B, T, W) -> as x; in float32 inside."""
    C = x.shape[-1]
    dense = nn.Dense(2 * C, kernel_init=nn.initializers.zeros, name='dense')
    both = dense(jax.nn.silu(time.astype(jnp.float32)))
    both = both.reshape(*time.shape[:2], *(1,) * (x.ndim - 3), 2 * C)
    gamma, beta = jnp.split(both, 2, axis=-1)
    return (x.astype(jnp.float32) * (1.0 + gamma) + beta).astype(x.dtype)


class LayerScale(nn.Module):
  """x * scale, one factor per channel."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., C) -> (..., C)."""
    scale = linear.param(self, 'scale', nn.initializers.ones, (x.shape[-1],))
    return x * jnp.asarray(scale, x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class TemporalAttention(nn.Module):
  """Attention among the frames at one place, for all places at once.

  Attributes:
    num_heads: H; divides C.
  """

  num_heads: int

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    seen: jax.Array,
    cache: tuple[jax.Array, jax.Array] | None = None,
    index: jax.Array | None = None,
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """(B, T, P, C) -> (B, T, P, C), keys and values (B, S, P, H, D).

    Args:
      x: new frames.
      seen: (B, T, S) bool, which frames a frame looks at.
      cache: keys and values of earlier frames, S slots; None: S = T.
      index: () int32, the slot of the first new frame.
    """
    B, T, P, C = x.shape
    H = self.num_heads

    def heads(name):
      y = linear.QuantDense(C, True, name=f'{name}_proj')(x)
      return y.reshape(B, T, P, H, C // H)

    q, k, v = heads('q'), heads('k'), heads('v')
    if cache is not None:
      assert index is not None
      at = (0, index, 0, 0, 0)
      k = jax.lax.dynamic_update_slice(cache[0], k, at)
      v = jax.lax.dynamic_update_slice(cache[1], v, at)
    scores = jnp.einsum(
      'btphd,bsphd->bphts', q, k, preferred_element_type=jnp.float32
    )
    scores = scores * (C // H) ** -0.5
    lowest = jnp.finfo(jnp.float32).min
    scores = jnp.where(seen[:, None, None], scores, lowest)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum('bphts,bsphd->btphd', weights, v).reshape(B, T, P, C)
    return linear.QuantDense(C, True, name='o_proj')(out), (k, v)


class Block(nn.Module):
  """One progressive layer."""

  config: EncoderConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    time: jax.Array,
    seen: jax.Array,
    cache: tuple[jax.Array, jax.Array] | None = None,
    index: jax.Array | None = None,
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """(B, T, P, C) -> (B, T, P, C), the temporal keys and values."""
    c, (B, T, P, C) = self.config, x.shape

    def ada(x, name):
      y = norms.LayerNorm(c.norm_eps, name=f'{name}_norm')(x)
      return Modulation(name=f'{name}_time')(y, time)

    attention = bidirectional.SelfAttention(c.num_heads, name='attention')
    out = attention(ada(x, 'input').reshape(B * T, P, C)).reshape(B, T, P, C)
    x = x + LayerScale(name='attention_scale')(out)
    temporal = TemporalAttention(c.num_heads, name='temporal')
    out, kept = temporal(ada(x, 'temporal'), seen, cache, index)
    x = x + out
    mlp = bidirectional.MLP(c.intermediate_size, c.activation, name='mlp')
    out = mlp(ada(x, 'post').reshape(B * T, P, C)).reshape(B, T, P, C)
    return x + LayerScale(name='mlp_scale')(out), kept


@flax.struct.dataclass
class Stream:
  """Frames seen so far.

  k, v: (L, B, T_max, P, H, D), temporal keys and values. count: () int32.
  """

  k: jax.Array
  v: jax.Array
  count: jax.Array


def from_vit(
  rng: jax.Array, blocks: Params, config: EncoderConfig
) -> dict[str, Any]:
  """The last L of a ViT's stacked blocks, with what is new added.

  Args:
    rng: nothing random is left in what it begins with; the modules' own.
    blocks: params of models.vit's blocks, layers first.
    config: says L and the shapes.

  Returns:
    Stacked params of `Block`, which compute what the blocks compute.

  Raises:
    ValueError: the ViT has fewer layers.
  """
  have = jax.tree.leaves(blocks)[0].shape[0]
  L = config.num_layers
  if have < L:
    raise ValueError(
      f'from_vit: num_layers={L} of a ViT with {have}; it must have as many. '
      f'Use {have} or fewer.'
    )
  base = jax.tree.map(lambda a: a[have - L :], dict(blocks))
  C = base['input_norm']['scale'].shape[-1]
  x, time = jnp.zeros((1, 1, 1, C)), jnp.zeros((1, 1, C))
  seen = jnp.ones((1, 1, 1), bool)

  def one(key):
    return Block(config).init(key, x, time, seen)['params']

  params = jax.vmap(one)(jax.random.split(rng, L))
  attention = base['attention']
  return {
    **params,
    **base,
    'temporal_norm': base['input_norm'],
    'temporal': {
      **{f'{n}_proj': attention[f'{n}_proj'] for n in 'qkv'},
      'o_proj': jax.tree.map(jnp.zeros_like, attention['o_proj']),
    },
  }


def encode(
  blocks: Params,
  config: EncoderConfig,
  x: jax.Array,
  time: jax.Array,
  mask: jax.Array | None = None,
) -> jax.Array:
  """All frames at once.

  Args:
    blocks: of `from_vit`.
    config: static.
    x: (B, T, P, C), the plain layers' output.
    time: (B, T, W), the time's embedding.
    mask: (B, T) bool, False: padding behind a row's frames. None: no padding.

  Returns:
    (B, T, P, C).
  """
  B, T = x.shape[:2]
  seen = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool))[None], (B, T, T))
  if mask is not None:
    seen = seen & mask[:, None]

  def body(x, params):
    x, _ = Block(config).apply({'params': params}, x, time, seen)
    return x, None

  return jax.lax.scan(body, x, blocks)[0]


def stream(
  config: EncoderConfig,
  batch: int,
  frames: int,
  places: int,
  width: int,
  dtype: Any = jnp.float32,
) -> Stream:
  """An empty Stream for at most `frames` frames of (places, width)."""
  H = config.num_heads
  shape = (config.num_layers, batch, frames, places, H, width // H)
  return Stream(
    k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), count=jnp.int32(0)
  )


def encode_frame(
  blocks: Params,
  config: EncoderConfig,
  x: jax.Array,
  time: jax.Array,
  state: Stream,
) -> tuple[jax.Array, Stream]:
  """The next frame of a stream.

  Args:
    blocks, config: as for `encode`.
    x: (B, P, C).
    time: (B, W), of this frame; a stream must know its length beforehand, or
      count time against the longest it may have.
    state: the frames before.

  Returns:
    (B, P, C), and the next state.

  Raises:
    ValueError: outside jit, the stream is full.
  """
  frames = state.k.shape[2]
  if not isinstance(state.count, jax.core.Tracer) and state.count >= frames:
    raise ValueError(
      f'encode_frame: frame {int(state.count) + 1} of a stream made for '
      f'{frames}; no more fit. Make it longer: stream(frames=...).'
    )
  B = x.shape[0]
  seen = jnp.arange(frames)[None, None] <= state.count
  seen = jnp.broadcast_to(seen, (B, 1, frames))

  def body(x, layer):
    params, k, v = layer
    return Block(config).apply(
      {'params': params}, x, time[:, None], seen, (k, v), state.count
    )

  out, (k, v) = jax.lax.scan(body, x[:, None], (blocks, state.k, state.v))
  return out[:, 0], Stream(k=k, v=v, count=state.count + 1)
