"""--reproducible: a mesh gives the bytes of one device."""

import pytest
from absl.testing import absltest

from jaxq.calibrate import driver
from tests import simulated
from tests.calibrate import testing
from tests.parallel import reproducible_calibration, sharded_calibration

pytestmark = pytest.mark.slow


class ReproducibleTest(absltest.TestCase):
  def test_any_mesh_gives_the_bytes_of_one_device(self):
    cut = 0
    for row in simulated.rows(reproducible_calibration, 'awq'):
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
