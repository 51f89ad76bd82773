"""Tests of jaxq.eval.wer: counts by hand, a slow oracle, and messages."""

import functools

import numpy as np
from absl.testing import absltest, parameterized

from jaxq.eval import wer


def slow_distance(a, b):
  """The recursion that defines the distance."""

  @functools.cache
  def of(i, j):
    if not i or not j:
      return i + j
    same = a[i - 1] == b[j - 1]
    return min(of(i - 1, j) + 1, of(i, j - 1) + 1, of(i - 1, j - 1) + 1 - same)

  return of(len(a), len(b))


class WerTest(parameterized.TestCase):
  @parameterized.parameters(
    ('the cat sat', 'the cat sat', 0),
    ('the cat sat', 'the cat', 1),  # Deleted.
    ('the cat sat', 'the black cat sat', 1),  # Inserted.
    ('the cat sat', 'the dog sat', 1),  # Substituted.
    ('the cat sat', '', 3),
    ('a b c d', 'b c d e', 2),
    ('', 'a b', 2),
  )
  def test_by_hand(self, reference, hypothesis, errors):
    got = wer.distance(reference.split(), hypothesis.split())
    self.assertEqual(got, errors)

  def test_definition(self):
    rng = np.random.default_rng(0)
    for _ in range(50):
      a, b = (
        tuple(rng.choice(list('abc'), rng.integers(0, 8)).tolist())
        for _ in range(2)
      )
      self.assertEqual(wer.distance(a, b), slow_distance(a, b))
      self.assertEqual(wer.distance(a, b), wer.distance(b, a))

  @parameterized.parameters(
    ('And so, my fellow Americans!', 'and so my fellow americans'),
    ("Don't say 'yes'.", "don't say yes"),
    ('well\u2014known  caf\u00e9', 'well known caf\u00e9'),
    ('it\u2019s', "it's"),
    ('snake_case', 'snake case'),
  )
  def test_words(self, text, expected):
    self.assertEqual(wer.words(text), expected.split())

  def test_rate_is_over_all_words(self):
    got = wer.word_errors(['One two three.', 'Four'], ['one two', 'five six'])
    self.assertEqual((got.errors, got.words), (3, 4))
    self.assertEqual(got.rate, 0.75)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, '2 references and 1 hypotheses'):
      wer.word_errors(['a', 'b'], ['a'])
    with self.assertRaisesRegex(ValueError, 'hold no words; a rate needs'):
      wer.word_errors(['...'], ['a'])


if __name__ == '__main__':
  absltest.main()
