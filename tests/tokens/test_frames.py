"""Capped shares and exact totals against their loops."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import frames


def capped_one_by_one(p, cap):
  """The recursion: cap the largest, scale the others, look again."""
  p, at = np.array(p, float) / sum(p), np.zeros(len(p), bool)
  while True:
    rest = np.where(at, 0, p)
    if not (rest > cap * (1 + 1e-9)).any():
      return p
    at[np.argmax(rest)] = True
    left = 1 - cap * at.sum()
    p = np.where(at, cap, p / p[~at].sum() * left)


def moved_one_by_one(n, total, upper):
  """The reference's loop."""
  n, upper = np.array(n), np.maximum(upper, n)
  while n.sum() > total:
    n[np.argmax(n)] -= 1
  while n.sum() < total and (n < upper).any():
    n[np.argmin(np.where(n < upper, n, 10**6))] += 1
  return n


class CappedTest(parameterized.TestCase):
  def test_by_hand(self):
    p = jnp.array([[7.0, 2.0, 1.0], [1.0, 1.0, 2.0], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(
      frames.capped(p, 0.5),
      [[0.5, 1 / 3, 1 / 6], [0.25, 0.25, 0.5], [0.5, 0, 0]],
      rtol=1e-6,
    )

  def test_is_the_recursion_in_one_pass(self):
    rng = np.random.default_rng(0)
    p = rng.exponential(size=(40, 25)) ** 3
    run = jax.jit(frames.capped)
    for cap in (0.05, 0.1, 0.5):
      got = run(jnp.asarray(p, jnp.float32), cap)
      self.assertLessEqual(float(got.max()), np.float32(cap))
      np.testing.assert_allclose(got.sum(1), 1, rtol=1e-5)
      expected = [capped_one_by_one(row, cap) for row in p]
      np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)

  def test_a_cap_that_forbids_1_gives_all_the_cap(self):
    got = frames.capped(jnp.array([3.0, 2.0, 0.0]), 0.25)
    np.testing.assert_array_equal(got, [0.25, 0.25, 0])


class FitTotalTest(parameterized.TestCase):
  def test_by_hand(self):
    n, upper = jnp.array([1, 1, 1, 1]), jnp.array([10] * 4)
    fit = lambda total: frames.fit_total(n, jnp.int32(total), upper, 10)
    np.testing.assert_array_equal(fit(5), [2, 1, 1, 1])
    np.testing.assert_array_equal(fit(4), [1, 1, 1, 1])
    np.testing.assert_array_equal(fit(2), [0, 0, 1, 1])

  def test_is_the_loop(self):
    rng = np.random.default_rng(1)
    run = jax.jit(frames.fit_total, static_argnums=3)
    for _ in range(60):
      n = rng.integers(0, 12, 6)
      upper = rng.integers(0, 15, 6)
      total = int(rng.integers(0, 60))
      got = run(jnp.array(n), jnp.int32(total), jnp.array(upper), 14)
      np.testing.assert_array_equal(
        got, moved_one_by_one(n, total, upper), f'{n} {total} {upper}'
      )


if __name__ == '__main__':
  absltest.main()
