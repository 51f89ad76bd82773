"""`python -m experiments.export`: what is written, printed and refused."""

import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

import models
from jaxq.numerics import spec as spec_lib
from tests.io import model_files, test_gguf_export


def run(*flags):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.export', *flags],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )


class ExportTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.hf = model_files.write_hf(self.folder / 'hf')
    self.out = self.folder / 'new' / 'out.gguf'

  def test_a_quantized_directory_computes_the_same_as_its_gguf(self):
    spec = spec_lib.QuantSpec(
      dtype='int4',
      granularity='group',
      group_size=32,
      scale_dtype='float16',
    )
    folder = self.folder / 'jaxq'
    source = models.open_model(str(self.hf)).source
    test_gguf_export.write_jaxq(source, folder, spec)
    done = run(
      '--format=gguf',
      f'--source={folder}',
      f'--output={self.out}',
      '--gguf_rest=F32',
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertRegex(
      done.stdout,
      r'out.gguf: 0.\d MB, 6 F32, 14 Q4_0; 14 linears with their integers '
      r'unchanged, their scales rounded by at most 0.0e\+00',
    )
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    left, right = (models.load(str(path)) for path in (folder, self.out))
    left, right = (
      m.module.apply(m.variables, tokens)[0] for m in (left, right)
    )
    np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)

  def test_mistakes_are_one_line(self):
    source = f'--source={self.hf}'
    for flags, message in (
      (('--format=gguf', source, f'--output={self.hf}'), 'hf exists; a new'),
      (
        ('--format=onnx', source, f'--output={self.out}'),
        r"--format=onnx; allowed are \[.*'gguf'",
      ),
    ):
      done = run(*flags)
      self.assertEqual(done.returncode, 1)
      self.assertRegex(done.stderr, f'^error: .*{message}')
      self.assertEqual(done.stderr.count('\n'), 1)


if __name__ == '__main__':
  absltest.main()
