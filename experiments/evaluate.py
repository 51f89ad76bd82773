"""Measures a language model on held-out text.

  python -m experiments.evaluate --model=DIR --reference=smollm2-135m

Prints token perplexity over non-overlapping windows, the word- and
byte-normalised figures beside it and, given a reference, the paired ratio, the
KL divergence and the top-1 agreement, each with a 95 % bootstrap interval.
"""

import sys
import time
from collections.abc import Sequence

import jax
from absl import flags

import models
from experiments import cli, evaluation, results
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
  'data', 'wiki-sample:evaluation', 'Text that calibration did not see.'
)
_WINDOW = flags.DEFINE_integer(
  'window', 2048, 'Tokens per window.', lower_bound=2
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
  windows = evaluation.load_windows(
    model,
    source=_DATA.value,
    window=_WINDOW.value,
    tokens=_TOKENS.value,
    bos=_BOS.value,
  )
  comparison = evaluation.compare(
    reference,
    model,
    windows,
    config=config,
    mesh=mesh,
    progress=Progress(),
  )
  rows = comparison.rows()
  results.print_table(rows)
  if _OUTPUT.value is not None and jax.process_index() == 0:
    run = results.run_info(cli.resolved_flags())
    results.save(_OUTPUT.value, results.Result(run=run, rows=rows))
    print(f'results: {_OUTPUT.value}')


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
