"""EmbedLens on MosaicQA: finding the classes of a model, without training.

arXiv 2603.00510 (jaxq.tokens.embedlens_groups). A pass over videos notes, for
each visual token, the nearest row of the model's input embeddings, its length
and the attention it gets, in the encoder and in the first three blocks of the
decoder (there: from the questions). Words that the data never say are left out
of the probe, as training never moved their rows.

Finding none is a finding: a small model trained from scratch may have no
direction that its dead tokens share. Then all is alive, and of more tokens than
the budget the first ones are kept. So is that the nearest words mean nothing:
`nearest`, the mean largest cosine, is to be above `chance`, that of random
vectors; where it is not there is a warning.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from experiments.reducer_training import program
from jaxq.data import mosaic, mosaic_variants
from jaxq.tokens import embedlens, embedlens_groups, primitives
from models import vision_language, visual_tokens

_LAYERS = 3  # Of the decoder, whose states and attention are looked at.
_FIELDS = tuple(
  field.name for field in dataclasses.fields(embedlens_groups.Observed)
)
_COSINES = ('nearest', 'chance')  # Of embedlens.informative, a pair a step.


def build(setting: program.Setting) -> program.Program:
  """The program of experiments.reducer_training.program."""
  model, frozen = setting.trained.model, setting.trained.params
  schedule, view = setting.schedule, program.viewer(setting.trained)
  shape = (schedule.steps * schedule.batch, model.num_visual)
  embedding = jnp.asarray(frozen['embed']['embedding'])
  unsaid = unsaid_words(setting.trained.data, embedding.shape[0])
  probe = embedlens.make_probe(embedding, embedlens.Groups(), left_out=unsaid)
  look = jax.jit(observe, static_argnums=0)
  compare = jax.jit(embedlens.informative)

  def init() -> dict[str, Any]:
    state: dict[str, Any] = {
      name: np.zeros(shape, np.float32) for name in _FIELDS
    }
    state |= {name: np.zeros(schedule.steps, np.float32) for name in _COSINES}
    return state | {'ids': np.zeros(shape, np.int32)}

  def update(state, index, batch):
    visual = view(batch)
    seen = look(model, frozen, probe, visual, batch['text'])
    ts, key = visual.tokens, setting.key(index)
    cosines = compare(ts.tokens, ts.mask, probe, key)
    for name, cosine in zip(_COSINES, cosines, strict=True):
      state[name][index] = cosine
    start, end = index * schedule.batch, (index + 1) * schedule.batch
    for name in _FIELDS:
      state[name][start:end] = getattr(seen, name)
    ids = state['ids'][:end]
    most = np.bincount(ids.ravel()).max() / ids.size
    figures = {'words': np.unique(ids).size, 'most common': most}
    return state, figures | {name: state[name][index] for name in _COSINES}

  def finish(state) -> program.Learned:
    images = [
      embedlens_groups.Observed(**{name: state[name][i] for name in _FIELDS})
      for i in range(shape[0])
    ]
    groups, candidates = embedlens_groups.discover_groups(
      images, setting.config
    )
    for candidate in candidates:
      logging.info('embedlens: %s', candidate)
    nearest, chance = (float(state[name].mean()) for name in _COSINES)
    if nearest <= chance:
      logging.warning(
        'embedlens: the nearest words of visual tokens have a mean cosine of '
        '%.3f, those of random vectors up to %.3f; the first should be larger. '
        'Classes by nearest words mean little for this model.',
        nearest,
        chance,
      )
    return program.Learned(
      reducer=embedlens.make_probe(embedding, groups, left_out=unsaid)
    )

  return program.Program(init=init, update=update, finish=finish)


def observe(
  model: program.Model,
  params: Any,
  probe: embedlens.Probe,
  visual: visual_tokens.Visual,
  text: jax.Array,
) -> embedlens_groups.Observed:
  """What a batch of videos shows, in arrays (B, N); text (B, Q, L)."""
  module: Any = vision_language.VisionLanguage(model)
  (B, Q, L), ts = text.shape, visual.tokens
  ids, _ = embedlens.nearest_vocab(ts.tokens, probe, 1)
  x = visual_tokens.question_of(model, params, text).reshape(B, Q * L, -1)
  words = (text != mosaic.TOKENS['pad']).reshape(B, Q * L, 1)
  hidden, lengths, received = ts.tokens, [], []
  for i in range(min(_LAYERS, model.num_layers)):
    (hidden, x), updated = module.apply(
      {'params': params},
      hidden,
      ts.positions,
      ts.mask,
      x,
      Q,
      range(i, i + 1),
      method='layers',
      mutable=['tapped'],
    )
    weights = updated['tapped'][f'blocks_{i}']['attention']['to_context']
    received.append(primitives.masked_mean(weights, words, axis=1))
    lengths.append(jnp.linalg.norm(hidden, axis=-1))
  return embedlens_groups.Observed(
    ids=ids[..., 0],
    encoder_norm=jnp.linalg.norm(visual.features, axis=-1),
    llm_norm=jnp.mean(jnp.stack(lengths), axis=0),
    encoder_attention=visual.received,
    llm_attention=jnp.mean(jnp.stack(received), axis=0),
  )


def unsaid_words(data: mosaic.MosaicConfig, vocabulary: int) -> list[int]:
  """Ids that no question or answer of 64 videos, asked 64 times each, has."""
  many = dataclasses.replace(data, split='train', questions_per_sample=64)
  source = mosaic_variants.samples(many)
  said = np.zeros(vocabulary, bool)
  for i in range(64):
    for name in ('text', 'targets'):
      ids = source[i][name]
      said[ids[ids != mosaic.IGNORE]] = True
  return np.flatnonzero(~said).tolist()
