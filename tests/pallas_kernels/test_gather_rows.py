"""Tests of gather_rows: the TPU kernel, interpreted, equals base.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.gather_rows import api
from pallas_kernels.gather_rows import pallas_mosaic_tpu as tpu

KERNEL = {
  'implementation': 'pallas_mosaic_tpu',
  'chip': 'v6e',
  'interpret': True,
}


def make(B, N, R, D, dtype):
  """x with a poisoned row, indices of which some are no row."""
  rng = np.random.default_rng(N + R)
  x = rng.normal(size=(B, N, D))
  x[:, 1] = np.nan  # Never asked for.
  index = rng.integers(2, N, (B, R))
  index[:, ::5] = -1
  index[:, 3::7] = N
  index[0, 0] = -N
  return jnp.asarray(x, dtype), jnp.asarray(index, jnp.int32)


def run(x, index, scale=None, **options):
  f = functools.partial(api.gather_rows, **{**KERNEL, **options})
  return jax.jit(f)(x, index, scale)


def loop(x, index, scale=None):
  """Row by row."""
  x = np.asarray(x, np.float32)
  out = np.zeros((*index.shape, x.shape[-1]), np.float32)
  for at in np.ndindex(index.shape):
    i = int(index[at])
    if 0 <= i < x.shape[-2]:
      row = x[at[:-1]][i]
      out[at] = row if scale is None else row * np.float32(scale[at])
  return out


class KernelTest(parameterized.TestCase):
  def test_a_case_worked_by_hand(self):
    x = jnp.arange(16.0)[:, None] * jnp.ones((1, 128))
    y = run(x, jnp.array([3, -1, 15, 16, 3], jnp.int32))
    np.testing.assert_array_equal(y[:, 0], [3.0, 0.0, 15.0, 0.0, 3.0])

  @parameterized.parameters(
    (1, 20, 7, 128, 'float32'),
    (2, 18, 37, 256, 'bfloat16'),
    (1, 40, 150, 128, 'bfloat16'),
  )
  def test_equals_base_to_the_bit(self, B, N, R, D, dtype):
    x, index = make(B, N, R, D, dtype)
    scale = jnp.asarray(
      np.random.default_rng(0).normal(size=(B, R)), jnp.float32
    )
    for factor in (None, scale):
      y = run(x, index, factor)
      self.assertEqual((y.shape, y.dtype), ((B, R, D), x.dtype))
      want = run(x, index, factor, implementation='xla')
      np.testing.assert_array_equal(y, want)
    rounded = jnp.asarray(loop(x, index, scale), dtype)
    np.testing.assert_array_equal(want, rounded)
    np.testing.assert_array_equal(run(x, index), loop(x, index).astype(x.dtype))

  def test_few_rows_more_blocks(self):
    self.assertEqual(tpu.block_rows(5, 4096), 16)
    self.assertEqual(tpu.block_rows(4096, 4096), 64)
    self.assertEqual(tpu.block_rows(4096, 16384), 32)


class ApiTest(parameterized.TestCase):
  @parameterized.parameters('xla', 'pallas_mosaic_tpu')
  def test_gradient_adds_rows_taken_twice(self, implementation):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 128)), 'float32')
    index = jnp.array([3, 3, -1, 16, 5], jnp.int32)
    scale = jnp.array([2.0, 1.0, 7.0, 7.0, 3.0])
    g = jnp.asarray(np.random.default_rng(1).normal(size=(5, 128)), 'float32')

    def loss(x, scale):
      options = {**KERNEL, 'implementation': implementation}
      return jnp.sum(g * api.gather_rows(x, index, scale, **options))

    dx, ds = jax.jit(jax.grad(loss, (0, 1)))(x, scale)
    want = np.zeros((16, 128), np.float32)
    want[3], want[5] = 2 * g[0] + g[1], 3 * g[4]
    np.testing.assert_allclose(dx, want, rtol=1e-6)
    kept = np.asarray(x)[[3, 3, 0, 0, 5]] * [[1], [1], [0], [0], [1]]
    np.testing.assert_allclose(ds, np.sum(g * kept, 1), rtol=1e-4, atol=1e-5)
    alone = jax.jit(jax.grad(lambda x: jnp.sum(g * run(x, index))))(x)
    want[3], want[5] = g[0] + g[1], g[4]
    np.testing.assert_allclose(alone, want, rtol=1e-6)

  def test_codes_and_leading_axes(self):
    x = jnp.arange(2 * 3 * 4 * 2, dtype=jnp.int8).reshape(2, 3, 4, 2)
    index = jnp.full((2, 3, 5), 1, jnp.int32).at[1, 2, 0].set(-1)
    y = jax.vmap(api.gather_rows)(x, index)
    self.assertEqual(y.dtype, jnp.int8)
    np.testing.assert_array_equal(y, loop(x, index))
    np.testing.assert_array_equal(api.gather_rows(x, index), y)

  def test_choice(self):
    x, index = make(1, 20, 7, 128, 'bfloat16')
    self.assertEqual(api.choose(x, index), 'xla')  # On a CPU.
    self.assertEqual(api.choose(x, index, 'v5e'), 'pallas_mosaic_tpu')
    self.assertEqual(api.choose(x[:, :, :64], index, 'v5e'), 'xla')

  @parameterized.named_parameters(
    ('none', {'x': jnp.zeros((0, 8))}, ValueError, r'x has shape \(0, 8\)'),
    ('index', {'index': jnp.zeros((2, 3), 'int32')}, ValueError, r'\(2, 3\)'),
    ('dtype', {'index': jnp.zeros(3)}, TypeError, 'index is float32; it must'),
    ('scale', {'scale': jnp.zeros(2)}, ValueError, r'scale has shape \(2,\)'),
    (
      'codes',
      {'x': jnp.zeros((4, 8), 'int8'), 'scale': jnp.zeros(3)},
      TypeError,
      'x is int8; with a scale it must be floating',
    ),
    ('name', {'implementation': 'cuda'}, ValueError, "'cuda'; allowed"),
  )
  def test_messages(self, changed, kind, message):
    args = {'x': jnp.zeros((4, 8)), 'index': jnp.zeros(3, 'int32'), **changed}
    with self.assertRaisesRegex(kind, message):
      api.gather_rows(**args)

  @parameterized.parameters(
    ((16, 64), 'float32', 'D=64; it takes multiples of 128'),
    ((8, 128), 'float32', 'x has 8 rows of float32; it takes at least 16'),
    ((17, 128), 'bfloat16', 'x has 17 rows of bfloat16.*an even number'),
    ((16, 128), 'float16', 'x is float16; it takes bfloat16 or float32'),
  )
  def test_refusals(self, shape, dtype, message):
    with self.assertRaisesRegex(NotImplementedError, message):
      run(jnp.zeros(shape, dtype), jnp.zeros(3, jnp.int32))

  def test_refuses_other_chips(self):
    with self.assertRaisesRegex(NotImplementedError, "chip is 'v4'; it runs"):
      run(jnp.zeros((16, 128)), jnp.zeros(3, jnp.int32), chip='v4')


if __name__ == '__main__':
  absltest.main()
