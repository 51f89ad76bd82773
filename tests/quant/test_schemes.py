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

  def test_inputs_with_zero_points_and_in_groups(self):
    scheme = schemes.parse('W4A4', input_symmetric=False, input_group_size=32)
    self.assertFalse(scheme.inputs.symmetric)
    self.assertEqual(scheme.inputs.granularity, 'group')
    self.assertEqual(scheme.inputs.group_size, 32)
    with self.assertRaisesRegex(
      ValueError, 'W4A4_STATIC with --input_group_size=32.*Leave _STATIC out'
    ):
      schemes.parse('W4A4_STATIC', input_group_size=32)

  def test_static_inputs_have_one_scale_per_tensor(self):
    scheme = schemes.parse('W8A8_STATIC')
    self.assertTrue(scheme.static_inputs)
    self.assertEqual(scheme.inputs.granularity, 'tensor')
    self.assertFalse(schemes.parse('W8A8').static_inputs)

  @parameterized.parameters(
    # name, weights, granularity, inputs, granularity, static
    ('FP8', 'fp8_e4m3', 'tensor', 'fp8_e4m3', 'tensor', True),
    ('INT8', 'int8', 'channel', 'int8', 'token', False),
    ('W4A8', 'int4', 'channel', 'int8', 'token', False),
    ('W4AFP8', 'int4', 'group', 'fp8_e4m3', 'token', False),
    ('MXFP4', 'mxfp4', 'group', 'mxfp4', 'group', False),
    ('MXFP8', 'mxfp8', 'group', 'mxfp8', 'group', False),
    ('NVFP4', 'nvfp4', 'group', 'nvfp4', 'group', True),
  )
  def test_presets_with_inputs(self, name, w, w_by, a, a_by, static):
    scheme = schemes.parse(name)
    self.assertEqual(
      (scheme.weights.dtype, scheme.weights.granularity), (w, w_by)
    )
    self.assertEqual(
      (scheme.inputs.dtype, scheme.inputs.granularity), (a, a_by)
    )
    self.assertEqual(scheme.static_inputs, static)

  def test_asymmetric_weights_by_name(self):
    self.assertFalse(schemes.parse('W4A16_ASYM').weights.symmetric)
    self.assertEqual(schemes.parse('W4A16_ASYM').weights.group_size, 128)
    self.assertFalse(schemes.parse('W8A8_ASYM').weights.symmetric)
    self.assertTrue(schemes.parse('W8A8_ASYM').inputs.symmetric)

  def test_blocks_of_weights_are_read_and_not_made(self):
    with self.assertRaisesRegex(
      NotImplementedError, '--scheme=fp8_block: .*FP8_DYNAMIC'
    ):
      schemes.parse('fp8_block')

  def test_sixteen_bits_is_float(self):
    self.assertIsNone(schemes.parse('W16A8').weights)

  @parameterized.parameters(
    *('W9A16', 'int4', 'W4', 'W4A1', 'W4A16_STATIC', 'W16A16_ASYM'),
    *('W16AFP8', 'W1AFP8', 'W1A16_ASYM', 'W4AFP8_STATIC'),
  )
  def test_unknown_names_list_the_known(self, name):
    with self.assertRaisesRegex(ValueError, f'--scheme={name}.*FP8_DYNAMIC'):
      schemes.parse(name)


if __name__ == '__main__':
  absltest.main()
