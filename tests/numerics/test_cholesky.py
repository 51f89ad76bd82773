"""Tests of jaxq.numerics.cholesky."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.numerics import cholesky


def positive_definite(K: int) -> jax.Array:
  x = jax.random.normal(jax.random.key(K), (2 * K, K))
  return x.T @ x + 0.1 * jnp.eye(K)


class CholeskyTest(parameterized.TestCase):
  @parameterized.parameters((1, 4), (8, 4), (10, 4), (30, 8), (30, 128))
  def test_blocked_equals_lapack(self, K, block):
    a = positive_definite(K)
    lower = cholesky.blocked(a, block=block)
    exact = np.linalg.cholesky(np.asarray(a, np.float64))
    np.testing.assert_allclose(lower, exact, atol=1e-5 * np.max(exact))
    np.testing.assert_array_equal(np.triu(lower, 1), 0)

  def test_a_cpu_computes_in_float64(self):
    # A Gram matrix of condition 1e5, whose float32 factor is off by 1e-3.
    x = np.random.default_rng(0).normal(size=(64, 32)) * np.logspace(0, -5, 32)
    x = x @ np.linalg.qr(np.random.default_rng(1).normal(size=(32, 32)))[0]
    a = np.float32(x.T @ x + 1e-5 * np.eye(32))
    exact = np.linalg.cholesky(np.float64(a))
    lower = jax.jit(cholesky.cholesky)(a)
    self.assertEqual(lower.dtype, jnp.float32)
    np.testing.assert_array_equal(lower, np.float32(exact))
    lapack = np.asarray(jax.jit(jnp.linalg.cholesky)(a))
    self.assertGreater(np.max(np.abs(lapack - exact) / np.max(exact)), 1e-5)

  @parameterized.parameters(0, 6, 9)
  def test_not_positive_definite_is_nan(self, where):
    a = positive_definite(10).at[where, where].set(-1.0)
    lower = cholesky.blocked(a, block=4)
    self.assertFalse(bool(jnp.all(jnp.isfinite(lower))))


if __name__ == '__main__':
  absltest.main()
