"""Trains a reducer; resumable, cached by what went into it.

A batch is drawn from (seed, step) alone, and so is whatever a step draws, so a
run that was killed goes on where its last checkpoint is and ends with the same
bits. Videos are those of the training split under a seed of their own: the
frozen model was not trained on them, and test digits are in none.

The folder is that of experiments.trained_reducers.
"""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from experiments import trained_reducers, training, training_files
from experiments.reducer_training import program, registry
from jaxq import config_text
from jaxq.data import mosaic, mosaic_variants, packaged
from jaxq.parallel import arrays, preemption
from jaxq.tokens import interface
from jaxq.tokens import registry as reducers

VERSION = 1  # Of the trainings: raised where the same job would differ.
_PHASES = ('reducer',)
_VIDEOS = 7919  # Added to the seed, whose videos the model was trained on.


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Job:
  """What is trained, on which model, and how; made by `job`."""

  name: str
  setting: program.Setting

  @property
  def training(self) -> program.Training:
    """The registry's."""
    return registry.TRAININGS[self.name]

  @property
  def description(self) -> dict[str, Any]:
    """All that decides on the result, as JSON."""
    s = self.setting
    schedule = dataclasses.asdict(s.schedule)
    for name in ('save_every', 'log_every'):  # They do not change the result.
      del schedule[name]
    description = {
      'model': {'params': trained_reducers.fingerprint(s.trained.params)},
      'data': dataclasses.asdict(s.trained.data),
      'reducer': {
        'text': reducers.text_of(s.reducer),
        'features': self.training.features,
      },
      'train': config_text.describe(s.config),
      'schedule': schedule,
      'versions': {'data': mosaic.VERSION, 'train': VERSION},
    }
    return json.loads(json.dumps(description))

  @property
  def content_hash(self) -> str:
    """16 hexadecimal digits of the description."""
    return training_files.content_hash(self.description)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
  """What is reported: steps done, and means of their figures since the last."""

  phase: str
  step: int
  figures: Mapping[str, float]
  seconds: float


def job(
  text: str,
  trained: training.Trained,
  schedule: program.Schedule,
  train: str = '',
) -> Job:
  """The training of `--token_reducer=text` on a model.

  Args:
    text: the reducer, as jaxq.tokens.registry.parse reads it.
    trained: the model.
    schedule: how long.
    train: fields of the training, as 'rate=0.001,tau=0.5'.

  Raises:
    ValueError: no such reducer or field, one without a training, or one that
      does not fit the model.
  """
  name, reducer = registry.parse(text)
  training_ = registry.TRAININGS[name]
  config = config_text.parse(
    name + ':' * bool(train) + train,
    {name: training_.config},
    flag='train',
    noun='training',
    example='rate=0.001',
  )
  fitted: interface.Config = training_.fit(reducer, trained.model)
  return Job(
    name=name,
    setting=program.Setting(
      reducer=fitted, config=config, schedule=schedule, trained=trained
    ),
  )


def folder_of(wanted: Job) -> pathlib.Path:
  """Where a job is cached: $JAXQ_CACHE/reducers/HASH."""
  return packaged.cache_dir() / 'reducers' / wanted.content_hash


def train(
  wanted: Job,
  folder: str | os.PathLike,
  *,
  report: Callable[[Progress], None] = lambda progress: None,
  stop_after: int | None = None,
) -> bool:
  """Trains, or goes on with, a job.

  Args:
    wanted: what.
    folder: new, or of this same job.
    report: called every `log_every` steps.
    stop_after: steps after which to stop with a checkpoint, for tests.

  Returns:
    Whether it is complete now.

  Raises:
    ValueError: the folder is of another job, or is damaged; a loss that is not
      finite.
    preemption.Preempted: told to stop; the state is saved.
  """
  folder = pathlib.Path(folder)
  run = wanted.training.build(wanted.setting)
  training_files.claim(folder, wanted.description)
  if training_files.is_complete(folder):
    return True
  schedule, state, done = wanted.setting.schedule, run.init(), 0
  saved = training_files.restore(folder, _PHASES)
  if saved is not None:
    state, done = _unpacked(state, saved['state']), int(saved['step'])
  end = schedule.steps
  if stop_after is not None:
    end = min(end, done + stop_after)
  dataset = mosaic.dataset(_videos(wanted), schedule.batch, start=done)
  start, first, figures = time.perf_counter(), done, []
  for step in range(done, end):
    state, found = run.update(state, step, dataset[step - first])
    figures.append(found)
    done = step + 1
    if done % schedule.log_every == 0 or done == end:
      progress = Progress(
        phase=_PHASES[0],
        step=done,
        figures=_means(figures),
        seconds=(time.perf_counter() - start) / (done - first),
      )
      _check_finite(progress)
      training_files.log(folder, progress)
      report(progress)
      figures = []
    if done % schedule.save_every == 0 or done == end:
      with preemption.finishing():
        training_files.save(folder, _packed(state, done))
      preemption.check(f'step {done} is saved')
  if done < schedule.steps:
    return False
  learned = run.finish(state)
  training_files.finish(
    folder,
    arrays.fetch(
      {
        'reducer': trained_reducers.storable(learned.reducer),
        'model': dict(learned.model),
      }
    ),
  )
  return True


def _videos(wanted: Job) -> Any:
  """The samples that are trained on."""
  s = wanted.setting
  return mosaic_variants.samples(
    dataclasses.replace(
      s.trained.data,
      split='train',
      seed=s.trained.data.seed + _VIDEOS + s.schedule.seed,
      questions_per_sample=s.schedule.questions,
    )
  )


def _packed(state: Any, step: int) -> dict[str, Any]:
  """A checkpoint; leaves by number, as the optimizer's tree is no dict."""
  leaves = jax.tree.leaves(arrays.fetch(state))
  return {
    'phase': np.int32(0),
    'step': np.int32(step),
    # One-dimensional, as a scalar is no array to every reader.
    'state': {f'{i:04d}': np.atleast_1d(leaf) for i, leaf in enumerate(leaves)},
  }


def _unpacked(like: Any, stored: Mapping[str, np.ndarray]) -> Any:
  """The state of a checkpoint, its leaves of the kind of those of `like`."""
  leaves, structure = jax.tree.flatten(like)
  found = []
  for i, leaf in enumerate(leaves):
    value = np.array(stored[f'{i:04d}']).reshape(leaf.shape)
    found.append(jax.numpy.asarray(value) if _on_device(leaf) else value)
  return jax.tree.unflatten(structure, found)


def _on_device(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array)


def _means(figures: list[Mapping[str, Any]]) -> dict[str, float]:
  """The mean of each figure."""
  return {
    name: float(np.mean([float(f[name]) for f in figures]))
    for name in figures[0]
  }


def _check_finite(progress: Progress) -> None:
  loss = progress.figures.get('loss', 0.0)
  if not np.isfinite(loss):
    raise ValueError(
      f'train_reducer: the loss is {loss} at step {progress.step}; it must be '
      'finite. Train again with a smaller rate.'
    )
