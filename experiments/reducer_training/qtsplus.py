"""QTSplus on MosaicQA: the selector learns, everything else is frozen.

Li et al., 2025, https://arxiv.org/abs/2511.11910 (jaxq.tokens.qtsplus_training
has the gate and the losses on the share). A row is a question. Those that the
model answers right from all tokens count, and no others: that is the paper's
data, and the answers are then the model's own (`known`).

The scoring layers start as the model's last block, the mixing ones as its
first. n_max is at most what rho_max allows, or the losses on the share, which
are relative to it, would vanish on a small model.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.reducer_training import program
from jaxq.data import mosaic
from jaxq.tokens import qtsplus, qtsplus_training
from jaxq.tokens import training as steps
from models import visual_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class QtsplusTrainConfig(qtsplus_training.TrainConfig):
  """known: whether only questions count that all tokens answer right."""

  known: bool = True


def fit(
  reducer: qtsplus.QTSplusConfig, model: program.Model
) -> qtsplus.QTSplusConfig:
  """With the model's heads, and an n_max that it can reach.

  Raises:
    ValueError: more mixing layers than the model has blocks.
  """
  if reducer.mixing_layers > model.num_layers:
    raise ValueError(
      f'qtsplus: mixing_layers={reducer.mixing_layers}; they begin as blocks '
      f'of the model, which has {model.num_layers}. Use at most as many.'
    )
  most = math.ceil(round(reducer.rho_max * model.num_visual, 9))
  return dataclasses.replace(
    reducer,
    num_heads=model.num_heads,
    num_kv_heads=model.num_heads,
    n_max=min(reducer.n_max, most),
  )


def build(setting: program.Setting) -> program.Program:
  """The program of experiments.reducer_training.program."""
  config: QtsplusTrainConfig = setting.config
  model, frozen = setting.trained.model, setting.trained.params
  view = program.viewer(setting.trained)
  optimizer = qtsplus_training.optimizer(config, setting.schedule.steps)

  def loss(params, mean, frozen, visual, text, targets, counted, rng):
    # Rows are questions: B videos and their Q questions are B * Q.
    (B, Q, L), ts = text.shape, program.repeated(visual.tokens, text.shape[1])
    text, targets = text.reshape(B * Q, L), targets.reshape(B * Q, L)
    query = visual_tokens.question_of(model, frozen, text)
    asked = text != mosaic.TOKENS['pad']
    reduced, mean = qtsplus_training.select(
      setting.reducer, config, params, ts, query, asked, rng, mean
    )
    aux, kept = reduced.aux, program.without_aux(reduced)
    logits = visual_tokens.answer(model, frozen, kept, text[:, None])
    answered, accuracy = program.answer_loss(
      logits[:, 0], targets, counted.reshape(-1)
    )
    figures = {
      'accuracy': accuracy,
      'rho': jnp.mean(aux['rho']),
      'overflow': jnp.mean(aux['overflow'].astype(jnp.float32)),
    }
    return answered + aux['losses'], (mean, figures)

  step = jax.jit(steps.step(loss, optimizer))

  @jax.jit
  def counts(frozen, visual, text, targets):
    logits = visual_tokens.answer(model, frozen, visual.tokens, text)
    return program.hits(logits, targets)

  def init() -> dict[str, Any]:
    ts, query = setting.example
    params = setting.reducer.init_params(setting.key(-1), ts, query)
    params = from_model(params, frozen, setting.reducer, model.num_layers)
    return {
      'params': params,
      'optimizer': jax.jit(optimizer.init)(params),
      'mean': qtsplus_training.running_mean(),
    }

  def update(state, index, batch):
    visual = view(batch)
    counted = jnp.ones(batch['text'].shape[:2], bool)
    if config.known:
      counted = counts(frozen, visual, batch['text'], batch['targets'])
    params, moments, value, (mean, figures) = step(
      state['params'],
      state['optimizer'],
      state['mean'],
      frozen,
      visual,
      batch['text'],
      batch['targets'],
      counted,
      setting.key(index),
    )
    state = {'params': params, 'optimizer': moments, 'mean': mean}
    return state, {'loss': value, **figures}

  return program.Program(
    init=init,
    update=update,
    finish=lambda state: program.Learned(reducer=state['params']),
  )


def from_model(
  params: Mapping[str, Any],
  model: Mapping[str, Any],
  reducer: qtsplus.QTSplusConfig,
  layers: int,
) -> dict[str, Any]:
  """The selector with the model's blocks in it, and biases of its own (0)."""
  block = functools.partial(_with_biases, params['scoring_0']['attention'])
  return qtsplus.from_blocks(
    params,
    block(model[f'blocks_{layers - 1}']),
    tuple(block(model[f'blocks_{i}']) for i in range(reducer.mixing_layers)),
  )


def _with_biases(
  attention: Mapping[str, Any], block: Mapping[str, Any]
) -> dict[str, Any]:
  """A block whose projections have what those of `attention` have."""
  merged = {
    name: {**attention[name], **projection}
    for name, projection in block['attention'].items()
  }
  return {**block, 'attention': merged}
