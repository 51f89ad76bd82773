"""LangDC's training: captions as long as their clips are dense.

  I    projectors and base branch on captions, the language model frozen
  II   captioner and its projectors on captions whose length follows the
       information density of the clip
  III  everything but encoders and projectors, on video instructions; captions
       are written beforehand and teacher-forced, one pass in place of decoding

Semantic density-aware supervision (the corpus is not published; our reading): a
strong captioner is given a number of words,

  density = mean change of patch features from frame to frame
          + entropy of their clusters / log(number of clusters)
  target  = 16 + (128 - 16) * clip((density - low) / (high - low), 0, 1)

and the captioner learns both words and length: beside cross-entropy

  0.1 |log E[m] - log target|,  E[m] = sum_s prod_{j <= s} (1 - p_end(j))

with p_end the probability of the end at each step of the caption. At inference
the end alone decides.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxq.tokens import captioner, langdc, primitives, training

_ROUNDS = 4  # Of k-means; its entropy settles before its centres.

# What each stage trains, as patterns of paths; the rest is frozen.
STAGES = {
  1: r'^(caption_|base_|project)',
  2: r'^(captioner|caption_)',
  3: r'^(captioner|base_|decoder)',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensityConfig:
  """clusters: of a clip's patches. shortest, longest: target lengths."""

  clusters: int = 8
  shortest: int = 16
  longest: int = 128

  def __post_init__(self):
    if self.clusters < 2 or not 0 < self.shortest <= self.longest:
      raise ValueError(
        f'DensityConfig: clusters={self.clusters}, shortest={self.shortest}, '
        f'longest={self.longest}; at least 2 clusters and 0 < shortest <= '
        'longest are needed. Use 8, 16 and 128.'
      )


def density(x: jax.Array, config: DensityConfig) -> jax.Array:
  """How much a clip has to say.

  Args:
    x: (M, F, N, C), patch features of clips of F frames.
    config: static; at most F N clusters.

  Returns:
    (M,) float32: from 0 (one colour, nothing moves) to about 2.
  """
  M, F, N, C = x.shape
  unit = primitives.normalize(x)
  change = jnp.zeros((M,), jnp.float32)
  if F > 1:
    change = jnp.mean(1 - jnp.sum(unit[:, 1:] * unit[:, :-1], -1), axis=(1, 2))
  patches, k = unit.reshape(M, F * N, C), config.clusters
  centres = patches[:, np.linspace(0, F * N - 1, k).astype(int)]

  def assign(centres):
    cosine = jnp.einsum('mnc,mkc->mnk', patches, centres)
    # Patches alike to a rounding error go to the first of like centres.
    best = jnp.max(cosine, axis=-1, keepdims=True)
    return jax.nn.one_hot(jnp.argmax(cosine >= best - 1e-5, axis=-1), k)

  def move(_, centres):
    members = assign(centres)
    sums = jnp.einsum('mnk,mnc->mkc', members, patches)
    some = jnp.sum(members, axis=1)[..., None] > 0
    return jnp.where(some, primitives.normalize(sums), centres)

  p = jnp.mean(assign(jax.lax.fori_loop(0, _ROUNDS, move, centres)), axis=1)
  entropy = -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1.0)), axis=-1)
  return change + entropy / np.log(k)


def density_range(densities: np.ndarray) -> tuple[float, float]:
  """(low, high) of a corpus: its 5th and 95th percentiles."""
  low, high = np.percentile(densities, (5, 95))
  return float(low), float(high)


def target_length(
  densities: jax.Array, low: float, high: float, config: DensityConfig
) -> jax.Array:
  """Tokens a caption is to have, (M,) int32; it grows with the density.

  Raises:
    ValueError: low is not below high.
  """
  if not low < high:
    raise ValueError(
      f'target_length: low={low}, high={high}; low must be below high. Take '
      'them from density_range of clips that differ.'
    )
  share = jnp.clip((densities - low) / (high - low), 0.0, 1.0)
  length = config.shortest + (config.longest - config.shortest) * share
  return jnp.round(length).astype(jnp.int32)


def expected_length(
  logits: jax.Array, lengths: jax.Array, stop_id: int
) -> jax.Array:
  """E[m] under the model's own ends, along captions: (B,) float32.

  logits (B, Lmax + 1, V) of `captioner.teacher_forced`, lengths (B,).
  """
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  go_on = jnp.log1p(-jnp.minimum(jnp.exp(log_p[..., stop_id]), 1 - 1e-6))
  survive = jnp.exp(jnp.cumsum(go_on, axis=1))
  at = jnp.arange(logits.shape[1])[None]
  return jnp.sum(jnp.where(at <= lengths[:, None], survive, 0.0), axis=1)


def caption_loss(
  params: Any,
  config: langdc.LangDCConfig,
  images: jax.Array,
  ids: jax.Array,
  lengths: jax.Array,
  targets: jax.Array,
  *,
  length_weight: float = 0.1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Stage II: captions of clips, and their lengths.

  Args:
    params: of the method.
    config: static.
    images: (M, F, H, W, C), clips.
    ids: (M, Lmax) int32, captions. lengths: (M,) int32, at least 1.
    targets: (M,) int32, of `target_length`.
    length_weight: of the second term.

  Returns:
    The loss; aux 'ce' and 'expected' (M,).
  """
  mask = jnp.ones(images.shape[:-1], bool)
  prompt = langdc.clip_prompt(params, config, images, mask)
  captions, logits = captioner.teacher_forced(
    config.model, params['captioner'], prompt, ids, lengths, config.writing
  )
  end = jnp.full((ids.shape[0], 1), config.stop_id, jnp.int32)
  labels = jnp.concatenate([captions.ids, end], axis=1)
  at = jnp.arange(labels.shape[1])[None]
  ce = training.cross_entropy(logits, labels, at <= lengths[:, None])
  expected = expected_length(logits, lengths, config.stop_id)
  gap = jnp.abs(jnp.log(expected + 1e-6) - jnp.log(targets.astype(jnp.float32)))
  loss = ce + length_weight * jnp.mean(gap)
  return loss, {'ce': ce, 'expected': expected}


@dataclasses.dataclass(frozen=True)
class Instruction:
  """Stage I and III: the language model behind the reduction.

  config: of the method.
  decode: (params, visual tokens (B, K, D), mask (B, K), ids (B, T)) -> logits
    (B, T, V) of what follows each id.
  captioner_learns: False, as released, stops gradients at the soft tokens.
  """

  config: langdc.LangDCConfig
  decode: Callable[..., jax.Array]
  captioner_learns: bool = False

  def loss(
    self,
    params: Any,
    images: jax.Array,
    caption_ids: jax.Array,
    caption_lengths: jax.Array,
    ids: jax.Array,
    asked: jax.Array,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Next-token loss on texts behind videos.

    Args:
      params: of the method, and 'decoder'.
      images: (B, T, H, W, C).
      caption_ids: (B, C, Lmax) int32, written beforehand (or references; swap
        them to see what that difference costs). caption_lengths: (B, C).
      ids: (B, L) int32, texts. asked: (B, L) bool, ids to be predicted.
    """
    config = self.config
    B, T, H, W, _ = images.shape
    F = config.clip_frames
    clips = images.reshape(-1, F, *images.shape[2:])
    prompt = langdc.clip_prompt(
      params, config, clips, jnp.ones((clips.shape[0], F, H, W), bool)
    )
    captions, _ = captioner.teacher_forced(
      config.model,
      params['captioner'],
      prompt,
      caption_ids.reshape(clips.shape[0], -1),
      caption_lengths.reshape(-1),
      config.writing,
    )
    if not self.captioner_learns:
      captions = jax.lax.stop_gradient(captions)
    reduced = langdc.compress(params, config, images, captions=captions)
    logits = self.decode(params['decoder'], reduced.tokens, reduced.mask, ids)
    labels = jnp.where(asked, ids, -1)
    loss = training.next_token_loss(logits, labels, jnp.ones(ids.shape, bool))
    return loss, {'tokens': jnp.mean(reduced.count.astype(jnp.float32))}


def optimizer(stage: int, rate: float = 1e-4) -> optax.GradientTransformation:
  """AdamW on what a stage trains (STAGES), nothing else.

  Raises:
    ValueError: no such stage.
  """
  if stage not in STAGES:
    raise ValueError(
      f'langdc_training.optimizer: stage={stage}; allowed {sorted(STAGES)}.'
    )
  return training.rates([(STAGES[stage], rate), ('', 0.0)])


def token_table(
  config: langdc.LangDCConfig, T: int, lengths: np.ndarray, text: int
) -> dict[str, float]:
  """What a reduction of one video costs, to be printed with every result.

  Args:
    config: of the method.
    T: frames.
    lengths: (C,) caption lengths.
    text: tokens of the question.

  Returns:
    'base_tokens', 'caption_tokens', 'captioner_prefill' (tokens of all clips),
    'decode_steps' (the longest caption and its end), 'prefill' (of the language
    model) and 'captioner_flops' (2 a weight and token, attention left out).
  """
  C, d = T // config.clip_frames, config.width
  clip = config.clip_frames * config.caption_side**2
  prompt = clip + len(config.before) + len(config.after)
  base = T * config.base_side**2 * config.base_branch
  steps = int(np.max(lengths)) + 1
  heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
  weights = config.num_layers * d * (heads + 3 * config.intermediate_size)
  tokens = C * prompt + int(np.sum(lengths))
  return {
    'base_tokens': base,
    'caption_tokens': int(np.sum(lengths)),
    'captioner_prefill': C * prompt,
    'decode_steps': steps,
    'prefill': base + int(np.sum(lengths)) + text,
    'captioner_flops': 2.0
    * (weights * tokens + d * config.vocab * int(np.sum(lengths + 1))),
  }
