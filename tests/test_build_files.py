"""The BUILD files say what the imports say, target by target."""

import pathlib
import tempfile

from absl.testing import absltest, parameterized

from tools import build_files

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = {
  'jaxq/__init__.py': '"""The library."""',
  'jaxq/numerics/__init__.py': '"""Numbers."""',
  'jaxq/numerics/spec.py': '"""Spec."""\nimport dataclasses\nBITS = 4',
  'jaxq/numerics/qarray.py': '''"""QArray."""
import os.path
import jax.numpy as jnp
from absl import logging
from jaxq import numerics
from jaxq.numerics import spec
from . import spec as again


def late():
  from jaxq.numerics.spec import BITS
  import orbax.checkpoint as ocp
''',
  'tests/numerics/test_qarray.py': '"""T."""\nfrom jaxq.numerics import qarray',
}


class RepositoryTest(absltest.TestCase):
  def test_every_build_file_says_what_the_imports_say(self):
    problems = build_files.differences(ROOT)
    self.assertEmpty(problems, '\n' + '\n'.join(problems))


class BuildFilesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.root = pathlib.Path(folder.name)
    for name, text in FILES.items():
      (self.root / name).parent.mkdir(parents=True, exist_ok=True)
      (self.root / name).write_text(text)

  def test_deps_are_the_imports_wherever_they_stand(self):
    targets = build_files.expected(self.root)
    self.assertEqual(
      targets['jaxq/numerics'][1],
      build_files.Target(
        rule='py_library',
        label='//jaxq/numerics:qarray',
        deps=(
          '//jaxq/numerics:__init__',
          '//jaxq/numerics:spec',
          '@pypi//absl_py',
          '@pypi//jax',
          '@pypi//orbax_checkpoint',
        ),
      ),
    )
    self.assertEqual(targets['tests/numerics'][0].rule, 'py_test')

  def test_the_text_is_laid_out_as_buildifier_does(self):
    build_files.write(self.root)
    self.assertEqual(
      (self.root / 'tests/numerics/BUILD').read_text(),
      """\
# Written from the imports by `make build-files`; do not edit.
load("@rules_python//python:py_test.bzl", "py_test")

package(default_visibility = ["//visibility:public"])

py_test(
    name = "test_qarray",
    srcs = ["test_qarray.py"],
    deps = ["//jaxq/numerics:qarray"],
)
""",
    )

  def test_what_was_written_agrees_and_is_not_written_again(self):
    changed = build_files.write(self.root)
    self.assertEqual(changed, ['jaxq', 'jaxq/numerics', 'tests/numerics'])
    self.assertEmpty(build_files.differences(self.root))
    self.assertEmpty(build_files.write(self.root))

  @parameterized.parameters(
    (
      'jaxq/numerics/qarray.py',
      '"""Q."""\nimport jax\nimport flax',
      r"//jaxq/numerics:qarray: deps lack \['@pypi//flax'\], have unused .*"
      r"'//jaxq/numerics:spec'.* Run `make build-files`",
    ),
    ('jaxq/numerics/new.py', '', '//jaxq/numerics:new is missing. Run `make'),
    ('models/vit.py', '', 'models/BUILD is missing. Run `make build-files`'),
    ('models/BUILD', '', 'models/BUILD has no modules beside it. Delete it'),
    (
      'tests/numerics/BUILD',
      'py_library(name = "test_qarray")',
      '//tests/numerics:test_qarray is a py_library, not a py_test. Run',
    ),
    (
      'jaxq/BUILD',
      'py_library(name = "__init__")',
      'jaxq/BUILD is laid out differently. Run `make build-files`',
    ),
  )
  def test_a_difference_names_the_target_and_the_command(
    self, name, text, message
  ):
    build_files.write(self.root)
    (self.root / name).parent.mkdir(exist_ok=True)
    (self.root / name).write_text(text)
    problems = build_files.differences(self.root)
    self.assertLen(problems, 1)
    self.assertRegex(problems[0], f'^{message}')

  def test_a_target_without_source_is_named(self):
    build_files.write(self.root)
    (self.root / 'tests/numerics/test_other.py').touch()
    build_files.write(self.root)
    (self.root / 'tests/numerics/test_other.py').unlink()
    self.assertEqual(
      build_files.differences(self.root),
      [
        '//tests/numerics:test_other has no source file. '
        'Run `make build-files`.'
      ],
    )

  @parameterized.parameters(
    (
      'import jaxq.nowhere',
      r'a.py:1: imports jaxq.nowhere, which is no module',
    ),
    ('def', r'a.py:1: invalid syntax; a file that parses is needed'),
  )
  def test_a_file_that_cannot_be_read_is_named(self, text, message):
    (self.root / 'jaxq/a.py').write_text(text)
    with self.assertRaisesRegex(ValueError, message):
      build_files.expected(self.root)


if __name__ == '__main__':
  absltest.main()
