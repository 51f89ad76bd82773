"""LangDC: a small language model captions each clip; its states are the tokens.

"Seeing More, Saying More: Lightweight Language Experts are Dynamic Video Token
Compressors", EMNLP 2025, arXiv 2509.00969.

  clip c of 4 frames -> tokens for the captioner -> caption of m_c tokens
  soft tokens = project(state of the captioner at each caption token)
  out = [base tokens of all frames, captions of clip 1, 2, ..., C]

A rich clip gets a long caption and so more tokens (CapPruner); a few pooled
tokens of every frame stay beside (BasePruner). FLOPs fall, but a caption is
decoded token by token: report the time with it (`token_table` in
tokens.langdc_training).

Slots are base + C * max_new, in use those before a caption's end. The state is
taken in front of layer `layer` (-9 of 24: it knows more than the word). The
released configuration takes layer 0 whatever its flag says, so its soft tokens
are embeddings of the words; layer=0 is that. States and logits of training and
of decoding follow one convention (tokens.captioner).

Gradients of a reduction reach the base tokens only, as in the release; training
teacher-forces captions (tokens.langdc_training).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxq.nn import linear
from jaxq.tokens import captioner, decoder_layers, interface, primitives

BASES = ('ldp', 'mlp')
PROJECTIONS = ('linear', 'mlp')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LangDCConfig(interface.Config):
  """Two branches; the captioner's shapes are those of Qwen2.5-0.5B.

  `budget` is not used: a caption's end decides.

  features: channels of the language model behind (D).
  clip_frames: frames of a clip.
  caption_side, base_side: an image's tokens are pooled to so many rows and
    columns for the captioner and for the base branch.
  video_caption_side, video_base_side: the same for a clip encoder's features.
  caption_branch, base_branch: on or off.
  base: 'mlp', or 'ldp' (a depth-wise 3 x 3 behind the pooling).
  projection: of soft tokens, 'linear' or 'mlp'.
  before, after: ids of the chat prompt around a clip's tokens.
  max_new, layer, convention, no_repeat, loop: captioner.Writing.
  width, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size,
    vocab, theta, stop_id: of the captioner.
  """

  features: int = 2048
  clip_frames: int = 4
  caption_side: int = 12
  base_side: int = 6
  video_caption_side: int = 8
  video_base_side: int = 4
  caption_branch: bool = True
  base_branch: bool = True
  base: str = 'mlp'
  projection: str = 'linear'
  before: tuple[int, ...] = ()
  after: tuple[int, ...] = ()
  max_new: int = 128
  layer: int = -9
  convention: str = 'consume'
  no_repeat: int = 0
  loop: str = 'while'
  width: int = 896
  num_layers: int = 24
  num_heads: int = 14
  num_kv_heads: int = 2
  head_dim: int = 64
  intermediate_size: int = 4864
  vocab: int = 151_936
  theta: float = 1e6
  stop_id: int = 151_643

  def __post_init__(self):
    super().__post_init__()
    for name, allowed in (('base', BASES), ('projection', PROJECTIONS)):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'LangDCConfig: {name}={getattr(self, name)!r}; allowed '
          f'{sorted(allowed)}. Use {allowed[-1]!r}.'
        )
    if not (self.caption_branch or self.base_branch):
      raise ValueError(
        'LangDCConfig: caption_branch=False, base_branch=False; one of them '
        'must be on, or there are no visual tokens. Turn one on.'
      )
    if not 0 <= self.stop_id < self.vocab:
      raise ValueError(
        f'LangDCConfig: stop_id={self.stop_id} of vocab={self.vocab} ids; it '
        "must be one of them. Use the captioner's end of text."
      )
    if self.clip_frames < 1 or self.features < 1:
      raise ValueError(
        f'LangDCConfig: clip_frames={self.clip_frames}, features='
        f'{self.features}; both must be at least 1. Use 4 and 2048.'
      )
    self.writing.captured(self.num_layers)

  @property
  def writing(self) -> captioner.Writing:
    """How captions are written."""
    return captioner.Writing(
      max_new=self.max_new,
      layer=self.layer,
      convention=self.convention,
      no_repeat=self.no_repeat,
      loop=self.loop,
    )

  @property
  def layer_config(self) -> decoder_layers.LayerConfig:
    """A layer of the captioner."""
    return decoder_layers.LayerConfig(
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads,
      head_dim=self.head_dim,
      intermediate_size=self.intermediate_size,
      qkv_bias=True,
    )

  @property
  def model(self) -> captioner.CaptionModel:
    """The captioner."""
    return captioner.model_of(
      self.layer_config,
      num_layers=self.num_layers,
      stop_id=self.stop_id,
      theta=self.theta,
    )

  @property
  def traits(self) -> interface.Traits:
    """A generator."""
    return interface.Traits(
      kind='generator', params=True, grid=True, conserves_mass=False
    )

  def budget_for(self, ts: interface.TokenSet) -> interface.Budget:
    """Base tokens and the longest captions."""
    T, _, _ = interface.square_grid(ts)
    return interface.Budget(k_max=self.slots(T))

  def slots(self, T: int, video: bool = False) -> int:
    """Slots of T frames; `video`: with a clip encoder's features beside."""
    clips = T // self.clip_frames
    base = T * self.base_side**2 * self.base_branch
    if video:
      base += T * self.video_base_side**2 * self.base_branch
    return base + clips * self.max_new * self.caption_branch

  def init_params(
    self, rng: jax.Array, ts: interface.TokenSet, query: jax.Array | None = None
  ) -> dict[str, Any]:
    """{'captioner', 'caption_image', 'base_image', 'project'}, random."""
    del query
    return init_params(rng, self, ts.tokens.shape[-1])

  def example(self) -> interface.Example:
    """Two clips of one frame, captions of at most 3 tokens."""
    small = dataclasses.replace(
      self,
      features=8,
      clip_frames=1,
      caption_side=2,
      base_side=2,
      max_new=3,
      layer=1,
      width=8,
      num_layers=2,
      num_heads=2,
      num_kv_heads=1,
      head_dim=4,
      intermediate_size=16,
      vocab=16,
      stop_id=3,
      after=(1,),
    )
    return interface.Example(reducer=small, k_max=small.slots(2))

  def _reduce(
    self,
    ts: interface.TokenSet,
    budget: interface.Budget,
    given: interface.Given,
  ) -> interface.Reduced:
    B, (T, H, W) = ts.mask.shape[0], interface.square_grid(ts)
    images = ts.tokens[:, ts.special :].reshape(B, T, H, W, -1)
    mask = ts.mask[:, ts.special :].reshape(B, T, H, W)
    return compress(
      given.params,
      self,
      images,
      mask=mask,
      budget=budget,
      sources=ts.mask.shape[1],
      axes=ts.positions.shape[-1],
    )


class Projector(nn.Module):
  """One linear, or two with GELU between.

  Attributes:
    features: of the output. hidden: whether there are two.
  """

  features: int
  hidden: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., C) -> (..., features)."""
    if self.hidden:
      x = linear.QuantDense(self.features, True, name='up')(x)
      x = jax.nn.gelu(x, approximate=False)
    return linear.QuantDense(self.features, True, name='down')(x)


class BasePruner(nn.Module):
  """A projector, then pooling to side x side; for 'ldp' a local mixing.

  Attributes:
    features: D. side: rows and columns. ldp: adds a depth-wise 3 x 3 of the
      pooled tokens to them (MobileVLM's LDPv2).
  """

  features: int
  side: int
  ldp: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """x (M, H, W, C), mask (M, H, W) -> (M, side, side, features)."""
    x = pool(Projector(self.features, name='project')(x), mask, self.side)
    if not self.ldp:
      return x
    depthwise = nn.Conv(
      self.features, (3, 3), feature_group_count=self.features, name='local'
    )
    return x + depthwise(x)


def pool(x: jax.Array, mask: jax.Array, side: int) -> jax.Array:
  """Adaptive average of the tokens that are no padding.

  x (M, H, W, C), mask (M, H, W) bool -> (M, side, side, C); 0 where a cell has
  padding only.
  """
  H, W = mask.shape[1:]
  rows = primitives.resample_matrix(H, side, side)
  columns = primitives.resample_matrix(W, side, side)
  weight = mask[..., None].astype(jnp.float32)
  sums = primitives.resample_grid(
    jnp.where(mask[..., None], x, 0), rows, columns
  )
  weights = primitives.resample_grid(weight, rows, columns)
  mean = sums / jnp.where(weights > 0, weights, 1.0).astype(x.dtype)
  return jnp.where(weights > 0, mean, jnp.zeros((), x.dtype))


def init_params(
  rng: jax.Array, config: LangDCConfig, width: int, video_width: int = 0
) -> dict[str, Any]:
  """Random params for image features of `width` channels.

  video_width: channels of a clip encoder's features; 0: there are none.
  """
  keys = jax.random.split(rng, 6)
  params: dict[str, Any] = {
    'captioner': captioner.init_params(
      keys[0],
      config.layer_config,
      num_layers=config.num_layers,
      vocab=config.vocab,
      width=config.width,
    ),
    'project': _soft_projector(config).init(
      keys[1], jnp.zeros((1, config.width))
    )['params'],
  }
  streams = {'image': width, 'video': video_width}
  for i, (name, channels) in enumerate(streams.items()):
    if channels:
      x = jnp.zeros((1, 2, 2, channels))
      mask = jnp.ones((1, 2, 2), bool)
      params[f'caption_{name}'] = Projector(config.width).init(keys[2 + i], x)[
        'params'
      ]
      params[f'base_{name}'] = _base(config, name).init(keys[4 + i], x, mask)[
        'params'
      ]
  return params


def clip_prompt(
  params: Mapping[str, Any],
  config: LangDCConfig,
  images: jax.Array,
  mask: jax.Array,
  video: jax.Array | None = None,
) -> captioner.Prompt:
  """What the captioner is asked about each clip.

  Args:
    params, config: of the method.
    images: (M, F, H, W, C), clips of F frames.
    mask: (M, F, H, W) bool, False: padding.
    video: (M, F, H', W', C') of a clip encoder.

  Returns:
    A Prompt of M rows: before, image tokens, video tokens, after. A clip that
    is all padding has length 0.
  """
  M, F = images.shape[:2]

  def tokens(x, mask, name, side):
    projector = Projector(config.width)
    x = projector.apply({'params': params[f'caption_{name}']}, x)
    x = pool(
      x.reshape(M * F, *x.shape[2:]), mask.reshape(M * F, *mask.shape[2:]), side
    )
    return x.reshape(M, F * side**2, config.width)

  parts = [tokens(images, mask, 'image', config.caption_side)]
  if video is not None:
    everywhere = jnp.ones(video.shape[:-1], bool)
    parts.append(tokens(video, everywhere, 'video', config.video_caption_side))
  words = {
    name: config.model.embed(
      params['captioner'],
      jnp.broadcast_to(jnp.array(ids, jnp.int32)[None], (M, len(ids))),
    )
    for name, ids in (('before', config.before), ('after', config.after))
  }
  x = jnp.concatenate([words['before'], *parts, words['after']], axis=1)
  some = jnp.any(mask, axis=(1, 2, 3))
  return captioner.Prompt(x, jnp.where(some, x.shape[1], 0).astype(jnp.int32))


def base_tokens(
  params: Mapping[str, Any],
  config: LangDCConfig,
  x: jax.Array,
  mask: jax.Array,
  name: str = 'image',
) -> tuple[jax.Array, jax.Array]:
  """Pooled tokens of every frame.

  x (B, T, H, W, C), mask (B, T, H, W) -> (B, T side^2, D), mask (B, T side^2).
  """
  B, T = x.shape[:2]
  pruner = _base(config, name)
  out: Any = pruner.apply(
    {'params': params[f'base_{name}']},
    x.reshape(B * T, *x.shape[2:]),
    mask.reshape(B * T, *mask.shape[2:]),
  )
  n = pruner.side**2
  used = jnp.repeat(jnp.any(mask, axis=(2, 3)), n, axis=1)
  return out.reshape(B, T * n, -1), used


def compress(
  params: Mapping[str, Any],
  config: LangDCConfig,
  images: jax.Array,
  video: jax.Array | None = None,
  *,
  mask: jax.Array | None = None,
  captions: captioner.Captions | None = None,
  budget: interface.Budget | None = None,
  sources: int | None = None,
  axes: int = 1,
) -> interface.Reduced:
  """Base tokens, then captions without gaps.

  Args:
    params, config: of the method.
    images: (B, T, H, W, C) features of every frame.
    video: (B, T, H', W', C') features of a clip encoder, or None.
    mask: (B, T, H, W) bool; None: no padding.
    captions: of all B * T / clip_frames clips, where they are known (training);
      None: they are written.
    budget: None: a slot for everything. With fewer the last are cut off.
    sources: N of the answer's `assignment`; None: T H W.
    axes: P of its positions, which are 0, 1, 2, ... on all axes.

  Returns:
    A Reduced with nothing assigned. Its aux: 'group' (B, K), the clip of each
    slot, 'is_caption' (B, K), 'ids' (B, C, Lmax), 'lengths' (B, C).

  Raises:
    ValueError: T is no multiple of clip_frames.
  """
  B, T, H, W, _ = images.shape
  F, L = config.clip_frames, config.max_new
  if T % F:
    raise ValueError(
      f'LangDCConfig: T={T} frames in clips of clip_frames={F}; T must be a '
      f'multiple. Sample {-(-T // F) * F} frames.'
    )
  C = T // F
  mask = jnp.ones(images.shape[:-1], bool) if mask is None else mask
  images = jnp.where(mask[..., None], images, 0)
  parts: list[tuple[jax.Array, jax.Array, jax.Array]] = []  # x, mask, clip.
  aux: dict[str, Any] = {}
  if config.base_branch:
    streams = [('image', images, mask)]
    if video is not None:
      streams.append(('video', video, jnp.ones(video.shape[:-1], bool)))
    for name, x, x_mask in streams:
      x, used = base_tokens(params, config, x, x_mask, name)
      clip = jnp.arange(x.shape[1], dtype=jnp.int32) * C // x.shape[1]
      parts.append((x, used, clip))
  n_base = sum(part[0].shape[1] for part in parts)
  if config.caption_branch:
    if captions is None:
      prompt = clip_prompt(
        params,
        config,
        images.reshape(B * C, F, *images.shape[2:]),
        mask.reshape(B * C, F, H, W),
        None if video is None else video.reshape(B * C, F, *video.shape[2:]),
      )
      captions = captioner.describe(
        config.model, params['captioner'], prompt, config.writing
      )
    soft: Any = _soft_projector(config).apply(
      {'params': params['project']}, captions.soft
    )
    clip = jnp.repeat(jnp.arange(C, dtype=jnp.int32), L)
    parts.append(
      (soft.reshape(B, C * L, -1), captions.mask.reshape(B, C * L), clip)
    )
    aux['ids'] = captions.ids.reshape(B, C, L)
    aux['lengths'] = captions.lengths.reshape(B, C)
  x = jnp.concatenate([part[0] for part in parts], axis=1)
  used = jnp.concatenate([part[1] for part in parts], axis=1)
  clip = jnp.concatenate([part[2] for part in parts])
  budget = interface.Budget(k_max=x.shape[1]) if budget is None else budget
  index, out_mask = primitives.compact(used, budget.k_max, budget.k)
  group = jnp.broadcast_to(clip[None], used.shape)
  aux['group'] = primitives.gather(group + 1, index) - 1
  aux['is_caption'] = index >= n_base
  place = jnp.arange(budget.k_max, dtype=jnp.int32)[None, :, None]
  place = jnp.where(out_mask[..., None], place, 0)
  N = T * H * W if sources is None else sources
  return interface.Reduced(
    tokens=primitives.gather(x, index),
    mask=out_mask,
    positions=jnp.broadcast_to(place, (*out_mask.shape, axes)),
    size=out_mask.astype(jnp.float32),
    index=jnp.full(index.shape, -1, jnp.int32),
    assignment=jnp.full((B, N), -1, jnp.int32),
    count=jnp.sum(out_mask, axis=1, dtype=jnp.int32),
    aux=aux,
  )


def _soft_projector(config: LangDCConfig) -> Projector:
  return Projector(config.features, hidden=config.projection == 'mlp')


def _base(config: LangDCConfig, name: str) -> BasePruner:
  side = config.base_side if name == 'image' else config.video_base_side
  return BasePruner(config.features, side, ldp=config.base == 'ldp')
