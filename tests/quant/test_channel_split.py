"""Tests of jaxq.quant.channel_split, and of nn.linear.SplitInput."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import linear
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import channel_split

STEPS = spec_lib.QuantSpec(dtype='int4', granularity='tensor', narrow=True)
W4 = spec_lib.QuantSpec(dtype='int4')
K = 200


def config(**fields):
  fields = {'multiple': 8, 'max_share': 0.1, **fields}
  return channel_split.SplitConfig(**fields)


def planted(seed=0, factor=50.0):
  """s (K,) with 1 % of the channels `factor` times the others; W (K, 32)."""
  rng = np.random.default_rng(seed)
  s = rng.uniform(0.8, 1.2, K).astype(np.float32)
  s[[17, 120]] *= factor
  w = rng.normal(size=(K, 32)).astype(np.float32)
  return jnp.asarray(s), jnp.asarray(w)


def split_of(plan, how, kept=K):
  offset = channel_split.offsets(plan, how)
  return linear.SplitInput(plan.src[kept:], offset, STEPS)


class PlanTest(parameterized.TestCase):
  def test_by_hand(self):
    s = jnp.array([1.0, 1.0, 9.0, 1.0, 1.0, 4.5, 1.0, 1.0, 1.0, 1.0])
    # theta = 4: three copies of channel 2, two of 5; K' = 10 + 5 -> 16.
    how = config(max_extra=0.5, max_growth=2.0)
    # At most one channel of ten may be split: theta is the next largest.
    plan = channel_split.plan_split(s, how)
    self.assertEqual(float(plan.theta), 4.5)
    np.testing.assert_array_equal(plan.src, [*range(10), 2] + [10] * 5)
    np.testing.assert_array_equal(
      plan.n[jnp.array([2, 10, 5, 15])], [2, 2, 1, 1]
    )
    # Twice as many channels: both.
    both = jnp.concatenate([s, jnp.ones(10)])
    plan = channel_split.plan_split(both, config(max_extra=0.1))
    self.assertEqual(float(plan.theta), 4.0)
    np.testing.assert_array_equal(plan.src, [*range(20), 2, 2, 5, 20])
    np.testing.assert_array_equal(plan.n[20:], [3, 3, 2, 1])
    np.testing.assert_array_equal(plan.i[20:], [1, 2, 1, 0])
    np.testing.assert_array_equal(plan.i[:20], 0)
    # o = (2 i + 1 - n) / 2 n
    offsets = channel_split.offsets(plan, how)
    np.testing.assert_allclose(offsets[20:], [0, 1 / 3, 0.25, 0], atol=1e-7)
    np.testing.assert_allclose(
      offsets[jnp.array([2, 5])], [-1 / 3, -0.25], atol=1e-7
    )

  def test_theta_rises_where_places_are_few(self):
    s, _ = planted()
    few = channel_split.plan_split(s, config(max_extra=0.05))
    many = channel_split.plan_split(s, config(max_extra=0.3))
    self.assertEqual(few.src.shape, (216,))  # 200 + 10, to a multiple of 8.
    self.assertAlmostEqual(
      float(many.theta), 4 * float(jnp.median(s)), places=4
    )
    self.assertGreater(few.theta, 1.2 * many.theta)
    # All sixteen places but for what does not come out even.
    self.assertGreaterEqual(int(jnp.sum(few.src[200:] < K)), 14)
    np.testing.assert_array_less(
      np.asarray(s) / np.asarray(few.n[:200]), float(few.theta) * (1 + 1e-5)
    )

  def test_nothing_large_nothing_split(self):
    plan = channel_split.plan_split(jnp.ones(K), config())
    np.testing.assert_array_equal(plan.src, [*range(K)] + [K] * 24)
    np.testing.assert_array_equal(plan.n, 1)

  def test_jit_is_eager(self):
    s, _ = planted()
    how = config()
    jitted = jax.jit(channel_split.plan_split, static_argnums=1)(s, how)
    for a, b in zip(channel_split.plan_split(s, how), jitted, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6)

  def test_a_constant_width_takes_the_least_important(self):
    s, _ = planted()
    importance = jnp.arange(K, 0, -1.0).at[17].set(0.0)
    how = config(width='constant', max_extra=0.1)
    plan = channel_split.plan_split(s, how, importance)
    self.assertEqual(plan.src.shape, (K,))
    copies = np.asarray(plan.src)[-20:]  # The twenty least important.
    self.assertGreaterEqual(np.isin(copies, [17, 120]).sum(), 18)
    np.testing.assert_array_equal(plan.src[: K - 20], np.arange(K - 20))
    self.assertEqual(int(plan.src[17]), 17)  # One that is split stays.


class ExactTest(parameterized.TestCase):
  def test_copies_sum_to_the_code_and_stay_in_range(self):
    """All m and n up to 16, in float32 as at run time."""
    copies = [(n, i) for n in range(1, 17) for i in range(n)]
    n, i = np.array(copies).T
    split = linear.SplitInput(
      jnp.asarray(n - 1, jnp.int32),  # Channel n - 1 is the one of n copies.
      jnp.asarray((2 * i + 1 - n) / (2 * n), jnp.float32),
      STEPS,
    )
    limits = 7 * np.arange(1, 17)
    m = np.clip(np.arange(-112, 113)[:, None], -limits, limits)  # (225, 16)
    q = np.asarray(split(jnp.asarray(m / np.arange(1, 17), jnp.float32)))
    self.assertLessEqual(np.abs(q).max(), 7)
    for channel in range(16):
      own = n == channel + 1
      np.testing.assert_array_equal(q[:, own].sum(axis=1), m[:, channel])
    # The spec's form.
    np.testing.assert_array_equal(q, np.floor((m[:, n - 1] + i) / n))

  def test_beyond_the_range_all_are_cut_off(self):
    split = linear.SplitInput(
      jnp.zeros(2, jnp.int32), jnp.array([-1 / 3, 0.0, 1 / 3]), STEPS
    )
    np.testing.assert_array_equal(
      split(jnp.array([[7.4], [-100.0]])), [[7] * 3, [-7] * 3]
    )

  @parameterized.parameters('hermite', 'copy')
  def test_the_float_kernel_is_unchanged(self, kind):
    s, w = planted()
    how = config(split=kind)
    plan = channel_split.plan_split(s, how)
    split = split_of(plan, how)
    x = jax.random.normal(jax.random.key(0), (16, K))
    y = split.spread(x / s[None])
    rows = channel_split.split_rows(w * s[:, None], plan)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    made = np.asarray(y, np.float64) @ np.asarray(rows, np.float64)
    error = np.linalg.norm(made - exact) / np.linalg.norm(exact)
    self.assertLess(error, 1e-6)
    np.testing.assert_allclose(
      split.gather(rows, K), w * s[:, None], rtol=1e-5, atol=1e-6
    )

  def test_hermite_copies_are_finer_and_equal_ones_are_not(self):
    s, w = planted()
    large = jnp.where(s > 10, 2 * s, 0)  # Two steps; the others are silent.
    x = jax.random.normal(jax.random.key(0), (64, K)) * large[None]
    errors = {}
    for kind in ('hermite', 'copy'):
      how = config(split=kind)
      plan = channel_split.plan_split(s, how)
      rows = channel_split.split_rows(w * s[:, None], plan)
      y = split_of(plan, how)(x / s[None]) @ rows
      errors[kind] = float(jnp.mean(jnp.square(y - x @ w)))
    # Of n = 13 or so copies the error of the large channels is n^2 less.
    self.assertLess(errors['hermite'], errors['copy'] / 100)

  def test_sqnr_of_the_rows_gains_ten_decibels(self):
    """1 % of the channels 50 times the others: the small rows' precision."""
    s, w = planted()
    plan = channel_split.plan_split(s, config(max_extra=0.15))
    whole = w * s[:, None]
    rows = channel_split.split_rows(whole, plan)

    def sqnr(w):
      noise = jnp.sum(jnp.square(qarray.fake_quant(w, W4) - w), axis=0)
      # Against the signal of the rows that no copy makes larger.
      signal = jnp.sum(jnp.square(jnp.delete(whole, np.array([17, 120]), 0)), 0)
      return 10 * jnp.log10(signal / noise)  # (N,), per output channel.

    gain = sqnr(rows) - sqnr(whole)
    self.assertGreater(float(jnp.mean(gain)), 10)


class PruneTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(3)
    mix = rng.normal(size=(12, 12))
    self.x = rng.normal(size=(500, 12)) @ mix
    self.w = rng.normal(size=(12, 5))
    self.hessian = 2 * self.x.T @ self.x / 500
    mean = np.mean(np.diag(self.hessian))
    self.damped = self.hessian + 0.01 * mean * np.eye(12)

  def test_saliency_is_by_the_inverse(self):
    found = channel_split.saliency(
      jnp.asarray(np.sum(self.w**2, axis=1), jnp.float32),
      jnp.asarray(self.hessian, jnp.float32),
    )
    inverse = np.linalg.inv(self.damped)
    expected = np.sum(self.w**2, axis=1) / np.diag(inverse)
    np.testing.assert_allclose(found, expected, rtol=1e-3)

  def test_the_others_make_up_by_least_squares(self):
    kept = np.ones(12, bool)
    kept[[2, 9]] = False
    update = channel_split.make_up(
      jnp.asarray(self.hessian, jnp.float32), jnp.asarray(kept)
    )
    w = self.w + np.asarray(update, np.float64) @ self.w
    part = np.linalg.solve(
      self.damped[np.ix_(kept, kept)], self.hessian[np.ix_(kept, ~kept)]
    )
    np.testing.assert_allclose(
      w[kept], self.w[kept] + part @ self.w[~kept], rtol=1e-3, atol=1e-3
    )
    exact = self.x @ self.w
    made_up = np.mean((self.x[:, kept] @ w[kept] - exact) ** 2)
    dropped = np.mean((self.x[:, kept] @ self.w[kept] - exact) ** 2)
    self.assertLess(made_up, 0.5 * dropped)


class MessagesTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(split='half'), r"split='half'; allowed \['copy', 'hermite'\]"),
    (dict(width='shrink'), r"width='shrink'; allowed \['constant', 'grow'\]"),
    (dict(prune='all'), r"prune='all'; allowed \['absmax', 'obs'\]"),
    (dict(theta=0.5), 'theta=0.5; allowed 1.0 to .* default is 4.0'),
    (dict(max_share=0.2), 'max_share=0.2; allowed 0.0 to 0.1'),
    (
      dict(width='constant', max_extra=0.2),
      "width='constant' with max_extra=0.2; at most 0.1",
    ),
  )
  def test_config(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      channel_split.SplitConfig(**fields)

  def test_a_width_above_the_largest(self):
    with self.assertRaisesRegex(
      ValueError, "K=64 channels would grow to K'=128, more than max_growth=1.5"
    ):
      channel_split.grown_width(64, channel_split.SplitConfig())

  @parameterized.parameters(0.0, -1.0, np.nan, np.inf)
  def test_scales(self, bad):
    s = jnp.ones(K).at[3].set(bad)
    with self.assertRaisesRegex(
      ValueError, 'scale of channel 3 is .*; it must be positive and finite'
    ):
      channel_split.plan_split(s, config())


if __name__ == '__main__':
  absltest.main()
