"""Tests of jaxq.quant.schemes."""

from absl.testing import absltest, parameterized

from jaxq.quant import schemes


class SchemesTest(parameterized.TestCase):
  @parameterized.parameters(
    ('W4A16', 'int4', 'group', 128, None),
    ('w8a8', 'int8', 'channel', -1, 'int8'),
    ('W8A16', 'int8', 'channel', -1, None),
    ('W4A4', 'int4', 'channel', -1, 'int4'),
    ('W1A16', 'binary', 'group', 128, None),
    ('FP8_DYNAMIC', 'fp8_e4m3', 'channel', -1, 'fp8_e4m3'),
    ('NVFP4A16', 'nvfp4', 'group', 16, None),
    ('MXFP4A16', 'mxfp4', 'group', 32, None),
    ('NF4A16', 'nf4', 'group', 64, None),
  )
  def test_presets(self, name, dtype, granularity, group_size, inputs):
    scheme = schemes.parse(name)
    self.assertEqual(scheme.weights.dtype, dtype)
    self.assertEqual(scheme.weights.granularity, granularity)
    self.assertEqual(scheme.weights.group_size, group_size)
    self.assertEqual(scheme.inputs.dtype if scheme.inputs else None, inputs)
    if scheme.inputs:
      self.assertEqual(scheme.inputs.granularity, 'token')

  def test_group_size_and_symmetry_override(self):
    scheme = schemes.parse('W4A16', group_size=-1, symmetric=False)
    self.assertEqual(scheme.weights.granularity, 'channel')
    self.assertFalse(scheme.weights.symmetric)
    grouped = schemes.parse('W8A8', group_size=64, input_clip=0.9)
    self.assertEqual(grouped.weights.group_size, 64)
    self.assertEqual(grouped.inputs.clip, 0.9)

  def test_static_inputs_have_one_scale_per_tensor(self):
    scheme = schemes.parse('W8A8_STATIC')
    self.assertTrue(scheme.static_inputs)
    self.assertEqual(scheme.inputs.granularity, 'tensor')
    self.assertFalse(schemes.parse('W8A8').static_inputs)

  def test_sixteen_bits_is_float(self):
    self.assertIsNone(schemes.parse('W16A8').weights)

  @parameterized.parameters('W9A16', 'int4', 'W4', 'W4A1', 'W4A16_STATIC')
  def test_unknown_names_list_the_known(self, name):
    with self.assertRaisesRegex(ValueError, f'--scheme={name}.*FP8_DYNAMIC'):
      schemes.parse(name)


if __name__ == '__main__':
  absltest.main()
