"""Writes the report of a calibration: one HTML file, to look at.

  python -m experiments.report --run=out/smollm2_w4a16_gptq.run

experiments.calibrate writes the same file when it ends. Nothing is measured
here: the figures are those of the run folder, an unfinished or older one too.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from experiments import cli, reporting

_RUN = flags.DEFINE_string(
  'run', None, 'Folder OUTPUT.run of experiments.calibrate, or OUTPUT itself.'
)
_COMPARE = flags.DEFINE_multi_string(
  'compare', [], 'Another run to draw beside it, such as round to nearest.'
)
_SENSITIVITY = flags.DEFINE_string(
  'sensitivity', None, 'A sensitivity.json of experiments.sensitivity to draw.'
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'File to write. Default: report.html in the run folder.'
)
_TENSORBOARD = flags.DEFINE_string(
  'tensorboard_dir', None, 'Also write the figures as TensorBoard scalars.'
)


def main(argv: Sequence[str]) -> None:
  """Writes the page and says where it is."""
  del argv
  if _RUN.value is None:
    raise ValueError(
      '--run not given; a run folder is needed. Add --run=OUTPUT.run.'
    )
  output = None if _OUTPUT.value is None else pathlib.Path(_OUTPUT.value)
  path = reporting.write(_RUN.value, _COMPARE.value, output, _SENSITIVITY.value)
  if _TENSORBOARD.value is not None:
    reporting.write_scalars(_RUN.value, _TENSORBOARD.value)
  print(f'report: {path}', file=sys.stderr)


if __name__ == '__main__':
  cli.run(main)
