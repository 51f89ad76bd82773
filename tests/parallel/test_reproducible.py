"""--reproducible: a mesh gives the bytes of one device."""

import json
import os
import subprocess
import sys

import pytest
from absl.testing import absltest

from jaxq.calibrate import driver
from tests.calibrate import testing
from tests.parallel import reproducible_calibration, sharded_calibration

pytestmark = pytest.mark.slow


def run(*methods):
  """Rows of reproducible_calibration, from a process with eight devices."""
  flags = '--xla_force_host_platform_device_count=8'
  done = subprocess.run(
    [sys.executable, '-m', reproducible_calibration.__name__, *methods],
    env=os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return [json.loads(line) for line in done.stdout.splitlines()]


class ReproducibleTest(absltest.TestCase):
  def test_any_mesh_gives_the_bytes_of_one_device(self):
    cut = 0
    for row in run('awq'):
      print(row)
      self.assertGreater(row['arrays'], 0)
      self.assertEqual(row['mesh'], 0, row['method'])
      self.assertEqual(row['batch'], ["(('data', 'model'), None, None)"])
      cut += row['cut']
    self.assertGreater(cut, 0)  # Or the above would show nothing.

  def test_messages(self):
    opened = testing.small_model()
    calibrator = driver.Calibrator(
      opened,
      sharded_calibration.METHODS['gptq'][0],
      driver.CalibrationConfig(batch_size=4, reproducible=True),
    )
    with self.assertRaisesRegex(ValueError, 'batch_size=4 on 1 devices; each'):
      calibrator.check(testing.tokens())


if __name__ == '__main__':
  absltest.main()
