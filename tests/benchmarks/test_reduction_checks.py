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

  def test_embedlens_probe_and_control(self):
    probe = {
      'noise dropped': 0.99,
      'digits dropped': 0.02,
      'auc': 0.95,
      'nearest': 0.2,
      'chance': 0.3,
    }
    mine = row('embedlens', 0.5, accuracy=0.89, evidence_recall=0.97)
    rows = [
      FULL,
      mine | {'probe': probe},
      row(reduction_checks.ALIVE, 0.5, accuracy=0.5),
    ]
    _, alive, told, means = reduction_checks.lines(rows)
    self.assertIn('+39.0%, as expected', alive)
    self.assertIn('99.0% of the cells of noise and 2.0%', told)
    self.assertIn('AUC 0.950, of at least 0.900: as expected', told)
    self.assertIn('0.200, above the 95th', means)
    self.assertIn('NOT as expected', means)

  def test_qtsplus_controls(self):
    rows = [
      FULL,
      row('qtsplus', 0.5, tokens=6.0, accuracy=0.8),
      row(reduction_checks.SHARE, 0.5, tokens=6.0, accuracy=0.7),
      row(reduction_checks.HEAVY, 0.5, tokens=7.0, accuracy=0.7),
    ]
    _, share, heavy = reduction_checks.lines(rows)
    self.assertRegex(share, r'\+10.0% points, of at least \+5.0%: as expected')
    self.assertIn('7.0 of 6.0, NOT as expected', heavy)

  def test_tokenflex_controls(self):
    rows = [
      row('tokenflex', budget, accuracy=accuracy)
      for budget, accuracy in ((0.05, 0.7), (0.25, 0.8), (0.5625, 0.85))
    ]
    rows += [row('tokenflex', 1.0, accuracy=0.9)]
    rows += [
      row('tokenflex, 4 a frame only', b, accuracy=a)
      for b, a in ((0.25, 0.8), (0.05, 0.75))
    ]
    rows += [row(reduction_checks.MLP, b, accuracy=0.74) for b in (0.25, 0.05)]
    _, collapse, between, block = reduction_checks.lines(rows)
    self.assertIn('at least 10 points: 5.0%, NOT as expected', collapse)
    self.assertIn('80.0%, 85.0%, 90.0%, as expected', between)
    self.assertRegex(block, r'mean over counts: \+1.0% points, .*: as expected')

  def test_a_shuffled_map_is_worth_nothing(self):
    rows = [
      row(reduction_checks.SHUFFLED, 0.25, accuracy=0.76),
      row(reduction_checks.SEQUENCE_CODES, 0.25, accuracy=0.81),
    ]
    (line,) = reduction_checks.lines(rows)
    self.assertIn('-5.0% points, as expected', line)

  def test_evidence_and_a_decoder_that_is_used_to_few_tokens(self):
    rows = [
      row('visionzip, decoder trained', 0.1, accuracy=0.5),
      row('random, decoder trained', 0.1, accuracy=0.52),
    ]
    (line,) = reduction_checks.lines(rows)
    self.assertRegex(line, r'-2.0% points, of at least \+0.0%: NOT')


if __name__ == '__main__':
  absltest.main()
