r"""Writes down what is said in a wav file.

  python -m experiments.transcribe --source=whisper-base --audio=FILE.wav

The file holds one channel at 16 kHz. The text goes to stdout, the speed to
stderr. With --reference='what was said' the word error rate is printed too.
"""

import sys
import time
from collections.abc import Sequence

from absl import flags

import models
from experiments import cli, encoder_reduction, transcription
from jaxq.data import audio
from jaxq.eval import wer

_SOURCE = flags.DEFINE_string(
  'source',
  None,
  'Packaged name (whisper-base), Hugging Face or jaxq directory of a Whisper '
  'model.',
  required=True,
)
_AUDIO = flags.DEFINE_string(
  'audio', None, 'A 16 kHz mono .wav file.', required=True
)
_LANGUAGE = flags.DEFINE_string(
  'language', 'en', 'Code of the language that is spoken.'
)
_REFERENCE = flags.DEFINE_string(
  'reference', None, 'What was said; gives the word error rate.'
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  'max_new_tokens',
  transcription.MAX_NEW_TOKENS,
  'Tokens per 30 s at most.',
  lower_bound=1,
)
_RETRY_LOOPS = flags.DEFINE_bool(
  'retry_loops',
  True,
  'Draw again, at higher temperatures, what came out as a loop. '
  '--noretry_loops: greedy only.',
)
_TOKEN_REDUCER = flags.DEFINE_string(
  'token_reducer',
  '',
  'What drops or merges frames inside the encoder, as in tome:r=40.',
)
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'Of weights and activations.'
)


def main(argv: Sequence[str]) -> None:
  """Loads, transcribes and prints."""
  del argv
  samples = audio.read_wav(_AUDIO.value)
  model = models.load(_SOURCE.value, dtype=_DTYPE.value)
  if _TOKEN_REDUCER.value:
    model = encoder_reduction.apply(model, _TOKEN_REDUCER.value)
  start = time.monotonic()
  (text,) = transcription.transcribe(
    model,
    [samples],
    language=_LANGUAGE.value,
    max_new_tokens=_MAX_NEW_TOKENS.value,
    temperatures=transcription.TEMPERATURES if _RETRY_LOOPS.value else (),
  )
  print(text, flush=True)
  seconds, length = time.monotonic() - start, len(samples) / audio.RATE
  print(
    f'{length:.1f} s of speech in {seconds:.1f} s, compilation included',
    file=sys.stderr,
  )
  if _REFERENCE.value:
    errors = wer.word_errors([_REFERENCE.value], [text])
    print(
      f'WER {errors.rate:.3f} ({errors.errors} errors in {errors.words} words)',
      file=sys.stderr,
    )


if __name__ == '__main__':
  cli.run(main)
