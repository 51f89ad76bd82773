"""Which tokens of an item can go: labels from images, then nearest neighbours.

Follow the Flow (arXiv 2504.01137) keeps one token of an item at a time and asks
whether the image still shows it: tokens that do are representative, the others
redundant (`representative`). That costs an image per token; a nearest-neighbour
vote over tokens labelled so tells new ones from their encoding alone, with 92 %
precision in the paper:

  feature(i) = [C_i, mean of the item's C, place / length, length, is last,
                begins a word], the first two of length 1
  vote(i) = sum of w over redundant neighbours / sum of w,  w = 1 / (1 - cosine)

The features and the weights are ours; the paper names the classifier only. The
threshold is the smallest whose precision on held-out items reaches 0.9: a token
wrongly removed costs more than one wrongly kept. An item keeps at least one.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxq.tokens import follow_the_flow, primitives
from pallas_kernels.nearest_center import api as nearest_center

_SCALARS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnnConfig:
  """k: neighbours. precision: wanted. scalars: weight of the four scalars."""

  k: int = 5
  precision: float = 0.9
  scalars: float = 0.3

  def __post_init__(self):
    if self.k < 1 or not 0 < self.precision <= 1 or self.scalars < 0:
      raise ValueError(
        f'KnnConfig: k={self.k}, precision={self.precision}, scalars='
        f'{self.scalars}; k is at least 1, precision in (0, 1], scalars 0 or '
        'more. Use 5, 0.9 and 0.3.'
      )


@flax.struct.dataclass
class Bank:
  """Labelled tokens.

  features: (M, F), of length 1. redundant: (M,) bool. threshold: () float32;
  votes from it on say redundant; infinite where no precision is enough.
  """

  features: jax.Array
  redundant: jax.Array
  threshold: jax.Array


def representative(
  shows: Callable[[jax.Array, int], np.ndarray],
  states: jax.Array,
  pads: jax.Array,
  item: follow_the_flow.Range,
  seeds: Sequence[int] = range(5),
) -> np.ndarray:
  """Which of an item's tokens carry it alone.

  Args:
    shows: (states (n, S, d), seed) -> (n,) bool: draws an image of each and
      judges whether the item is in it.
    states, pads: (S, d), of the prompt and the empty prompt.
    item: its range; n tokens.
    seeds: one image each; the majority counts.

  Returns:
    (n,) bool.
  """
  S = states.shape[0]
  follow_the_flow.check_range('representative', item, S)
  keep = jnp.asarray(np.arange(*item)[:, None] == np.arange(S)[None])  # (n, S)
  alone = follow_the_flow.keep_tokens(states[None], keep, pads[None])
  return np.mean([shows(alone, seed) for seed in seeds], axis=0) > 0.5


def features(
  states: jax.Array,
  item: follow_the_flow.Range,
  begins_word: Sequence[bool],
  config: KnnConfig,
) -> jax.Array:
  """Features (n, 2 d + 4) of an item's n tokens; states (S, d)."""
  follow_the_flow.check_range('features', item, states.shape[0])
  rows = states[item[0] : item[1]].astype(jnp.float32)
  n = rows.shape[0]
  mean = jnp.broadcast_to(jnp.mean(rows, axis=0, keepdims=True), rows.shape)
  place = np.arange(n)
  scalars = np.column_stack(
    [
      place / n,
      np.full(n, min(n, 8) / 8),
      place == n - 1,
      np.asarray(begins_word, np.float32),
    ]
  )
  assert scalars.shape == (n, _SCALARS)
  return primitives.normalize(
    jnp.concatenate(
      [
        primitives.normalize(rows),
        primitives.normalize(mean),
        jnp.asarray(config.scalars * scalars, jnp.float32),
      ],
      axis=1,
    )
  )


def vote(
  bank_features: jax.Array,
  redundant: jax.Array,
  new: jax.Array,
  config: KnnConfig,
) -> jax.Array:
  """The share of redundant among the nearest, by distance: (n,) float32.

  Args:
    bank_features: (M, F); M at least k.
    redundant: (M,) bool.
    new: (n, F).
    config: k.
  """
  cosine, index = nearest_center.nearest_center(
    new, bank_features, top=config.k
  )
  weight = 1.0 / jnp.maximum(1.0 - cosine, 1e-6)
  said = jnp.where(redundant[index], weight, 0.0)
  return jnp.sum(said, axis=1) / jnp.sum(weight, axis=1)


def fit(
  train: jax.Array,
  redundant: jax.Array,
  held_out: jax.Array,
  held_out_redundant: jax.Array,
  config: KnnConfig | None = None,
) -> Bank:
  """A bank of labelled tokens, its threshold set on held-out items.

  Raises:
    ValueError: fewer tokens than k.
  """
  config = KnnConfig() if config is None else config
  if train.shape[0] < config.k:
    raise ValueError(
      f'redundancy.fit: {train.shape[0]} labelled tokens for k={config.k}; '
      'there must be at least k. Label more items.'
    )
  votes = np.asarray(vote(train, redundant, held_out, config))
  threshold = choose_threshold(
    votes, np.asarray(held_out_redundant), config.precision
  )
  return Bank(
    features=train, redundant=redundant, threshold=jnp.float32(threshold)
  )


def choose_threshold(
  votes: np.ndarray, redundant: np.ndarray, precision: float
) -> float:
  """The smallest positive threshold with that precision; inf: there is none."""
  for threshold in np.unique(votes[votes > 0]):
    said = votes >= threshold
    if np.mean(redundant[said]) >= precision:
      return float(threshold)
  return float('inf')


def redundant_of_item(
  bank: Bank, new: jax.Array, config: KnnConfig | None = None
) -> jax.Array:
  """Which tokens of ONE item (n, F) can go; never all: (n,) bool.

  The token with the lowest vote stays, of equal ones the last, which in most
  encoders has seen the others.
  """
  config = KnnConfig() if config is None else config
  votes = vote(bank.features, bank.redundant, new, config)
  n = votes.shape[0]
  best = n - 1 - jnp.argmin(votes[::-1])
  return (votes >= bank.threshold) & (jnp.arange(n) != best)


def keep_mask(
  S: int, items: Sequence[tuple[follow_the_flow.Range, Any]]
) -> np.ndarray:
  """All S places less the redundant tokens of ((start, stop), (n,) bool)."""
  keep = np.ones(S, bool)
  for (start, stop), redundant in items:
    follow_the_flow.check_range('keep_mask', (start, stop), S)
    keep[start:stop] = ~np.asarray(redundant)
  return keep
