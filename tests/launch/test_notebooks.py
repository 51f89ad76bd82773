"""The notebooks run top to bottom on a CPU, and their outputs are kept."""

import importlib
import json
import pathlib
import re
import tempfile
import time
import tomllib
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

try:
  execute = importlib.import_module('launch.colab.execute')
  MISSING = ''
except ModuleNotFoundError as e:
  execute, MISSING = None, f'{e.name} is not installed'
NAMES = ('caches', 'quantize', 'rooflines')
ROOT = pathlib.Path(__file__).resolve().parents[2]
MINUTES = 5  # That a free runtime's CPU may take; here with less of everything.


@pytest.mark.slow
class RunTest(parameterized.TestCase):
  @parameterized.parameters(*NAMES)
  def test_it_runs_top_to_bottom(self, name):
    for module in ('ipykernel', 'matplotlib'):
      if importlib.util.find_spec(module) is None:
        self.skipTest(f'{module} is not installed')
    if MISSING:
      self.skipTest(MISSING)
    start = time.monotonic()
    try:
      notebook = execute.run(name, small=True)
    except ValueError as e:
      if 'ConnectionError' in str(e):
        self.skipTest('the packaged model could not be fetched (no network)')
      raise
    self.assertLess(time.monotonic() - start, 60 * MINUTES)
    outputs = [o for cell in notebook.cells for o in cell.get('outputs', ())]
    figures = [o for o in outputs if 'image/png' in o.get('data', {})]
    self.assertGreaterEqual(len(figures), 2)
    self.assertNotIn('error', {o.output_type for o in outputs})


class SavedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    if MISSING:
      self.skipTest(MISSING)

  def test_all_of_them_are_run(self):
    self.assertEqual(tuple(execute.names()), NAMES)

  @parameterized.parameters(*NAMES)
  def test_it_is_valid_and_small_and_holds_its_figures(self, name):
    notebook = execute.load(name)
    path = execute.FOLDER / f'{name}.ipynb'
    self.assertLess(path.stat().st_size, execute.MAX_BYTES)
    ids = [cell.id for cell in notebook.cells]
    self.assertLen(set(ids), len(ids))
    for cell_id in ids:  # Given by hand, so that they stay.
      self.assertRegex(cell_id, r'^[a-z][a-z-]*$')
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    ran = [bool(cell.execution_count) for cell in code]
    self.assertTrue(all(ran), 'not run: python -m launch.colab.execute')
    figures = sum(
      'image/png' in output.get('data', {})
      for cell in code
      for output in cell.outputs
    )
    self.assertGreaterEqual(figures, 2)

  @parameterized.parameters(*NAMES)
  def test_nothing_that_differs_from_run_to_run_is_kept(self, name):
    before = json.loads((execute.FOLDER / f'{name}.ipynb').read_text())
    tidied = execute.tidy(execute.load(name))
    self.assertEqual(json.loads(execute.text_of(name, tidied)), before)

  def test_what_is_wrong_is_named(self):
    with self.assertRaisesRegex(ValueError, r'--notebook=x: not here; allowed'):
      execute.load('x')
    big = execute.load(NAMES[0])
    big.cells[0].source = 'a' * 2 * execute.MAX_BYTES
    with self.assertRaisesRegex(ValueError, 'caches.ipynb: 2,.* at most 1,000'):
      execute.text_of('caches', big)


def setup_of(name):
  """The source of the cell that installs jaxq."""
  return next(c for c in execute.load(name).cells if c.id == 'setup').source


class SetupTest(parameterized.TestCase):
  """What the first cell gives to pip, on runtimes that have no jaxq yet."""

  def setUp(self):
    super().setUp()
    if MISSING:
      self.skipTest(MISSING)
    self.empty = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def installed(self, folder, *, source='', found=None, which=None, devices=()):
    """Runs the cell as if in a folder; returns what pip was given."""
    text = setup_of(NAMES[0])
    # What IPython alone understands.
    text, count = re.subn(
      r'%pip install --quiet "\$requirement"', 'given.append(requirement)', text
    )
    self.assertEqual(count, 1)
    self.assertIn("\nSOURCE = ''", text)
    text = text.replace("\nSOURCE = ''", f'\nSOURCE = {source!r}')
    given = []
    with (
      mock.patch('importlib.util.find_spec', return_value=found),
      mock.patch('pathlib.Path.cwd', return_value=folder),
      mock.patch('shutil.which', return_value=which),
      mock.patch('glob.glob', return_value=list(devices)),
    ):
      exec(compile(text, 'setup', 'exec'), {'given': given})
    return given

  def test_all_notebooks_share_it(self):
    self.assertLen({setup_of(name) for name in NAMES}, 1)

  def test_where_jaxq_is_nothing_is_installed(self):
    self.assertEmpty(self.installed(self.empty, found=object()))

  @parameterized.parameters(
    ({}, 'demo,notebooks'),
    ({'which': '/usr/bin/nvidia-smi'}, 'demo,notebooks,gpu'),
    ({'devices': ('/dev/accel0',)}, 'demo,notebooks,tpu'),
  )
  def test_of_a_checkout_with_the_extras_of_the_runtime(self, runtime, extras):
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    self.assertContainsSubset(
      extras.split(','), project['optional-dependencies']
    )
    for folder in (ROOT / 'launch' / 'colab', ROOT):
      self.assertEqual(
        self.installed(folder, **runtime),
        [f'jaxq[{extras}] @ {ROOT.as_uri()}'],
      )

  def test_of_a_clone_beside_the_notebook(self):
    clone = self.empty / 'jaxq'
    (clone / 'jaxq').mkdir(parents=True)
    for path in (clone / 'pyproject.toml', clone / 'jaxq' / '__init__.py'):
      path.touch()
    self.assertEqual(
      self.installed(self.empty), [f'jaxq[demo,notebooks] @ {clone.as_uri()}']
    )

  def test_of_an_address_before_all_else(self):
    source = 'git+https://example.org/a/jaxq.git'
    self.assertEqual(
      self.installed(ROOT, source=source), [f'jaxq[demo,notebooks] @ {source}']
    )

  def test_without_either_it_says_what_to_do(self):
    message = 'SOURCE is empty and .* is in no checkout of jaxq; set SOURCE to'
    with self.assertRaisesRegex(ValueError, message):
      self.installed(self.empty)


if __name__ == '__main__':
  absltest.main()
