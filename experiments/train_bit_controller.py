r"""Trains the network that gives every cached token its bits.

  python -m experiments.train_bit_controller --model=smollm2-135m \
      --output=controller.json
  python -m experiments.evaluate --model=smollm2-135m \
      --kv_cache=dont_waste_bits:controller=controller.json

Measures, token by token, what fewer bits do to the text behind
(experiments.bit_harm), and trains on it. The measurement is kept beside the
output, so that it is not made again for another --mean_bits or --beta.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

import models
from experiments import bit_harm, cli
from jaxq.data import pipeline
from jaxq.kvcache import bit_controller

_MODEL = flags.DEFINE_string(
  'model', None, 'Packaged name, .gguf file or directory.', required=True
)
_OUTPUT = flags.DEFINE_string('output', None, 'The JSON file.', required=True)
_DATA = flags.DEFINE_string(
  'data', 'wiki-sample:calibration', 'Text that is read.'
)
_SEQUENCES = flags.DEFINE_integer('sequences', 24, 'Of text.', lower_bound=1)
_LENGTH = flags.DEFINE_integer(
  'length', 256, 'Tokens of a sequence.', lower_bound=2
)
_SAMPLES = flags.DEFINE_integer(
  'samples', 32, 'Tokens measured in each.', lower_bound=1
)
_HORIZON = flags.DEFINE_integer(
  'horizon', 32, 'Tokens behind that are looked at.', lower_bound=1
)
_MEAN_BITS = flags.DEFINE_float('mean_bits', 5.05, 'Of the labels.')
_BETA = flags.DEFINE_float('beta', 0.1, 'Of the cost; more: fewer bits.')
_EPOCHS = flags.DEFINE_integer('epochs', 60, 'Of training.', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the draw and the network.')


def main(argv: Sequence[str]) -> None:
  """Measures or reads the harm, trains, writes."""
  del argv
  model = models.load(_MODEL.value)
  if model.family != 'decoder':
    raise NotImplementedError(
      f'train_bit_controller: {model.name} is a {model.family} model; a '
      'decoder is needed, whose cache is stored.'
    )
  settings = {
    'model': _MODEL.value,
    'data': _DATA.value,
    'sequences': _SEQUENCES.value,
    'length': _LENGTH.value,
    'samples': _SAMPLES.value,
    'horizon': _HORIZON.value,
    'seed': _SEED.value,
  }
  features, harm = _measured(model, settings)
  trained = bit_controller.train(
    features,
    harm,
    head_dim=model.config.head_dim,
    mean_bits=_MEAN_BITS.value,
    beta=_BETA.value,
    epochs=_EPOCHS.value,
    seed=_SEED.value,
    settings=settings,
  )
  bit_controller.save(_OUTPUT.value, trained)
  for name, value in trained.settings.items():
    print(f'{name}: {value}')
  means = ', '.join(f'{x:.2e}' for x in harm.mean(0))
  print(f'mean harm at 2, 4, 8 bits: {means} nats')
  print(f'controller: {_OUTPUT.value}')


def _measured(
  model: models.Model, settings: dict
) -> tuple[np.ndarray, np.ndarray]:
  """Features and harm, from the file beside the output where it is of these."""
  path = pathlib.Path(f'{_OUTPUT.value}.harm.npz')
  if path.exists():
    with np.load(path) as file:
      if str(file['settings']) == str(settings):
        return file['features'], file['harm']
  config = pipeline.DataConfig(
    source=_DATA.value,
    num_sequences=_SEQUENCES.value,
    sequence_length=_LENGTH.value,
  )
  features, harm = bit_harm.measure(
    model,
    pipeline.calibration_tokens(config, model.tokenizer),
    samples=_SAMPLES.value,
    horizon=_HORIZON.value,
    seed=_SEED.value,
  )
  np.savez(path, features=features, harm=harm, settings=str(settings))
  return features, harm


if __name__ == '__main__':
  cli.run(main)
