r"""Trains a quantized language model a little and writes it as a float one.

  python -m experiments.restore \
      --flagfile=experiments/flags/smollm2_ptq161_restore.flags

PTQ1.61's preprocessing (jaxq.quant.restorative_lora): calibrate, restore, then
calibrate with this output as --model. The output is a jaxq directory of float
weights. This is fine-tuning: compare its results with such.
"""

import dataclasses
import hashlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from absl import flags

import models
from experiments import cli, families
from jaxq.io import checkpoint
from jaxq.quant import restorative_lora

_MODEL = flags.DEFINE_string(
  'model', None, 'A jaxq directory of experiments.calibrate.', required=True
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'Directory to write; must be new.', required=True
)
_DATA = flags.DEFINE_string(
  'data', None, 'Text to train on, as of experiments.calibrate.'
)
_SEQUENCES = flags.DEFINE_integer(
  'sequences', 64, 'Sequences of text, used again as needed.', lower_bound=1
)
_LENGTH = flags.DEFINE_integer(
  'sequence_length', None, 'Tokens of a sequence. Default: 512.', lower_bound=2
)
_DEFAULTS = restorative_lora.LoraConfig()
_RANK = flags.DEFINE_integer('rank', _DEFAULTS.rank, 'Of the adapters.')
_ALPHA = flags.DEFINE_float(
  'alpha', _DEFAULTS.alpha, 'Their factor is this over the rank.'
)
_DROPOUT = flags.DEFINE_float('dropout', _DEFAULTS.dropout, 'Of their inputs.')
_TARGETS = flags.DEFINE_list(
  'targets', list(_DEFAULTS.targets), 'Names of the linears that have them.'
)
_UPDATES = flags.DEFINE_integer(
  'updates', _DEFAULTS.updates, 'Updates of the adapters.'
)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', _DEFAULTS.batch_size, 'Sequences in a batch.'
)
_ACCUMULATE = flags.DEFINE_integer(
  'accumulate', _DEFAULTS.accumulate, 'Batches of an update.'
)
_RATE = flags.DEFINE_float(
  'learning_rate', _DEFAULTS.learning_rate, 'At its peak.'
)
_WARMUP = flags.DEFINE_float(
  'warmup', _DEFAULTS.warmup, 'Share of the updates before the peak.'
)
_MAX_NORM = flags.DEFINE_float(
  'max_norm', _DEFAULTS.max_norm, 'Longest gradient of an update.'
)
_SEED = flags.DEFINE_integer('seed', _DEFAULTS.seed, 'Of start and dropout.')


def main(argv: Sequence[str]) -> None:
  """Trains, merges and saves."""
  del argv
  config = restorative_lora.LoraConfig(
    rank=_RANK.value,
    alpha=_ALPHA.value,
    dropout=_DROPOUT.value,
    targets=tuple(_TARGETS.value),
    updates=_UPDATES.value,
    batch_size=_BATCH_SIZE.value,
    accumulate=_ACCUMULATE.value,
    learning_rate=_RATE.value,
    warmup=_WARMUP.value,
    max_norm=_MAX_NORM.value,
    seed=_SEED.value,
  )
  opened = models.open_model(_MODEL.value)
  if opened.family != 'decoder' or opened.quantization is None:
    raise ValueError(
      f'--model={_MODEL.value} is a model of the family {opened.family!r}, '
      f'{"float" if opened.quantization is None else "quantized"}; a '
      'quantized decoder is needed. Run experiments.calibrate first.'
    )
  tokens, description = families.calibration_data(
    opened,
    families.Choice(
      source=_DATA.value or '',
      samples=_SEQUENCES.value,
      length=_LENGTH.value or 0,
    ),
  )
  marks = {
    'source': opened.fingerprint(),
    'data': hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest(),
    'config': repr(config),
    'jax': jax.__version__,
  }
  with checkpoint.Writer(_OUTPUT.value, marks) as writer:
    if writer.complete:
      _say(f'{_OUTPUT.value} is complete already; nothing to train.')
      return
    _say(f'{_MODEL.value}: {config.updates} updates on {description}')
    write(models.load(_MODEL.value), opened, tokens, config, writer)
  _say(f'saved {_OUTPUT.value}, a float model to calibrate')


def write(
  model: models.Model,
  opened: Any,
  tokens: np.ndarray,
  config: restorative_lora.LoraConfig,
  writer: checkpoint.Writer,
) -> None:
  """Trains a loaded model and saves it merged.

  Args:
    model: quantized.
    opened: the same, as models.open_model has it.
    tokens: (sequences, T) int32.
    config: of the training.
    writer: of a new directory.
  """
  with tqdm.tqdm(
    total=config.updates, unit='update', desc='restore', dynamic_ncols=True
  ) as bar:

    def show(i, loss):
      del i
      bar.set_postfix_str(f'loss {loss:.3f}')
      bar.update()

    adapters = restorative_lora.train(
      lambda variables, t: model.module.apply(variables, t)[0],
      model.variables,
      tokens,
      config,
      show,
    )
  params = restorative_lora.merge(model.variables['params'], adapters, config)
  host = jax.device_get(params)
  runs = [key for key in sorted(host) if key.startswith('blocks_')]
  runs.sort(key=lambda key: int(key.removeprefix('blocks_')))
  writer.save_outside({k: v for k, v in host.items() if k not in runs})
  i = 0
  for key in runs:
    for j in range(len(jax.tree.leaves(host[key])[0])):
      block = jax.tree.map(lambda a, j=j: a[j], host[key])
      writer.save_block(i, {'params': block, 'quant': {}})
      i += 1
  writer.finish(
    {
      'model': opened.description(),
      'num_blocks': i,
      'quantization': None,
      'restored': {
        **dataclasses.asdict(config),
        'targets': list(config.targets),
        'from': opened.quantization,
      },
    },
    opened.tokenizer().to_str(),
  )


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


if __name__ == '__main__':
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  cli.run(main)
