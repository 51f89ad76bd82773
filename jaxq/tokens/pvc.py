"""PVC: an image is a static video, and each frame adds what is missing.

"PVC: Progressive Visual Token Compression for Unified Image and Video
Processing in Large Vision-Language Models", CVPR 2025, arXiv 2412.09613.

  image  -> 4 times the same frame;  video -> its frames
  frames -> plain ViT layers -> progressive layers (tokens.pvc_encoder)
  a frame of 32 x 32 places -> pixel shuffle by 4 -> 8 x 8 slots of 16 C
  slot   -> ada(slot, time) -> linear, GELU, linear -> a token

So a frame costs 64 tokens where InternVL2 takes 256; an image costs the same
256, in four passes. What is saved is on video.

The plain layers see the same frame four times: `repeated` broadcasts their
output, which is exact. Times are relative, t / (T - 1) with the true T: a
static image has no seconds. T is padded to a bucket, one compile each. The
first linear has 16 C x D weights, most of the compressor: shard its rows.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from jaxq.nn import linear, norms
from jaxq.tokens import interface, pixel_shuffle, pvc_encoder, training

BUCKETS = (4, 16, 32, 64, 96)  # Frames that programs are compiled for.
NEW = r'temporal|time|compressor'  # Paths of what the ViT did not have.


@dataclasses.dataclass(frozen=True, kw_only=True)
class PvcConfig(interface.Config):
  """Pixel shuffle, then what the params hold.

  Without params slots are plain shuffled blocks. `budget` is 1 / shuffle^2,
  whatever it says.

  shuffle: blocks of shuffle x shuffle places become one token.
  image_repeat: frames that an image becomes.
  features: channels of a token (the language model's); 0: no compressor.
  sinusoid: width of the time's sinusoids. norm_eps: of the norm.
  """

  shuffle: int = 4
  image_repeat: int = 4
  features: int = 0
  sinusoid: int = 256
  norm_eps: float = 1e-6

  def __post_init__(self):
    super().__post_init__()
    if self.shuffle < 1 or self.features < 0:
      raise ValueError(
        f'PvcConfig: shuffle={self.shuffle}, features={self.features}; the '
        'first is at least 1, the second 0 or more. Use 4 and the width of the '
        'language model.'
      )
    _check_repeat(self.image_repeat)

  @property
  def traits(self) -> interface.Traits:
    """A resampler; it has params where it has features."""
    return interface.Traits(
      kind='resampler',
      grid=True,
      params=self.features > 0,
      conserves_mass=False,
    )

  def budget_for(self, ts: interface.TokenSet) -> interface.Budget:
    """A slot per block."""
    return self._shuffle.budget_for(ts)

  def init_params(
    self, rng: jax.Array, ts: interface.TokenSet, query: jax.Array | None = None
  ) -> dict[str, Any] | None:
    """{'time', 'compressor'}, random; None without features."""
    del query
    if not self.features:
      return None
    C = ts.tokens.shape[-1]
    rng_time, rng_compressor = jax.random.split(rng)
    time = jnp.zeros((1, 1, C))
    slots = jnp.zeros((1, 1, self.shuffle**2 * C))
    compressor = Compressor(self.features, self.norm_eps)
    return {
      'time': pvc_encoder.TimeEmbedding(C, self.sinusoid).init(
        rng_time, time[..., 0]
      )['params'],
      'compressor': compressor.init(rng_compressor, slots, time)['params'],
    }

  def example(self) -> interface.Example:
    """Two frames of 4 x 4, blocks of 2 x 2, with a compressor."""
    small = dataclasses.replace(self, shuffle=2, features=8, sinusoid=4)
    return interface.Example(reducer=small, k_max=8)

  @property
  def _shuffle(self) -> pixel_shuffle.PixelShuffleConfig:
    return pixel_shuffle.PixelShuffleConfig(stride=self.shuffle)

  def _reduce(
    self,
    ts: interface.TokenSet,
    budget: interface.Budget,
    given: interface.Given,
  ) -> interface.Reduced:
    T, H, W = interface.square_grid(ts)
    # The frame goes along as a position, to be known behind the shuffle.
    frame = np.repeat(np.arange(T), H * W)
    frame = np.concatenate([np.zeros(ts.special, int), frame])
    frame_bnp = jnp.broadcast_to(
      jnp.asarray(frame, jnp.int32)[None, :, None], (*ts.mask.shape, 1)
    )
    positions = jnp.concatenate([ts.positions, frame_bnp], axis=-1)
    reduced = self._shuffle.reduce(
      dataclasses.replace(ts, positions=positions), budget=budget
    )
    at = reduced.positions[..., -1]  # Frame of each slot, (B, K).
    reduced = dataclasses.replace(
      reduced, positions=reduced.positions[..., :-1]
    )
    if given.params is None:
      return reduced
    frames = ts.mask[:, ts.special :].reshape(-1, T, H * W)
    # Frames up to the last with a valid token are the true T.
    last = jnp.where(jnp.any(frames, axis=2), jnp.arange(1, T + 1)[None], 0)
    tau = relative_time(jnp.max(last, axis=1), T)
    tau = jnp.take_along_axis(tau, at, axis=1)
    tokens = self.compress(given.params, reduced.tokens, tau)
    tokens = jnp.where(reduced.mask[..., None], tokens, 0)
    return dataclasses.replace(reduced, tokens=tokens)

  def compress(
    self, params: Any, slots: jax.Array, tau: jax.Array
  ) -> jax.Array:
    """slots (B, K, s^2 C) at times tau (B, K) -> tokens (B, K, features)."""
    time = embed_time(params, tau, self.sinusoid)
    compressor = Compressor(self.features, self.norm_eps)
    out: Any = compressor.apply({'params': params['compressor']}, slots, time)
    return out


class Compressor(nn.Module):
  """ada over all channels of a slot, then linear, GELU, linear.

  Attributes:
    features: of a token. norm_eps: of the norm, whose sums are in float32.
  """

  features: int
  norm_eps: float = 1e-6

  @nn.compact
  def __call__(self, slots: jax.Array, time: jax.Array) -> jax.Array:
    """slots (B, K, s^2 C), time (B, K, W) -> (B, K, features)."""
    x = norms.LayerNorm(self.norm_eps, name='norm')(slots)
    x = pvc_encoder.Modulation(name='norm_time')(x, time)
    x = linear.QuantDense(self.features, True, name='up')(x)
    x = jax.nn.gelu(x, approximate=False)
    return linear.QuantDense(self.features, True, name='down')(x)


def embed_time(
  params: Mapping[str, Any], tau: jax.Array, sinusoid: int
) -> jax.Array:
  """tau (B, T) -> (B, T, W), by params['time']."""
  width = params['time']['down']['kernel'].shape[-1]
  module = pvc_encoder.TimeEmbedding(width, sinusoid)
  out: Any = module.apply({'params': params['time']}, tau)
  return out


def relative_time(counts: jax.Array, T: int) -> jax.Array:
  """t / (n - 1) of rows with n = counts (B,) of T frames, 0 for n = 1."""
  t = jnp.arange(T, dtype=jnp.float32)[None]
  most = jnp.maximum(counts - 1, 1).astype(jnp.float32)[:, None]
  return jnp.minimum(t / most, 1.0)


def check_times(tau: Any) -> None:
  """Raises ValueError unless times (B, T), outside jit, increase."""
  steps = np.diff(np.asarray(tau), axis=1)
  if np.any(steps <= 0):
    row = int(np.argwhere(steps <= 0)[0, 0])
    raise ValueError(
      f'pvc: times {np.asarray(tau)[row].tolist()} of row {row} do not '
      'increase; each frame must come after the one before. Sort the frames.'
    )


def static_video(images: jax.Array, repeat: int = 4) -> jax.Array:
  """images (B, ...) -> frames (B, repeat, ...), all the same."""
  _check_repeat(repeat)
  shape = (images.shape[0], repeat, *images.shape[1:])
  return jnp.broadcast_to(images[:, None], shape)


# What the plain layers make of an image is repeated, not the work: `repeated`
# and `static_video` in front of them give the same bits.
repeated = static_video


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pvc:
  """Encoder and compressor around a ViT's plain layers.

  config: of the compressor; it has features. encoder: of the last layers.
  prefix: (params, images (B, height, width, 3)) -> (B, 1 + H W, C), the plain
    layers, class token first.
  grid: (H, W) of the places.
  """

  config: PvcConfig
  encoder: pvc_encoder.EncoderConfig
  prefix: Callable[[Any, jax.Array], jax.Array]
  grid: tuple[int, int]

  def init_params(
    self,
    rng: jax.Array,
    prefix: Any,
    last_blocks: Mapping[str, Any],
    width: int,
  ) -> dict[str, Any]:
    """{'prefix', 'encoder', 'time', 'compressor'}, of a ViT's parameters.

    Args:
      rng: of what is new.
      prefix: parameters of the plain layers.
      last_blocks: the ViT's stacked blocks; the last L are used.
      width: C.
    """
    H, W = self.grid
    ts = interface.token_set(jnp.zeros((1, H * W, width)), grid=(1, H, W))
    rng, rng_encoder = jax.random.split(rng)
    new = self.config.init_params(rng, ts)
    assert new is not None
    blocks = pvc_encoder.from_vit(rng_encoder, last_blocks, self.encoder)
    return {'prefix': prefix, 'encoder': blocks, **new}

  def image(self, params: Any, images: jax.Array) -> jax.Array:
    """images (B, height, width, 3) -> tokens (B, repeat K, features).

    The plain layers run once.
    """
    states = self.prefix(params['prefix'], images)
    return self._tokens(params, repeated(states, self.config.image_repeat))

  def video(
    self, params: Any, frames: jax.Array, counts: jax.Array | None = None
  ) -> jax.Array:
    """frames (B, T, height, width, 3) -> tokens (B, T K, features).

    counts (B,): true frames of each row, those behind are padding, whose tokens
    are 0; None: all.
    """
    B, T = frames.shape[:2]
    states = self.prefix(
      params['prefix'], frames.reshape(-1, *frames.shape[2:])
    )
    return self._tokens(params, states.reshape(B, T, *states.shape[1:]), counts)

  def _tokens(
    self, params: Any, states: jax.Array, counts: jax.Array | None = None
  ) -> jax.Array:
    (B, T, P, C), (H, W) = states.shape, self.grid
    if P != 1 + H * W:
      raise ValueError(
        f'Pvc: {P} states per frame for a grid of {H} x {W}; there must be '
        f'{1 + H * W}, the class token first. Check grid and prefix.'
      )
    counts = jnp.full((B,), T, jnp.int32) if counts is None else counts
    mask = jnp.arange(T)[None] < counts[:, None]
    tau = relative_time(counts, T)
    time = embed_time(params, tau, self.config.sinusoid)
    x = pvc_encoder.encode(params['encoder'], self.encoder, states, time, mask)
    x = x[:, :, 1:].reshape(B, T * H * W, C)
    ts = interface.token_set(
      x, mask=jnp.repeat(mask, H * W, axis=1), grid=(T, H, W)
    )
    return self.config.reduce(ts, params=params).tokens

  def loss(
    self,
    params: Any,
    decode: Callable[..., jax.Array],
    frames: jax.Array,
    counts: jax.Array,
    ids: jax.Array,
    asked: jax.Array,
  ) -> tuple[jax.Array, None]:
    """Next-token loss of texts (B, L) behind videos; images are videos too.

    Args:
      params: of `init_params`, and 'decoder'.
      decode: (params, visual tokens (B, K, features), ids (B, L)) -> logits
        (B, L, V) of what follows each id.
      frames, counts: as for `video`.
      ids: (B, L) int32.
      asked: (B, L) bool, ids that are to be predicted.
    """
    visual = self.video(params, frames, counts)
    logits = decode(params['decoder'], visual, ids)
    mask = jnp.ones(ids.shape, bool)
    labels = jnp.where(asked, ids, -1)
    return training.next_token_loss(logits, labels, mask), None


def optimizer(
  stage: str, new: float = 1e-4, old: float = 1e-5
) -> optax.GradientTransformation:
  """AdamW of a stage: 'align' trains what is new, 'full' everything.

  Rates are ours; the paper gives them for its large models only.
  """
  stages = {'align': 0.0, 'full': old}
  if stage not in stages:
    raise ValueError(
      f'pvc.optimizer: stage={stage!r}; allowed {sorted(stages)}. Train align '
      'first.'
    )
  return training.rates([(NEW, new), ('', stages[stage])])


def bucket(T: int) -> int:
  """The smallest of BUCKETS that T frames fit in.

  Raises:
    ValueError: T is 0, or above the largest.
  """
  if not 0 < T <= BUCKETS[-1]:
    raise ValueError(
      f'pvc.bucket: T={T} frames; allowed 1 to {BUCKETS[-1]}. Sample fewer '
      'frames with frame_indices.'
    )
  return next(size for size in BUCKETS if size >= T)


def frame_indices(length: int, n: int) -> np.ndarray:
  """n frames of a clip of `length`: the middles of n equal parts, (n,) int."""
  seg = (length - 1) / n
  return (seg / 2 + np.round(seg * np.arange(n))).astype(int)


def tile_grid(
  width: int, height: int, *, most: int = 12, least: int = 1, size: int = 448
) -> tuple[int, int]:
  """(columns, rows) of tiles whose aspect ratio is nearest the image's.

  Of equally near ones a larger is taken if the image fills half of it.
  """
  grids = [
    (i, j)
    for i in range(1, most + 1)
    for j in range(1, most // i + 1)
    if i * j >= least
  ]
  best, best_difference = (1, 1), math.inf
  for i, j in sorted(grids, key=lambda g: (g[0] * g[1], g)):
    difference = abs(width / height - i / j)
    filled = width * height > 0.5 * size * size * i * j
    if difference < best_difference or (
      difference == best_difference and filled
    ):
      best, best_difference = (i, j), difference
  return best


def tiles(
  image: jax.Array, *, most: int = 12, size: int = 448, thumbnail: bool = True
) -> jax.Array:
  """image (height, width, 3) -> (n, size, size, 3) in raster order.

  A thumbnail of the whole comes last, unless there is one tile only.
  """
  height, width, C = image.shape
  columns, rows = tile_grid(width, height, most=most, size=size)
  shape = (rows * size, columns * size, C)
  resized = jax.image.resize(image, shape, 'bicubic')
  out = resized.reshape(rows, size, columns, size, C).transpose(0, 2, 1, 3, 4)
  out = out.reshape(rows * columns, size, size, C)
  if thumbnail and rows * columns > 1:
    small = jax.image.resize(image, (size, size, C), 'bicubic')
    out = jnp.concatenate([out, small[None]])
  return out


def _check_repeat(repeat: int) -> None:
  if repeat < 1:
    raise ValueError(
      f'pvc: image_repeat={repeat}; an image is at least 1 frame. Use 4.'
    )
