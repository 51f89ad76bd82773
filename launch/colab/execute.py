"""Runs the notebooks top to bottom and keeps what they show.

  python -m launch.colab.execute                      all, as a person would
  python -m launch.colab.execute --notebook=caches    one
  python -m launch.colab.execute --small --nosave     as continuous integration

A notebook is edited in Jupyter or Colab like any other; this brings its outputs
up to date and takes off what differs from run to run (times, streamed pieces,
execution metadata), so that a change of a notebook can be read.
"""

import os
import pathlib
import time
from collections.abc import Sequence

import nbclient
import nbformat
from absl import flags

from experiments import cli

_NOTEBOOK = flags.DEFINE_multi_string(
  'notebook', [], 'Name of one, without .ipynb. Default: all.'
)
_SMALL = flags.DEFINE_bool('small', False, 'With less of everything.')
_SAVE = flags.DEFINE_bool('save', True, 'Write the outputs into the files.')

FOLDER = pathlib.Path(__file__).resolve().parent
SMALL = 'JAXQ_NOTEBOOK_SMALL'  # The notebooks look at it.
MAX_BYTES = 1_000_000  # Of a file with its outputs.
_ROOT = FOLDER.parents[1]
_SECONDS = 600  # A cell may take.


def names() -> list[str]:
  """The notebooks, sorted, without .ipynb."""
  return sorted(path.stem for path in FOLDER.glob('*.ipynb'))


def load(name: str) -> nbformat.NotebookNode:
  """A notebook of this folder, checked against its format.

  Raises:
    ValueError: there is none of that name, or it is not of nbformat 4.
  """
  if name not in names():
    raise ValueError(f'--notebook={name}: not here; allowed {names()}.')
  path = FOLDER / f'{name}.ipynb'
  notebook = nbformat.read(path, as_version=4)
  try:
    nbformat.validate(notebook)
  except nbformat.ValidationError as e:
    raise ValueError(f'{path}: not of nbformat 4 ({e}); mend it.') from e
  return notebook


def run(name: str, *, small: bool = False) -> nbformat.NotebookNode:
  """Executes a notebook in a kernel of its own; returns it with its outputs.

  Args:
    name: without .ipynb.
    small: with less of everything.

  Raises:
    ValueError: as `load`, or a cell failed; the message says which and why.
  """
  notebook = load(name)
  client = nbclient.NotebookClient(
    notebook,
    timeout=_SECONDS,
    kernel_name='python3',
    resources={'metadata': {'path': str(FOLDER)}},
  )
  paths = [str(_ROOT), os.environ.get('PYTHONPATH', '')]
  env = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths))}
  env[SMALL] = '1' if small else ''
  try:
    client.execute(env=env)
  except nbclient.exceptions.CellExecutionError as e:
    raise ValueError(f'{name}.ipynb: a cell failed: {e}') from e
  return tidy(notebook)


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
  """Takes off what differs from run to run; returns the same notebook."""
  number = 0
  for cell in notebook.cells:
    cell.metadata = {}
    if cell.cell_type != 'code' or cell.execution_count is None:
      continue
    number += 1
    cell.execution_count = number
    kept: list[nbformat.NotebookNode] = []
    for output in cell.outputs:
      if output.output_type == 'stream' and output.name == 'stderr':
        continue  # Progress bars and warnings of libraries.
      output.pop('execution_count', None)
      if output.output_type == 'execute_result':
        output.execution_count = number
      last = kept[-1] if kept else None
      if output.output_type == 'stream' and last and 'name' in last:
        last.text += output.text
      else:
        kept.append(output)
    cell.outputs = kept
  return notebook


def text_of(name: str, notebook: nbformat.NotebookNode) -> str:
  """The text of a notebook's file.

  Raises:
    ValueError: with its outputs it is larger than MAX_BYTES.
  """
  text = nbformat.writes(notebook).rstrip('\n') + '\n'
  if len(text.encode()) > MAX_BYTES:
    raise ValueError(
      f'{name}.ipynb: {len(text.encode()):,} bytes with its outputs; at most '
      f'{MAX_BYTES:,} are kept. Draw smaller figures.'
    )
  return text


def main(argv: Sequence[str]) -> None:
  """Runs what was asked for."""
  del argv
  for name in _NOTEBOOK.value or names():
    start = time.perf_counter()
    notebook = run(name, small=_SMALL.value)
    if _SAVE.value:
      text = text_of(name, notebook)
      (FOLDER / f'{name}.ipynb').write_text(text, encoding='utf-8')
    print(f'{name}.ipynb: {time.perf_counter() - start:.0f} s', flush=True)


if __name__ == '__main__':
  cli.run(main)
