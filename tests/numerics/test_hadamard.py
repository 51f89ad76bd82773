"""Tests of jaxq.numerics.hadamard."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.numerics import hadamard


class MatrixTest(parameterized.TestCase):
  def test_order_four_by_hand(self):
    expected = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    np.testing.assert_array_equal(hadamard.matrix(4), expected)

  @parameterized.parameters(1, 2, 64, 256, *hadamard.ORDERS, 576, 24, 432)
  def test_rows_are_orthogonal_signs(self, n):
    H = hadamard.matrix(n)
    self.assertEqual(H.dtype, np.float32)
    np.testing.assert_array_equal(np.abs(H), np.ones((n, n)))
    np.testing.assert_array_equal(H @ H.T, n * np.eye(n))

  def test_supported_sizes(self):
    for n in (1, 2, 4096, 576, 1536, 14336, 11008, 13824, 28672):
      self.assertTrue(hadamard.supported(n), n)
    for n in (0, -4, 3, 6, 44, 100):
      self.assertFalse(hadamard.supported(n), n)

  def test_unsupported_size_names_the_sizes(self):
    with self.assertRaisesRegex(ValueError, r'n=100; allowed.*\[12, 20.*Pad'):
      hadamard.matrix(100)
    with self.assertRaisesRegex(ValueError, r'n=6; allowed'):
      hadamard.transform(jnp.ones((2, 6)))


class TransformTest(parameterized.TestCase):
  @parameterized.parameters(1, 8, 12, 36, 156, 256, 576, 1024)
  def test_is_the_matrix_product(self, n):
    x = np.random.default_rng(0).standard_normal((2, 3, n), np.float32)
    H = hadamard.matrix(n).astype(np.float64) / np.sqrt(n)
    # Sums of n float32 terms of size one.
    np.testing.assert_allclose(hadamard.transform(x), x @ H, atol=1e-5)
    inverse = hadamard.transform(x, inverse=True)
    np.testing.assert_allclose(inverse, x @ H.T, atol=1e-5)

  @parameterized.product(n=(12, 28, 64, 172), axis=(0, 1, -1))
  def test_inverse_undoes_it_on_any_axis(self, n, axis):
    shape = [3, 2, 4]
    shape[axis] = n
    x = jax.random.normal(jax.random.key(1), shape)
    y = hadamard.transform(x, axis)
    self.assertEqual(y.shape, x.shape)
    np.testing.assert_allclose(
      hadamard.transform(y, axis, inverse=True), x, atol=1e-5
    )
    np.testing.assert_allclose(
      jnp.sum(y**2, axis=axis), jnp.sum(x**2, axis=axis), rtol=1e-5
    )

  def test_spreads_an_outlier_evenly(self):
    x = jnp.zeros((1, 576)).at[0, 77].set(24.0)
    np.testing.assert_allclose(jnp.abs(hadamard.transform(x)), 1.0, rtol=1e-6)

  def test_jit_vmap_and_dtype(self):
    x = jax.random.normal(jax.random.key(2), (3, 5, 24), jnp.bfloat16)
    y = hadamard.transform(x)
    self.assertEqual(y.dtype, jnp.bfloat16)
    np.testing.assert_array_equal(jax.jit(hadamard.transform)(x), y)
    np.testing.assert_array_equal(jax.vmap(hadamard.transform)(x), y)

  def test_random_orthogonal_is_signs_then_transform(self):
    key, n = jax.random.key(3), 36
    Q = hadamard.random_orthogonal(n, key)
    np.testing.assert_allclose(Q @ Q.T, np.eye(n), atol=1e-6)
    x = jax.random.normal(jax.random.key(4), (5, n))
    signed = x * hadamard.signs(n, key)[None]
    np.testing.assert_allclose(hadamard.transform(signed), x @ Q, atol=1e-5)
    other = hadamard.random_orthogonal(n, jax.random.key(5))
    self.assertFalse(np.array_equal(Q, other))


if __name__ == '__main__':
  absltest.main()
