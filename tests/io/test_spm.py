"""SentencePiece vocabularies: against ids the library itself gave."""

import json
import pathlib

from absl.testing import absltest, parameterized

from jaxq.io import spm, tokenizer

_RECORDED = json.loads(
  (pathlib.Path(__file__).parent / 'testdata' / 'sentencepiece.json').read_text(
    'utf-8'
  )
)


def metadata(kind, **changes):
  """A recorded model as GGUF metadata."""
  found = {'model': 'llama', **_RECORDED['models'][kind]} | changes
  del found['ids']
  return {f'tokenizer.ggml.{k}': v for k, v in found.items() if v is not None}


def build(kind, **changes):
  return tokenizer.from_gguf(metadata(kind, **changes), 600, 'tiny.gguf')


class SpmTest(parameterized.TestCase):
  def test_the_best_score_is_joined_first_by_hand(self):
    tokens = ['<unk>', 'a', 'b', 'c', 'ab', 'bc', spm.SPACE]
    types = [2, 1, 1, 1, 1, 1, 1]
    for scores, expected in (
      ([0, -9, -9, -9, -2, -1, -9], ['a', 'bc']),
      ([0, -9, -9, -9, -1, -2, -9], ['ab', 'c']),
    ):
      built = spm.build(
        tokens, scores, types, add_space_prefix=False, unknown='<unk>'
      )
      self.assertEqual(built.encode('abc').tokens, expected)
      self.assertEqual(built.encode('a?c').tokens, ['a', '<unk>', 'c'])

  @parameterized.parameters('llama', 'gemma')
  def test_ids_are_those_of_the_library(self, kind):
    built = build(kind)
    expected = _RECORDED['models'][kind]['ids']
    for text, ids in zip(_RECORDED['texts'], expected, strict=True):
      self.assertEqual(built.encode(text, add_special_tokens=False).ids, ids)
      self.assertEqual(built.decode(ids), text)

  def test_bos_unless_the_file_says_no(self):
    self.assertEqual(build('llama').encode('a').ids[0], 1)
    self.assertNotEqual(
      build('llama', add_bos_token=False).encode('a').ids[0], 1
    )
    ids = build('llama', add_eos_token=True).encode('a').ids
    self.assertEqual((ids[0], ids[-1]), (1, 2))

  @parameterized.parameters('llama', 'gemma')
  def test_scores_invert_merges(self, kind):
    found = _RECORDED['models'][kind]
    tokens, types = found['tokens'], found['token_type']
    pairs = spm.merges(tokens, found['scores'], types)
    again = spm.scores(tokens, types, pairs)
    self.assertEqual(spm.merges(tokens, again, types), pairs)

  def test_merges_that_no_scores_give(self):
    tokens, types = ['a', 'b', 'c', 'ab', 'bc', 'abc'], [1] * 6
    some = [('a', 'b'), ('ab', 'c')]  # 'bc' could be made, and is not.
    self.assertIsNone(spm.scores(tokens, types, some))

  @parameterized.parameters(
    ({'scores': [0.0]}, ValueError, '600 tokens and 1 scores'),
    (
      {'remove_extra_whitespaces': True},
      NotImplementedError,
      'remove_extra_whitespaces is set, which changes the text',
    ),
    ({'unknown_token_id': 600}, ValueError, r'unknown_token_id=600; allowed'),
    (
      {'add_eos_token': True, 'eos_token_id': None},
      ValueError,
      'add_eos_token is set and eos_token_id=None',
    ),
  )
  def test_refusals(self, changes, error, message):
    with self.assertRaisesRegex(error, message):
      build('llama', **changes)


if __name__ == '__main__':
  absltest.main()
