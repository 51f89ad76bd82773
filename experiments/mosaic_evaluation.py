"""Accuracy of a trained MosaicQA model on test digits, by kind of question.

Intervals are bootstraps over videos: the questions of one video share its
digits, so drawing questions would pretend that there is more evidence.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import results, training
from jaxq.data import mosaic, mosaic_variants
from jaxq.eval import bootstrap
from models import vision_language

LEAST_ACCURACY = 0.9  # With all tokens; below it a comparison says little.
QUESTIONS = 8  # Of a video.
_BATCH = 32


def source(data: mosaic.MosaicConfig, seed: int = 0) -> Any:
  """The test videos of what a model was trained on."""
  return mosaic_variants.samples(
    dataclasses.replace(
      data, split='test', seed=seed, questions_per_sample=QUESTIONS
    )
  )


def batches(
  data: mosaic.MosaicConfig, videos: int, seed: int = 0
) -> Iterator[Mapping[str, np.ndarray]]:
  """Test videos in batches, the last one smaller.

  Args:
    data: of the training; the split becomes 'test'.
    videos: how many.
    seed: of the videos; another one than the training's by itself, as the
      split is part of what a sample is drawn from.
  """
  drawn = source(data, seed)
  for start in range(0, videos, _BATCH):
    samples = [drawn[i] for i in range(start, min(start + _BATCH, videos))]
    yield {k: np.stack([s[k] for s in samples]) for k in samples[0]}


def hits(logits: Any, targets: Any) -> np.ndarray:
  """Logits (B, Q, L, V), targets (B, Q, L) -> right answers (B, Q) bool."""
  targets = np.asarray(targets)
  right = np.asarray(jnp.argmax(logits, axis=-1)) == targets
  return np.all(right | (targets == mosaic.IGNORE), axis=-1)


def accuracy_metrics(
  right: np.ndarray, kinds: np.ndarray, conventions: Mapping[str, Any]
) -> tuple[results.Metric, ...]:
  """Right answers and kinds (videos, Q) -> accuracy over all, and by kind."""
  found = bootstrap.interval(
    lambda mean: mean,
    right.astype(np.float64),
    config=bootstrap.BootstrapConfig(block=right.shape[1]),
  )
  metrics = [results.Metric.of('accuracy', found, conventions)]
  for i, kind in enumerate(mosaic.KINDS):
    if (kinds == i).any():
      value = float(right[kinds == i].mean())
      metrics.append(results.Metric(name=kind, value=value))
  return tuple(metrics)


def full_accuracy(trained: training.Trained, videos: int) -> results.Row:
  """The accuracy with all tokens."""
  read = jax.jit(functools.partial(_full, trained.model))
  right, kinds = [], []
  for batch in batches(trained.data, videos):
    logits = read(
      trained.params, batch['frames'], batch['text'], batch.get('audio')
    )
    right.append(hits(logits, batch['targets']))
    kinds.append(batch['kind'])
  conventions = {
    'data': dataclasses.replace(trained.data, split='test').description,
    'videos': videos,
  }
  metrics = accuracy_metrics(
    np.concatenate(right), np.concatenate(kinds), conventions
  )
  name = f'all {trained.model.num_visual} tokens'
  return results.Row(name=name, metrics=metrics)


def _full(
  config: vision_language.VisionLanguageConfig,
  params: training.Params,
  frames: jax.Array,
  text: jax.Array,
  audio: jax.Array | None = None,
) -> jax.Array:
  logits, _ = vision_language.VisionLanguage(config).apply(
    {'params': params}, frames, text, audio
  )
  return logits
