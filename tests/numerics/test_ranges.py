"""Tests of jaxq.numerics.ranges."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.numerics import qarray, ranges, spec

QuantSpec = spec.QuantSpec
RangeSearch = ranges.RangeSearch


class RangeSearchTest(parameterized.TestCase):
  def test_ratios_are_those_of_the_reference(self):
    ratios = RangeSearch(grid=10, max_shrink=0.35).ratios
    np.testing.assert_array_equal(ratios, np.float32([1.0, 0.9, 0.8]))
    self.assertLen(RangeSearch().ratios, 80)

  def test_extent_by_hand(self):
    x = jnp.array([[1.0, -2.0], [3.0, -4.0]])
    lo, hi = ranges.extent(x, (-2,), False)
    np.testing.assert_array_equal(lo, [[0.0, -4.0]])
    np.testing.assert_array_equal(hi, [[3.0, 0.0]])

  def test_percentile_cuts_the_outlier(self):
    x = jnp.linspace(-1.0, 1.0, 1001)[:, None].at[0, 0].set(-100.0)
    search = RangeSearch(kind='percentile', percentile=0.99)
    lo, hi = ranges.extent(x, (-2,), False, search)
    np.testing.assert_allclose([lo[0, 0], hi[0, 0]], [-0.98, 0.98], atol=1e-3)
    lo, hi = ranges.extent(x, (-2,), True, search)
    np.testing.assert_allclose([lo[0, 0], hi[0, 0]], [-0.99, 0.99], atol=1e-3)

  @parameterized.product(
    symmetric=(True, False), granularity=('channel', 'group')
  )
  def test_mse_equals_a_loop_over_ratios(self, symmetric, granularity):
    x = np.random.default_rng(0).standard_t(3, (32, 3)).astype(np.float32)
    size = 16 if granularity == 'group' else -1
    s = QuantSpec(
      dtype='int3',
      granularity=granularity,
      group_size=size,
      symmetric=symmetric,
    )
    search = RangeSearch(grid=8)
    scale, _ = qarray.find_params(x, s, search)
    x64 = x.reshape(-1, 32 if size < 0 else size, 3).astype(np.float64)
    lo, hi = np.minimum(x64.min(1), 0), np.maximum(x64.max(1), 0)
    best = np.full(lo.shape, np.inf)
    expected = np.zeros(lo.shape)
    for p in search.ratios.astype(np.float64):
      if symmetric:
        step, zero, low, high = p * np.maximum(hi, -lo) / 3, 0.0, -4, 3
      else:
        step = p * (hi - lo) / 7
        zero, low, high = np.round(-p * lo / step), 0, 7
      code = (
        np.round(x64 / step[:, None]) + np.broadcast_to(zero, lo.shape)[:, None]
      )
      y = np.clip(code, low, high) - np.broadcast_to(zero, lo.shape)[:, None]
      error = (np.abs(y * step[:, None] - x64) ** 2.4).sum(1)
      expected = np.where(error < best, step, expected)
      best = np.minimum(error, best)
    np.testing.assert_allclose(scale, expected, rtol=1e-6)

  def test_mse_beats_absmax_on_heavy_tails(self):
    x = jax.random.t(jax.random.key(0), 4.0, (256, 8))
    s = QuantSpec(dtype='int4')

    def error(search):
      return jnp.mean((x - qarray.fake_quant(x, s, search=search)) ** 2)

    self.assertLess(error(RangeSearch(grid=20)), 0.8 * error(None))
    # Ratio 1 is in the grid, so no slice can be worse by its own norm.
    self.assertEqual(error(RangeSearch(kind='absmax')), error(None))

  def test_all_zero_slices_stay_finite(self):
    s = QuantSpec(dtype='int4', symmetric=False)
    y = qarray.fake_quant(jnp.zeros((8, 2)), s, search=RangeSearch(grid=4))
    np.testing.assert_array_equal(y, np.zeros((8, 2)))

  @parameterized.parameters(
    (dict(kind='kl'), r"kind='kl'; allowed \['absmax', 'mse', 'percentile'\]"),
    (dict(grid=0), r'grid=0, .*usual values are 100, 0.8 and 2.4'),
    (dict(max_shrink=1.0), r'0 < max_shrink < 1'),
    (dict(percentile=99.9), r'percentile=99.9; .*not a percentage'),
  )
  def test_messages(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      RangeSearch(**fields)


if __name__ == '__main__':
  absltest.main()
