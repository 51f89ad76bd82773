"""CaCoVID's sampling: which sets of tokens are tried.

2026, https://arxiv.org/abs/2602.01649. Drawing k of hundreds of tokens tries
combinations that are hardly ever good. Online combination space sampling sorts
the tokens of a frame by the policy, splits them into groups, draws a group and
then k tokens of it: a set is good or bad as a whole, and its reward tells about
tokens that are alike.

Every set keeps k tokens per frame on average, k * T in all, so that the frozen
model answers from all of them in one batch.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxq.tokens import (
  cacovid,
  density_peaks,
  frames,
  interface,
  primitives,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
  """The defaults are the authors'.

  Attributes:
    tokens, frames: sets drawn by token and by frame scores; the first of each
      is greedy. One more is drawn by content. 23 + 8 + 1 = 32.
    group_size: a group has about so many times the k tokens drawn from it.
    max_group: a group's probability is at most so many times the mean.
    grouped: whether groups are used; without, plain draws from each frame.
    frame_ratio: share of the frames that a frame set looks at.
    max_frame: a frame's probability is at most so many times the mean.
  """

  tokens: int = 23
  frames: int = 8
  group_size: float = 2.0
  max_group: float = 2.0
  grouped: bool = True
  frame_ratio: float = 0.125
  max_frame: float = 3.0

  def __post_init__(self):
    if min(self.tokens, self.frames) < 2:
      raise ValueError(
        f'{type(self).__name__}: tokens={self.tokens}, frames={self.frames}; '
        'an advantage needs at least 2 sets of each kind. The paper has 23 '
        'and 8.'
      )
    interface.check_ratio(type(self).__name__, 'frame_ratio', self.frame_ratio)


class Combinations(NamedTuple):
  """keep: (G, N) bool, content first, then tokens, then frames.

  frames: (frames, T) bool, the frames that each frame set looked at.
  """

  keep: jax.Array
  frames: jax.Array


def kept_per_frame(rate: float, cells: int) -> int:
  """k = round(rate * cells), halves to even as the reference.

  Raises:
    ValueError: it is 0.
  """
  k = round(rate * cells)
  if k < 1:
    raise ValueError(
      f'kept_per_frame: rate={rate} of {cells} tokens per frame rounds to 0; '
      f'at least 1 must stay. Use a rate of at least {0.51 / cells:.3f}.'
    )
  return k


def group_sizes(rate: float, cells: int, config: SamplingConfig) -> list[int]:
  """Sizes of the groups of `cells` sorted tokens, the longer ones first."""
  number = max(int(1 / rate / config.group_size), 1)
  number = min(number, cells)
  short, longer = divmod(cells, number)
  return [short + 1] * longer + [short] * (number - longer)


def group_cap(number: int, config: SamplingConfig) -> float:
  """The largest probability of one of `number` groups."""
  if number == 1:
    return 1.0
  return max(min(config.max_group / number, 0.9), 0.1)


def group_of_ranks(sizes: list[int]) -> jax.Array:
  """The group of each place of the sorted tokens: (cells,) int32."""
  groups = [g for g, size in enumerate(sizes) for _ in range(size)]
  return jnp.array(groups, jnp.int32)


def sample_tokens(
  rng: jax.Array, a: jax.Array, k: int, rate: float, config: SamplingConfig
) -> jax.Array:
  """Sets by the token scores: (config.tokens, T, cells) bool, k of each frame.

  Args:
    rng: a key.
    a: (T, cells) scores.
    k: of `kept_per_frame`.
    rate: sets the number of groups.
    config: how.
  """
  T, cells = a.shape
  n = config.tokens
  p = jax.nn.softmax(a.astype(jnp.float32), axis=1)
  order = jnp.argsort(-p, axis=1, stable=True)
  falling = jnp.take_along_axis(p, order, axis=1)  # (T, cells)
  sizes = group_sizes(rate, cells, config) if config.grouped else [cells]
  if k > min(sizes):
    raise ValueError(
      f'sample_tokens: {k} tokens of groups of {min(sizes)}; a group must hold '
      'what is drawn from it. Raise group_size.'
    )
  group = group_of_ranks(sizes)
  key_group, key_token = jax.random.split(rng)
  of_group = jax.nn.one_hot(group, len(sizes), dtype=jnp.float32)
  share = frames.capped(
    jnp.maximum(falling @ of_group, 1 / len(sizes) ** 2),
    group_cap(len(sizes), config),
  )
  drawn = jax.random.categorical(
    key_group, jnp.log(share)[None], shape=(n, T)
  )  # (n, T)
  inside = drawn[..., None] == group[None, None]  # (n, T, cells)
  clamped = falling
  if config.grouped:
    # Within a group no token is left out for good, nor chosen every time.
    even = cells // len(sizes)
    total = (falling @ of_group)[:, group]  # Of each token's own group.
    within = falling / jnp.maximum(total, 1e-30)
    clamped = jnp.clip(within, 0.5 / even, 2 / even)
  logits = jnp.where(inside, jnp.log(clamped + 1e-30)[None], -jnp.inf)
  ranks = primitives.gumbel_topk(key_token, logits, k)  # (n, T, k)
  greedy = jnp.arange(k, dtype=ranks.dtype)[None, None]
  first = jnp.arange(n)[:, None, None] == 0
  ranks = jnp.where(first, greedy, ranks)
  index = jnp.take_along_axis(
    jnp.broadcast_to(order[None], (n, T, cells)), ranks, axis=2
  )
  return jnp.any(jax.nn.one_hot(index, cells, dtype=bool), axis=2)


def sample_frames(
  rng: jax.Array, f: jax.Array, config: SamplingConfig
) -> jax.Array:
  """Frames by their scores f (T,): (config.frames, F) int32, rising.

  F = ceil(frame_ratio * T) without replacement; the first set is greedy.
  """
  T = f.shape[0]
  number = max(math.ceil(config.frame_ratio * T), 1)
  q = jax.nn.softmax(f.astype(jnp.float32))
  q = frames.capped(jnp.maximum(q, 1 / T**2), min(config.max_frame / T, 1.0))
  logits = jnp.broadcast_to(jnp.log(q)[None], (config.frames, T))
  drawn = primitives.gumbel_topk(rng, logits, number)
  best = jax.lax.top_k(f, number)[1]
  first = jnp.arange(config.frames)[:, None] == 0
  return jnp.sort(jnp.where(first, best[None], drawn), axis=1)


def sample_combinations(
  rng: jax.Array,
  a: jax.Array,
  f: jax.Array,
  x: jax.Array,
  rate: float,
  config: SamplingConfig,
) -> Combinations:
  """The sets of one visit; each keeps k * T tokens, so that they batch.

  Args:
    rng: a key.
    a: (N,) token scores, of the first visit's policy.
    f: (T,) frame scores.
    x: (N, D) tokens, whose likeness the content rule looks at.
    rate: share kept, static.
    config: static.

  Raises:
    ValueError: k is 0 or more than a group or the frames drawn have.
  """
  N, T = a.shape[0], f.shape[0]
  if N % T:
    raise ValueError(
      f'sample_combinations: {N} tokens of {T} frames; frames have equally '
      'many. Pass the tokens of a whole grid.'
    )
  cells = N // T
  k = kept_per_frame(rate, cells)
  number = max(math.ceil(config.frame_ratio * T), 1)
  if number * cells < k * T:
    raise ValueError(
      f'sample_combinations: {k * T} tokens of {number} frames of {cells}; '
      'they do not have as many. Raise frame_ratio, or lower the rate.'
    )
  key_token, key_frame = jax.random.split(rng)
  by_frame = x.reshape(T, cells, -1)
  every = jnp.ones((T, cells), bool)
  peaks = density_peaks.scores(by_frame, every)
  content = cacovid.top_per_frame(peaks, every, jnp.full((T,), k, jnp.int32))
  tokens = sample_tokens(key_token, a.reshape(T, cells), k, rate, config)
  chosen = sample_frames(key_frame, f, config)  # (frames, F)

  def of_frames(chosen):
    few = by_frame[chosen].reshape(number * cells, -1)
    score = density_peaks.scores(few, jnp.ones(few.shape[:1], bool))
    best = jax.lax.top_k(score, k * T)[1]
    token = chosen[best // cells] * cells + best % cells
    return jnp.zeros((N,), bool).at[token].set(True)

  keep = jnp.concatenate(
    [
      content.reshape(1, N),
      tokens.reshape(-1, N),
      jax.lax.map(of_frames, chosen),
    ]
  )
  looked = jnp.any(jax.nn.one_hot(chosen, T, dtype=bool), axis=1)
  return Combinations(keep=keep, frames=looked)
