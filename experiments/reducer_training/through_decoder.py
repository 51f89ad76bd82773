"""Reducers whose training is the model's: TokenFLEX, VQToken, and controls.

Their papers train reducer and language model together for the answer's
cross-entropy. The ViT stays frozen here; what is trained is

  reducer   its params, if it has any, at `rate`
  model     the decoder, embeddings and head, at `decoder_rate`; 0: frozen

(AdamW with warm-up and cosine, jaxq.tokens.vqtoken_training). The number of
tokens is one for a whole step, drawn from (seed, step) alone, so that a run
that goes on draws the same: of TokenFLEX's `counts` (arXiv 2504.03154), of
`budgets` for others; one program is compiled for each.

A reducer without params is trained alone with the decoder: the control by which
a trained reducer shows what it adds to a decoder that is used to few tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import token_reduction
from experiments.reducer_training import program
from jaxq.tokens import (
  interface,
  tokenflex,
  tokenflex_training,
  vqtoken,
  vqtoken_attention,
  vqtoken_training,
)
from jaxq.tokens import training as steps
from models import visual_tokens

# Parts of the model behind the seam, by how their names begin.
_DECODER = ('blocks_', 'embed', 'final_norm', 'head')

# (reducer, budgets) -> a reducer per choice, and probabilities.
Choices = Callable[..., tuple[tuple[interface.Config, ...], np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderTrainConfig:
  """How reducer and decoder are trained.

  Attributes:
    rate: peak of the reducer's learning rate.
    decoder_rate: of the decoder's; 0: it is frozen.
    warmup: share of the steps.
    clip: of the gradient's norm.
    budgets: shares of the tokens that steps draw from, evenly; (): the
      reducer's own. TokenFLEX has `counts` instead.
  """

  rate: float = 1e-3
  decoder_rate: float = 3e-4
  warmup: float = 0.03
  clip: float = 1.0
  budgets: tuple[float, ...] = ()

  def __post_init__(self):
    if min(self.rate, self.decoder_rate) < 0 or self.clip <= 0:
      raise ValueError(
        f'DecoderTrainConfig: rate={self.rate}, decoder_rate='
        f'{self.decoder_rate}, clip={self.clip}; rates must not be negative, '
        'clip must be positive.'
      )
    for budget in self.budgets:
      interface.check_ratio('DecoderTrainConfig', 'budgets', budget)


def by_budgets(
  reducer: Any, config: DecoderTrainConfig, model: program.Model
) -> tuple[tuple[interface.Config, ...], np.ndarray]:
  """The reducer at each of the training's budgets, all as likely."""
  del model
  if not config.budgets:
    return (reducer,), np.ones(1)
  fields = {'codes': 0} if isinstance(reducer, vqtoken.VQTokenConfig) else {}
  made = tuple(
    dataclasses.replace(reducer, budget=budget, **fields)
    for budget in config.budgets
  )
  return made, np.full(len(made), 1 / len(made))


def by_counts(
  reducer: tokenflex.TokenFlexConfig,
  config: DecoderTrainConfig,
  model: program.Model,
) -> tuple[tuple[interface.Config, ...], np.ndarray]:
  """The reducer at each of its counts, with their probabilities.

  Raises:
    ValueError: budgets, which counts stand for.
  """
  if config.budgets:
    raise ValueError(
      f'tokenflex: budgets={config.budgets}; it draws from its counts. Give '
      '--token_reducer=tokenflex:counts=4/16.'
    )
  cells = model.rows * model.columns
  made = tuple(
    dataclasses.replace(reducer, budget=count / cells)
    for count in reducer.counts
  )
  return made, tokenflex_training.probabilities(reducer)


def fit_tokenflex(
  reducer: tokenflex.TokenFlexConfig, model: program.Model
) -> tokenflex.TokenFlexConfig:
  """With the projector, of the decoder's width, in place of the model's.

  Raises:
    ValueError: a count that is more than a frame's patches.
  """
  side = min(model.rows, model.columns)
  for count in reducer.counts:
    if count > side * side:
      raise ValueError(
        f'tokenflex: counts={reducer.counts}; a frame of this model has '
        f'{model.rows} x {model.columns} patches, so at most {side * side}. '
        'Give squares up to that, as in tokenflex:counts=1/4/16.'
      )
  return dataclasses.replace(reducer, project=True, features=model.hidden_size)


def fit_vqtoken(
  reducer: vqtoken.VQTokenConfig, model: program.Model
) -> vqtoken.VQTokenConfig:
  """With the model's heads."""
  return dataclasses.replace(reducer, num_heads=model.num_heads)


def build(
  setting: program.Setting,
  *,
  choices: Choices = by_budgets,
  features: bool = False,
  start: Callable[[Any], Any] = lambda params: params,
) -> program.Program:
  """The program of experiments.reducer_training.program.

  Args:
    setting: the reducer looks at no question.
    choices: what a step draws from.
    features: as of `program.Training`.
    start: of the reducer's untrained params, makes those that training starts
      from.
  """
  config: DecoderTrainConfig = setting.config
  model, frozen = setting.trained.model, setting.trained.params
  schedule, view = setting.schedule, program.viewer(setting.trained)
  made, shares = choices(setting.reducer, config, model)
  rules = ((r'^reducer', config.rate), (r'^model', config.decoder_rate))
  optimizer = optax.chain(
    optax.clip_by_global_norm(config.clip),
    vqtoken_training.optimizer(schedule.steps, rules, config.warmup),
  )

  def loss(params, reducer, frozen, visual, text, targets, rng):
    method = token_reduction.Method(
      config=reducer, params=params['reducer'], features=features
    )
    whole = {**frozen, **params['model']}
    reduced = token_reduction.reduce(model, method, whole, visual, None, rng)
    kept = program.without_aux(reduced)
    logits = visual_tokens.answer(model, whole, kept, text)
    counted = program.asked(targets).any(axis=-1)
    value, accuracy = program.answer_loss(logits, targets, counted)
    return value, {'accuracy': accuracy}

  @functools.partial(jax.jit, static_argnums=0)
  def step(which, params, moments, *rest):
    def one(params, *rest):
      return loss(params, made[which], *rest)

    return steps.step(one, optimizer)(params, moments, *rest)

  def init() -> dict[str, Any]:
    ts, _ = setting.example
    if features:
      width = (*ts.tokens.shape[:2], model.vision_size)
      ts = dataclasses.replace(ts, tokens=jnp.zeros(width))
    reducer = setting.reducer.init_params(setting.key(-1), ts)
    params = {
      'reducer': {} if reducer is None else start(reducer),
      'model': decoder_of(frozen) if config.decoder_rate else {},
    }
    if not jax.tree.leaves(params):
      raise ValueError(
        'train_reducer: this reducer has no params and decoder_rate=0; nothing '
        'is left to train. Give a decoder_rate, as 0.0003.'
      )
    return {'params': params, 'optimizer': jax.jit(optimizer.init)(params)}

  def update(state, index, batch):
    which = draw(schedule.seed, index, shares)
    params, moments, value, figures = step(
      which,
      state['params'],
      state['optimizer'],
      frozen,
      view(batch),
      batch['text'],
      batch['targets'],
      setting.key(index),
    )
    return {'params': params, 'optimizer': moments}, {'loss': value, **figures}

  return program.Program(
    init=init,
    update=update,
    finish=lambda state: program.Learned(**state['params']),
  )


def draw(seed: int, step: int, shares: np.ndarray) -> int:
  """Which choice a step takes, as tokenflex_training.sample_count draws."""
  rng = np.random.default_rng([seed, step])
  return int(rng.choice(len(shares), p=shares))


def decoder_of(params: Mapping[str, Any]) -> dict[str, Any]:
  """The parts of a model's parameters that are trained with a reducer."""
  return {
    name: part for name, part in params.items() if name.startswith(_DECODER)
  }


TOKENFLEX = program.Training(
  config=DecoderTrainConfig(),
  build=functools.partial(build, choices=by_counts, features=True),
  fit=fit_tokenflex,
  features=True,
)
VQTOKEN = program.Training(
  config=DecoderTrainConfig(),
  # It begins as the codes alone.
  build=functools.partial(build, start=vqtoken_attention.zero_outputs),
  fit=fit_vqtoken,
)
CONTROL = program.Training(config=DecoderTrainConfig(), build=build)
