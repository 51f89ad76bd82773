"""The Dockerfiles copy what is there and install extras that exist."""

import pathlib
import re
import tomllib

from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / 'launch' / 'docker'


class DockerfileTest(parameterized.TestCase):
  @parameterized.parameters('tpu', 'gpu')
  def test_what_it_copies_is_there_and_is_sent(self, kind):
    path = FOLDER / f'{kind}.Dockerfile'
    sent = path.with_name(path.name + '.dockerignore').read_text().split()
    for line in re.findall(r'^COPY (.*) \S+$', path.read_text(), re.M):
      for name in line.split():
        self.assertTrue((ROOT / name).exists(), name)
        self.assertIn(f'!{name.split("/")[0]}', sent)

  @parameterized.parameters('tpu', 'gpu')
  def test_every_package_and_extra_is_declared(self, kind):
    text = (FOLDER / f'{kind}.Dockerfile').read_text()
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    (extras,) = re.findall(r"'\.\[([\w,-]+)\]'", text)
    known = project['project']['optional-dependencies']
    self.assertIn(kind, extras.split(','))
    self.assertContainsSubset(extras.split(','), known)
    find = project['tool']['setuptools']['packages']['find']
    for package in find['include']:
      self.assertRegex(text, rf'COPY {package.rstrip("*")} ')


if __name__ == '__main__':
  absltest.main()
