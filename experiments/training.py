"""Trains a MosaicQA model; resumable, cached by what went into it.

Two phases, as with larger models of this kind:

  vision   the ViT and its probe, on single frames full of digits: every patch
           has a label, so it takes seconds where questions would take hours
  answers  projector and decoder (and the ViT, unless `freeze_vision`), on
           questions about videos: cross-entropy of the answers, plus
           `probe_weight` times the probe's

AdamW, a linear warm-up and a cosine to 2 % of the learning rate in each phase;
gradients are clipped to a norm of 1. A batch is drawn from (seed, step) alone,
so a run that was killed goes on where its last checkpoint is and ends with the
same bits.

The folder is that of experiments.training_files.
"""

import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from experiments import training_files
from jaxq.data import digits as digits_lib
from jaxq.data import mosaic, mosaic_variants, packaged, packages
from jaxq.io import manifest, trees
from jaxq.parallel import arrays, preemption
from jaxq.parallel import mesh as mesh_lib
from jaxq.tokens import training as steps
from models import vision_language

VERSION = 1  # Of the training: raised where the same config would differ.
PHASES = ('vision', 'answers')

Params = Mapping[str, Any]
Batch = Mapping[str, Any]
_VISION = ('probe', 'tower')  # What the first phase trains.


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """How to train.

  Attributes:
    vision_steps, steps: of the two phases; either may be 0.
    vision_batch, batch: frames, videos in a step.
    learning_rate, vision_learning_rate: at the end of `warmup` steps.
    weight_decay: of AdamW.
    probe_weight: of the probe's loss in the second phase.
    freeze_vision: whether the second phase leaves the ViT alone.
    seed: of the parameters; the data have their own.
    save_every, log_every: steps.
  """

  vision_steps: int = 2000
  steps: int = 20000
  vision_batch: int = 64
  batch: int = 64
  learning_rate: float = 1e-3
  vision_learning_rate: float = 3e-3
  warmup: int = 50
  weight_decay: float = 1e-3
  probe_weight: float = 0.1
  freeze_vision: bool = False
  seed: int = 0
  save_every: int = 500
  log_every: int = 50

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      least = int(
        field.name in ('batch', 'vision_batch', 'save_every', 'log_every')
      )
      if value < least:
        raise ValueError(
          f'TrainConfig: {field.name}={value}; it must be at least {least}.'
        )
    if not self.vision_steps + self.steps:
      raise ValueError(
        'TrainConfig: vision_steps=0 and steps=0; there is nothing to train. '
        'Give one of them.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """data, model and training; equal ones give the same parameters."""

  data: mosaic.MosaicConfig
  model: vision_language.VisionLanguageConfig
  train: TrainConfig

  @property
  def description(self) -> dict[str, Any]:
    """All of it as JSON, with the versions of code and data."""
    wheel = packages.PACKAGES['digits'].wheels[0]
    description = {
      name: dataclasses.asdict(getattr(self, name))
      for name in ('data', 'model', 'train')
    }
    for name in ('save_every', 'log_every'):  # They do not change the result.
      del description['train'][name]
    description['versions'] = {
      'data': mosaic.VERSION,
      'digits': wheel.members[0].sha256,
      'model': vision_language.VERSION,
      'train': VERSION,
    }
    return json.loads(json.dumps(description))

  @property
  def content_hash(self) -> str:
    """16 hexadecimal digits of the description."""
    return training_files.content_hash(self.description)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
  """A trained model: what it is for, and its parameters."""

  data: mosaic.MosaicConfig
  model: vision_language.VisionLanguageConfig
  params: Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
  """What a finished step reports: phase, steps done of it, loss, accuracy."""

  phase: str
  step: int
  loss: float
  accuracy: float
  seconds: float


def fit(
  data: mosaic.MosaicConfig, model: vision_language.VisionLanguageConfig
) -> vision_language.VisionLanguageConfig:
  """The model with the grid, the variant and the words of the data.

  Raises:
    ValueError: a patch that does not divide a cell.
  """
  side = digits_lib.SIDE
  if side % model.patch_size:
    raise ValueError(
      f'--model: patch_size={model.patch_size}; a cell has {side} pixels, '
      f'which it must divide. Use 2, 4 or {side}.'
    )
  times = side // model.patch_size
  return dataclasses.replace(
    model,
    variant=data.variant,
    frames=data.frames,
    rows=data.rows * times,
    columns=data.columns * times,
    vocab_size=len(mosaic.VOCABULARY),
    num_classes=digits_lib.CLASSES + 1,
    audio_size=mosaic.TONES if data.variant == 'audio' else 0,
  )


def folder_of(job: Job) -> pathlib.Path:
  """Where a job is cached: $JAXQ_CACHE/mosaicqa/HASH."""
  return packaged.cache_dir() / 'mosaicqa' / job.content_hash


def load(folder: str | os.PathLike, variant: str | None = None) -> Trained:
  """A trained model.

  Args:
    folder: that `train` wrote.
    variant: of the data it must be for; None: any.

  Raises:
    FileNotFoundError: no such folder, or none of a finished training.
    ValueError: it is for another variant, or damaged.
  """
  folder = pathlib.Path(folder)
  if not (
    folder / training_files.CONFIG
  ).is_file() or not training_files.is_complete(folder):
    raise FileNotFoundError(
      f'{folder}: holds no trained MosaicQA model; it is a folder that '
      'experiments.train finished. Train it, or give another folder.'
    )
  found = manifest.read_json(folder / training_files.CONFIG)
  data = mosaic.MosaicConfig(
    **{**found['data'], 'questions': tuple(found['data']['questions'])}
  )
  if variant is not None and data.variant != variant:
    raise ValueError(
      f'{folder}: is a model of the variant {data.variant!r}; {variant!r} was '
      f'asked for. Train that variant, or ask for {data.variant!r}.'
    )
  return Trained(
    data=data,
    model=vision_language.VisionLanguageConfig(**found['model']),
    params=trees.load(folder / training_files.PARAMS),
  )


def train(
  job: Job,
  folder: str | os.PathLike,
  *,
  mesh: Mesh | None = None,
  report: Callable[[Progress], None] = lambda progress: None,
  stop_after: int | None = None,
) -> bool:
  """Trains, or goes on with, a job.

  Args:
    job: what.
    folder: new, or of this same job.
    mesh: batches go over `data`, matrices over `model`; None: one device.
    report: called every `log_every` steps.
    stop_after: steps after which to stop with a checkpoint, for tests.

  Returns:
    Whether it is complete now.

  Raises:
    ValueError: the folder is of another job, or is damaged.
    preemption.Preempted: told to stop; the state is saved.
  """
  folder = pathlib.Path(folder)
  training_files.claim(folder, job.description)
  if training_files.is_complete(folder):
    return True
  saved = training_files.restore(folder, PHASES)
  params = _init(job) if saved is None else saved['params']
  left = stop_after
  for index, phase in enumerate(PHASES):
    if saved is not None and index < saved['phase']:
      continue
    trainer = _Trainer(job, phase, params, mesh)
    if saved is not None and index == saved['phase']:
      trainer.resume(saved)
    end = trainer.steps
    if left is not None:
      end = min(end, trainer.step + left)
      left -= end - trainer.step
    _run(trainer, end, folder, report)
    if trainer.step < trainer.steps:
      return False
    params = trainer.params
  training_files.finish(folder, arrays.fetch(params))
  return True


def losses(
  config: vision_language.VisionLanguageConfig,
  params: Params,
  batch: Batch,
  probe_weight: float,
) -> tuple[jax.Array, jax.Array]:
  """Mean loss and accuracy over the answers of a batch of videos."""
  model: Any = vision_language.VisionLanguage(config)
  logits, probe = model.apply(
    {'params': params}, batch['frames'], batch['text'], batch.get('audio')
  )
  loss, accuracy = _cross_entropy(logits, batch['targets'])
  seen, _ = _cross_entropy(probe, patch_classes(config, batch['cells']))
  return loss + probe_weight * seen, accuracy


def vision_losses(
  config: vision_language.VisionLanguageConfig, params: Params, batch: Batch
) -> tuple[jax.Array, jax.Array]:
  """Mean loss and accuracy of the probe over the patches of a batch."""
  probe: Any = vision_language.VisionLanguage(config).apply(
    {'params': params}, batch['frames'], method='classify'
  )
  return _cross_entropy(probe, patch_classes(config, batch['cells']))


def patch_classes(
  config: vision_language.VisionLanguageConfig, cells: jax.Array
) -> jax.Array:
  """Cells (B, T, rows, columns) -> the class of every patch (B, N)."""
  times = digits_lib.SIDE // config.patch_size
  fine = jnp.repeat(jnp.repeat(cells, times, axis=2), times, axis=3)
  return fine.reshape(cells.shape[0], -1)


def _cross_entropy(
  logits: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Mean over targets (...) that are not IGNORE: loss and accuracy."""
  counted = targets != mosaic.IGNORE
  hits = counted & (jnp.argmax(logits, axis=-1) == targets)
  total = jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1.0)
  loss = steps.cross_entropy(logits, targets, counted)
  return loss, jnp.sum(hits, dtype=jnp.float32) / total


class _Trainer:
  """One phase: its data, its optimizer and where it is.

  Attributes:
    phase, steps: name and length.
    step: steps done.
    params: all of the model's.
    state: of the optimizer, for the trained part of them.
  """

  def __init__(
    self, job: Job, phase: str, params: Params, mesh: Mesh | None
  ) -> None:
    t = job.train
    self._job, self._mesh, self.phase = job, mesh, phase
    vision = phase == 'vision'
    self.steps = t.vision_steps if vision else t.steps
    self._names = tuple(
      name
      for name in sorted(params)
      if (name in _VISION) == vision or not (vision or t.freeze_vision)
    )
    rules: mesh_lib.Rules = ()
    if mesh is not None:
      rules = vision_language.sharding_rules(job.model, mesh.shape['model'])
    self.params = mesh_lib.place(dict(params), rules, mesh)
    self.step = 0
    optimizer, self._update = _program(job, phase)
    self.state = jax.jit(optimizer.init)(self._split(self.params)[0])
    self._source = mosaic_variants.samples(_phase_data(job, phase))

  def resume(self, saved: Mapping[str, Any]) -> None:
    """Goes on from what `checkpoint` gave."""
    leaves, structure = jax.tree.flatten(self.state)
    stored = [saved['optimizer'][f'{i:04d}'] for i in range(len(leaves))]
    placed = [
      arrays.put(np.asarray(new).reshape(old.shape), old.sharding)
      for new, old in zip(stored, leaves, strict=True)
    ]
    self.state = jax.tree.unflatten(structure, placed)
    self.step = int(saved['step'])

  def checkpoint(self) -> dict[str, Any]:
    """All that `resume` needs, on the host."""
    leaves = jax.tree.leaves(arrays.fetch(self.state))
    return {
      'phase': np.int32(PHASES.index(self.phase)),
      'step': np.int32(self.step),
      'params': arrays.fetch(self.params),
      # One-dimensional, as a scalar is no array to every reader.
      'optimizer': {
        f'{i:04d}': np.atleast_1d(leaf) for i, leaf in enumerate(leaves)
      },
    }

  def batches(self) -> Any:
    """An iterator over (step + 1, batch on the devices)."""
    t = self._job.train
    size = t.vision_batch if self.phase == 'vision' else t.batch
    dataset = mosaic.dataset(self._source, size, start=self.step)
    names = ('frames', 'cells', 'text', 'targets', 'audio')
    for i in range(self.steps - self.step):
      batch = dataset[i]
      yield {n: self._put(batch[n]) for n in names if n in batch}

  def update(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """One step; loss and accuracy of its batch."""
    trained, rest = self._split(self.params)
    trained, self.state, out = self._update(trained, rest, self.state, batch)
    self.params = {**rest, **trained}
    self.step += 1
    return out

  def _split(self, params: Params) -> tuple[dict, dict]:
    """The trained parameters and the others."""
    trained = {k: v for k, v in params.items() if k in self._names}
    return trained, {k: v for k, v in params.items() if k not in self._names}

  def _put(self, array: np.ndarray) -> jax.Array:
    if self._mesh is None:
      return jnp.asarray(array)
    return arrays.put(array, mesh_lib.batch_sharding(self._mesh))


@functools.cache
def _program(job: Job, phase: str) -> tuple[Any, Callable[..., Any]]:
  """The optimizer of a phase, and its jitted step, compiled once a process.

  update(trained, rest, state, batch) -> (trained, state, (loss, accuracy))
  """
  t = job.train
  vision = phase == 'vision'
  length = t.vision_steps if vision else t.steps
  rate = t.vision_learning_rate if vision else t.learning_rate
  warmup = min(t.warmup, max(length // 2, 1))
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, rate, warmup, max(length, warmup + 1), rate * 0.02
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(schedule, b2=0.98, weight_decay=t.weight_decay),
  )

  def loss(trained, rest, batch):
    params = {**rest, **trained}
    if vision:
      return vision_losses(job.model, params, batch)
    weight = 0.0 if t.freeze_vision else t.probe_weight
    return losses(job.model, params, batch, weight)

  step = steps.step(loss, optimizer)

  def update(trained, rest, state, batch):
    trained, state, value, accuracy = step(trained, state, rest, batch)
    return trained, state, (value, accuracy)

  return optimizer, jax.jit(update, donate_argnums=(0, 2))


def _phase_data(job: Job, phase: str) -> mosaic.MosaicConfig:
  """Of the first phase: frames by themselves, with a digit in most cells."""
  data = dataclasses.replace(job.data, split='train')
  if phase == 'answers':
    return data
  cells = data.rows * data.columns
  return dataclasses.replace(
    data,
    variant='image',
    frames=1,
    min_digits=cells - cells // 8,
    max_digits=cells,
    questions=('count',),
    questions_per_sample=1,
  )


def _init(job: Job) -> Params:
  """Untrained parameters."""
  c = job.model
  size = c.patch_size
  frames = jnp.zeros((1, c.frames, c.rows * size, c.columns * size))
  text = jnp.zeros((1, 1, mosaic.QUESTION_LENGTH), jnp.int32)
  audio = jnp.zeros((1, c.frames, 1, c.audio_size)) if c.audio_size else None
  model = vision_language.VisionLanguage(c)
  made = jax.jit(model.init)(
    jax.random.key(job.train.seed), frames, text, audio
  )
  return made['params']


def _run(
  trainer: _Trainer,
  end: int,
  folder: pathlib.Path,
  report: Callable[[Progress], None],
) -> None:
  """Trains until `end` steps are done, with checkpoints."""
  t = trainer._job.train
  start, first = time.perf_counter(), trainer.step
  batches = trainer.batches()
  while trainer.step < end:
    loss, accuracy = trainer.update(next(batches))
    step = trainer.step
    if step % t.log_every == 0 or step == end:
      progress = Progress(
        phase=trainer.phase,
        step=step,
        loss=float(loss),
        accuracy=float(accuracy),
        seconds=(time.perf_counter() - start) / (step - first),
      )
      _check_finite(progress)
      training_files.log(folder, progress)
      report(progress)
    if step % t.save_every == 0 or step == end:
      with preemption.finishing():
        training_files.save(folder, trainer.checkpoint())
      preemption.check(f'step {step} of {trainer.phase} is saved')


def _check_finite(progress: Progress) -> None:
  if not np.isfinite(progress.loss):
    raise ValueError(
      f'training: the loss is {progress.loss} at step {progress.step} of '
      f'{progress.phase}; it must be finite. Train again with a smaller '
      'learning_rate.'
    )
