"""Tests of jaxq.data.passages."""

import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from jaxq.data import passages
from tests.io import encoder_files

TEXT = '\n'.join(
  f'The cat sat on the mat {"a" * i}. {"The dog ran on a mat. " * i}Title'
  for i in range(1, 9)
)


class PassagesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    (folder / 'a.txt').write_text('Title\n\n' + TEXT)
    self.source = str(folder / 'a.txt')

  def config(self, **fields):
    return passages.PassageConfig(
      source=self.source, **{'num_passages': 4, 'length': 12, **fields}
    )

  def test_padding_and_cut(self):
    batch = passages.calibration_batch(self.config(), encoder_files.tokenizer())
    tokens, mask = batch['tokens'], batch['mask']
    self.assertEqual((tokens.dtype, mask.dtype), (np.int32, np.bool_))
    self.assertEqual(tokens.shape, (4, 12))
    np.testing.assert_array_equal(tokens[:, 0], 2)  # [CLS]
    last = mask.sum(axis=1) - 1
    np.testing.assert_array_equal(tokens[np.arange(4), last], 3)  # [SEP]
    np.testing.assert_array_equal(tokens[~mask], 0)
    short = passages.encode(
      ['the cat'], encoder_files.tokenizer(), self.config()
    )
    np.testing.assert_array_equal(short['tokens'][0, :4], [2, 4, 6, 3])
    self.assertEqual(short['mask'].sum(), 4)

  def test_pairs_are_of_one_paragraph(self):
    firsts, rests = passages.pairs(self.config(num_passages=8, min_words=6))
    self.assertEqual(firsts[2], 'The cat sat on the mat aaa.')
    self.assertTrue(rests[2].startswith('The dog ran'))
    self.assertNotIn('cat', rests[2])
    self.assertLen(firsts, 8)

  def test_description(self):
    self.assertIn('at most 12 tokens', self.config().description)

  def test_messages(self):
    for name, value, least in (
      ('num_passages', 0, 1),
      ('length', 3, 4),
      ('min_words', 0, 1),
    ):
      with self.assertRaisesRegex(
        ValueError, f'{name}={value}; it must be at least {least}'
      ):
        self.config(**{name: value})
    with self.assertRaisesRegex(ValueError, 'has 8 passages.*99 were asked'):
      passages.passages(self.config(num_passages=99))


if __name__ == '__main__':
  absltest.main()
