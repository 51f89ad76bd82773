"""CaCoVID's training: combinatorial policy optimisation.

2026, https://arxiv.org/abs/2602.01649. For one question about one video,

  1. sample_combinations    G sets of k T tokens: one by content (a control),
                            most by the token scores, some by the frame scores
                            (jaxq.tokens.cacovid_sampling);
  2. the frozen model answers from each set; a reward in [0, 1] for each
     (jaxq.tokens.cacovid_rewards);
  3. remember               sets and rewards, over all visits to this sample;
  4. policy_loss            ratio clipping on every bit of every set, with the
                            advantage of its reward within the memory.

Bits are scored as independent Bernoulli variables though they are drawn without
replacement: so does the reference, and the ratio is not that of the sampler.
The share kept is the sample's difficulty (`next_rate`); it is static, as it
shapes the sets, and takes few values.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxq.tokens import cacovid, cacovid_sampling, interface, training


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(cacovid_sampling.SamplingConfig):
  """How sets are drawn, and what is learned from them.

  Attributes:
    rate, rate_min, rate_max: share of the tokens kept, and its range.
    clip_low, clip_high: of the ratio.
    beta: weight of the divergence from fair coins.
    visits: to each sample.
    learning_rate, layer_rate: peak rates, of heads and of the copied layer.
    weight_decay, clip_norm: of AdamW and of the gradient.
  """

  rate: float = 0.02
  rate_min: float = 0.01
  rate_max: float = 0.12
  clip_low: float = 0.2
  clip_high: float = 0.28
  beta: float = 0.0
  visits: int = 5
  learning_rate: float = 1e-6
  layer_rate: float = 1e-7
  weight_decay: float = 0.01
  clip_norm: float = 5.0

  def __post_init__(self):
    super().__post_init__()
    if not 0 < self.rate_min <= self.rate_max <= 1 or not 0 < self.rate <= 1:
      raise ValueError(
        f'TrainConfig: rate={self.rate}, rate_min={self.rate_min}, rate_max='
        f'{self.rate_max}; shares in (0, 1] are needed, rate_min at most '
        'rate_max.'
      )
    if self.visits < 1:
      raise ValueError(
        f'TrainConfig: visits={self.visits}; each sample needs at least 1. The '
        'paper has 5.'
      )


class Memory(NamedTuple):
  """Sets and rewards of all visits to a sample; of fixed size.

  token_masks (V, tokens, N) bool, token_rewards (V, tokens), frame_masks (V,
  frames, T) bool, frame_rewards (V, frames), visits () int32 made so far.
  u (N, 2), v (T, 2): logits of the first visit, which all ratios refer to.
  """

  token_masks: jax.Array
  token_rewards: jax.Array
  frame_masks: jax.Array
  frame_rewards: jax.Array
  visits: jax.Array
  u: jax.Array
  v: jax.Array


def empty_memory(u: jax.Array, v: jax.Array, config: TrainConfig) -> Memory:
  """Before the first visit, whose logits u (N, 2) and v (T, 2) are kept."""
  V, (N, T) = config.visits, (u.shape[0], v.shape[0])
  return Memory(
    token_masks=jnp.zeros((V, config.tokens, N), bool),
    token_rewards=jnp.zeros((V, config.tokens)),
    frame_masks=jnp.zeros((V, config.frames, T), bool),
    frame_rewards=jnp.zeros((V, config.frames)),
    visits=jnp.zeros((), jnp.int32),
    u=jax.lax.stop_gradient(u),
    v=jax.lax.stop_gradient(v),
  )


def remember(
  memory: Memory, sets: cacovid_sampling.Combinations, rewards: jax.Array
) -> Memory:
  """The memory with one more visit; rewards (G,) in the order of the sets.

  The content set is a control and is not learned from.
  """
  n, i = memory.token_rewards.shape[1], memory.visits
  return memory._replace(
    token_masks=memory.token_masks.at[i].set(sets.keep[1 : 1 + n]),
    token_rewards=memory.token_rewards.at[i].set(rewards[1 : 1 + n]),
    frame_masks=memory.frame_masks.at[i].set(sets.frames),
    frame_rewards=memory.frame_rewards.at[i].set(rewards[1 + n :]),
    visits=i + 1,
  )


def advantages(rewards: jax.Array, visits: jax.Array) -> jax.Array:
  """(R - mean) / (std + 1e-4) of rewards (V, n) over the visits made.

  The standard deviation is the sample's (n - 1). 0 in visits to come.
  """
  made = (jnp.arange(rewards.shape[0]) < visits)[:, None]
  number = jnp.maximum(visits * rewards.shape[1], 2).astype(jnp.float32)
  mean = jnp.sum(jnp.where(made, rewards, 0.0)) / number
  off = jnp.where(made, rewards - mean, 0.0)
  std = jnp.sqrt(jnp.sum(off * off) / (number - 1))
  return off / (std + 1e-4)


def balanced_weights(bits: jax.Array) -> jax.Array:
  """m (1 - mean) + (1 - m) mean of bits (..., N): kept and dropped in total
  weigh the same.
  """
  m = bits.astype(jnp.float32)
  mean = jnp.mean(m, axis=-1, keepdims=True)
  return m * (1 - mean) + (1 - m) * mean


def clipped_loss(
  logits: jax.Array,
  old: jax.Array,
  bits: jax.Array,
  advantage: jax.Array,
  config: TrainConfig,
) -> jax.Array:
  """-min(ratio A, clip(ratio) A) + beta KL of every bit: (V, n, N) float32.

  Args:
    logits, old: (N, 2), now and at the first visit.
    bits: (V, n, N) bool.
    advantage: (V, n).
    config: the clip and beta.
  """

  def of_bits(logits):
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))[None, None]
    return jnp.where(bits, logp[..., 1], logp[..., 0])

  logp = of_bits(logits)
  ratio = jnp.exp(logp - of_bits(old))
  clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
  A = advantage[..., None]
  loss = -jnp.minimum(ratio * A, clipped * A)
  if config.beta:
    to_coin = math.log(0.5) - logp
    loss = loss + config.beta * (jnp.exp(to_coin) - to_coin - 1)
  return loss


def policy_loss(
  u: jax.Array, v: jax.Array, memory: Memory, config: TrainConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss of a memory under logits u (N, 2) and v (T, 2); and its parts."""
  V = memory.token_rewards.shape[0]
  made = (jnp.arange(V) < memory.visits).astype(jnp.float32)[:, None]

  def mean(of_sets):  # (V, n) -> ()
    number = jnp.maximum(jnp.sum(made) * of_sets.shape[1], 1.0)
    return jnp.sum(of_sets * made) / number

  loss = clipped_loss(
    u,
    memory.u,
    memory.token_masks,
    advantages(memory.token_rewards, memory.visits),
    config,
  )
  w = balanced_weights(memory.token_masks)
  token = mean(jnp.sum(w * loss, axis=2) / (jnp.sum(w, axis=2) + 1e-7))
  loss = clipped_loss(
    v,
    memory.v,
    memory.frame_masks,
    advantages(memory.frame_rewards, memory.visits),
    config,
  )
  frame = mean(jnp.mean(loss, axis=2))
  aux = {
    'token_loss': token,
    'frame_loss': frame,
    'accuracy': mean(memory.token_rewards),
    'frame_accuracy': mean(memory.frame_rewards),
  }
  return token + frame, aux


def next_rate(rate: float, accuracy: float, config: TrainConfig) -> float:
  """The share kept at the next visit: fewer where it is easy, more where hard.

  The next sample starts from config.rate again.
  """
  if accuracy >= 0.875:
    return max(rate / 2, min(config.rate_min, config.rate))
  if accuracy <= 0.125:
    return min(2 * rate, max(config.rate_max, config.rate))
  return rate


def prompt_loss(
  config: TrainConfig, reducer: cacovid.CaCoVIDConfig
) -> training.Loss:
  """loss(params, ts, query, query_mask, memory), for training.step.

  One sample: batches of 1.
  """

  def loss(
    params: Any,
    ts: interface.TokenSet,
    query: jax.Array,
    query_mask: jax.Array | None,
    memory: Memory,
  ):
    u, v = reducer.logits(params, ts, query, query_mask)
    return policy_loss(u[0], v[0], memory, config)

  return loss


def optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
  """AdamW with clip and cosine; the copied layer at a rate of its own.

  Biases and the scales of norms do not decay.
  """

  def make(rate):
    return optax.adamw(
      optax.cosine_decay_schedule(rate, max(steps, 1)),
      weight_decay=config.weight_decay,
      mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    )

  rates = training.rates(
    ((r'^block', config.layer_rate), (r'', config.learning_rate)), make
  )
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), rates)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
  """What a visit runs, compiled once for all samples of one shape.

  logits: (params, ts, query, query_mask) -> u, v. sample: as
  sample_combinations. remember: as the function. update: (params, state, ts,
  query, query_mask, memory) -> (params, state, loss, aux).
  """

  config: TrainConfig
  logits: Callable[..., tuple[jax.Array, jax.Array]]
  sample: Callable[..., cacovid_sampling.Combinations]
  remember: Callable[..., Memory]
  update: Callable[..., Any]


def programs(
  config: TrainConfig,
  reducer: cacovid.CaCoVIDConfig,
  policy_optimizer: optax.GradientTransformation,
) -> Programs:
  """The programs of a policy that is trained with this optimizer."""
  update = training.step(prompt_loss(config, reducer), policy_optimizer)
  sample = cacovid_sampling.sample_combinations
  return Programs(
    config=config,
    logits=jax.jit(reducer.logits),
    sample=jax.jit(sample, static_argnums=(4, 5)),
    remember=jax.jit(remember),
    update=jax.jit(update),
  )


def train_on_sample(
  run: Programs,
  rng: jax.Array,
  params: Any,
  state: Any,
  ts: interface.TokenSet,
  query: jax.Array,
  rewards_of: Callable[[jax.Array], jax.Array],
  query_mask: jax.Array | None = None,
) -> tuple[Any, Any, list[dict[str, float]]]:
  """All visits to one sample: sample, answer, remember, update.

  Sets of later visits are drawn from the first visit's policy, which the ratios
  refer to; what changes is the share kept.

  Args:
    run: of `programs`.
    rng: a key.
    params, state: of the policy and its optimizer.
    ts, query: one sample, batches of 1; of the tokens nothing is masked.
    rewards_of: keep (G, N) bool -> rewards (G,): the frozen model's answers.
    query_mask: (1, L) bool, False: padding; None: there is none.

  Returns:
    params, state and a line of figures per visit: the share kept, the loss, the
    mean rewards by kind of set, and that of the greedy token set.
  """
  config = run.config
  u, v = run.logits(params, ts, query, query_mask)
  memory, rate, log = empty_memory(u[0], v[0], config), config.rate, []
  a, f = cacovid.margin(u[0]), cacovid.margin(v[0])
  for key in jax.random.split(rng, config.visits):
    sets = run.sample(key, a, f, ts.tokens[0], rate, config)
    rewards = rewards_of(sets.keep)
    memory = run.remember(memory, sets, rewards)
    params, state, loss, aux = run.update(
      params, state, ts, query, query_mask, memory
    )
    log.append(
      {
        'rate': rate,
        'loss': float(loss),
        'content': float(rewards[0]),
        'greedy': float(rewards[1]),
        'token': float(jnp.mean(rewards[1 : 1 + config.tokens])),
        'frame': float(jnp.mean(rewards[1 + config.tokens :])),
      }
    )
    rate = next_rate(rate, float(aux['accuracy']), config)
  return params, state, log
