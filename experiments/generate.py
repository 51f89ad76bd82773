r"""Continues a prompt with a language model.

  python -m experiments.generate --model=smollm2-135m --prompt='The capital of'

The text is streamed to stdout as it comes; speed goes to stderr. Special
tokens in the prompt are understood, so a chat model's turns can be written
out: $'<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n'.
"""

import sys
from collections.abc import Sequence

from absl import flags

import models
from experiments import cli, generation
from jaxq.decode import sampling as sampling_lib

_MODEL = flags.DEFINE_string(
  'model',
  None,
  'Packaged name, .gguf file, Hugging Face or jaxq directory.',
  required=True,
)
_PROMPT = flags.DEFINE_string(
  'prompt', None, 'The text to continue.', required=True
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  'max_new_tokens', 64, 'Tokens to generate at most.', lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float(
  'temperature', 0.0, 'Divides the logits; 0 is greedy.'
)
_TOP_K = flags.DEFINE_integer('top_k', 0, 'Most likely tokens kept; 0: all.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Probability mass kept; 1: all.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the sampling.')
_DTYPE = flags.DEFINE_enum(
  'dtype',
  'float32',
  ['float32', 'bfloat16'],
  'Of float weights, activations and the cache.',
)


def main(argv: Sequence[str]) -> None:
  """Loads, generates and prints."""
  del argv
  sampling = sampling_lib.Sampling(
    temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value
  )
  model = models.load(_MODEL.value, dtype=_DTYPE.value)
  watch = generation.Stopwatch()
  tokens = generation.stream(
    model,
    _PROMPT.value,
    max_new_tokens=_MAX_NEW_TOKENS.value,
    sampling=sampling,
    seed=_SEED.value,
  )
  for text in generation.pieces(model.tokenizer, watch.time(tokens)):
    print(text, end='', flush=True)
  print(flush=True)
  print(watch.summary(), file=sys.stderr)


if __name__ == '__main__':
  cli.run(main)
