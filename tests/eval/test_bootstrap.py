"""Tests of jaxq.eval.bootstrap."""

import numpy as np
from absl.testing import absltest, parameterized

from jaxq.eval import bootstrap


def correlated(rng, shape, rho=0.7):
  """Unit-variance AR(1) rows of mean 0."""
  noise = rng.normal(size=shape) * (1 - rho**2) ** 0.5
  x = np.zeros(shape)
  state = rng.normal(size=shape[0])
  for t in range(shape[1]):
    state = rho * state + noise[:, t]
    x[:, t] = state
  return x


def mean(x):
  return x


class BootstrapTest(parameterized.TestCase):
  def test_by_hand(self):
    # Two blocks of sums 0 and 2 over one token each: means 0, 1, 1, 2.
    config = bootstrap.BootstrapConfig(block=1, confidence=0.6, seed=3)
    got = bootstrap.interval(mean, np.array([[0.0, 2.0]]), config=config)
    self.assertEqual((got.value, got.low, got.high), (1.0, 0.0, 2.0))

  def test_constant_values_have_no_width(self):
    got = bootstrap.interval(np.exp, np.full((2, 300), 3.0))
    np.testing.assert_allclose([got.low, got.high], got.value, rtol=1e-12)

  def test_value_is_the_statistic_of_all_tokens(self):
    x = np.random.default_rng(0).normal(size=(3, 301))  # 301 = 2 * 128 + 45.
    got = bootstrap.interval(np.exp, x)
    self.assertAlmostEqual(got.value, np.exp(x.mean()), places=12)
    self.assertBetween(got.value, got.low, got.high)

  def test_blocks_cover_where_single_tokens_do_not(self):
    rng = np.random.default_rng(1)
    x = correlated(rng, (200, 1024)).reshape(100, 2, 1024)

    def coverage(block):
      config = bootstrap.BootstrapConfig(block=block, resamples=200)
      got = [bootstrap.interval(mean, v, config=config) for v in x]
      return np.mean([i.low <= 0.0 <= i.high for i in got])

    self.assertGreater(coverage(32), 0.87)  # 0.95, less 3 sigma and bias.
    self.assertLess(coverage(1), 0.75)

  def test_paired_is_narrower(self):
    rng = np.random.default_rng(5)
    a = rng.gamma(1.0, 3.0, (4, 1024))
    b = a + 0.1 + 0.1 * rng.normal(size=a.shape)
    ratio = lambda a, b: np.exp(b - a)
    paired = bootstrap.interval(ratio, a, b)
    other = np.random.default_rng(3).permutation(b.reshape(-1, 128))
    unpaired = bootstrap.interval(ratio, a, other.reshape(b.shape))
    self.assertAlmostEqual(paired.value, unpaired.value, places=9)
    self.assertBetween(np.exp(0.1), paired.low, paired.high)
    self.assertLess(
      paired.high - paired.low, 0.1 * (unpaired.high - unpaired.low)
    )

  def test_seed(self):
    x = np.random.default_rng(0).normal(size=(2, 2048))

    def run(seed):
      config = bootstrap.BootstrapConfig(seed=seed)
      return bootstrap.interval(mean, x, config=config)

    self.assertEqual(run(0), run(0))
    self.assertNotEqual(run(0), run(1))

  def test_slabs_make_no_difference_to_the_shape(self):
    sums, counts = np.ones((1, 5)), np.full(5, 2)
    config = bootstrap.BootstrapConfig(resamples=7)
    slab = bootstrap._MAX_ENTRIES
    try:
      bootstrap._MAX_ENTRIES = 10
      got = bootstrap._resample(sums, counts, config)
    finally:
      bootstrap._MAX_ENTRIES = slab
    np.testing.assert_allclose(got, np.full((1, 7), 0.5))

  @parameterized.parameters(
    (dict(block=0), 'block=0; .*at least 1.*block=128'),
    (dict(resamples=-1), 'resamples=-1; .*at least 1'),
    (dict(confidence=1.0), 'confidence=1.0; .*between 0 and 1'),
  )
  def test_config_messages(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      bootstrap.BootstrapConfig(**fields)

  def test_shape_message(self):
    for values in ([np.zeros((2, 3)), np.zeros((2, 4))], [np.zeros(3)], []):
      with self.assertRaisesRegex(ValueError, 'shapes .*one shape.*same tok'):
        bootstrap.interval(mean, *values)


if __name__ == '__main__':
  absltest.main()
