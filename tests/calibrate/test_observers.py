"""Tests of jaxq.calibrate.observers."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.calibrate import observers

SHAPE = (2, 3, 4)


def batches(n=3):
  return jax.random.normal(jax.random.key(0), (n, *SHAPE))


def run(request, xs, jit=False):
  step = jax.jit(lambda s, x: s.update(x)) if jit else lambda s, x: s.update(x)
  state = request(xs[0].shape)
  for x in xs:
    state = step(state, x)
  return state


class ObserversTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_statistics_equal_those_of_all_tokens_at_once(self, jit):
    xs = batches()
    flat = np.asarray(xs).reshape(-1, 4)
    state = run(observers.absmax, xs, jit)
    np.testing.assert_array_equal(state.absmax, np.abs(flat).max(axis=0))
    state = run(observers.mean_abs, xs, jit)
    np.testing.assert_allclose(state.mean, np.abs(flat).mean(axis=0), rtol=1e-6)
    state = run(observers.hessian, xs, jit)
    np.testing.assert_allclose(
      state.mean, 2 * flat.T @ flat / len(flat), rtol=1e-5, atol=1e-6
    )
    state = run(observers.minmax(), xs, jit)
    np.testing.assert_array_equal(state.low, flat.min(axis=0))
    np.testing.assert_array_equal(state.high, flat.max(axis=0))

  @parameterized.parameters((384, 2), (576, 3), (768, 4), (1000, 4), (577, 1))
  def test_hessian_sums_the_blocks_on_and_above_the_diagonal(self, K, parts):
    rng = np.random.default_rng(K)
    xs = jnp.asarray(rng.normal(size=(2, 3, 8, K)), jnp.float32)
    state = run(observers.hessian, xs)
    flat = np.asarray(xs, np.float64).reshape(-1, K)
    np.testing.assert_allclose(
      state.mean, 2 * flat.T @ flat / len(flat), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(state.mean, state.mean.T)
    work = jax.jit(state.update).lower(xs[0]).cost_analysis()['flops']
    share = (parts + 1) / (2 * parts)
    self.assertAlmostEqual(work / (2 * 24 * K * K), share, delta=0.1)

  def test_average_and_ema_of_batch_extremes(self):
    xs = batches()
    high = np.asarray(xs).reshape(3, -1, 4).max(axis=1)  # (3, K)
    state = run(observers.minmax('average'), xs)
    np.testing.assert_allclose(state.high, high.mean(axis=0), rtol=1e-6)
    state = run(observers.minmax('ema', decay=0.5), xs)
    expected = 0.25 * high[0] + 0.25 * high[1] + 0.5 * high[2]
    np.testing.assert_allclose(state.high, expected, rtol=1e-6)

  def test_minmax_of_positive_values_does_not_start_at_zero(self):
    state = run(observers.minmax(), [jnp.full(SHAPE, 5.0)])
    np.testing.assert_array_equal(state.low, np.full(4, 5.0))

  def test_percentile_averages_the_quantiles_of_batches(self):
    xs = batches()
    state = run(observers.percentile(0.9), xs)
    expected = [np.quantile(np.asarray(x), 0.9) for x in xs]
    np.testing.assert_allclose(state.high, [np.mean(expected)], rtol=1e-5)

  def test_sample_keeps_the_first_sequences(self):
    xs = batches()
    state = run(observers.sample(3), xs)
    kept = np.asarray(xs).reshape(6, 3, 4)[:3]
    np.testing.assert_array_equal(state.x, kept)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, "kind='max'.*'all', 'average'"):
      observers.minmax('max')
    with self.assertRaisesRegex(ValueError, 'quantile=0.2'):
      observers.percentile(0.2)


if __name__ == '__main__':
  absltest.main()
