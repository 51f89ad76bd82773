"""From speech to text: what `experiments.transcribe` is made of.

A clip is cut into windows of 30 s, each of which is transcribed by itself,
greedily and without timestamps:

  <|startoftranscript|><|en|><|transcribe|><|notimestamps|> text <|endoftext|>

The encoder and the keys and values of the cross-attention run once per window;
the loop is that of jaxq.decode.autoregressive. A word on a cut may be lost:
clips of up to 30 s have none.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

import models
from jaxq.data import audio
from jaxq.decode import autoregressive
from models import whisper

MAX_NEW_TOKENS = 224  # Half the decoder's positions, as Whisper's own code has.


def transcribe(
  model: models.Model,
  clips: Sequence[np.ndarray],
  *,
  language: str = 'en',
  max_new_tokens: int = MAX_NEW_TOKENS,
  batch_size: int = 8,
) -> list[str]:
  """The text of each clip.

  Args:
    model: a Whisper model.
    clips: samples (N,) float32 at 16 kHz, of any lengths.
    language: code of the language that is spoken, as in 'en'.
    max_new_tokens: per window of 30 s; the decoder's positions end it too.
    batch_size: windows at a time.

  Raises:
    ValueError: another kind of model, an unknown language, or a clip without
      samples.
  """
  check_family(model)
  prompt = prompt_ids(model.tokenizer, model.config, language)
  room = model.config.max_position - len(prompt)
  size = model.config.frames * audio.HOP
  parts = [audio.windows(clip, size) for clip in clips]
  stacked = np.concatenate(parts)
  texts: list[str] = []
  for start in range(0, len(stacked), batch_size):
    batch = stacked[start : start + batch_size]
    out = _generate(model, batch, prompt, min(max_new_tokens, room))
    texts += [_text(model.tokenizer, row) for row in out]
  pieces = iter(texts)
  return [
    ' '.join(text for text in (next(pieces) for _ in part) if text)
    for part in parts
  ]


def check_family(model: Any) -> None:
  """Raises ValueError unless a model hears."""
  if model.family != 'whisper':
    raise ValueError(
      f'{model.name}: is a {model.family} model; speech needs a Whisper model. '
      'Give whisper-base, or a directory of one.'
    )


def prompt_ids(
  tokenizer: tokenizers.Tokenizer, config: Any, language: str
) -> list[int]:
  """The tokens that a transcript begins with.

  Raises:
    ValueError: a language the model has no token for, or a tokenizer that is
      not Whisper's.
  """
  tokens = ['<|startoftranscript|>', '<|notimestamps|>']
  if config.is_multilingual:
    tokens[1:1] = [f'<|{language}|>', '<|transcribe|>']
  elif language != 'en':
    raise ValueError(
      f'--language={language}; this model knows English only. Give '
      '--language=en, or a multilingual model.'
    )
  ids = [tokenizer.token_to_id(token) for token in tokens]
  if config.is_multilingual and ids[1] is None:
    known = sorted(
      token[2:-2]
      for token in tokenizer.get_vocab()
      if token.startswith('<|')
      and token.endswith('|>')
      and len(token) in (6, 7)
    )
    raise ValueError(
      f'--language={language}; allowed are {known}. Give the code of the '
      'language that is spoken.'
    )
  if None in ids:
    raise ValueError(
      f'the tokenizer has no token {tokens[ids.index(None)]}; Whisper needs '
      'it. Use the tokenizer.json of the model.'
    )
  return [token for token in ids if token is not None]


@functools.cache
def speech_model(module: whisper.Whisper) -> autoregressive.LanguageModel:
  """For jaxq.decode; `variables` hold 'cross', from `cross_caches`, as well."""
  config = module.config

  def forward(variables, tokens, positions, caches):
    own = {name: variables[name] for name in ('params', 'quant')}
    return module.apply(
      own, tokens, positions, caches, variables['cross'], method='hidden'
    )

  def head(variables, x, never=config.suppress_tokens):
    own = {name: variables[name] for name in ('params', 'quant')}
    logits: Any = module.apply(own, x, method='logits')
    if not never:
      return logits
    return logits.at[..., jnp.asarray(never, jnp.int32)].set(-jnp.inf)

  first = (*config.suppress_tokens, *config.begin_suppress_tokens)
  return autoregressive.LanguageModel(
    forward=forward,
    head=head,
    init_caches=lambda batch, capacity: whisper.init_caches(
      config, module.runs, batch, capacity, module.dtype
    ),
    max_position=config.max_position,
    stop_ids=config.eos_token_ids,
    first_head=functools.partial(head, never=first),
  )


@functools.partial(jax.jit, static_argnums=0)
def _listen(module, variables, samples):
  """Samples (B, N) of windows -> the cross-attention's keys and values."""
  features = audio.log_mel(samples, module.config.mels)
  return module.apply(variables, features, method='listen')


def _generate(model, samples, prompt, max_new_tokens) -> list[list[int]]:
  """The tokens behind the prompt, for windows (B, N)."""
  cross = _listen(model.module, model.variables, samples)
  out = autoregressive.generate(
    speech_model(model.module),
    {**model.variables, 'cross': cross},
    [prompt] * len(samples),
    max_new_tokens=max_new_tokens,
  )
  return [
    row[:length].tolist()
    for row, length in zip(out.tokens, out.lengths, strict=True)
  ]


def _text(tokenizer: tokenizers.Tokenizer, ids: list[int]) -> str:
  return tokenizer.decode(ids, skip_special_tokens=True).strip()
