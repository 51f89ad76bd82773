"""Writes what a run folder holds: as a page, and as TensorBoard scalars."""

import importlib
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from experiments import report_findings as findings
from experiments import report_page, results, run_folder

_COMPARED = 3


def write(
  folder: str | os.PathLike,
  compare: Sequence[str | os.PathLike] = (),
  output: pathlib.Path | None = None,
  sensitivity: str | None = None,
) -> pathlib.Path:
  """Writes the report of a run folder and returns its path.

  Args:
    folder: OUTPUT.run, or OUTPUT.
    compare: run folders drawn beside it, at most three.
    output: the file; None is report.html in the folder.
    sensitivity: a sensitivity.json; None is that of the run, if there is one.

  Raises:
    FileNotFoundError, ValueError: no such folder, or a file of it is not ours.
    OSError: the report cannot be written.
  """
  if len(compare) > _COMPARED:
    raise ValueError(
      f'--compare is given {len(compare)} times; at most {_COMPARED} runs are '
      'drawn beside one. Leave some out.'
    )
  run = run_folder.load(folder, sensitivity)
  others = [run_folder.load(other) for other in compare]
  page = report_page.render(run, others)
  output = output or run.path / 'report.html'
  results.write_text(output, page)
  return output


def check_tensorboard() -> None:
  """Refuses at once where no writer is installed.

  Raises:
    ValueError: tensorboardX is missing.
  """
  _writer_module()


def write_scalars(folder: str | os.PathLike, directory: str) -> int:
  """Writes a run's figures for TensorBoard; the step is the block.

  Args:
    folder: OUTPUT.run, or OUTPUT.
    directory: for the event file; made where it is not there.

  Returns:
    how many scalars were written.

  Raises:
    FileNotFoundError, ValueError: as `write`; or tensorboardX is missing.
  """
  module = _writer_module()
  run = run_folder.load(folder)
  count = 0
  with module.SummaryWriter(directory) as writer:
    for tag, value, step in scalars(run):
      writer.add_scalar(tag, value, step)
      count += 1
  return count


def scalars(run: run_folder.RunData) -> Iterator[tuple[str, float, int]]:
  """Yields (tag, value, step) of every finite figure of a run."""
  for tag, value, step in _scalars(run):
    if value is not None and math.isfinite(value):
      yield tag, float(value), step


def _scalars(run: run_folder.RunData) -> Iterator[tuple[str, Any, int]]:
  for block in run.blocks:
    step = block['index']
    for name in ('output_sqnr_db', 'rtn_sqnr_db', 'stream_sqnr_db', 'seconds'):
      yield f'block/{name}', block.get(name), step
    for linear in block['linears']:
      name = findings.short(linear['name'])
      yield f'weight_sqnr_db/{name}', linear['sqnr_db'], step
      yield f'bits/{name}', linear['bits'], step
  for tap in findings.taps(run):
    for which, side in enumerate(('before', 'after')):
      values = findings.outlier_ratio(run, tap, which)
      for block, value in zip(run.blocks, values, strict=True):
        yield f'outliers_{side}/{tap}', value, block['index']
  for i, row in enumerate(run.rows):
    side = 'quantized' if i == len(run.rows) - 1 else 'reference'
    for metric in row.metrics:
      tag = metric.name.replace(' ', '_')
      yield f'results_{side}/{tag}', metric.value, 0


def _writer_module() -> Any:
  """The tensorboardX module, imported only where it is asked for."""
  try:
    return importlib.import_module('tensorboardX')
  except ImportError as e:
    raise ValueError(
      '--tensorboard_dir needs the package tensorboardX, which is not '
      'installed. Run pip install jaxq[tensorboard], or leave the flag out.'
    ) from e
