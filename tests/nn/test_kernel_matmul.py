"""Tests of jaxq.nn.kernel_matmul: what it picks, and that kernels agree."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import kernel_matmul, linear, matmul
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib

TOKEN = spec_lib.QuantSpec(dtype='int8', granularity='token')
TENSOR = spec_lib.QuantSpec(dtype='int8', granularity='tensor')


def spec_of(dtype, group_size=-1, symmetric=True):
  return spec_lib.QuantSpec(
    dtype=dtype,
    granularity='group' if group_size > 0 else 'channel',
    group_size=group_size,
    symmetric=symmetric,
  )


def data(spec, K=256, N=96):
  x = jax.random.normal(jax.random.key(0), (2, 3, K), jnp.bfloat16)
  w = jax.random.normal(jax.random.key(1), (K, N)) / K**0.5
  return x, qarray.quantize(w, spec)


class KernelMatmulTest(parameterized.TestCase):
  @parameterized.parameters(
    (spec_of('int8'), None),
    (spec_of('int4', 64, False), None),
    (spec_of('binary', 128), None),
    (spec_lib.QuantSpec(dtype='int8', granularity='tensor'), None),
    (spec_of('int8'), linear.ActQuant(None, None, TOKEN)),
    (spec_of('int4', -1, False), linear.ActQuant(None, None, TOKEN)),
    (spec_of('int8'), linear.ActQuant(jnp.full((1, 1), 0.02), None, TENSOR)),
  )
  def test_equals_the_float_path(self, spec, act):
    x, q = data(spec)
    y = kernel_matmul.matmul(x, q, act, chip='v5e', interpret=True)
    want = matmul.matmul(x, q, act, implementation='float')
    self.assertEqual((y.shape, y.dtype), (want.shape, want.dtype))
    # bfloat16 on both sides, and the float path rounds the weight too.
    np.testing.assert_allclose(
      y.astype(jnp.float32), want.astype(jnp.float32), atol=0.05
    )

  def test_choice_names_the_kernel_where_it_serves(self):
    x, q = data(spec_of('int4', 64))
    act = linear.ActQuant(None, None, TOKEN)
    _, q8 = data(spec_of('int8'))
    kernel = 'pallas_mosaic_tpu'
    self.assertEqual(kernel_matmul.choose(x, q, None), '')  # On a CPU.
    self.assertEqual(kernel_matmul.choose(x, q, None, 'v6e'), kernel)
    self.assertEqual(kernel_matmul.choose(x, q8, act, 'v6e'), kernel)
    self.assertEqual(kernel_matmul.choose(x, q8, act, 'tpu7x'), '')
    self.assertEqual(
      kernel_matmul.choose(x, q, act, 'v6e'), ''
    )  # Groups of 64.
    self.assertEqual(kernel_matmul.choose(x, x[0, 0], None, 'v6e'), '')

  def test_none_is_as_before_on_a_cpu(self):
    x, q = data(spec_of('int4', 64))
    np.testing.assert_array_equal(
      matmul.matmul(x, q), matmul.matmul(x, q, implementation='float')
    )

  @parameterized.named_parameters(
    ('float', lambda x, q: (x, x[0], None), 'w must be a QArray of one'),
    (
      'nf4',
      lambda x, q: (x, data(spec_lib.QuantSpec(dtype='nf4'))[1], None),
      'w is nf4; kernels take',
    ),
    ('int3', lambda x, q: (x, data(spec_of('int3'))[1], None), 'w has 3 bits'),
    (
      'fp8',
      lambda x, q: (x, data(spec_of('fp8_e4m3'))[1], None),
      'w is fp8 and x is not',
    ),
    ('steps', lambda x, q: (x, q, linear.StepInput(TOKEN)), 'x is a StepInput'),
    (
      'mixed',
      lambda x, q: (
        x,
        q,
        linear.ActQuant(
          None, None, spec_lib.QuantSpec(dtype='fp8_e4m3', granularity='token')
        ),
      ),
      'w is int8 and x fp8_e4m3',
    ),
    (
      'clip',
      lambda x, q: (
        x,
        q,
        linear.ActQuant(
          None,
          None,
          spec_lib.QuantSpec(dtype='int8', granularity='token', clip=0.9),
        ),
      ),
      'x has a clip ratio',
    ),
    (
      'int6',
      lambda x, q: (
        x,
        q,
        linear.ActQuant(
          None, None, spec_lib.QuantSpec(dtype='int6', granularity='token')
        ),
      ),
      'x is int6',
    ),
    (
      'tensor',
      lambda x, q: (x, q, linear.ActQuant(None, None, TENSOR)),
      'one dynamic scale per tensor',
    ),
    (
      'static',
      lambda x, q: (x, q, linear.ActQuant(jnp.ones((1, 256)), None, TENSOR)),
      r'static scale of shape \(1, 256\)',
    ),
    ('rows', lambda x, q: (x, data(TOKEN)[1], None), 'one scale per row'),
    ('chip', lambda x, q: (x, q, None), "chip is 'cpu'; it runs on"),
  )
  def test_messages(self, arguments, message):
    x, q = data(spec_of('int8'))
    with self.assertRaisesRegex(NotImplementedError, message):
      matmul.matmul(*arguments(x, q), implementation='kernel')


if __name__ == '__main__':
  absltest.main()
