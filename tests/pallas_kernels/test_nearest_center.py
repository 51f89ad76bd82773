"""Tests of nearest_center: the TPU kernel, interpreted, equals base.py."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.nearest_center import api, arg_specs
from pallas_kernels.nearest_center import pallas_mosaic_tpu as tpu


def draw(*shape, dtype='float32', seed=0):
  x = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(x, dtype)


def run(x, c, **options):
  options = {
    'implementation': 'pallas_mosaic_tpu',
    'chip': 'v6e',
    'interpret': True,
    **options,
  }
  bias = options.pop('bias', None)  # Traced, so that one compile serves all.
  f: Any = functools.partial(api.nearest_center, **options)
  return jax.jit(lambda x, c, b: f(x, c, bias=b))(x, c, bias)


class KernelTest(parameterized.TestCase):
  def test_a_case_worked_by_hand(self):
    x = jnp.array([[1.0, 0.0], [2.0, 2.0]])
    c = jnp.array([[0.0, 1.0], [3.0, 0.0], [1.0, 1.0]])
    values, indices = run(x, c, top=2)
    np.testing.assert_array_equal(values, [[3.0, 1.0], [6.0, 4.0]])
    np.testing.assert_array_equal(indices, [[1, 2], [1, 2]])

  @parameterized.parameters(
    (5, 3, 16, 1, 'float32', False),
    (130, 300, 72, 3, 'float32', True),
    (200, 129, 128, 8, 'bfloat16', False),
  )
  def test_equals_base(self, N, K, D, top, dtype, has_bias):
    x, c = draw(N, D, dtype=dtype), draw(K, D, dtype=dtype, seed=1)
    bias = draw(K, seed=2) if has_bias else None
    block = tpu.Block(bn=128, bk=256)
    values, indices = run(x, c, top=top, bias=bias, block=block)
    want = run(x, c, top=top, bias=bias, implementation='xla')
    self.assertEqual((values.shape, indices.shape), ((N, top), (N, top)))
    # float32 sums in another order.
    np.testing.assert_allclose(values, want[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(indices, want[1])

  def test_ties_take_the_lowest_index(self):
    # Small integers are exact in any order, and most scores meet again: in
    # another lane, in the same lane of another step, and in padding.
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-1, 2, (40, 4)), jnp.bfloat16)
    c = jnp.asarray(rng.integers(-1, 2, (700, 4)), jnp.bfloat16)
    block = tpu.Block(bn=128, bk=256)
    got = run(x, c, top=3, block=block)
    want = run(x, c, top=3, implementation='xla')
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])

  @parameterized.parameters(0, 2, 300)
  def test_centers_left_out(self, kept):
    x, c = draw(9, 8), draw(300, 8, seed=1)
    bias = jnp.where(jnp.arange(300) < 300 - kept, -jnp.inf, 0.0)
    block = tpu.Block(bn=128, bk=128)
    got = run(x, c, top=3, bias=bias, block=block)
    want = run(x, c, top=3, bias=bias, implementation='xla')
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_array_equal(got[1], want[1])
    self.assertEqual(np.isfinite(got[0]).sum(1).max(), min(kept, 3))

  def test_distance(self):
    x, c = draw(30, 8), 2.0 * draw(20, 8, seed=1)
    values, indices = run(x, c, bias=api.distance_bias(c))
    squared = np.sum((np.asarray(x)[:, None] - np.asarray(c)[None]) ** 2, -1)
    np.testing.assert_array_equal(indices[:, 0], squared.argmin(1))
    found = np.sum(np.asarray(x) ** 2, 1) - 2 * values[:, 0]
    np.testing.assert_allclose(found, squared.min(1), rtol=1e-4, atol=1e-4)


class ApiTest(parameterized.TestCase):
  def test_leading_axes_are_a_loop(self):
    x, c = draw(2, 1, 5, 8), draw(2, 1, 6, 8, seed=1)
    bias = draw(2, 1, 6, seed=2)
    values, indices = run(x, c, top=2, bias=bias)
    shared = run(x, c[0, 0], top=2, bias=bias[0, 0], implementation='xla')
    for b in np.ndindex(2, 1):
      one = run(x[b], c[b], top=2, bias=bias[b], implementation='xla')
      np.testing.assert_allclose(values[b], one[0], rtol=1e-5, atol=1e-6)
      np.testing.assert_array_equal(indices[b], one[1])
    np.testing.assert_array_equal(shared[1][0, 0], indices[0, 0])

  @parameterized.parameters('xla', 'pallas_mosaic_tpu')
  def test_gradient_is_that_of_the_scores_found(self, implementation):
    x, c, bias = draw(7, 8), draw(5, 8, seed=1), draw(5, seed=2)
    weight = draw(7, 2, seed=3)

    def loss(x, c, bias):
      options = {'chip': 'v6e', 'interpret': True, 'top': 2, 'bias': bias}
      options['implementation'] = implementation
      return jnp.sum(weight * api.nearest_center(x, c, **options)[0])

    def plain(x, c, bias):
      return jnp.sum(weight * jax.lax.top_k(x @ c.T + bias[None], 2)[0])

    got, want = (
      jax.jit(jax.grad(f, (0, 1, 2)))(x, c, bias) for f in (loss, plain)
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want
    )

  def test_choice(self):
    x, c = jnp.zeros((2048, 64)), jnp.zeros((2048, 64))
    self.assertEqual(api.choose(x, c), 'xla')  # On a CPU.
    self.assertEqual(api.choose(x, c, chip='v5e'), 'pallas_mosaic_tpu')
    # The scores of few rows stay on the chip in any case.
    self.assertEqual(api.choose(x[:98], c[:98], chip='v5e'), 'xla')
    self.assertEqual(api.choose(x, c, top=9, chip='v5e'), 'xla')

  @parameterized.named_parameters(
    ('none', {'x': jnp.zeros((0, 8))}, ValueError, r'x has shape \(0, 8\)'),
    ('D', {'c': jnp.zeros((3, 7))}, ValueError, r'c has shape \(3, 7\), x'),
    ('few', {'top': 4}, ValueError, 'top=4 of K=3 centers; allowed 1 to K'),
    ('dtype', {'c': jnp.zeros((3, 8), 'bfloat16')}, TypeError, 'c is bfloat16'),
    ('bias', {'bias': jnp.zeros(2)}, ValueError, r'bias has shape \(2,\)'),
    ('name', {'implementation': 'cuda'}, ValueError, "'cuda'; allowed"),
  )
  def test_messages(self, changed, kind, message):
    args = {'x': jnp.zeros((2, 8)), 'c': jnp.zeros((3, 8)), **changed}
    with self.assertRaisesRegex(kind, message):
      api.nearest_center(**args)

  def test_refusals(self):
    x, c = draw(4, 8), draw(9, 8)
    with self.assertRaisesRegex(NotImplementedError, 'top=9; it takes up to 8'):
      run(x, c, top=9)
    half = x.astype(jnp.float16), c.astype(jnp.float16)
    with self.assertRaisesRegex(NotImplementedError, 'x is float16; it takes'):
      run(*half)
    with self.assertRaisesRegex(NotImplementedError, "chip is 'v4'; it runs"):
      run(x, c, chip='v4')
    with self.assertRaisesRegex(NotImplementedError, 'D=131072; its rows do'):
      run(*(jax.ShapeDtypeStruct((1, 131072), jnp.float32),) * 2)
    with self.assertRaisesRegex(ValueError, 'bn=100; it must be a multiple'):
      tpu.Block(bn=100)

  def test_blocks_fit_the_chips(self):
    for spec in arg_specs.SPECS.values():
      size = jnp.dtype(spec.dtype).itemsize
      block = tpu.pick_block(spec.N, spec.K, spec.D, size)
      self.assertLess(tpu.onchip_bytes(block, spec.D, size, spec.top), 2**25)


if __name__ == '__main__':
  absltest.main()
