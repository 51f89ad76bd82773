"""Asks a trained MosaicQA model about a test video, in words."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments import mosaic_evaluation, token_reduction, training
from jaxq.data import mosaic
from models import visual_tokens


def say(
  trained: training.Trained,
  text: str | None,
  prompt: str,
  video: int,
  max_new_tokens: int,
  kv_cache: Any = None,
) -> str:
  """What the model says behind a prompt about a test video.

  Args:
    trained: the model.
    text: `--token_reducer`; None: all tokens.
    prompt: words of the vocabulary, as in 'cell f0 r1 c2'.
    video: which one.
    max_new_tokens: at most; nothing is said behind 'end'.
    kv_cache: what keys and values are kept in; None: as they are.

  Raises:
    ValueError: a word that is not known.
    NotImplementedError: a reducer inside the decoder.
  """
  words = prompt.split()
  unknown = [word for word in words if word not in mosaic.TOKENS]
  if unknown or not words:
    raise ValueError(
      f'--prompt={prompt}: {unknown} are no words of this model; it knows '
      f'{" ".join(mosaic.VOCABULARY)}. Ask as in --prompt="cell f0 r1 c2".'
    )
  method = None
  if text is not None:
    method = token_reduction.parse(text, trained)
  token_reduction.check_cached(method, text)
  sample = mosaic_evaluation.source(trained.data)[video]
  shown = [
    jnp.asarray(sample[name])[None]
    for name in ('frames', 'audio')
    if name in sample
  ]
  ids = jnp.asarray([[mosaic.TOKENS[word] for word in words]], jnp.int32)
  model = trained.model

  @jax.jit
  def continued(params, ids, *shown):
    visual = visual_tokens.visual_of(model, params, *shown)
    seen: Any = visual.tokens
    if method is not None:
      params = {**params, **method.model}
      key = jax.random.key(0)
      seen = token_reduction.reduce(model, method, params, visual, ids, key)
    return visual_tokens.generate(
      model,
      params,
      seen,
      ids,
      jnp.array([len(words)]),
      max_new_tokens=max_new_tokens,
      kv_cache=kv_cache,
    )

  said = continued(trained.params, ids, *shown)
  spoken = mosaic.words(said)
  if 'end' in spoken:
    spoken = spoken[: spoken.index('end')]
  return ' '.join(spoken)
