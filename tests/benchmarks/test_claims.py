"""Tests of claims."""

from absl.testing import absltest, parameterized

from benchmarks import claims, quality


def stored(low, high):
  """What is stored of a row with one metric."""
  metric = {'name': 'KL', 'value': (low + high) / 2, 'low': low, 'high': high}
  return {'row': {'metrics': [metric]}}


class ClaimsTest(parameterized.TestCase):
  @parameterized.parameters(
    ((0.1, 0.2), (0.3, 0.4), 'yes'),
    ((0.3, 0.4), (0.1, 0.2), '**no**'),
    ((0.1, 0.3), (0.2, 0.4), 'not told apart'),
    ((0.1, 0.2), (0.2, 0.3), 'not told apart'),
  )
  def test_the_intervals_decide(self, ours, beside, says):
    rows = {'m, a': stored(*ours), 'm, b': stored(*beside)}
    text = claims.table(rows, [('a', 'b')], 'KL', prefix='m, ')
    self.assertStartsWith(text, '## Does what the papers claim hold?\n')
    self.assertEndsWith(text, f'| {says} |\n')
    opposite = claims.table(rows, [('b', 'a')], 'KL', more=True, prefix='m, ')
    self.assertEndsWith(opposite, f'| {says} |\n')

  def test_nothing_without_both_rows(self):
    rows = {'a': stored(0, 1), 'b': {'refused': 'it cannot.'}}
    self.assertEqual(claims.table(rows, [('a', 'b'), ('a', 'c')], 'KL'), '')
    rows['b'] = stored(2, 3)
    self.assertEmpty(claims.table(rows, [('a', 'b')], 'perplexity'))

  def test_claims_of_the_decoder_are_of_rows(self):
    names = {f'{setting}, {method}' for setting, method, _ in quality.ROWS}
    self.assertContainsSubset(
      {name for claim in quality.CLAIMS for name in claim}, names
    )


if __name__ == '__main__':
  absltest.main()
