"""Tests of norm_quantize and hadamard_quantize, interpreted, against base."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import norms
from jaxq.numerics import hadamard
from pallas_kernels import rows
from pallas_kernels.hadamard_quantize import api as hadamard_api
from pallas_kernels.hadamard_quantize import base as hadamard_base
from pallas_kernels.norm_quantize import api as norm_api

KERNEL = {
  'implementation': 'pallas_mosaic_tpu',
  'chip': 'v6e',
  'interpret': True,
}


def draw(*shape, dtype='float32'):
  x = np.random.default_rng(len(shape) + shape[0]).normal(size=shape)
  return jnp.asarray(x + 0.3, dtype)


def same_codes(got, want):
  """Equal but for ties, where sums were added in another order."""
  differ = np.abs(np.asarray(got, np.float32) - np.asarray(want, np.float32))
  assert differ.max() <= 1, differ.max()
  assert (differ > 0).mean() <= 2e-3, (differ > 0).mean()


class NormQuantizeTest(parameterized.TestCase):
  @parameterized.product(
    kind=('rms', 'layer'),
    static=(None, 1, 256),
    x_format=('int8', 'int4'),
  )
  def test_equals_base(self, kind, static, x_format):
    x, weight, bias = draw(3, 13, 256, dtype='bfloat16'), draw(256), None
    bias = draw(256) * 0.1 if kind == 'layer' else None
    scale = None if static is None else jnp.linspace(0.02, 0.05, static)
    f = functools.partial(
      norm_api.norm_quantize, kind=kind, x_format=x_format, scale=scale
    )
    codes, steps = jax.jit(functools.partial(f, **KERNEL))(x, weight, bias)
    want, want_steps = f(x, weight, bias, implementation='xla')
    self.assertEqual((codes.shape, codes.dtype), (x.shape, jnp.int8))
    same_codes(codes, want)
    if static is None:
      self.assertEqual(steps.shape, (3, 13, 1))
      np.testing.assert_allclose(steps, want_steps, rtol=1e-6)
    else:
      self.assertIsNone(steps)

  @parameterized.parameters(
    ('rms', 'bfloat16', True), ('layer', 'float32', False)
  )
  def test_copies_equal_base(self, kind, dtype, narrow):
    """The one-hot product takes columns as they are, in both dtypes."""
    K, S = 256, 128
    x, weight, bias = draw(3, 13, K, dtype=dtype), 50 + draw(K), draw(K) * 0.1
    gather = jnp.full((S,), K).at[:4].set(jnp.array([7, 7, 255, 0]))
    f = functools.partial(
      norm_api.norm_quantize,
      kind=kind,
      scale=jnp.ones((1,)),
      gather=gather,
      offset=jnp.linspace(-0.4, 0.4, K + S),
      narrow=narrow,
    )
    codes, steps = jax.jit(functools.partial(f, **KERNEL))(x, weight, bias)
    want, _ = f(x, weight, bias, implementation='xla')
    self.assertIsNone(steps)
    self.assertEqual(codes.shape, (3, 13, K + S))
    same_codes(codes, want)
    self.assertEqual(int(want.min()), -127 if narrow else -128)

  def test_copies_by_hand(self):
    x = jnp.array([[3.0, -1.0], [1.0, 1.0]])  # RMS sqrt(5) and 1.
    codes, _ = norm_api.norm_quantize(
      x,
      jnp.array([2.0, 5.0]),
      eps=0.0,
      scale=jnp.array([1.0, 0.5]),
      gather=jnp.array([1, 2, 0]),
      offset=jnp.array([0.0, 0.0, 0.7, 0.6, 0.0]),
    )
    # 6 / 2.236 = 2.68, -10 / 2.236 = -4.47; the place of no channel has 0.
    np.testing.assert_array_equal(codes, [[3, -4, -4, 1, 3], [2, 10, 11, 1, 2]])

  @parameterized.parameters(
    ('rms', norms.RMSNorm()), ('layer', norms.LayerNorm())
  )
  def test_base_is_the_norm_then_the_rounding(self, kind, layer: nn.Module):
    x, weight = draw(4, 128), draw(128)
    params = {'scale': weight}
    if kind == 'layer':
      params['bias'] = jnp.zeros(128)
    y = layer.apply({'params': params}, x)
    codes, scale = norm_api.norm_quantize(x, weight, kind=kind)
    want, want_scale = rows.quantize(y, 'int8')
    same_codes(codes, want)
    np.testing.assert_allclose(scale, want_scale, rtol=1e-6)

  def test_fp8(self):
    x, weight = draw(4, 128, dtype='bfloat16'), draw(128)
    f = functools.partial(norm_api.norm_quantize, x_format='float8_e4m3fn')
    codes, _ = f(x, weight, **KERNEL)
    want, _ = f(x, weight, implementation='xla')
    np.testing.assert_allclose(
      codes.astype(jnp.float32), want.astype(jnp.float32), rtol=0.07
    )

  @parameterized.named_parameters(
    ('kind', {'kind': 'batch'}, r"kind='batch'; allowed \['layer', 'rms'\]"),
    ('format', {'x_format': 'int2'}, "x_format='int2'; allowed"),
    ('scale', {'scale': jnp.ones(3)}, r'scale has shape \(3,\), x has K=128'),
    ('bias', {'bias': jnp.ones(3)}, r'bias has shape \(3,\)'),
    ('name', {'implementation': 'cuda'}, "implementation='cuda'; allowed"),
    ('dynamic', {'gather': jnp.zeros(8, int)}, 'gather or offset without scal'),
    (
      'gather',
      {'gather': jnp.zeros((1, 8), int), 'scale': jnp.ones(1)},
      r'gather has shape \(1, 8\); it needs \(S,\)',
    ),
    (
      'offset',
      {'offset': jnp.zeros(8), 'scale': jnp.ones(1)},
      r'offset has shape \(8,\).*need \(128,\)',
    ),
  )
  def test_messages(self, changed, message):
    with self.assertRaisesRegex(ValueError, message):
      norm_api.norm_quantize(draw(2, 128), draw(128), **changed)

  def test_refusals(self):
    f = functools.partial(norm_api.norm_quantize, **KERNEL)
    with self.assertRaisesRegex(NotImplementedError, 'K=96; it takes mult'):
      f(draw(2, 96), draw(96))
    with self.assertRaisesRegex(NotImplementedError, 'x is float16; it takes'):
      f(draw(2, 128, dtype='float16'), draw(128))
    with self.assertRaisesRegex(NotImplementedError, "chip is 'v4'; it runs"):
      f(draw(2, 128), draw(128), chip='v4')
    with self.assertRaisesRegex(ValueError, 'x has shape .0, 128.*no rows'):
      f(draw(2, 128)[:0], draw(128))
    with self.assertRaisesRegex(NotImplementedError, 'S=8 copies; it takes m'):
      f(draw(2, 128), draw(128), scale=jnp.ones(1), gather=jnp.zeros(8, int))
    self.assertEqual(norm_api.choose(draw(2, 128)), 'xla')  # On a CPU.
    self.assertEqual(norm_api.choose(draw(2, 128), 'v6e'), 'pallas_mosaic_tpu')


class HadamardQuantizeTest(parameterized.TestCase):
  @parameterized.parameters(1, 4, 128, 256)
  def test_matrix_is_that_of_numerics(self, h):
    np.testing.assert_array_equal(hadamard_base.matrix(h), hadamard.matrix(h))

  @parameterized.product(h=(32, 128, 256), x_format=('int8', 'int4'))
  def test_equals_base(self, h, x_format):
    x = draw(3, 15, 512, dtype='bfloat16')
    f = functools.partial(
      hadamard_api.hadamard_quantize, block=h, x_format=x_format
    )
    codes, scale = jax.jit(functools.partial(f, **KERNEL))(x)
    want, want_scale = f(x, implementation='xla')
    self.assertEqual((codes.shape, scale.shape), (x.shape, (3, 15, 1)))
    same_codes(codes, want)
    np.testing.assert_allclose(scale, want_scale, rtol=1e-5)

  def test_a_block_of_several_runs_equals_base(self):
    x = draw(3, 15, 4096, dtype='bfloat16')
    f = functools.partial(hadamard_api.hadamard_quantize, block=2048)
    codes, scale = jax.jit(functools.partial(f, **KERNEL))(x)
    want, want_scale = f(x, implementation='xla')
    same_codes(codes, want)
    np.testing.assert_allclose(scale, want_scale, rtol=1e-5)

  @parameterized.parameters((256, 64), (4096, 2048))
  def test_the_transform_is_that_of_numerics(self, K, h):
    x = draw(4, K)
    want = hadamard.transform(x.reshape(4, K // h, h)).reshape(4, K)
    np.testing.assert_allclose(hadamard_base.transform(x, h), want, atol=1e-5)

  @parameterized.named_parameters(
    ('odd', {'block': 96}, 'block=96, K=128; block must be a power of two'),
    ('large', {'block': 256}, 'block=256, K=128.*at most 128'),
    ('format', {'block': 64, 'x_format': 'int2'}, "x_format='int2'; allowed"),
    ('name', {'block': 64, 'implementation': 'cuda'}, "'cuda'; allowed"),
  )
  def test_messages(self, changed, message):
    with self.assertRaisesRegex(ValueError, message):
      hadamard_api.hadamard_quantize(draw(2, 128), **changed)

  def test_refusals(self):
    f = functools.partial(hadamard_api.hadamard_quantize, **KERNEL)
    x = draw(2, 1024, dtype='bfloat16')
    wide = jnp.zeros((2, 65536), jnp.bfloat16)
    with self.assertRaisesRegex(NotImplementedError, 'block=65536; it takes u'):
      f(wide, block=65536)
    with self.assertRaisesRegex(
      NotImplementedError, 'x is float32; it takes b'
    ):
      f(draw(2, 128), block=64)
    with self.assertRaisesRegex(NotImplementedError, 'K=64; it takes multiple'):
      f(x[:, :64], block=64)
    with self.assertRaisesRegex(NotImplementedError, "chip is 'h100'; it runs"):
      f(x, block=64, chip='h100')
    with self.assertRaisesRegex(ValueError, 'x has shape .0, 1024.*no rows'):
      f(x[:0], block=64)
    self.assertEqual(hadamard_api.choose(x, 64), 'xla')  # On a CPU.
    self.assertEqual(hadamard_api.choose(x, 64, 'v5e'), 'pallas_mosaic_tpu')


if __name__ == '__main__':
  absltest.main()
