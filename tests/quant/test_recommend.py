"""Tests of jaxq.quant.recommend."""

from absl.testing import absltest, parameterized

import jaxq
from jaxq.numerics import chips
from jaxq.quant import recommend, schemes


class RecommendTest(parameterized.TestCase):
  @parameterized.parameters(
    ('v4', 'W8A16'),
    ('v5e', 'W8A8'),
    ('v5p', 'W8A8'),
    ('v6e', 'W8A8'),  # Its e4m3 is another one.
    ('tpu7x', 'FP8_DYNAMIC'),
    ('h100', 'FP8_DYNAMIC'),
    ('a100', 'W8A8'),
    ('cpu', 'W8A16'),
  )
  def test_throughput_is_a_native_format(self, chip, scheme):
    self.assertEqual(recommend.recommend(chip, 'throughput'), scheme)
    inputs = schemes.parse(scheme).inputs
    if inputs is not None:
      self.assertIn(inputs.dtype, chips.native_formats(chip))

  @parameterized.product(
    chip=('v4', 'v5e', 'tpu7x', 'h100', 'cpu'), goal=recommend.GOALS
  )
  def test_every_answer_is_a_scheme(self, chip, goal):
    self.assertIsNotNone(schemes.parse(recommend.recommend(chip, goal)).weights)

  def test_it_is_jaxq_recommend(self):
    self.assertEqual(jaxq.recommend('v5e'), 'W4A16')
    self.assertEqual(jaxq.recommend('v5e', 'quality'), 'W8A16')

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, "chip='v9'; allowed .*'v5e'"):
      jaxq.recommend('v9', 'latency')
    with self.assertRaisesRegex(
      ValueError, "goal='speed'; allowed .*'latency', 'memory'"
    ):
      jaxq.recommend('v5e', 'speed')


if __name__ == '__main__':
  absltest.main()
