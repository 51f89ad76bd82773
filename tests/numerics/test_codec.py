"""Tests of jaxq.numerics.codec, through the functions of qarray."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.numerics import codec, qarray, spec

QuantSpec = spec.QuantSpec
TINY = 2.0**-126


class ByHandTest(parameterized.TestCase):
  def test_symmetric_int4(self):
    x = jnp.array([[7.0], [-3.5], [2.5], [0.0]])  # absmax 7: scale 1.
    q = qarray.quantize(x, QuantSpec(dtype='int4'))
    np.testing.assert_array_equal(qarray.codes(q)[:, 0], [7, -4, 2, 0])
    np.testing.assert_array_equal(q.scale, [[1.0]])

  def test_asymmetric_int2(self):
    x = jnp.array([[-1.0], [0.0], [2.0], [0.6]])  # lo -1, hi 2: scale 1.
    q = qarray.quantize(x, QuantSpec(dtype='int2', symmetric=False))
    np.testing.assert_array_equal(qarray.codes(q)[:, 0], [0, 1, 3, 2])
    np.testing.assert_array_equal(q.zero_point, np.uint8([[1]]))
    np.testing.assert_array_equal(qarray.dequantize(q)[:, 0], [-1, 0, 2, 1])

  def test_binary_is_sign_times_mean(self):
    x = jnp.array([[1.0], [-3.0], [2.0], [-2.0]] * 2)
    q = qarray.quantize(x, QuantSpec(dtype='binary'))
    self.assertEqual(q.qvalue.shape, (1, 1))
    np.testing.assert_array_equal(
      qarray.dequantize(q)[:, 0], [2, -2, 2, -2] * 2
    )

  def test_narrow_and_clip(self):
    x = jnp.array([[-8.0], [7.0], [4.0], [1.0]])
    s = QuantSpec(dtype='int4', clip=0.5)  # Range 4: scale 4/7.
    y = qarray.fake_quant(x, s)
    np.testing.assert_allclose(y[:3, 0], [-8 * 4 / 7, 4.0, 4.0], rtol=1e-6)
    y = qarray.fake_quant(x, dataclasses.replace(s, narrow=True))
    np.testing.assert_allclose(y[:3, 0], [-4.0, 4.0, 4.0], rtol=1e-6)

  def test_fp8_saturates_and_never_makes_nan(self):
    x = jnp.array([[448.0], [1e9], [-3e38], [17.0]])
    q = qarray.quantize(x, QuantSpec(dtype='fp8_e4m3'), scale=jnp.ones((1, 1)))
    self.assertEqual(q.qvalue.dtype, jnp.float8_e4m3fn)
    np.testing.assert_array_equal(
      qarray.dequantize(q)[:, 0], [448, 448, -448, 16]
    )


class DivideTest(parameterized.TestCase):
  @parameterized.parameters((1, 4), (64, 1), (1, 1))
  def test_is_the_rounded_quotient_under_jit(self, *shape):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((64, 4)).astype(np.float32)
    d = rng.uniform(0.5, 2, shape).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(codec.divide)(x, d), x / d)
    by_constant = jax.jit(lambda x: codec.divide(x, 7))(x)
    np.testing.assert_array_equal(by_constant, x / np.float32(7))


class OracleTest(parameterized.TestCase):
  @parameterized.product(
    symmetric=(True, False), granularity=('channel', 'group')
  )
  def test_integers_equal_numpy(self, symmetric, granularity):
    x = np.random.default_rng(0).standard_normal((64, 5)).astype(np.float32)
    x[:16, 0] = 0
    G = 16 if granularity == 'group' else 64
    s = QuantSpec(
      dtype='int4',
      granularity=granularity,
      group_size=16 if granularity == 'group' else -1,
      symmetric=symmetric,
    )
    q = qarray.quantize(jnp.asarray(x), s)
    v = x.reshape(-1, G, 5)
    if symmetric:
      scale = np.maximum(np.abs(v).max(1), np.float32(1e-5)) / np.float32(7)
      code = np.clip(np.round(v / scale[:, None]), -8, 7)
    else:
      lo, hi = np.minimum(v.min(1), 0), np.maximum(v.max(1), 0)
      empty = (lo == 0) & (hi == 0)
      lo, hi = np.where(empty, np.float32(-1), lo), np.where(empty, 1, hi)
      scale = (hi - lo).astype(np.float32) / np.float32(15)
      zero = np.round(-lo / scale)
      np.testing.assert_array_equal(q.zero_point, zero)
      code = np.clip(np.round(v / scale[:, None]) + zero[:, None], 0, 15)
    np.testing.assert_array_equal(q.scale, scale)
    np.testing.assert_array_equal(qarray.codes(q), code.reshape(64, 5))

  @parameterized.product(
    dtype=('mxfp4', 'mxfp8', 'mxfp8_e5m2'), rule=('floor', 'ceil')
  )
  def test_mx_equals_numpy(self, dtype, rule):
    element, emax, largest = {
      'mxfp4': (ml_dtypes.float4_e2m1fn, 2, 6.0),
      'mxfp8': (ml_dtypes.float8_e4m3fn, 8, 448.0),
      'mxfp8_e5m2': (ml_dtypes.float8_e5m2, 15, 57344.0),
    }[dtype]
    rng = np.random.default_rng(1)
    x = rng.standard_normal((64, 40)).astype(np.float64)
    x *= 2.0 ** rng.integers(-125, 126, (1, 40))
    x[:32, 0] = 0  # An all-zero block.
    x[:, 1] *= TINY * 2**-6 / np.abs(x[:, 1]).max()  # Subnormal blocks.
    x[:, 2] *= 3 * TINY / np.abs(x[:, 2]).max()  # A few normal numbers.
    x[0, 3] = 2.0**127
    x[:32, 4] = 2.0**5  # An exact power of two.
    x = x.astype(np.float32)
    s = QuantSpec(dtype=dtype, scale_rule=rule)
    q = qarray.quantize(jnp.asarray(x), s)

    blocks = x.astype(np.float64).reshape(2, 32, 40)
    blocks = np.where(np.abs(blocks) < TINY, 0, blocks)  # As XLA does.
    scale = np.zeros((2, 40))
    for i in range(2):
      for n in range(40):
        absmax = np.abs(blocks[i, :, n]).max()
        e = np.frexp(absmax)[1] - 1 - emax if absmax else -127
        if rule == 'ceil' and absmax > largest * 2.0**e:
          e += 1
        scale[i, n] = 2.0 ** np.clip(e, -127, 127)
    elements = np.clip(blocks / scale[:, None], -largest, largest)
    elements = elements.astype(np.float32).astype(element)
    y = elements.astype(np.float64) * scale[:, None]
    y = np.where(np.abs(y) < TINY, 0, y).reshape(64, 40)
    np.testing.assert_array_equal(
      np.asarray(q.scale).view(np.uint8),
      scale.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8),
    )
    np.testing.assert_array_equal(qarray.dequantize(q), y.astype(np.float32))
    if rule == 'ceil':  # Nothing saturates.
      self.assertTrue(np.all(np.abs(blocks) <= largest * scale[:, None]))

  def test_nvfp4_equals_numpy(self):
    x = np.random.default_rng(2).standard_t(3, (64, 6)).astype(np.float32)
    x[:16, 0] = 0
    x[16:32, 0] *= 1e-7  # The block scale rounds to zero.
    q = qarray.quantize(jnp.asarray(x), QuantSpec(dtype='nvfp4'))
    S = np.float32(np.abs(x).max() / np.float32(6 * 448))
    np.testing.assert_allclose(q.tensor_scale, [[S]], rtol=2.0**-20)
    S = np.asarray(q.tensor_scale)[0, 0]
    v = x.reshape(4, 16, 6)
    block = (np.abs(v).max(1) / (6 * S)).astype(ml_dtypes.float8_e4m3fn)
    self.assertEqual(block.astype(np.float32).max(), 448)
    np.testing.assert_array_equal(
      np.asarray(q.scale).view(np.uint8), block.view(np.uint8)
    )
    step = (block.astype(np.float32) * S)[:, None]
    ratio = np.where(step > 0, v / np.where(step > 0, step, 1), 0)
    element = np.clip(ratio, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    y = element.astype(np.float32) * block.astype(np.float32)[:, None] * S
    np.testing.assert_array_equal(qarray.dequantize(q), y.reshape(64, 6))

  def test_finer_formats_and_groups_have_less_error(self):
    x = jax.random.t(jax.random.key(5), 4.0, (128, 8))

    def error(**fields):
      s = QuantSpec(**fields)
      return float(jnp.mean((qarray.fake_quant(x, s) - x) ** 2))

    channel = error(dtype='int4')
    self.assertLess(error(dtype='nvfp4'), error(dtype='mxfp4'))
    self.assertLess(error(dtype='mxfp4'), channel)
    group = dict(granularity='group', group_size=32)
    self.assertLess(error(dtype='int4', **group), channel)
    self.assertLess(error(dtype='nf4', **group), error(dtype='int4', **group))


if __name__ == '__main__':
  absltest.main()
