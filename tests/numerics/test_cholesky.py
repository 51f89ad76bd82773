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

  def test_the_platform_has_its_own(self):
    a = positive_definite(16)
    np.testing.assert_array_equal(
      jax.jit(cholesky.cholesky)(a), jax.jit(jnp.linalg.cholesky)(a)
    )

  @parameterized.parameters(0, 6, 9)
  def test_not_positive_definite_is_nan(self, where):
    a = positive_definite(10).at[where, where].set(-1.0)
    lower = cholesky.blocked(a, block=4)
    self.assertFalse(bool(jnp.all(jnp.isfinite(lower))))


if __name__ == '__main__':
  absltest.main()
