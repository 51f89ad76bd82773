"""Rewards of answers, by hand."""

from absl.testing import absltest, parameterized

from jaxq.tokens import cacovid_rewards


class RewardsTest(parameterized.TestCase):
  @parameterized.parameters(
    ('choice', 'B. The dog', 'B', 1),
    ('choice', 'b', 'B', 1),
    ('choice', '(C)', 'B', 0),
    ('choice', '', 'B', 0),
    ('numeric', 'about 1,250.004 m', '1250', 1),
    ('numeric', '3.15', '3.14', 0),
    ('numeric', 'many', '3', 0),
    ('ocr', 'Stop here now', 'stop here, now!', 1),
    ('ocr', 'stop there', 'stop here now', 1 / 3),
    ('ocr', 'a b c d e f', 'x', 0),
    ('regression', '8', '10', 0.8),
    ('regression', '-5', '10', 0),
    ('regression', 'none', '10', 0),
    ('free_form', 'the cat sat', 'the cat sat', 1),
    ('free_form', 'dogs run', 'the cat sat', 0),
    # ROUGE-1 and -L: 2 of 3 words; ROUGE-2: 1 of 2 pairs.
    ('free_form', 'the cat ran', 'the cat sat', (2 / 3 + 0.5 + 2 / 3) / 3),
  )
  def test_by_hand(self, kind, answer, truth, expected):
    got = cacovid_rewards.reward(kind, answer, truth)
    self.assertAlmostEqual(got, expected)

  def test_the_longest_common_subsequence_may_have_gaps(self):
    got = cacovid_rewards.rouge_l(['a', 'x', 'b', 'y', 'c'], ['a', 'b', 'c'])
    self.assertAlmostEqual(got, 2 * (3 / 5) / (3 / 5 + 1))

  def test_another_kind_lists_the_known(self):
    with self.assertRaisesRegex(ValueError, "kind='x'; allowed .'choice'"):
      cacovid_rewards.reward('x', '', '')


if __name__ == '__main__':
  absltest.main()
