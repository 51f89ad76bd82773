"""Tests of experiments.saturation: on text that was calibrated, and louder."""

import pathlib
import tempfile

import jax.numpy as jnp
from absl.testing import absltest

import models
from experiments import saturation
from jaxq.calibrate import driver, run
from jaxq.nn import blocks, taps
from jaxq.quant import outliertune
from tests.calibrate import test_run, testing


class SaturationTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    cls.tokens = testing.tokens()
    cls.directory = str(folder / 'model')
    run.calibrate(
      test_run.model(),
      test_run.outliertune_w8a8(),
      cls.tokens,
      cls.directory,
      config=driver.CalibrationConfig(batch_size=4),
    )
    cls.opened = models.open_model(cls.directory)

  def test_calibrated_text_is_at_the_end_once_a_channel(self):
    found = saturation.rates(self.opened, self.tokens)
    reading = {
      blocks.name_of(i, path)
      for i in range(self.opened.num_blocks)
      for _, consumers in self.opened.block_at(i).norms
      for path in consumers
    }
    self.assertEqual(set(found), reading)
    for name, rate in found.items():
      self.assertGreater(rate, 0, name)  # What the range was made of.
      self.assertLess(rate, 0.02, name)

  def test_louder_text_raises_the_alarm(self):
    outside = self.opened.block_variables(0)
    norm = 'params/input_norm/scale'
    louder = taps.set_path(outside, norm, 2 * taps.get_path(outside, norm))
    opened = models.open_model(self.directory)
    first = opened.block_variables
    opened.block_variables = lambda i: louder if i == 0 else first(i)
    with self.assertLogs(level='WARNING') as logs:
      mean, worst = saturation.metrics(opened, self.tokens)
    self.assertRegex(
      logs.output[0],
      r'of blocks\.0\.attention\.\w+ are at the ends .*Calibrate on data',
    )
    self.assertGreater(worst.value, 10 * outliertune.SATURATION_ALARM)
    self.assertLess(mean.value, worst.value)
    self.assertStartsWith(worst.conventions['linear'], 'blocks.0.attention')
    self.assertEqual(mean.conventions['tokens'], self.tokens.size)

  def test_models_without_steps_are_not_run(self):
    self.assertTrue(saturation.has_steps(models.load(self.directory).variables))
    self.assertFalse(saturation.has_steps({'quant': {}}))
    self.assertFalse(
      saturation.has_steps({'quant': {'mlp': {'scale': jnp.ones(2)}}})
    )


if __name__ == '__main__':
  absltest.main()
