"""The README's first 40 lines, and its Python example, run as written."""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest
from absl.testing import absltest

ROOT = pathlib.Path(__file__).resolve().parents[1]


class ReadmeTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.text = (ROOT / 'README.md').read_text(encoding='utf-8')

  def test_the_first_lines_show_the_commands_and_their_output(self):
    head = '\n'.join(self.text.splitlines()[:40])
    for needed in ('make demo', 'make test', 'token perplexity', 'quantized ='):
      self.assertIn(needed, head)

  def test_links_lead_somewhere(self):
    for target in re.findall(r'\]\((?!https?:)([^)#]+)', self.text):
      self.assertTrue((ROOT / target).exists(), target)

  @pytest.mark.slow
  def test_the_example_runs_as_written(self):
    (example,) = re.findall(r'```python\n(.*?)```', self.text, re.DOTALL)
    self.assertLen([line for line in example.splitlines() if line], 10)
    with tempfile.TemporaryDirectory() as folder:
      done = subprocess.run(
        [sys.executable, '-c', example],
        cwd=folder,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
      )
      if 'ConnectionError' in done.stderr:
        self.skipTest('the packaged model could not be fetched (no network)')
      self.assertEqual(done.returncode, 0, done.stderr[-2000:])
      written = pathlib.Path(folder) / 'w4' / 'manifest.json'
      self.assertTrue(written.exists())


if __name__ == '__main__':
  absltest.main()
