"""Tests of jaxq.nn.linear and jaxq.nn.matmul."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import linear, matmul
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib

INT8_CHANNEL = spec_lib.QuantSpec(dtype='int8', granularity='channel')
INT8_TOKEN = spec_lib.QuantSpec(dtype='int8', granularity='token')
INT4_GROUP = spec_lib.QuantSpec(
  dtype='int4', granularity='group', group_size=16, symmetric=False
)


def data(K=64, N=24):
  x = jax.random.normal(jax.random.key(0), (2, 5, K))
  w = jax.random.normal(jax.random.key(1), (K, N)) / K**0.5
  return x, w


class QuantDenseTest(parameterized.TestCase):
  def test_float_kernel_is_a_plain_dense_layer(self):
    x, w = data()
    layer = linear.QuantDense(24, use_bias=True)
    variables = layer.init(jax.random.key(0), x)
    self.assertEqual(variables['params']['kernel'].shape, (64, 24))
    bias = jnp.arange(24.0)
    y = layer.apply({'params': {'kernel': w, 'bias': bias}}, x)
    np.testing.assert_allclose(
      y, np.asarray(x) @ np.asarray(w) + np.asarray(bias), rtol=2e-5, atol=2e-5
    )

  @parameterized.parameters(INT8_CHANNEL, INT4_GROUP)
  def test_quantized_kernel_is_its_dequantized_one(self, spec):
    x, w = data()
    q = qarray.quantize(w, spec)
    layer = linear.QuantDense(24)
    y = layer.apply({'params': {'kernel': q}}, x)
    expected = layer.apply({'params': {'kernel': qarray.dequantize(q)}}, x)
    np.testing.assert_array_equal(y, expected)

  def test_dynamic_and_equal_static_input_scales_agree(self):
    x, w = data()
    q = qarray.quantize(w, INT8_CHANNEL)
    scale, _ = qarray.find_params(x.reshape(-1, 64), INT8_TOKEN)
    layer = linear.QuantDense(24)

    def run(scale):
      act = linear.ActQuant(scale, None, INT8_TOKEN)
      return layer.apply({'params': {'kernel': q}, 'quant': {'input': act}}, x)

    np.testing.assert_array_equal(run(None), run(scale))

  def test_online_hadamard_undoes_a_rotated_kernel(self):
    x, w = data()
    rotation = linear.OnlineHadamard(32)
    rotated = rotation(w.T).T  # H^T W, block by block.
    layer = linear.QuantDense(24)
    y = layer.apply(
      {'params': {'kernel': rotated}, 'quant': {'hadamard': rotation}}, x
    )
    expected = layer.apply({'params': {'kernel': w}}, x)
    np.testing.assert_allclose(y, expected, atol=1e-5)

  def test_a_bias_that_a_method_put_there_is_added(self):
    x, w = data()
    layer = linear.QuantDense(24)
    bias = jnp.arange(24.0)
    y = layer.apply({'params': {'kernel': w, 'bias': bias}}, x)
    plain = layer.apply({'params': {'kernel': w}}, x)
    np.testing.assert_allclose(y, plain + bias[None, None], rtol=1e-5)

  def test_a_quantized_output(self):
    x, w = data()
    layer = linear.QuantDense(24)
    act = linear.ActQuant(None, None, INT8_TOKEN)
    y = layer.apply({'params': {'kernel': w}, 'quant': {'output': act}}, x)
    plain = layer.apply({'params': {'kernel': w}}, x)
    np.testing.assert_array_equal(y, matmul.fake_input(plain, act))
    self.assertLess(float(jnp.max(jnp.abs(y - plain))), 0.03)

  @parameterized.parameters('float', 'integer')
  def test_inputs_in_steps_are_rounded_and_clipped(self, implementation):
    x = jnp.array([[1.4, -200.0, 2.5]])  # Codes 1, -128, 2.
    w = jnp.array([[127.0], [-1.0], [3.0]])
    step = linear.StepInput(INT8_TOKEN)
    np.testing.assert_array_equal(step.codes(x), [[1, -128, 2]])
    y = matmul.matmul(
      x, qarray.quantize(w, INT8_CHANNEL), step, implementation=implementation
    )
    np.testing.assert_array_equal(y, [[127.0 + 128.0 + 6.0]])

  @parameterized.parameters('int8', 'int4')
  def test_a_zero_point_of_the_weights_in_integers(self, dtype):
    x, w = data()
    spec = spec_lib.QuantSpec(dtype=dtype, symmetric=False)
    q = qarray.quantize(w + 0.1, spec)
    act = linear.ActQuant(None, None, INT8_TOKEN)
    np.testing.assert_allclose(
      matmul.matmul(x, q, act, implementation='integer'),
      matmul.matmul(x, q, act, implementation='float'),
      atol=1e-4,
    )

  def test_stacked_qarrays_scan(self):
    x, _ = data()
    w = jax.random.normal(jax.random.key(2), (3, 64, 64)) / 8
    q = qarray.quantize(w, INT4_GROUP)
    layer = linear.QuantDense(64)
    y, _ = jax.lax.scan(
      lambda x, k: (layer.apply({'params': {'kernel': k}}, x), None), x, q
    )
    expected = x
    for i in range(3):
      one = qarray.quantize(w[i], INT4_GROUP)
      expected = layer.apply({'params': {'kernel': one}}, expected)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


class MatmulTest(parameterized.TestCase):
  @parameterized.product(jit=(False, True), granularity=('token', 'tensor'))
  def test_integer_equals_float(self, jit, granularity):
    x, w = data()
    q = qarray.quantize(w, INT8_CHANNEL)
    spec = spec_lib.QuantSpec(dtype='int8', granularity=granularity)
    act = linear.ActQuant(None, None, spec)

    def run(implementation):
      f = lambda x: matmul.matmul(x, q, act, implementation=implementation)
      return (jax.jit(f) if jit else f)(x)

    # int32 sums are exact; the float ones round 64 products.
    np.testing.assert_allclose(run('integer'), run('float'), atol=1e-5)

  def test_integer_path_multiplies_int8(self):
    x, w = data()
    q = qarray.quantize(w, INT8_CHANNEL)
    act = linear.ActQuant(None, None, INT8_TOKEN)
    text = (
      jax.jit(lambda x: matmul.matmul(x, q, act, implementation='integer'))
      .lower(x)
      .as_text()
    )
    self.assertRegex(text, r'dot_general.*xi8.*xi8.*xi32')

  def test_messages(self):
    x, w = data()
    with self.assertRaisesRegex(ValueError, "implementation='fast'.*'float'"):
      matmul.matmul(x, w, implementation='fast')
    with self.assertRaisesRegex(NotImplementedError, 'both sides'):
      matmul.matmul(x, w, implementation='integer')
    act = linear.ActQuant(None, None, INT8_TOKEN)
    grouped = qarray.quantize(
      w, spec_lib.QuantSpec(dtype='int4', granularity='group', group_size=16)
    )
    with self.assertRaisesRegex(NotImplementedError, 'w has one scale per gr'):
      matmul.matmul(x, grouped, act, implementation='integer')
    asymmetric = spec_lib.QuantSpec(
      dtype='int4', granularity='token', symmetric=False
    )
    with self.assertRaisesRegex(NotImplementedError, 'x is int4, symmetric=F'):
      matmul.matmul(
        x,
        qarray.quantize(w, INT8_CHANNEL),
        linear.ActQuant(None, None, asymmetric),
        implementation='integer',
      )


if __name__ == '__main__':
  absltest.main()
