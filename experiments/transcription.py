"""From speech to text: what `experiments.transcribe` is made of.

A clip is cut into windows of 30 s, each of which is transcribed by itself,
greedily and without timestamps:

  <|startoftranscript|><|en|><|transcribe|><|notimestamps|> text <|endoftext|>

A greedy decoder can fall into a loop and repeat a word to the end. Such a text
compresses far better than speech does, so Whisper tries again at higher and
higher temperatures until it no longer compresses more than LOOP times (Radford
et al., arXiv 2212.04356, section 4.5; its second test, of the mean log
probability, is left out). `temperatures` asks for that.

The encoder and the keys and values of the cross-attention run once per window;
the loop is that of jaxq.decode.autoregressive. A word on a cut may be lost:
clips of up to 30 s have none.
"""

import functools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

import models
from jaxq.data import audio
from jaxq.decode import autoregressive, sampling
from models import whisper

TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0)  # The paper's.
LOOP = 2.4  # Bytes of a text over those it compresses to, at most.
MAX_NEW_TOKENS = 224  # Half the decoder's positions, as Whisper's own code has.


def transcribe(
  model: models.Model,
  clips: Sequence[np.ndarray],
  *,
  language: str = 'en',
  max_new_tokens: int = MAX_NEW_TOKENS,
  batch_size: int = 8,
  temperatures: Sequence[float] = (),
) -> list[str]:
  """The text of each clip.

  Args:
    model: a Whisper model.
    clips: samples (N,) float32 at 16 kHz, of any lengths.
    language: code of the language that is spoken, as in 'en'.
    max_new_tokens: per window of 30 s; the decoder's positions end it too.
    batch_size: windows at a time.
    temperatures: of further tries for a window whose text is a loop, drawn
      with the same key for every window; the last one stands. None of them:
      greedy only.

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
  texts = [''] * len(stacked)
  left = list(range(len(stacked)))
  for temperature in (0.0, *temperatures):
    for start in range(0, len(left), batch_size):
      chosen = left[start : start + batch_size]
      out = _generate(
        model, stacked[chosen], prompt, min(max_new_tokens, room), temperature
      )
      for i, row in zip(chosen, out, strict=True):
        texts[i] = _text(model.tokenizer, row)
    left = [i for i in left if compression(texts[i]) > LOOP]
  pieces = iter(texts)
  return [
    ' '.join(text for text in (next(pieces) for _ in part) if text)
    for part in parts
  ]


def compression(text: str) -> float:
  """How many times smaller zlib makes a text; below 1 for a short one."""
  data = text.encode('utf-8')
  return len(data) / len(zlib.compress(data))


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


def _generate(
  model, samples, prompt, max_new_tokens, temperature
) -> list[list[int]]:
  """The tokens behind the prompt, for windows (B, N)."""
  cross = _listen(model.module, model.variables, samples)
  out = autoregressive.generate(
    speech_model(model.module),
    {**model.variables, 'cross': cross},
    [prompt] * len(samples),
    max_new_tokens=max_new_tokens,
    sampling=sampling.Sampling(temperature=temperature),
    key=jnp.broadcast_to(jax.random.key(0), (len(samples),)),
  )
  return [
    row[:length].tolist()
    for row, length in zip(out.tokens, out.lengths, strict=True)
  ]


def _text(tokenizer: tokenizers.Tokenizer, ids: list[int]) -> str:
  return tokenizer.decode(ids, skip_special_tokens=True).strip()
