"""What the training of a reducer is: a state, a step, and what is learned.

  program = training.build(setting)
  state = program.init()
  state, figures = program.update(state, step, batch)   steps times
  learned = program.finish(state)

A pass over data (EmbedLens) is one too: its state is what it has seen. Beside
these types stand what programs share: videos behind the frozen ViT, and the
loss of their answers.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import training
from jaxq.data import mosaic
from jaxq.tokens import interface
from jaxq.tokens import training as steps
from models import vision_language, visual_tokens

Batch = Mapping[str, np.ndarray]
Figures = Mapping[str, Any]
Model = vision_language.VisionLanguageConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """How much is looked at, whatever is trained.

  steps: of `batch` videos with `questions` questions each. seed: of the videos,
  the parameters and all draws. save_every, log_every: steps.
  """

  steps: int = 2000
  batch: int = 8
  questions: int = 4
  seed: int = 0
  save_every: int = 500
  log_every: int = 50

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value, least = getattr(self, field.name), int(field.name != 'seed')
      if value < least:
        raise ValueError(
          f'Schedule: {field.name}={value}; it must be at least {least}.'
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
  """What a program is made of.

  reducer: fitted to the model. config: of the training. trained: the model.
  """

  reducer: Any
  config: Any
  schedule: Schedule
  trained: training.Trained

  @property
  def example(self) -> tuple[interface.TokenSet, jax.Array]:
    """A token set and a query (1, L, C) of zeros, of the model's shapes."""
    model = self.trained.model
    tokens = jnp.zeros((1, model.num_visual, model.hidden_size))
    query = jnp.zeros((1, mosaic.QUESTION_LENGTH, model.hidden_size))
    return interface.token_set(tokens, grid=model.grid), query

  def key(self, step: int) -> jax.Array:
    """The random key of a step; of the parameters: -1."""
    return jax.random.fold_in(jax.random.key(self.schedule.seed), step + 1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Learned:
  """reducer: its params. model: what replaces parts of the model's, by name."""

  reducer: Any
  model: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """A training; the module docstring has its order.

  init: () -> state, a tree of arrays. update: (state, step, batch) -> state,
  figures; the step counts from 0 and is all that a draw may depend on. finish:
  state -> what is learned. figures are numbers by name, one of them 'loss'
  where there is one.
  """

  init: Callable[[], Any]
  update: Callable[[Any, int, Batch], tuple[Any, Figures]]
  finish: Callable[[Any], Learned]


def as_it_is(reducer: Any, model: Model) -> Any:
  """The reducer: its fields fit any model."""
  del model
  return reducer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
  """How one reducer is trained.

  config: of the training, with its defaults. build: setting -> program. fit:
  the reducer with heads and widths of the model. features: whether it reads
  the encoder's features, in place of the projector.
  """

  config: Any
  build: Callable[[Setting], Program]
  fit: Callable[[Any, Model], Any] = as_it_is
  features: bool = False


def viewer(
  trained: training.Trained,
) -> Callable[[Batch], visual_tokens.Visual]:
  """batch -> its videos behind the frozen ViT and projector."""
  see = jax.jit(visual_tokens.visual_of, static_argnums=0)

  def view(batch: Batch) -> visual_tokens.Visual:
    audio = batch.get('audio')
    return see(trained.model, trained.params, batch['frames'], audio)

  return view


def asked(targets: jax.Array) -> jax.Array:
  """Where targets (...) are answers."""
  return targets != mosaic.IGNORE


def hits(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Logits (..., L, V), targets (..., L) -> whether right (...) bool."""
  right = jnp.argmax(logits, axis=-1) == targets
  return jnp.all(right | ~asked(targets), axis=-1)


def answer_loss(
  logits: jax.Array, targets: jax.Array, counted: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy and accuracy of the questions that count.

  Args:
    logits: (..., L, V).
    targets: (..., L) int32, IGNORE but for the answer.
    counted: (...) bool.
  """
  where = counted[..., None] & asked(targets)
  loss = steps.cross_entropy(logits, targets, where)
  right = jnp.sum(hits(logits, targets) & counted, dtype=jnp.float32)
  number = jnp.sum(counted, dtype=jnp.float32)
  return loss, right / jnp.maximum(number, 1.0)


def repeated(tree: Any, times: int) -> Any:
  """Every row of a tree's arrays so many times, one behind the other."""
  return jax.tree.map(lambda a: jnp.repeat(a, times, axis=0), tree)


def without_aux(reduced: interface.Reduced) -> interface.Reduced:
  """A reduction that a decoder may read under jit."""
  return dataclasses.replace(reduced, aux={})
