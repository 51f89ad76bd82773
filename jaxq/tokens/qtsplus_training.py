"""QTSplus' training: a random gate for the choice, and losses on the share.

Li et al., 2025, https://arxiv.org/abs/2511.11910. The answer's cross-entropy
reaches the scores through the gate (straight-through), and the share rho both
through the threshold and through

  L = lambda_t mean (rho M)^2 / n_max^2     compute of attention
    + lambda_m mean rho M / n_max           key/value memory
    + lambda_s mean (rho - mean rho)^2      spread around a running mean

Only the selector is trained; the recipe's data are questions that the language
model answers correctly from all tokens, with its own answers as targets.

The number kept is random, shapes are not: slots for `slack` times the largest
expected number; what goes past them is counted in aux['overflow'].
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxq.tokens import interface, primitives, qtsplus, qtsplus_gate

SOLVERS = ('bisection', 'newton')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """How the selector is trained; the defaults are the paper's code's.

  Attributes:
    tau: of the threshold and of the gate.
    lambda_t, lambda_m, lambda_s: weights of the losses.
    momentum: of the running mean of rho (ours; the code does not say).
    calibrated: whether rho M tokens are kept on average (qtsplus_gate.gate).
    normalize_gate: whether r is divided by its largest before the gate. Raw, r
      is of the order of 1 / M beside tau, and the gate is blind to it.
    solver: of SOLVERS, of the threshold.
    slack: slots over the largest expected number.
    rate: peak of the learning rate; warm-up over `warmup` of the steps, then
      a cosine. clip: of the gradient's norm.
  """

  tau: float = 0.1
  lambda_t: float = 1.0
  lambda_m: float = 1.7
  lambda_s: float = 0.05
  momentum: float = 0.99
  calibrated: bool = True
  normalize_gate: bool = True
  solver: str = 'bisection'
  slack: float = 1.25
  rate: float = 1e-6
  warmup: float = 0.01
  clip: float = 1.0

  def __post_init__(self):
    if self.solver not in SOLVERS:
      raise ValueError(
        f'TrainConfig: solver={self.solver!r}; allowed {sorted(SOLVERS)}.'
      )
    if self.tau <= 0 or self.slack < 1 or not 0 <= self.momentum < 1:
      raise ValueError(
        f'TrainConfig: tau={self.tau}, slack={self.slack}, momentum='
        f'{self.momentum}; allowed tau > 0, slack >= 1, momentum in [0, 1).'
      )


# What the authors' training script sets in place of the defaults, with n_max
# 512 and two mixing layers.
SCRIPT = TrainConfig(tau=0.5, lambda_t=0.1, lambda_m=0.17, lambda_s=0.05)


class RunningMean(NamedTuple):
  """Of rho: mean () float32 and how many steps it has seen () int32."""

  mean: jax.Array
  steps: jax.Array


def running_mean() -> RunningMean:
  """Before the first step; the first batch's mean is taken as it is."""
  return RunningMean(jnp.zeros(()), jnp.zeros((), jnp.int32))


def update_mean(
  state: RunningMean, rho: jax.Array, momentum: float
) -> RunningMean:
  """The state behind a batch's rho (B,); no gradient.

  Under jit over a sharded batch the mean is over all of it.
  """
  batch = jax.lax.stop_gradient(jnp.mean(rho))
  mixed = momentum * state.mean + (1 - momentum) * batch
  return RunningMean(jnp.where(state.steps == 0, batch, mixed), state.steps + 1)


def budget_losses(
  rho: jax.Array, number: jax.Array, mean: jax.Array, n_max: int
) -> dict[str, jax.Array]:
  """The three losses, unweighted, of rho (B,) for `number` (B,) tokens."""
  share = rho * number / n_max
  return {
    'compute': jnp.mean(share**2),
    'memory': jnp.mean(share),
    'spread': jnp.mean((rho - mean) ** 2),
  }


def train_slots(
  config: qtsplus.QTSplusConfig, train: TrainConfig, n: int
) -> int:
  """K of a training step on n tokens."""
  share = round(config.rho_max * n * train.slack, 9)
  return max(1, min(n, math.ceil(share)))


def select(
  config: qtsplus.QTSplusConfig,
  train: TrainConfig,
  params: Any,
  ts: interface.TokenSet,
  query: jax.Array,
  query_mask: jax.Array | None,
  rng: jax.Array,
  state: RunningMean,
) -> tuple[interface.Reduced, RunningMean]:
  """The selector as it is trained: a random, differentiable choice.

  Args:
    config, train: static.
    params: of config.init_params.
    ts, query, query_mask: as of config.reduce; n_max does not limit.
    rng: of the gate.
    state: of rho's mean.

  Returns:
    The reduction, with 'rho', 'relevance', 'losses' (weighted sum), the three
    losses and 'overflow' (B,) in aux; and the new state.
  """
  qtsplus.check_query(config, ts, query)
  apply = qtsplus.bind(config, params)
  tokens = qtsplus.project(config, params, ts, query.shape[-1])
  r = apply('relevance', tokens, ts.mask, query, query_mask)
  rho = apply('share', r, ts.mask, query, query_mask)
  gated = r
  if train.normalize_gate:
    gated = r / jnp.maximum(jnp.max(r, axis=1, keepdims=True), 1e-12)
  tau = jnp.float32(train.tau)
  if train.solver == 'newton':
    t = qtsplus_gate.newton_threshold(gated, ts.mask, rho, train.tau)
  else:
    t = qtsplus_gate.solve_threshold(gated, ts.mask, rho, tau)
  keep, s = qtsplus_gate.gate(
    rng, gated, t, ts.mask, train.tau, calibrated=train.calibrated
  )
  index, used = primitives.compact(
    keep, train_slots(config, train, keep.shape[1])
  )
  reduced = primitives.selected(ts, index, used)
  gates = primitives.gather(s, index)[..., None]
  kept = primitives.gather(tokens, index) * gates.astype(tokens.dtype)
  if config.mixing_layers:
    times = qtsplus.times_of(config, reduced.positions)
    kept = apply('mix', kept, used, times)
    kept = jnp.where(used[..., None], kept, jnp.zeros((), kept.dtype))
  number = jnp.sum(ts.mask, axis=1, dtype=jnp.float32)
  mean = jnp.where(state.steps == 0, jnp.mean(rho), state.mean)
  losses = budget_losses(rho, number, jax.lax.stop_gradient(mean), config.n_max)
  total = (
    train.lambda_t * losses['compute']
    + train.lambda_m * losses['memory']
    + train.lambda_s * losses['spread']
  )
  aux = {
    'rho': rho,
    'relevance': r,
    'losses': total,
    'overflow': jnp.sum(keep, axis=1, dtype=jnp.int32) - reduced.count,
    **losses,
  }
  reduced = dataclasses.replace(reduced, tokens=kept, aux=aux)
  if config.renumber:
    axes = reduced.positions.shape[-1]
    reduced = dataclasses.replace(
      reduced, positions=primitives.renumbered(used, axes)
    )
  return reduced, update_mean(state, rho, train.momentum)


def optimizer(train: TrainConfig, steps: int) -> optax.GradientTransformation:
  """AdamW with the recipe's clip, warm-up and cosine over `steps`."""
  warmup = max(1, int(train.warmup * steps))
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, train.rate, warmup, max(steps, warmup + 1)
  )
  return optax.chain(
    optax.clip_by_global_norm(train.clip), optax.adamw(schedule)
  )
