"""Passkeys behind a context that was compressed before the question came.

jaxq.eval.passkey asks in the prompt, so that a cache that compresses by
attention sees what is asked for. Here the text is read first and the question
after it, as kvpress does, or both together, for comparison. kvpress then lets
the model write freely; here the question ends with the space before the number,
so that only digits are left to be said (docs/notes.md has both).
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import models
from experiments import adapters, generation
from jaxq.eval import passkey as passkey_lib
from jaxq.kvcache import interface

_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_QUESTION = '\nWhat is the pass key? The pass key is'


def retrieval(
  model: models.Model,
  config: interface.CacheConfig,
  length: int,
  *,
  asked: bool,
  depths: Sequence[float] = _DEPTHS,
  trials: int = 2,
) -> dict[str, Any]:
  """How many numbers are found, and how sure of them the model is.

  Args:
    model, config: what reads, and its cache.
    length: tokens of a text, about.
    asked: whether the question is read with the text, or once the text is in
      the cache only.
    depths: where the number stands. trials: numbers each.

  Returns:
    'found': [how many, of how many], every digit of the number the most likely
    one; 'nll': mean of the negative log-likelihood of a number's digits.
  """
  rng = np.random.default_rng(0)
  keys = []
  texts = []
  for depth in depths:
    for key in map(str, rng.integers(10_000, 100_000, trials)):
      keys.append(key)
      texts.append(_fit(model, key, depth, length))
  answers = _answers(model, config, texts, keys, asked)
  return {
    'found': [sum(found for found, _ in answers), len(answers)],
    'nll': round(float(np.mean([loss for _, loss in answers])), 4),
  }


def _fit(model: models.Model, key: str, depth: float, length: int) -> str:
  """The longest text of at most `length` tokens, less the question."""

  def text(fillers):
    return passkey_lib.prompt(key, depth, fillers).removesuffix(_QUESTION)

  def count(fillers):
    return len(model.tokenizer.encode(text(fillers)).ids)

  cost = (count(8) - count(0)) / 8
  fillers = int((length - count(0)) / cost) + 1
  while count(fillers) > length:
    fillers -= 1
  return text(fillers)


def _answers(
  model: models.Model,
  config: interface.CacheConfig,
  texts: Sequence[str],
  keys: Sequence[str],
  asked: bool,
) -> list[tuple[bool, float]]:
  """Whether each number is found, and the mean loss of its digits.

  The digits are read behind the question: they are found if the model would
  have written them, greedily, token by token. What tokenizers put between, such
  as a space, counts as the question's.
  """
  lm = adapters.language_model(model.module, config)
  variables = generation.prepared(model, config)
  encode = lambda text: model.tokenizer.encode(text).ids
  whole = [encode(f'{_QUESTION} {key}') for key in keys]
  # Keys do not begin with 0: only what all answers share is the same.
  shared = os.path.commonprefix([*whole, encode(f'{_QUESTION} 0')])
  question = shared
  answers = [own[len(question) :] for own in whole]
  first = [encode(text) for text in texts]
  second = [question + own for own in answers]
  if asked:
    first = [own + question[:-1] for own in first]
    second = [own[len(question) - 1 :] for own in second]
  widths = [max(map(len, rows)) for rows in (first, second)]
  widths[0] = -(-widths[0] // 64) * 64  # Few programs.
  caches = lm.init_caches(len(keys), sum(widths))
  start = np.zeros(len(keys), np.int32)
  read = jax.jit(lm.forward, donate_argnums=3)
  x = None
  for rows, width in zip((first, second), widths, strict=True):
    tokens, positions = _padded(rows, width, start)
    x, caches = read(variables, tokens, positions, caches)
    start = start + np.array([len(row) for row in rows], np.int32)
  log_p = np.asarray(jax.nn.log_softmax(jax.jit(lm.head)(variables, x)))
  out = []
  for row, ids, own in zip(log_p, second, answers, strict=True):
    said = row[len(ids) - len(own) - 1 : len(ids) - 1]  # Of the number.
    loss = -float(np.mean(said[np.arange(len(own)), own]))
    out.append((bool((said.argmax(-1) == own).all()), loss))
  return out


def _padded(
  rows: Sequence[Sequence[int]], width: int, start: np.ndarray
) -> tuple[jax.Array, jax.Array]:
  """Tokens and positions (B, width); -1 behind a row's tokens."""
  tokens = np.zeros((len(rows), width), np.int32)
  positions = np.full((len(rows), width), -1, np.int32)
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = row
    positions[i, : len(row)] = start[i] + np.arange(len(row))
  return jnp.asarray(tokens), jnp.asarray(positions)
