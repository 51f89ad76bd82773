"""TokenFLEX's training: another number of visual tokens at every step.

Hu et al., 2025, https://arxiv.org/abs/2504.03154. One count is drawn for all
devices and all images of a step: shapes stay static, and collectives meet. The
draw is a function of (seed, step) alone, so all hosts make the same one, and so
does a run that starts again from a checkpoint. A program is compiled per count,
before the first step.

The loss is next-token cross-entropy (jaxq.tokens.training), not rescaled by the
count. The rate's schedule runs in steps; report the tokens seen beside it, as
equal steps are fewer tokens than a model of the largest count sees.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from jaxq.tokens import tokenflex, training

# (params, batch, n) -> (loss, aux); n is a Python int.
Loss = Callable[[Any, Any, int], tuple[jax.Array, Any]]


def probabilities(config: tokenflex.TokenFlexConfig) -> np.ndarray:
  """(counts,) float64 that sum to 1."""
  C = len(config.counts)
  p = np.array(config.probs or (1 / C,) * C)
  return p / p.sum()


def sample_count(
  seed: int, step: int, config: tokenflex.TokenFlexConfig
) -> int:
  """The number of tokens per image of a step, one of config.counts.

  Drawn on the host from a generator of (seed, step): no device, no state.
  """
  rng = np.random.default_rng([seed, step])
  return config.counts[rng.choice(len(config.counts), p=probabilities(config))]


def mean_tokens(config: tokenflex.TokenFlexConfig) -> float:
  """Visual tokens per image of a mean step: sum of probability * count."""
  return float(probabilities(config) @ np.array(config.counts))


@dataclasses.dataclass
class Steps:
  """A compiled update per count.

  updates: count -> (params, state, batch) -> (params, state, loss, aux).
  tokens_seen: visual tokens per image, summed over the steps taken.
  """

  config: tokenflex.TokenFlexConfig
  seed: int
  updates: Mapping[int, Callable]
  tokens_seen: int = 0

  def __call__(
    self, step: int, params: Any, state: Any, batch: Any
  ) -> tuple[Any, Any, jax.Array, Any]:
    """Takes the step of this number: draws its count and updates."""
    count = sample_count(self.seed, step, self.config)
    self.tokens_seen += count
    return self.updates[count](params, state, batch)


def compile_steps(
  config: tokenflex.TokenFlexConfig,
  loss: Loss,
  optimizer: optax.GradientTransformation,
  params: Any,
  batch: Any,
  *,
  seed: int = 0,
) -> Steps:
  """Compiles the update of every count that training draws.

  Args:
    config: its counts and probabilities.
    loss: of (params, batch, n) for n x n tokens per image, n static.
    optimizer: of params.
    params, batch: arrays or jax.ShapeDtypeStructs of what the steps will get.
    seed: of the draws.
  """
  state = jax.eval_shape(optimizer.init, params)
  updates = {}
  for count in config.counts:
    if config.probs and not config.probs[config.counts.index(count)]:
      continue
    side = tokenflex.side_of('compile_steps', count)

    def one(params, batch, side=side):
      return loss(params, batch, side)

    update = jax.jit(training.step(one, optimizer))
    updates[count] = update.lower(params, state, batch).compile()
  return Steps(config, seed, updates)
