"""Tests of benchmarks.reduction_checks."""

from absl.testing import absltest, parameterized

from benchmarks import reduction_checks


def row(method, budget, tokens=8.0, kinds=None, **metrics):
  """A stored row; metrics by name, '_' for a space."""
  found = [
    {
      'name': name.replace('_', ' '),
      'value': value,
      'low': value,
      'high': value,
    }
    for name, value in {'tokens': tokens, **metrics}.items()
  ]
  return {
    'method': method,
    'budget': budget,
    'metrics': found,
    'tokens by kind': kinds or {},
  }


FULL = row('all tokens', 1.0, tokens=64.0, accuracy=0.9)


class ReductionChecksTest(parameterized.TestCase):
  @parameterized.parameters(
    (0.88, 6.0, 4.0, ('12.5% of the tokens, of at most 15 %: as expected',)),
    (0.70, 3.0, 4.0, ('95 %: NOT as', '+10.0% points, of at least +5.0%: as')),
    (
      0.62,
      3.0,
      4.0,
      ('+2.0% points, of at least +5.0%: NOT', '4.0 tokens, NOT'),
    ),
  )
  def test_qtsplus(self, accuracy, presence, cell, expected):
    rows = [
      FULL,
      row(
        'qtsplus',
        0.5,
        accuracy=accuracy,
        kinds={'presence': presence, 'cell': cell},
      ),
      row('uniform', 0.15, accuracy=0.6),
    ]
    text = '\n'.join(reduction_checks.lines(rows))
    for part in expected:
      self.assertIn(part, text)

  def test_comparisons_need_both_rows(self):
    mine = row('cacovid', 0.1, accuracy=0.5, evidence_recall=0.5)
    self.assertEmpty(reduction_checks.lines([mine]))
    other = row('uniform', 0.1, accuracy=0.44, evidence_recall=0.47)
    first, second = reduction_checks.lines([mine, other])
    self.assertRegex(first, r'accuracy: \+6.0% points, .*: as expected\.')
    self.assertRegex(second, r'recall: \+3.0% points, .*: NOT as expected\.')

  def test_a_margin_below_zero(self):
    rows = [
      row('tokenflex', 0.25, accuracy=0.496),
      row('tokenflex, 4 a frame only', 0.25, accuracy=0.5),
    ]
    (line,) = reduction_checks.lines(rows)
    self.assertIn('-0.4% points, of at least -0.5%: as expected', line)

  def test_embedlens(self):
    rows = [
      FULL,
      row('embedlens', 0.5, tokens=16.0, accuracy=0.895, evidence_recall=0.9),
    ]
    (line,) = reduction_checks.lines(rows)
    self.assertIn('90.0% in 25.0% of the tokens, NOT', line)
    self.assertIn('at most 1 point: 0.5%, as expected', line)


if __name__ == '__main__':
  absltest.main()
