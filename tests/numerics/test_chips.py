"""Tests of jaxq.numerics.chips."""

import types

from absl.testing import absltest, parameterized

from jaxq.numerics import chips


class NativeFormatsTest(parameterized.TestCase):
  @parameterized.parameters(
    ('v4', 'int8', False),
    ('v5e', 'int8', True),
    ('v5p', 'int4', True),
    ('v6e', 'int4', True),
    ('v6e', 'fp8_e4m3', False),
    ('v6e', 'fp8_e4m3b11fnuz', True),
    ('tpu7x', 'int8', False),
    ('tpu7x', 'fp8_e4m3', True),
    ('h100', 'int8', True),
    ('h100', 'int4', False),
    ('h100', 'fp8_e5m2', True),
    ('a100', 'fp8_e4m3', False),
    ('t4', 'int8', True),
    ('cpu', 'int8', False),
  )
  def test_table(self, chip, name, native):
    formats = chips.native_formats(chip)
    self.assertEqual(name in formats, native)
    self.assertEqual(list(formats), sorted(formats))

  @parameterized.parameters(
    ('cpu', 'cpu', 'cpu'),
    ('tpu', 'TPU v5 lite', 'v5e'),
    ('tpu', 'TPU v6 lite', 'v6e'),
    ('tpu', 'TPU7x', 'tpu7x'),
    ('tpu', 'TPU v9', 'tpu'),
    ('gpu', 'NVIDIA H100 80GB HBM3', 'h100'),
    ('gpu', 'NVIDIA A100-SXM4-40GB', 'a100'),
    ('gpu', 'Tesla T4', 't4'),
    ('gpu', 'NVIDIA GeForce RTX 4090', 'gpu'),
  )
  def test_chip_of_a_device(self, platform, kind, chip):
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    self.assertEqual(chips.chip_of(device), chip)
    self.assertNotEmpty(chips.native_formats(chip))

  def test_target_of_an_ahead_of_time_compilation(self):
    here = chips.current()
    with chips.compiling_for('v5e'):
      self.assertEqual(chips.current(), 'v5e')
      with chips.compiling_for('tpu7x'):
        self.assertEqual(chips.current(), 'tpu7x')
      self.assertEqual(chips.current(), 'v5e')
    self.assertEqual(chips.current(), here)

  def test_unknown_target(self):
    with self.assertRaisesRegex(ValueError, r"chip='v7'; allowed"):
      with chips.compiling_for('v7'):
        pass

  def test_unknown_chip_lists_the_known(self):
    with self.assertRaisesRegex(
      ValueError, r"chip='v7'; allowed \['a100', .*'v6e'\].*Use one"
    ):
      chips.native_formats('v7')


if __name__ == '__main__':
  absltest.main()
