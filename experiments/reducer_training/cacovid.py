"""CaCoVID on MosaicQA: a policy learns by what the frozen model answers.

2026, https://arxiv.org/abs/2602.01649 (jaxq.tokens.cacovid_training). A sample
is one question about one video of the batch; a step visits each `visits` times.
The policy's layer starts as the model's first block.

The reward is whether the answer is right, an answer being drawn with
temperature 1 and top-p. As it is one token here, the reward's mean over draws
is known, the probability of the right token among what top-p leaves, and is
taken in place of one draw.

Questions that are answered right from the text alone teach nothing of the video
(the paper's blind test): of a video, the first question that is not is taken.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.reducer_training import program
from jaxq.data import mosaic
from jaxq.decode import sampling
from jaxq.tokens import (
  cacovid,
  cacovid_sampling,
  cacovid_training,
  interface,
  primitives,
)
from models import visual_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacovidTrainConfig(cacovid_training.TrainConfig):
  """top_p: of the answers. blind: whether the blind test chooses questions."""

  top_p: float = 0.95
  blind: bool = True


def fit(
  reducer: cacovid.CaCoVIDConfig, model: program.Model
) -> cacovid.CaCoVIDConfig:
  """With a layer of the shape of the model's blocks.

  Raises:
    ValueError: a reducer without a policy.
  """
  if reducer.scorer != 'policy':
    raise ValueError(
      f'cacovid: scorer={reducer.scorer!r} has nothing to train; leave scorer '
      "out, which is 'policy'."
    )
  return dataclasses.replace(
    reducer,
    num_heads=model.num_heads,
    num_kv_heads=model.num_heads,
    head_dim=model.head_dim,
    intermediate_size=model.intermediate_size,
    qkv_bias=False,
    norm_eps=1e-5,
  )


def build(setting: program.Setting) -> program.Program:
  """The program of experiments.reducer_training.program."""
  config: CacovidTrainConfig = setting.config
  model, frozen = setting.trained.model, setting.trained.params
  schedule, view = setting.schedule, program.viewer(setting.trained)
  cells = model.rows * model.columns
  cacovid_sampling.kept_per_frame(min(config.rate_min, config.rate), cells)
  most = model.frames * cacovid_sampling.kept_per_frame(
    max(config.rate_max, config.rate), cells
  )
  optimizer = cacovid_training.optimizer(
    config, schedule.steps * schedule.batch * config.visits
  )
  run = cacovid_training.programs(config, setting.reducer, optimizer)
  rewards = jax.jit(_rewards, static_argnums=(0, 1, 2))
  blind = jax.jit(_blind, static_argnums=0)

  def init() -> dict[str, Any]:
    ts, _ = setting.example
    params = setting.reducer.init_params(setting.key(-1), ts)
    params = cacovid.from_block(params, frozen['blocks_0'])
    return {'params': params, 'optimizer': optimizer.init(params)}

  def update(state, index, batch):
    params, moments, lines = state['params'], state['optimizer'], []
    visual = view(batch)
    chosen = np.zeros(len(batch['text']), int)
    if config.blind:
      easy = blind(model, frozen, visual, batch['text'], batch['targets'])
      chosen = np.argmin(np.asarray(easy), axis=1)
    for i, q in enumerate(chosen):
      ts = jax.tree.map(lambda a, i=i: a[i : i + 1], visual.tokens)
      text, targets = batch['text'][i, q], batch['targets'][i, q]

      def rewards_of(keep, ts=ts, text=text, targets=targets):
        return rewards(
          model, config.top_p, most, frozen, keep, ts, text, targets
        )

      params, moments, log = cacovid_training.train_on_sample(
        run,
        setting.key(index * schedule.batch + i),
        params,
        moments,
        ts,
        visual_tokens.question_of(model, frozen, jnp.asarray(text)[None]),
        rewards_of,
        query_mask=jnp.asarray(text != mosaic.TOKENS['pad'])[None],
      )
      lines += log
    figures = {
      name: float(np.mean([line[name] for line in lines])) for name in lines[0]
    }
    return {'params': params, 'optimizer': moments}, figures

  return program.Program(
    init=init,
    update=update,
    finish=lambda state: program.Learned(reducer=state['params']),
  )


def _rewards(
  model: program.Model,
  top_p: float,
  most: int,
  params: Any,
  keep: jax.Array,
  ts: interface.TokenSet,
  text: jax.Array,
  targets: jax.Array,
) -> jax.Array:
  """Rewards (G,) of sets keep (G, N) of one video's tokens, at most `most`."""
  G = keep.shape[0]
  index, used = primitives.compact(keep, most)
  kept = primitives.selected(program.repeated(ts, G), index, used)
  each = jnp.broadcast_to(text, (G, 1, text.shape[0]))
  logits = visual_tokens.answer(model, params, kept, each)[:, 0]  # (G, L, V)
  at = jnp.argmax(program.asked(targets))
  how = sampling.Sampling(temperature=1.0, top_p=top_p)
  said = jax.nn.softmax(sampling.filter_logits(logits[:, at], how))
  return said[:, targets[at]]


def _blind(
  model: program.Model,
  params: Any,
  visual: visual_tokens.Visual,
  text: jax.Array,
  targets: jax.Array,
) -> jax.Array:
  """Which questions (B, Q) are answered right without any visual token."""
  none = dataclasses.replace(
    visual.tokens, mask=jnp.zeros_like(visual.tokens.mask)
  )
  return program.hits(visual_tokens.answer(model, params, none, text), targets)
