"""Measures a model on held-out text, or images.

  python -m experiments.evaluate --model=DIR --reference=smollm2-135m

Prints token perplexity over non-overlapping windows, the word- and
byte-normalised figures beside it and, given a reference, the paired ratio, the
KL divergence and the top-1 agreement, each with a 95 % bootstrap interval. Of
encoders it prints how far their embeddings moved and what they still find.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence

import jax
from absl import flags

import models
from experiments import cli, families, passkey, results
from jaxq.eval import bootstrap
from jaxq.parallel import mesh as mesh_lib

_MODEL = flags.DEFINE_string(
  'model',
  None,
  'What to measure: packaged name, .gguf, Hugging Face or jaxq directory.',
  required=True,
)
_REFERENCE = flags.DEFINE_string(
  'reference', None, 'The float model to compare with; none: measure alone.'
)
_DATA = flags.DEFINE_string(
  'data',
  None,
  'Text or images that calibration did not see. Default: '
  'wiki-sample:evaluation, photos:evaluation for images.',
)
_WINDOW = flags.DEFINE_integer(
  'window',
  None,
  'Tokens per window. Default: 2048; 128 for an encoder.',
  lower_bound=2,
)
_SAMPLES = flags.DEFINE_integer(
  'samples', 256, 'Pairs of passages, or images, to measure an encoder on.'
)
_IMAGE_SIZE = flags.DEFINE_integer(
  'image_size', 224, 'Pixels of an image, both sides.', lower_bound=1
)
_TOKENS = flags.DEFINE_integer(
  'tokens', 16384, 'Tokens in all, in whole windows.', lower_bound=2
)
_BOS = flags.DEFINE_enum(
  'bos',
  'none',
  ['none', 'document', 'window'],
  'Before what the BOS token is put.',
)
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'Of float weights, activations.'
)
_BLOCK = flags.DEFINE_integer(
  'bootstrap_block', 128, 'Consecutive tokens that are drawn together.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the bootstrap.')
_MESH = flags.DEFINE_string(
  'mesh', '', 'Device mesh, as in data:2,model:4. Default: one device.'
)
_PASSKEY = flags.DEFINE_list(
  'passkey', [], 'Prompt lengths, in tokens, to hide a number in; as 512,1024.'
)
_OUTPUT = flags.DEFINE_string('output', None, 'JSON file for the results.')


def main(argv: Sequence[str]) -> None:
  """Loads, measures, prints and writes."""
  del argv
  config = bootstrap.BootstrapConfig(block=_BLOCK.value, seed=_SEED.value)
  mesh = mesh_lib.make_mesh(_MESH.value) if _MESH.value else None
  model = models.load(_MODEL.value, _DTYPE.value, mesh)
  reference = None
  if _REFERENCE.value is not None:
    reference = models.load(_REFERENCE.value, _DTYPE.value, mesh)
  choice = families.Choice(
    source=_DATA.value or '',
    samples=_SAMPLES.value,
    length=_WINDOW.value or 0,
    image_size=_IMAGE_SIZE.value,
    tokens=_TOKENS.value,
    bos=_BOS.value,
  )
  rows = families.of(model).compare(
    reference,
    model,
    families.evaluation_data(model, choice),
    config=config,
    mesh=mesh,
    progress=Progress(),
  )
  if _PASSKEY.value:
    rows = _with_passkeys(rows, [m for m in (reference, model) if m])
  results.print_table(rows)
  if _OUTPUT.value is not None and jax.process_index() == 0:
    run = results.run_info(cli.resolved_flags())
    results.save(_OUTPUT.value, results.Result(run=run, rows=rows))
    print(f'results: {_OUTPUT.value}')


def _with_passkeys(rows, measured) -> tuple[results.Row, ...]:
  """The rows with the retrieval of their models behind."""
  try:
    lengths = [int(text) for text in _PASSKEY.value]
  except ValueError as e:
    raise ValueError(
      f'--passkey={",".join(_PASSKEY.value)}; whole numbers of tokens are '
      'needed, as in --passkey=512,1024.'
    ) from e
  return tuple(
    dataclasses.replace(
      row, metrics=row.metrics + passkey.metrics(model, lengths)
    )
    for row, model in zip(rows, measured, strict=True)
  )


class Progress:
  """Windows done and the time left, on one line of stderr."""

  def __init__(self):
    self._start = time.monotonic()

  def __call__(self, done: int, num: int) -> None:
    if jax.process_index() != 0:
      return
    left = (time.monotonic() - self._start) / done * (num - done)
    live = sys.stderr.isatty()
    text = f'evaluating: window {done}/{num}, {left:.0f} s left'
    end = '' if live and done < num else '\n'
    print(
      f'\r{text:<60}' if live else text, end=end, file=sys.stderr, flush=True
    )


if __name__ == '__main__':
  cli.run(main)
