"""The Dockerfiles can be read, copy what is there, install what is declared.

No daemon is needed: what a build would stumble over is looked for in the text,
and the layer that installs the dependencies is made of the files it would have.
"""

import importlib.util
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib

from absl.testing import absltest, parameterized

from launch import job as job_lib
from tests.launch import fakes

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / 'launch' / 'docker'
# Of the Dockerfile reference.
INSTRUCTIONS = frozenset(
  {
    *('ADD', 'ARG', 'CMD', 'COPY', 'ENTRYPOINT', 'ENV', 'EXPOSE', 'FROM'),
    *('HEALTHCHECK', 'LABEL', 'ONBUILD', 'RUN', 'SHELL', 'STOPSIGNAL', 'USER'),
    *('VOLUME', 'WORKDIR'),
  }
)


def read(kind):
  """(instruction, the rest of it) of a Dockerfile, in order.

  As Docker reads it: lines of comments are left out, also within an instruction
  that goes on over several lines.
  """
  lines = (FOLDER / f'{kind}.Dockerfile').read_text().splitlines()
  lines = [line for line in lines if not line.lstrip().startswith('#')]
  text = re.sub(r'\\\n', ' ', '\n'.join(lines))
  return [
    tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()
  ]


def all_of(kind, instruction):
  return [rest for name, rest in read(kind) if name == instruction]


def project():
  return tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']


@parameterized.parameters('tpu', 'gpu')
class DockerfileTest(parameterized.TestCase):
  def test_every_line_is_an_instruction(self, kind):
    found = read(kind)
    self.assertEqual(found[0][0], 'FROM')
    self.assertContainsSubset([name for name, _ in found], INSTRUCTIONS)
    for pairs in all_of(kind, 'ENV'):
      for pair in shlex.split(pairs):
        self.assertRegex(pair, r'^[A-Z][A-Z_]*=\S+$')

  def test_its_python_is_one_that_jaxq_runs_on(self, kind):
    (image,) = all_of(kind, 'FROM')
    version = re.fullmatch(r'python:(\d+)\.(\d+)-slim', image)
    least = re.fullmatch(r'>=(\d+)\.(\d+)', project()['requires-python'])
    self.assertGreaterEqual(
      tuple(map(int, version.groups())), tuple(map(int, least.groups()))
    )

  def test_what_it_copies_is_there_and_is_sent(self, kind):
    ignored = FOLDER / f'{kind}.Dockerfile.dockerignore'
    sent = ignored.read_text().split()
    self.assertEqual(sent[0], '*')  # All is left out but what is named.
    for line in all_of(kind, 'COPY'):
      *names, target = line.split()
      self.assertNotEmpty(names)
      self.assertFalse(pathlib.PurePath(target).is_absolute())
      for name in names:
        self.assertTrue((ROOT / name).exists(), name)
        self.assertIn(f'!{name.split("/")[0]}', sent)
    for name in sent[1:]:
      self.assertTrue('*' in name or (ROOT / name[1:]).exists(), name)

  def test_every_package_and_extra_is_declared(self, kind):
    copied = [line.split()[0] for line in all_of(kind, 'COPY')]
    (extras,) = re.findall(r"'\.\[([\w,-]+)\]'", '\n'.join(all_of(kind, 'RUN')))
    self.assertIn(kind, extras.split(','))
    self.assertContainsSubset(
      extras.split(','), project()['optional-dependencies']
    )
    tool = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']
    for package in tool['setuptools']['packages']['find']['include']:
      self.assertIn(package.rstrip('*'), copied)

  def test_the_layer_of_dependencies_is_a_package(self, kind):
    if importlib.util.find_spec('setuptools') is None:
      self.skipTest('setuptools is not installed')
    found = read(kind)
    first = next(i for i, (name, _) in enumerate(found) if name == 'RUN')
    with tempfile.TemporaryDirectory() as folder:
      for name, rest in found[:first]:
        if name == 'COPY':
          *names, target = rest.split()
          place = pathlib.Path(folder, target)
          place.mkdir(parents=True, exist_ok=True)
          for source in names:
            shutil.copy(ROOT / source, place)
      program = (
        'from setuptools import build_meta\n'
        "print(build_meta.prepare_metadata_for_build_wheel('.'))\n"
      )
      done = subprocess.run(
        [sys.executable, '-c', program],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
      )
      self.assertEqual(done.returncode, 0, done.stderr[-2000:])
      name = done.stdout.split()[-1]
      metadata = pathlib.Path(folder, name, 'METADATA').read_text()
    self.assertIn('\nName: jaxq\n', metadata)
    self.assertIn(f'\nProvides-Extra: {kind}\n', metadata)

  def test_it_is_where_and_what_the_launchers_start(self, kind):
    self.assertEqual(all_of(kind, 'WORKDIR'), ['/jaxq'])  # As for Slurm.
    (command,) = all_of(kind, 'CMD')
    words = json.loads(command)  # No shell, which would swallow SIGTERM.
    self.assertEqual(words[:2], ['python', '-m'])
    package, entry_point = words[2].split('.')
    self.assertEqual(package, 'experiments')
    self.assertIn(entry_point, job_lib.ENTRY_POINTS)

  def test_shellcheck_has_nothing_to_say(self, kind):
    script = '\n'.join(['#!/bin/sh', *all_of(kind, 'RUN'), ''])
    found = fakes.shellcheck(script)
    if found is None:
      self.skipTest('shellcheck is not installed')
    self.assertEqual(found, '')


if __name__ == '__main__':
  absltest.main()
