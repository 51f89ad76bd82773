"""The notebooks run top to bottom on a CPU, and their outputs are kept."""

import importlib
import json

import pytest
from absl.testing import absltest, parameterized

try:
  execute = importlib.import_module('launch.colab.execute')
  MISSING = ''
except ModuleNotFoundError as e:
  execute, MISSING = None, f'{e.name} is not installed'
NAMES = ('caches', 'quantize', 'rooflines')


@pytest.mark.slow
class RunTest(parameterized.TestCase):
  @parameterized.parameters(*NAMES)
  def test_it_runs_top_to_bottom(self, name):
    for module in ('ipykernel', 'matplotlib'):
      if importlib.util.find_spec(module) is None:
        self.skipTest(f'{module} is not installed')
    if MISSING:
      self.skipTest(MISSING)
    try:
      notebook = execute.run(name, small=True)
    except ValueError as e:
      if 'ConnectionError' in str(e):
        self.skipTest('the packaged model could not be fetched (no network)')
      raise
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
    if not any(ran):
      self.skipTest('it was not run yet: python -m launch.colab.execute')
    self.assertTrue(all(ran), 'run in part: python -m launch.colab.execute')
    figures = sum(
      'image/png' in output.get('data', {})
      for cell in code
      for output in cell.outputs
    )
    self.assertGreaterEqual(figures, 2)

  @parameterized.parameters(*NAMES)
  def test_it_installs_itself_only_where_it_is_missing(self, name):
    setup = next(c for c in execute.load(name).cells if c.id == 'setup')
    self.assertIn('%pip install', setup.source)
    self.assertIn("find_spec('jaxq') is None", setup.source)

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


if __name__ == '__main__':
  absltest.main()
