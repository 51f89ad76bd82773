"""Tests of jaxq.io.qwix.

The structure is checked against what Qwix documents of its QArray; with Qwix
installed, against its own validation and dequantize as well.
"""

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.io import qwix as qwix_io
from jaxq.numerics import binary, qarray
from jaxq.numerics import spec as spec_lib
from tests.numerics import test_binary

QuantSpec = spec_lib.QuantSpec
SPECS = {
  'int4': QuantSpec(dtype='int4', granularity='group', group_size=16),
  'int4_asym': QuantSpec(dtype='int4', symmetric=False),
  'int3': QuantSpec(dtype='int3'),
  'int8': QuantSpec(dtype='int8'),
  'fp8': QuantSpec(dtype='fp8_e4m3', granularity='tensor'),
  'mxfp4': QuantSpec(dtype='mxfp4'),
  'nvfp4': QuantSpec(dtype='nvfp4'),
}


def made(name):
  w = np.random.default_rng(0).standard_normal((64, 8), np.float32)
  return qarray.quantize(jnp.asarray(w), SPECS[name])


def broadcast(a, shape):
  """Repeats a along each axis to shape, as Qwix's generic broadcast."""
  for axis, size in enumerate(shape):
    a = np.repeat(a, size // a.shape[axis], axis)
  return a


class QwixTest(parameterized.TestCase):
  @parameterized.parameters(*sorted(SPECS))
  def test_value_is_code_less_zero_point_times_scale(self, name):
    q = made(name)
    leaf = np.ones(3, np.float32)
    tree = qwix_io.to_qwix({'mlp': {'up': {'kernel': q}}, 'norm': leaf})
    self.assertIs(tree['norm'], leaf)
    fields = tree['mlp']['up']['kernel']
    self.assertEqual(list(fields), ['qvalue', 'scale', 'zero_point', 'qtype'])
    qvalue, scale = fields['qvalue'], np.asarray(fields['scale'])
    self.assertEqual(qvalue.shape, (64, 8))
    self.assertEqual(scale.ndim, 2)
    self.assertEqual(scale.dtype, np.float32)
    values = np.asarray(qvalue.astype(jnp.float32))
    if fields['zero_point'] is not None:
      self.assertEqual(fields['zero_point'].dtype, qvalue.dtype)
      zero = np.asarray(fields['zero_point'].astype(jnp.float32))
      values = values - broadcast(zero, (64, 8))
    np.testing.assert_array_equal(
      values * broadcast(scale, (64, 8)), qarray.dequantize(q)
    )

  @parameterized.parameters(*sorted(SPECS))
  def test_with_qwix(self, name):
    try:
      from qwix._src.core import qarray as theirs
    except ImportError as e:
      self.skipTest(f'Qwix is not installed: {e}')
    q = made(name)
    array = qwix_io.to_qwix(q, make=theirs.QArray)
    theirs.validate_qarray(array)
    np.testing.assert_array_equal(
      theirs.dequantize(array), qarray.dequantize(q)
    )

  def test_formats_it_has_not(self):
    q = qarray.quantize(jnp.ones((8, 8)), QuantSpec(dtype='binary'))
    with self.assertRaisesRegex(
      ValueError, r"mlp.up.kernel is binary; Qwix has .*'int4'"
    ):
      qwix_io.to_qwix({'mlp': {'up': {'kernel': q}}})
    packed = binary.pack(**test_binary.parts())
    with self.assertRaisesRegex(ValueError, 'mlp.up.kernel holds signs.*Qwix'):
      qwix_io.to_qwix({'mlp': {'up': {'kernel': packed}}})


if __name__ == '__main__':
  absltest.main()
