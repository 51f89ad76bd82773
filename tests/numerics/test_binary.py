"""Tests of jaxq.numerics.binary."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import matmul
from jaxq.numerics import binary


def parts(K=32, k=8, N=6, bits=4, dtype=jnp.float32, seed=0):
  rng = np.random.default_rng(seed)
  uniform = lambda *shape: jnp.asarray(rng.uniform(0.5, 1.5, shape), dtype)
  return {
    'signs': jnp.asarray(rng.integers(0, 2, (K - k, N)), bool),
    'alpha': uniform(1, N),
    'mu': uniform(1, N) - jnp.asarray(1, dtype),
    'r': uniform(K - k, 1),
    'order': jnp.asarray(rng.permutation(K)),
    'codes': jnp.asarray(rng.integers(0, 2**bits, (k, N)), jnp.uint8),
    'scale': uniform(1, N),
    'zero_point': jnp.asarray(rng.integers(0, 2**bits, (1, N)), jnp.uint8),
    'salient_bits': bits,
  }


def dense(p):
  """(K, N) by the definition, row by row."""
  p = {key: np.asarray(value, np.float64) for key, value in p.items()}
  K, N = len(p['order']), p['signs'].shape[1]
  w, k = np.zeros((K, N)), len(p['codes'])
  for place, row in enumerate(p['order'].astype(int)):
    if place < k:
      w[row] = (p['codes'][place] - p['zero_point'][0]) * p['scale'][0]
    else:
      sign = 2 * p['signs'][place - k] - 1
      w[row] = p['r'][place - k] * (p['alpha'][0] * sign + p['mu'][0])
  return w


def float_sizes(jaxpr):
  """Sizes of all float arrays made in a jaxpr, those inside it included."""
  sizes = []
  for eqn in jaxpr.eqns:
    sizes += [
      v.aval.size
      for v in eqn.outvars
      if jnp.issubdtype(v.aval.dtype, jnp.floating)
    ]
    inner = jax.tree.leaves(
      list(eqn.params.values()),
      is_leaf=lambda p: hasattr(p, 'eqns') or hasattr(p, 'jaxpr'),
    )
    for p in inner:
      p = p.jaxpr if hasattr(p, 'jaxpr') else p
      if hasattr(p, 'eqns'):
        sizes += float_sizes(p)
  return sizes


class BinaryTest(parameterized.TestCase):
  def test_a_byte_by_hand(self):
    p = parts(K=8, k=0, N=1)
    p['signs'] = jnp.array([1, 0, 0, 1, 0, 0, 0, 1], bool)[:, None]
    # With 8 rows field f of the byte is row f: the lowest bit first.
    self.assertEqual(int(binary.pack(**p).bits[0, 0]), 0b10001001)

  @parameterized.parameters((4, 8), (3, 8), (2, 16), (8, 8), (4, 0))
  def test_packed_forward_is_that_of_the_dense_matrix(self, bits, k):
    p = parts(bits=bits, k=k)
    w = binary.pack(**p)
    expected = dense(p)
    np.testing.assert_allclose(binary.dequantize(w), expected, rtol=1e-6)
    x = np.random.default_rng(1).normal(size=(2, 3, 32)).astype(np.float32)
    y = matmul.matmul(jnp.asarray(x), w)
    np.testing.assert_allclose(y, x @ expected, rtol=1e-5, atol=1e-4)

  def test_stacked_matrices_are_each_their_own(self):
    both = [binary.pack(**parts(seed=seed)) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *both)
    made = binary.dequantize(stacked)
    for i, one in enumerate(both):
      np.testing.assert_array_equal(made[i], binary.dequantize(one))
    self.assertEqual(
      binary.bits_per_weight(stacked), binary.bits_per_weight(both[0])
    )

  def test_every_byte_is_counted(self):
    w = binary.pack(**parts(K=64, k=16, N=8, dtype=jnp.float16))
    # Signs, 4-bit codes; alpha, mu and scale; zero points; r; order.
    want = 48 * 8 // 8 + 16 * 8 // 2 + 3 * 8 * 2 + 8 + 48 * 2 + 64 * 2
    self.assertEqual(binary.nbytes(w), want)

  def test_no_dense_float_weight_is_made(self):
    K, N, k = 256, 64, 48
    w = binary.pack(**parts(K=K, N=N, k=k))
    x = jnp.ones((1, K))
    made = jax.make_jaxpr(matmul.matmul)(x, w)
    # One bit of all bytes, an eighth of the binary rows, is the most.
    self.assertEqual(max(float_sizes(made.jaxpr)), (K - k) // 8 * N)
    whole = jax.make_jaxpr(lambda x, w: x @ binary.dequantize(w))(x, w)
    self.assertGreaterEqual(max(float_sizes(whole.jaxpr)), K * N)

  def test_the_gradient_of_the_input_is_that_of_the_dense_matrix(self):
    p = parts()
    w, x = binary.pack(**p), jnp.ones((2, 32))
    gradient = jax.grad(lambda x: jnp.sum(binary.matmul(x, w)))(x)
    expected = np.broadcast_to(dense(p).sum(axis=1), (2, 32))
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)

  def test_rows_that_do_not_fill_bytes_are_refused(self):
    with self.assertRaisesRegex(ValueError, '28 binary rows.*multiples of 8'):
      binary.pack(**parts(K=36))

  def test_an_input_that_does_not_fit_is_refused(self):
    w = binary.pack(**parts())
    with self.assertRaisesRegex(ValueError, '40 channels, the kernel K=32'):
      binary.matmul(jnp.ones((1, 40)), w)

  @parameterized.parameters('bits', 'order', 'salient', 'mu')
  def test_a_part_of_another_kernel_is_refused(self, name):
    w = binary.pack(**parts())
    other = binary.pack(**parts(K=64, N=8))
    mixed = dataclasses.replace(w, **{name: getattr(other, name)})
    with self.assertRaisesRegex(ValueError, f'{name} is .*needs'):
      binary.matmul(jnp.ones((1, 32)), mixed)


if __name__ == '__main__':
  absltest.main()
