"""The house rules that a machine can check.

Imports point down only: experiments -> models -> jaxq -> pallas_kernels -> jax.
Oracles stay in tests/ and benchmarks/. Every module says what it is for, none
is longer than 500 lines, and what it imports is declared in pyproject.toml.
"""

import ast
import pathlib
import re
import tomllib

from absl.testing import absltest

from tools import build_files

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The packages of the repository that each may import, itself included.
BELOW = {
  'pallas_kernels': {'pallas_kernels'},
  'jaxq': {'jaxq', 'pallas_kernels'},
  'models': {'models', 'jaxq', 'pallas_kernels'},
  'experiments': {'experiments', 'models', 'jaxq', 'pallas_kernels'},
  'launch': {'launch', 'experiments', 'models', 'jaxq', 'pallas_kernels'},
  'tools': {'tools', 'experiments', 'models', 'jaxq', 'pallas_kernels'},
}
KERNEL_LIBRARIES = {'absl', 'jax', 'jaxlib', 'jaxtyping', 'ml_dtypes', 'numpy'}
ORACLES = {'torch', 'transformers'}
MAX_LINES = 500
# A note on work to be done names the issue, or says after a colon what ends it.
TODO = re.compile(r'#.*\bTODO\b(?!\([^)]+\):|: \S)')


def sources():
  """Yields (name, path) of every Python file."""
  for path in build_files.source_files(ROOT):
    yield path.relative_to(ROOT).as_posix(), path


def external_imports():
  """Yields (name, line, folder, imported top-level name) of every import."""
  for name, path in sources():
    for module, line in build_files.imports(ROOT, path):
      yield name, line, name.partition('/')[0], module.partition('.')[0]


class ImportsTest(absltest.TestCase):
  def assert_none(self, problems):
    self.assertEmpty(problems, '\n' + '\n'.join(problems))

  def test_imports_point_down(self):
    self.assert_none(
      [
        f'{name}:{line}: {folder} imports {top}; allowed are '
        f'{sorted(BELOW[folder])}. Move what is shared down.'
        for name, line, folder, top in external_imports()
        if folder in BELOW
        and top in build_files.ROOTS
        and top not in BELOW[folder]
      ]
    )

  def test_kernels_take_arrays_and_know_only_jax(self):
    self.assert_none(
      [
        f'{name}:{line}: imports {top}; allowed are {sorted(KERNEL_LIBRARIES)}.'
        ' Pass plain arrays in.'
        for name, line, folder, top in external_imports()
        if folder == 'pallas_kernels'
        and top not in KERNEL_LIBRARIES | {'pallas_kernels'}
      ]
    )

  def test_oracles_stay_in_tests_and_benchmarks(self):
    self.assert_none(
      [
        f'{name}:{line}: imports {top}; allowed in tests/ and benchmarks/ only.'
        ' Compare with it in tests/parity.'
        for name, line, folder, top in external_imports()
        if top in ORACLES and folder not in ('tests', 'benchmarks')
      ]
    )

  def test_what_is_imported_is_declared(self):
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    extras = project['optional-dependencies']

    def names(requirements):
      return {
        re.match(r'[\w.-]+', r)[0].lower().replace('_', '-')
        for r in requirements
      }

    library = names(project['dependencies']) | names(extras['eval'])
    for extra in ('launch', 'notebooks', 'video'):
      library |= names(extras[extra])
    tests = library | names(extras['test'])
    self.assert_none(
      [
        f'{name}:{line}: imports {top}, which pyproject.toml does not declare. '
        'Declare it, or do without.'
        for name, line, folder, top in external_imports()
        if folder != 'benchmarks'  # Peers install themselves.
        and top not in build_files.ROOTS
        and build_files.distribution(top).lower().replace('_', '-')
        not in (tests if folder == 'tests' else library)
      ]
    )

  def test_every_module_says_what_it_is_for(self):
    self.assert_none(
      [
        f'{name}: no module docstring. Say what the file is for.'
        for name, path in sources()
        if not ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')))
      ]
    )

  def test_no_file_is_too_long(self):
    lengths = {
      name: len(path.read_text(encoding='utf-8').splitlines())
      for name, path in sources()
    }
    self.assert_none(
      [
        f'{name}: {length} lines; at most {MAX_LINES}. Split it by idea.'
        for name, length in lengths.items()
        if length > MAX_LINES
      ]
    )

  def test_a_todo_names_what_closes_it(self):
    self.assert_none(
      [
        f'{name}:{i}: TODO without what closes it. Add `: <what ends it>`.'
        for name, path in sources()
        for i, line in enumerate(
          path.read_text(encoding='utf-8').split('\n'), 1
        )
        if TODO.search(line)
      ]
    )


if __name__ == '__main__':
  absltest.main()
