"""The page of caches: which claims hold, by intervals and over seeds."""

from absl.testing import absltest

from benchmarks import kv_page

HALF = 'evict:policy={},ratio=0.5'


def row(value, low, high):
  return {
    'ratio': [value, low, high],
    'stored bits': 2.0,
    'all bits': 3.0,
    'perplexity': 20.0 * value,
  }


class KvPageTest(absltest.TestCase):
  def test_claims(self):
    rows = {
      'oscar': row(1.1, 1.0, 1.2),
      'kivi': row(1.5, 1.4, 1.6),
      'kivi:mode=integer': row(1.05, 1.0, 1.15),
      'int2': row(1.3, 1.2, 1.35),
      HALF.format('knorm'): row(1.3, 1.2, 1.4),
      HALF.format('random'): row(1.1, 1.05, 1.15),
      HALF.format('random') + ',seed=1': row(1.3, 1.1, 1.5),
    }
    lines = kv_page._claim_lines(rows)
    verdicts = {
      tuple(line.split('`')[1:4:2]): line.split('| ')[-1].rstrip(' |')
      for line in lines
      if line.startswith('| `')
    }
    self.assertEqual(
      verdicts,
      {
        ('oscar', 'kivi'): 'yes',
        ('oscar', 'kivi:mode=integer'): 'not told apart',
        ('kivi', 'int2'): '**no**',
        # The seeds' mean is 1.2, and their intervals reach from 1.05 to 1.5.
        (HALF.format('knorm'), HALF.format('random')): 'not told apart',
      },
    )
    (drawn,) = [line for line in lines if 'knorm' in line]
    self.assertIn('| 1.2000 |', drawn)

  def test_rows_without_a_pair_claim_nothing(self):
    self.assertEqual(kv_page._claim_lines({'oscar': row(1.1, 1.0, 1.2)}), [])

  def test_a_page_of_what_is_stored(self):
    stored = {
      'settings': {'model': 'm', 'chunk': 128, 'passkey': 64},
      'windows': {
        '32': {
          'float': 20.0,
          'text': 'a text',
          'rows': {'int2': row(1.3, 1.2, 1.4)},
          'steps': {'int2': {'ms': 7.5}},
        },
        '64': {'float': 20.0, 'text': 'a text'},  # Nothing measured yet.
      },
      'passkey': {'int2': {'found': [1, 4], 'nll': 2.0}},
      'asked': {},
      'beyond': {},
    }
    page = kv_page.page(stored, {'2 bits': ('int2', 'oscar')})
    self.assertIn(
      '| `int2` | 2.00 | 3.00 | 26.00 | 1.300 [1.200, 1.400] ', page
    )
    self.assertIn('| 0.25 [0.05, 0.70], 2.00 |  | 7.5 |', page)
    self.assertNotIn('oscar` |', page.partition('## Quality')[2])
    self.assertNotIn('64 tokens\n', page)


if __name__ == '__main__':
  absltest.main()
