"""Tests of experiments.restore."""

import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from absl.testing import absltest

import models
from jaxq.calibrate import driver, run
from jaxq.numerics import spec as spec_lib
from jaxq.quant import ptq161
from tests.experiments import testing


def restore(*args: str) -> subprocess.CompletedProcess:
  """As `python -m experiments.restore ARGS`."""
  return subprocess.run(
    [sys.executable, '-m', 'experiments.restore', *args],
    cwd=testing.ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=False,
  )


class RestoreTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    testing.write_inputs(self.folder, num_layers=1)
    self.flags = (
      f'--data={self.folder / "text.txt"}',
      '--sequences=2',
      '--sequence_length=8',
      '--rank=2',
      '--updates=2',
    )

  def test_a_quantized_model_becomes_a_float_one(self):
    source = models.open_model(str(self.folder / 'model'))
    config = ptq161.PTQ161Config(
      weights=spec_lib.QuantSpec(dtype='binary'), epochs=0
    )
    run.calibrate(
      source,
      ptq161.ptq161(config),
      np.arange(8, dtype=np.int32).reshape(1, 8),
      self.folder / 'quantized',
      config=driver.CalibrationConfig(batch_size=1),
    )
    done = restore(
      f'--model={self.folder / "quantized"}',
      f'--output={self.folder / "restored"}',
      *self.flags,
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    opened = models.open_model(str(self.folder / 'restored'))
    self.assertIsNone(opened.quantization)
    kernel = opened.block_params(0)['mlp']['down_proj']['kernel']
    before = source.block_params(0)['mlp']['down_proj']['kernel']
    self.assertEqual(kernel.shape, before.shape)
    self.assertEqual(kernel.dtype, np.float32)
    # It is as good a source as any: what a calibration refuses is found here.
    driver.Calibrator(
      opened, ptq161.ptq161(config), driver.CalibrationConfig(batch_size=1)
    ).check(np.zeros((1, 8), np.int32))

  def test_a_float_model_is_refused(self):
    done = restore(
      f'--model={self.folder / "model"}',
      f'--output={self.folder / "restored"}',
      *self.flags,
    )
    self.assertEqual(done.returncode, 1)
    self.assertRegex(done.stderr, 'float; a quantized decoder is needed')
    self.assertFalse((self.folder / 'restored').exists())


if __name__ == '__main__':
  absltest.main()
