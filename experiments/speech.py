"""What Whisper models are calibrated and measured on; see experiments.families.

A batch is {'features', 'tokens', 'mask'}: log-mel features of a window of 30 s,
the prompt with what is said and the end, and True where tokens are no padding.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import results, transcription
from jaxq.data import audio, speech
from jaxq.eval import bootstrap, transcripts, wer

NLL = 'transcript NLL'
WER = 'WER'
_MULTIPLE = 8  # Lengths, and numbers of clips, are multiples of it.
_BLOCK = 8  # Tokens drawn together by the bootstrap: a phrase.


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Spoken:
  """clips: with their texts. batch: of them. prompt: tokens before a text."""

  clips: list[speech.Clip]
  batch: dict[str, np.ndarray]
  prompt: int
  description: str


def calibration(model: Any, choice: Any) -> dict[str, np.ndarray]:
  """The batch of all calibration clips; `choice` is a families.Choice."""
  clips = speech.load(choice.source, choice.samples)
  # The driver wants whole batches: where there are fewer clips than asked for,
  # the first ones are used again to make a multiple of 8.
  count = min(choice.samples, -(-len(clips) // _MULTIPLE) * _MULTIPLE)
  clips = [clips[i % len(clips)] for i in range(count)]
  return batch_of(model, clips)[0]


def evaluation(model: Any, choice: Any) -> Spoken:
  """What `compare` takes."""
  clips = speech.load(choice.source, choice.samples)
  batch, prompt = batch_of(model, clips)
  seconds = sum(len(clip.samples) for clip in clips) / audio.RATE
  return Spoken(
    clips=clips,
    batch=batch,
    prompt=prompt,
    description=f'{len(clips)} clips, {seconds:.0f} s of {choice.source}',
  )


def batch_of(
  model: Any, clips: Sequence[speech.Clip]
) -> tuple[dict[str, np.ndarray], int]:
  """The batch of some clips, and how many tokens their prompt has.

  Raises:
    ValueError: a clip or its text is longer than the model takes.
  """
  config = model.config
  tokenizer = (
    model.tokenizer() if callable(model.tokenizer) else model.tokenizer
  )
  prompt = transcription.prompt_ids(tokenizer, config, 'en')
  end = [config.eos_token_ids[0]]
  rows = []
  for clip in clips:
    # A word begins with its space, the first one too.
    text = tokenizer.encode(' ' + clip.text, add_special_tokens=False).ids
    rows.append([*prompt, *text, *end])
    if len(rows[-1]) > config.max_position:
      raise ValueError(
        f'{clip.name}: its text makes {len(rows[-1])} tokens; the model takes '
        f'{config.max_position}. Cut the clip.'
      )
  longest = max(map(len, rows))
  width = min(-(-longest // _MULTIPLE) * _MULTIPLE, config.max_position)
  tokens = np.full((len(rows), width), end[0], np.int32)
  for row, ids in zip(tokens, rows, strict=True):
    row[: len(ids)] = ids
  lengths = np.array([len(ids) for ids in rows])
  size = config.frames * audio.HOP
  features = []
  for clip in clips:
    windows = audio.windows(clip.samples, size)
    if len(windows) > 1:
      raise ValueError(
        f'{clip.name}: {clip.samples.size / audio.RATE:.1f} s long; the model '
        f'hears {size / audio.RATE:.1f} s. Cut the clip.'
      )
    features.append(np.asarray(audio.log_mel(windows, config.mels))[0])
  return {
    'features': np.stack(features),
    'tokens': tokens,
    'mask': np.arange(width)[None] < lengths[:, None],
  }, len(prompt)


@functools.cache
def logits_fn(module: Any) -> transcripts.LogitsFn:
  """For jaxq.eval.transcripts."""
  return lambda variables, features, tokens: module.apply(
    variables, features, tokens
  )[0]


def compare(
  reference: Any,
  model: Any,
  spoken: Spoken,
  *,
  mesh: Any = None,
  config: bootstrap.BootstrapConfig | None = None,
  progress: Any = None,
) -> tuple[results.Row, ...]:
  """Rows of the reference, if there is one, and of the model."""
  del mesh, progress  # Little data: it takes seconds on one device.
  other = model if reference is None else reference
  found = transcripts.per_token(
    logits_fn(other.module),
    other.variables,
    logits_fn(model.module),
    model.variables,
    spoken.batch,
    prompt=spoken.prompt,
  )
  conventions = {
    'data': spoken.description,
    'loops': 'heard again',
    'dtype': jnp.dtype(model.module.dtype).name,
  }
  config = dataclasses.replace(
    config or bootstrap.BootstrapConfig(), block=_BLOCK
  )

  def metric(name, values):
    interval = bootstrap.interval(
      lambda mean: mean, values[None], config=config
    )
    return results.Metric.of(name, interval, conventions)

  def own(m, nll):
    heard = transcription.transcribe(
      m,
      [clip.samples for clip in spoken.clips],
      temperatures=transcription.TEMPERATURES,
    )
    counts = [
      wer.word_errors([clip.text], [text])
      for clip, text in zip(spoken.clips, heard, strict=True)
    ]
    rate = bootstrap.interval(  # Over clips.
      np.divide,
      np.array([[count.errors for count in counts]]),
      np.array([[count.words for count in counts]]),
      config=dataclasses.replace(config, block=1),
    )
    return (metric(NLL, nll), results.Metric.of(WER, rate, conventions))

  row = own(model, found.nll)
  if reference is None:
    return (results.Row(name=model.name, metrics=row),)
  compared = (metric('KL', found.kl), metric('top-1 agreement', found.agree))
  first = own(reference, found.reference_nll)
  return (
    results.Row(name=reference.name, metrics=first),
    results.Row(name=model.name, metrics=row + compared),
  )
