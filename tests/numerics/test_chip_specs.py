"""Tests of jaxq.numerics.chip_specs."""

from absl.testing import absltest, parameterized

from jaxq.numerics import chip_specs, chips


class ChipSpecsTest(parameterized.TestCase):
  @parameterized.parameters(*chip_specs.chips())
  def test_figures_are_of_one_kind(self, chip):
    spec = chip_specs.of(chip)
    native = chips.native_formats(chip)  # Every chip is in both tables.
    self.assertBetween(spec.memory, 8e9, 1e12)
    self.assertBetween(spec.bandwidth, 1e11, 1e14)
    self.assertBetween(spec.interconnect, 1e10, spec.bandwidth)
    for name, peak in spec.peak.items():
      self.assertGreaterEqual(peak, spec.peak['bf16'])
      if name in ('int4', 'int8'):
        self.assertIn(name, native)

  def test_a_case_by_hand(self):
    # A matmul of 2 x 4096^3 flops cannot be done in less than 0.7 ms on v5e.
    seconds = 2 * 4096**3 / chip_specs.of('v5e').peak['bf16']
    self.assertAlmostEqual(seconds * 1e3, 0.698, places=3)

  def test_unknown_chip_lists_the_known(self):
    with self.assertRaisesRegex(
      ValueError, r"chip='cpu'; allowed \['a100', .*'v6e'\].*add its figures"
    ):
      chip_specs.of('cpu')


if __name__ == '__main__':
  absltest.main()
