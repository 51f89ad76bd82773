"""Tests of pallas_kernels.weights: what is refused, and in which words."""

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from pallas_kernels import weights

X = jnp.zeros((2, 128), jnp.bfloat16)
Q = jnp.zeros((64, 8), jnp.uint8)
S = jnp.ones((1, 8))


def check(x=X, q=Q, s=S, z=None, bits=4, group_size=-1):
  return weights.check('op', x, q, s, z, bits=bits, group_size=group_size)


class WeightsTest(parameterized.TestCase):
  @parameterized.parameters(
    ('int8', -1, True),
    ('int8', 32, False),
    ('int4', 64, True),
    ('int4', -1, False),
    ('int2', 32, True),
    ('binary', 64, True),
  )
  def test_dequantize_is_that_of_qarray(self, dtype, group_size, symmetric):
    spec = spec_lib.QuantSpec(
      dtype=dtype,
      granularity='group' if group_size > 0 else 'channel',
      group_size=group_size,
      symmetric=symmetric,
    )
    w = jnp.asarray(np.random.default_rng(0).normal(size=(128, 24)), 'float32')
    q = qarray.quantize(w, spec)
    args = q.qvalue, q.scale, q.zero_point
    layout = weights.check(
      'op', X, *args, bits=spec.bits, group_size=group_size
    )
    np.testing.assert_array_equal(
      weights.dequantize(*args, layout), qarray.dequantize(q)
    )

  @parameterized.named_parameters(
    ('no_rows', {'x': X[:0]}, r'x has shape \(0, 128\).*no rows'),
    ('vector', {'x': X[0]}, r'x has shape \(128,\)'),
    ('stacked', {'q': Q[None]}, r'qvalue has shape \(1, 64, 8\).*jax.vmap'),
    ('other_K', {'x': X[:, :64]}, 'K=64; bits=4 packed.*32 rows'),
    ('gaps', {'q': Q[::2]}, r'\(32, 8\), x has K=128.*without gaps.*64 rows'),
    ('group', {'group_size': 48}, 'K=128, group_size=48; group_size must div'),
    ('zero_group', {'group_size': 0}, 'group_size=0; group_size must divide'),
    ('scale', {'s': S[0]}, r'scale has shape \(8,\).*need \(1, 8\)'),
    (
      'grouped_scale',
      {'group_size': 64},
      r'scale has shape \(1, 8\).*group_size=64 need \(2, 8\)',
    ),
    (
      'zero_point',
      {'z': jnp.zeros((2, 8), jnp.uint8)},
      r'zero_point has shape \(2, 8\)',
    ),
  )
  def test_wrong_values(self, changed, message):
    with self.assertRaisesRegex(ValueError, message):
      check(**changed)

  @parameterized.named_parameters(
    ('codes', {'q': Q.astype(jnp.int8)}, r"qvalue is int8.*\['uint8'\]"),
    ('scale', {'s': S.astype(jnp.int8)}, "scale is int8; allowed .'bfloat16'"),
    (
      'zero_point',
      {'z': jnp.zeros((1, 8), jnp.int8)},
      r"zero_point is int8; allowed \['uint8'\]",
    ),
    (
      'bytes',
      {'q': jnp.zeros((128, 8), jnp.uint8), 'bits': 8},
      'qvalue is uint8.*bits=8 without unsigned codes',
    ),
  )
  def test_wrong_kinds(self, changed, message):
    with self.assertRaisesRegex(TypeError, message):
      check(**changed)

  def test_a_width_that_no_kernel_has(self):
    with self.assertRaisesRegex(NotImplementedError, r'bits=3; allowed \[1, 2'):
      check(bits=3)


if __name__ == '__main__':
  absltest.main()
