"""Passkey retrieval: is a number, hidden in a long text, still found?

Mohtashami and Jaggi, 2023, https://arxiv.org/abs/2305.16300. A five-digit
number stands somewhere in a long text that says nothing; the prompt ends by
asking for it. It is found if it is the first number of the greedy continuation,
as InfiniteBench counts (Zhang et al., 2024): a model may answer in a sentence.

Perplexity averages over tokens that mostly need little context, so that a model
whose attention or cache was damaged may keep it and still lose what it read a
thousand tokens ago; this is the test for that.

Text is filled to a length in tokens, at `depth` 0 with the number first, at 1
with it last. All prompts of one length have one shape: two programs a length.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxq.decode import autoregressive

_HEAD = (
  'There is important information hidden in a lot of irrelevant text. Find it '
  'and memorize it.\n'
)
_FILLER = (
  'The grass is green. The sky is blue. The sun is yellow. Here we go. There '
  'and back again. '
)
_KEY = 'The pass key is {key}. Remember it. {key} is the pass key. '
_QUESTION = '\nWhat is the pass key? The pass key is'
_NEW_TOKENS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class PasskeyConfig:
  """Which prompts are made.

  lengths: of the prompts, in tokens; each is filled up to at most that.
  depths: where the number stands, in [0, 1].
  trials: numbers per length and depth.
  batch_size: prompts per step.
  seed: of the numbers.
  """

  lengths: tuple[int, ...] = (512, 1024)
  depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
  trials: int = 4
  batch_size: int = 4
  seed: int = 0

  def __post_init__(self):
    for name in ('lengths', 'depths'):
      if not getattr(self, name):
        raise ValueError(
          f'PasskeyConfig: {name}=(); at least one is needed. '
          f'{getattr(PasskeyConfig, name)} is the default.'
        )
    for depth in self.depths:
      if not 0.0 <= depth <= 1.0:
        raise ValueError(
          f'PasskeyConfig: depth={depth}; it must lie in 0..1. 0 puts the '
          'number first, 1 last.'
        )
    for name in ('trials', 'batch_size'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'PasskeyConfig: {name}={getattr(self, name)}; it must be at least '
          f'1. {getattr(PasskeyConfig, name)} is the default.'
        )


class Retrieval(NamedTuple):
  """found: (lengths, depths, trials) bool. tokens: (lengths,) of prompts."""

  found: np.ndarray
  tokens: np.ndarray


def retrieval(
  model: autoregressive.LanguageModel,
  variables: Any,
  encode: Callable[[str], Sequence[int]],
  decode: Callable[[Sequence[int]], str],
  config: PasskeyConfig,
) -> Retrieval:
  """Hides numbers, asks for them, and says which were found.

  Args:
    model, variables: the model.
    encode: text -> token ids, with what the model expects at the beginning.
    decode: token ids -> text.
    config: which prompts.

  Raises:
    ValueError: a length that cannot hold the question, or that is longer than
      the model can take.
  """
  shape = (len(config.lengths), len(config.depths), config.trials)
  found, longest = np.zeros(shape, bool), np.zeros(len(config.lengths), int)
  rng = np.random.default_rng(config.seed)
  for i, length in enumerate(config.lengths):
    keys = rng.integers(10_000, 100_000, shape[1:])  # (depths, trials)
    prompts = [
      _fit(encode, str(key), depth, length)
      for depth, row in zip(config.depths, keys, strict=True)
      for key in row
    ]
    longest[i] = max(map(len, prompts))
    texts = _answers(model, variables, prompts, decode, length, config)
    hits = [
      first_number(text) == str(key)
      for text, key in zip(texts, keys.reshape(-1), strict=True)
    ]
    found[i] = np.reshape(hits, shape[1:])
  return Retrieval(found=found, tokens=longest)


def first_number(text: str) -> str:
  """The first run of digits in a text; '' where there is none."""
  found = re.search(r'\d+', text)
  return found[0] if found else ''


def prompt(key: str, depth: float, fillers: int) -> str:
  """The text with `fillers` sentences, the number after depth of them."""
  before = round(depth * fillers)
  return (
    _HEAD
    + _FILLER * before
    + _KEY.format(key=key)
    + _FILLER * (fillers - before)
  ).rstrip() + _QUESTION


def _fit(encode, key: str, depth: float, length: int) -> list[int]:
  """The tokens of the longest prompt of at most `length` tokens."""
  bare = len(encode(prompt(key, depth, 0)))
  if bare > length:
    raise ValueError(
      f'passkey: length={length}; the question alone has {bare} tokens. Give '
      f'a length of at least {bare}.'
    )
  # Fillers cost nearly the same each: guess, then step down to what fits.
  cost = (len(encode(prompt(key, depth, 8))) - bare) / 8
  fillers = int((length - bare) / cost) + 1
  while True:
    ids = list(encode(prompt(key, depth, fillers)))
    if len(ids) <= length:
      return ids
    fillers -= 1


def _answers(model, variables, prompts, decode, length, config) -> list[str]:
  texts: list[str] = []
  for start in range(0, len(prompts), config.batch_size):
    batch = prompts[start : start + config.batch_size]
    filled = batch + batch[:1] * (config.batch_size - len(batch))
    out = autoregressive.generate(
      model,
      variables,
      filled,
      max_new_tokens=_NEW_TOKENS,
      capacity=length + _NEW_TOKENS,
    )
    texts += [
      decode(row[:n].tolist())
      for row, n in zip(out.tokens, out.lengths, strict=True)
    ][: len(batch)]
  return texts
