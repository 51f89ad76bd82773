r"""Finds the key channels that Double Sparsity labels tokens with.

  python -m experiments.label_channels --model=smollm2-135m \
      --output=channels.json
  python -m experiments.generate --model=smollm2-135m --prompt=... \
      --kv_cache=double_sparsity:channels=channels.json

Runs the calibration driver over the model without changing it: one block is on
the device at a time. The file holds indices only.
"""

from collections.abc import Sequence

import numpy as np
from absl import flags

import models
from experiments import cli, label_statistics
from jaxq.data import pipeline
from jaxq.kvcache import label_channels

_MODEL = flags.DEFINE_string(
  'model',
  None,
  'Packaged name, .gguf file, Hugging Face or float jaxq directory.',
  required=True,
)
_OUTPUT = flags.DEFINE_string('output', None, 'The JSON file.', required=True)
_STAT = flags.DEFINE_enum(
  'stat', 'qk', label_channels.STATS, 'What makes a channel count.'
)
_DATA = flags.DEFINE_string(
  'data', 'wiki-sample:calibration', 'Text that is read.'
)
_SEQUENCES = flags.DEFINE_integer('sequences', 32, 'Of text.', lower_bound=1)
_LENGTH = flags.DEFINE_integer(
  'length', 512, 'Tokens of a sequence.', lower_bound=2
)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', 8, 'Sequences at a time; divides them.', lower_bound=1
)


def main(argv: Sequence[str]) -> None:
  """Reads text, writes the file, and says what the channels hold."""
  del argv
  model = models.open_model(_MODEL.value)
  config = pipeline.DataConfig(
    source=_DATA.value,
    num_sequences=_SEQUENCES.value,
    sequence_length=_LENGTH.value,
  )
  tokens = pipeline.calibration_tokens(config, model.tokenizer())
  found = label_statistics.statistics(
    model, tokens, stat=_STAT.value, batch_size=_BATCH_SIZE.value
  )
  settings = {
    'model': _MODEL.value,
    'stat': _STAT.value,
    'data': _DATA.value,
    'tokens': int(tokens.size),
  }
  label_channels.save(_OUTPUT.value, found, settings)
  ordered = -np.sort(-found, axis=-1)
  D = found.shape[-1]
  for factor in (2, 4, 8):
    share = ordered[..., : D // factor].sum(-1) / ordered.sum(-1)
    print(
      f'the first {D // factor:4d} of {D} channels hold '
      f'{100 * share.mean():.1f} % of {_STAT.value}'
    )
  print(f'channels: {_OUTPUT.value}')


if __name__ == '__main__':
  cli.run(main)
