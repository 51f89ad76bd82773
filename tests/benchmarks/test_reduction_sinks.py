"""Tests of benchmarks.reduction_sinks, on an untrained model."""

from unittest import mock

import jax
import numpy as np
from absl.testing import absltest

from benchmarks import reduction_sinks
from experiments import training
from jaxq.data import digits as digits_lib
from tests.data import mosaic_testing
from tests.experiments import mosaic_models

JOB = training.Job(
  data=mosaic_models.DATA,
  model=mosaic_models.MODEL,
  train=training.TrainConfig(),
)


class SinksTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enterContext(
      mock.patch.object(digits_lib, 'load', mosaic_testing.digits)
    )
    self.trained = training.Trained(
      data=JOB.data, model=JOB.model, params=training._init(JOB)
    )
    self.videos = reduction_sinks.load(self.trained, 3)

  def test_sets_and_what_is_measured(self):
    digits = np.asarray(self.videos.digits)
    sets = reduction_sinks.choices(self.videos, 4)
    sets = jax.tree.map(np.asarray, sets)
    np.testing.assert_array_equal(sets['digits + 0 noise'], digits)
    for m in reduction_sinks.NOISE:
      noise = sets[f'digits + {m} noise'] & ~digits
      np.testing.assert_array_equal(
        noise.sum(1), np.minimum(m, (~digits).sum(1))
      )
      self.assertTrue(sets[f'digits + {m} noise'][digits].all())
    for name in ('random', 'class', 'class + even'):
      np.testing.assert_array_equal(sets[name].sum(1), [4, 4, 4])
    found = reduction_sinks.measure(self.trained, self.videos, sets['all'])
    self.assertEqual(found['number'], 8)
    self.assertEqual(found['digits'], 1)
    self.assertBetween(found['accuracy'], 0, 1)
    for shares in reduction_sinks.attention(self.trained, self.videos):
      for share in shares.values():
        self.assertBetween(share, 0, 1)

  def test_messages(self):
    for K in (0, 9):
      with self.assertRaisesRegex(ValueError, f'--kept={K} of N=8 tokens; all'):
        reduction_sinks.choices(self.videos, K)


if __name__ == '__main__':
  absltest.main()
