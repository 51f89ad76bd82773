"""From a prompt to a stream of text: what `experiments.generate` is made of."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import tokenizers
from tokenizers import decoders

import models
from experiments import adapters
from jaxq.decode import autoregressive
from jaxq.decode import sampling as sampling_lib
from jaxq.kvcache import interface, registry


def stream(
  model: models.Model,
  prompt: str,
  *,
  max_new_tokens: int,
  sampling: sampling_lib.Sampling,
  seed: int = 0,
  kv_cache: interface.CacheConfig | None = None,
  prefill_chunk: int | None = None,
) -> Iterator[int]:
  """The ids of the tokens that continue a text, as they come.

  Args:
    model: what continues it.
    prompt: special tokens in it are understood; a BOS is put before it where
      the tokenizer does so.
    max_new_tokens: at most so many.
    sampling: how tokens are chosen.
    seed: of the choice.
    kv_cache: what keys and values are kept in; None: as they are.
    prefill_chunk: prompt tokens at a time; None: all.

  Returns:
    An iterator over token ids; the last one may be a stop token.

  Raises:
    ValueError: the prompt is empty, or prompt and text are too long. At the
      call, not at the first token.
  """
  _check_prompt(prompt)
  variables = _variables(model, kv_cache)
  tokens = autoregressive.stream(
    adapters.language_model(model.module, kv_cache),
    variables,
    [model.tokenizer.encode(prompt).ids],
    max_new_tokens=max_new_tokens,
    sampling=sampling,
    key=jax.random.key(seed),
    prefill_chunk=prefill_chunk,
  )
  return (int(token[0]) for token in tokens)


def batch(
  model: models.Model,
  prompts: Sequence[str],
  *,
  max_new_tokens: int,
  sampling: sampling_lib.Sampling,
  seed: int = 0,
  kv_cache: interface.CacheConfig | None = None,
  prefill_chunk: int | None = None,
) -> list[str]:
  """Continues prompts of any lengths together; arguments as of `stream`.

  Returns:
    The text of each, special tokens left out. Each row has its own random key,
    split from the seed's.

  Raises:
    ValueError: a prompt is empty, or prompt and text are too long.
  """
  for prompt in prompts:
    _check_prompt(prompt)
  out = autoregressive.generate(
    adapters.language_model(model.module, kv_cache),
    _variables(model, kv_cache),
    [model.tokenizer.encode(prompt).ids for prompt in prompts],
    max_new_tokens=max_new_tokens,
    sampling=sampling,
    key=jax.random.key(seed),
    prefill_chunk=prefill_chunk,
  )
  return [
    ''.join(pieces(model.tokenizer, row[:length].tolist()))
    for row, length in zip(out.tokens, out.lengths, strict=True)
  ]


def _check_prompt(prompt: str) -> None:
  if not prompt:
    raise ValueError(
      "--prompt=''; the prompt must not be empty. Give some text to continue."
    )


def _variables(
  model: models.Model, kv_cache: interface.CacheConfig | None
) -> Any:
  return model.variables if kv_cache is None else prepared(model, kv_cache)


def prepared(model: models.Model, kv_cache: interface.CacheConfig) -> Any:
  """The model's variables as this cache needs them.

  Raises:
    NotImplementedError: the model is no decoder.
    TypeError, ValueError: as registry.prepare.
  """
  if model.family != 'decoder':
    raise NotImplementedError(
      f'--kv_cache with {model.name}, a {model.family} model; caches are of '
      'decoders. Leave the flag out.'
    )
  config = model.config
  return registry.prepare(
    kv_cache, model.variables, config.num_kv_heads, config.head_dim
  )


def pieces(
  tokenizer: tokenizers.Tokenizer, tokens: Iterable[int]
) -> Iterator[str]:
  """Text as it grows with the tokens, special tokens left out.

  A character whose bytes are spread over several tokens is held back until it
  is whole; an unfinished one at the end is left out.
  """
  decoder = decoders.DecodeStream(skip_special_tokens=True)
  for token in tokens:
    text = decoder.step(tokenizer, token)
    if text:
      yield text


class Stopwatch:
  """How fast tokens come, from its creation on."""

  def __init__(self):
    self._times = [time.monotonic()]

  def time(self, tokens: Iterable[int]) -> Iterator[int]:
    """Passes tokens on and notes when they came."""
    for token in tokens:
      self._times.append(time.monotonic())
      yield token

  def summary(self) -> str:
    """'64 tokens in 9.1 s; 31.2 tokens/s after prefill and compilation'.

    The first two tokens wait for compilations, so the rate is that of the
    others; it is left out where there are none.
    """
    first, *times = self._times
    text = f'{len(times)} tokens in {self._times[-1] - first:.1f} s'
    if len(times) > 2:
      rate = (len(times) - 2) / max(times[-1] - times[1], 1e-9)
      text += f'; {rate:.1f} tokens/s after prefill and compilation'
    return text
