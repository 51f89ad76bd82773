"""Packing, sharding, resuming, and the counts of words and bytes."""

import pathlib
import tempfile

import numpy as np
import tokenizers
from absl.testing import absltest, parameterized
from tokenizers import decoders, models, pre_tokenizers, processors

from jaxq.data import pipeline

DOCUMENTS = ('One été  here.', '日本 🙂 two\n', ' three four five ' * 9)


def tokenizer(trim_offsets=False) -> tokenizers.Tokenizer:
  """Byte-level, with one merge across words and one inside a character."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokens = [*alphabet, 'Ġt', 'Ã©']
  merges = [('Ġ', 't'), ('Ã', '©')]
  built = tokenizers.Tokenizer(
    models.BPE({t: i for i, t in enumerate(tokens)}, merges)
  )
  built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  built.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
  built.decoder = decoders.ByteLevel()
  return built


def config(**changes) -> pipeline.DataConfig:
  defaults = {'source': 'x.txt', 'num_sequences': None, 'sequence_length': 8}
  return pipeline.DataConfig(**(defaults | changes))


def corpus(num_tokens) -> pipeline.Corpus:
  tokens = np.arange(num_tokens, dtype=np.int32)
  return pipeline.Corpus(tokens=tokens, words=tokens, nbytes=tokens)


class TokenizeTest(parameterized.TestCase):
  def test_counts_by_hand(self):
    built = pipeline.tokenize(['é t'], config(), tokenizer())
    # 'é' is one token of two bytes; ' t' starts the second word.
    np.testing.assert_array_equal(built.words, [1, 1])
    np.testing.assert_array_equal(built.nbytes, [2, 2])

  @parameterized.parameters(True, False)
  def test_counts_add_up_to_the_text(self, trim_offsets):
    cut = config(separator='\n\n')
    built = pipeline.tokenize(DOCUMENTS, cut, tokenizer(trim_offsets))
    text = '\n\n'.join(DOCUMENTS)
    self.assertEqual(built.words.sum(), len(text.split()))
    self.assertEqual(built.nbytes.sum(), len(text.encode()))
    self.assertEqual(tokenizer().decode(built.tokens.tolist()), text)

  def test_bos_before_each_document_counts_nothing(self):
    cut = config(bos='document', bos_token_id=99, separator='')
    built = pipeline.tokenize(['ab', 'c'], cut, tokenizer())
    a, b, c = (tokenizer().token_to_id(t) for t in 'abc')
    np.testing.assert_array_equal(built.tokens, [99, a, b, 99, c])
    np.testing.assert_array_equal(built.nbytes, [0, 1, 1, 0, 1])
    self.assertEqual(built.tokens.dtype, np.int32)

  def test_no_document(self):
    with self.assertRaisesRegex(ValueError, 'x.txt: holds no document'):
      pipeline.tokenize([], config(), tokenizer())


class DatasetTest(parameterized.TestCase):
  def test_windows_follow_each_other_and_the_rest_is_dropped(self):
    windows = pipeline.dataset(config(), corpus(20))
    self.assertLen(windows, 2)
    np.testing.assert_array_equal(windows[1], np.arange(8, 16))

  def test_bos_at_the_head_of_each_window(self):
    cut = config(bos='window', bos_token_id=99)
    windows = pipeline.dataset(cut, corpus(14))
    np.testing.assert_array_equal(windows[1], [99, *range(7, 14)])
    self.assertEqual(windows[1].dtype, np.int32)

  @parameterized.product(shuffle=(False, True), process_count=(1, 3, 4))
  def test_processes_together_see_each_window_once(
    self, shuffle, process_count
  ):
    cut = config(shuffle=shuffle, num_sequences=11)
    whole = pipeline.dataset(cut, corpus(8 * 13))
    parts = [
      pipeline.dataset(
        cut, corpus(8 * 13), process_index=i, process_count=process_count
      )
      for i in range(process_count)
    ]
    self.assertEqual(sum(map(len, parts)), 11)
    for j in range(11):
      part = parts[j % process_count]
      np.testing.assert_array_equal(part[j // process_count], whole[j])
    self.assertLen({int(whole[j][0]) for j in range(11)}, 11)

  def test_same_seed_same_order_other_seed_other_order(self):
    def order(seed):
      cut = config(shuffle=True, seed=seed)
      windows = pipeline.dataset(cut, corpus(8 * 20))
      return [int(windows[i][0]) for i in range(20)]

    self.assertEqual(order(3), order(3))
    self.assertNotEqual(order(3), order(4))
    self.assertNotEqual(order(3), sorted(order(3)))
    self.assertEqual(sorted(order(3)), list(range(0, 160, 8)))

  def test_iterator_goes_on_where_its_state_was_taken(self):
    cut = config(shuffle=True)

    def iterator():
      return iter(pipeline.dataset(cut, corpus(8 * 9)).to_iter_dataset())

    first = iterator()
    for _ in range(4):
      next(first)
    state = pipeline.get_state(first)
    self.assertIsInstance(state, bytes)
    second = iterator()
    pipeline.set_state(second, state)
    rest = list(first)
    self.assertLen(rest, 5)
    np.testing.assert_array_equal(np.stack(rest), np.stack(list(second)))

  def test_state_of_something_else(self):
    windows = iter(pipeline.dataset(config(), corpus(80)).to_iter_dataset())
    with self.assertRaisesRegex(ValueError, "b'nonsense' is no state of this"):
      pipeline.set_state(windows, b'nonsense')

  def test_fewer_windows_than_asked(self):
    with self.assertRaisesRegex(
      ValueError, 'x.txt: has 20 tokens, which fill 2 windows of 8; 3 were'
    ):
      pipeline.dataset(config(num_sequences=3), corpus(20))
    with self.assertRaisesRegex(ValueError, 'fill 0 windows of 8; 1 were'):
      pipeline.dataset(config(), corpus(7))

  def test_process_out_of_range(self):
    with self.assertRaisesRegex(ValueError, 'process_index=2, process_count=2'):
      pipeline.dataset(config(), corpus(80), process_index=2, process_count=2)


class WindowsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.path = folder / 'a.txt'
    self.path.write_text(''.join(DOCUMENTS), 'utf-8')

  def test_calibration_tokens(self):
    cut = config(source=str(self.path), num_sequences=5, shuffle=True)
    tokens = pipeline.calibration_tokens(cut, tokenizer())
    self.assertEqual(tokens.shape, (5, 8))
    self.assertEqual(tokens.dtype, np.int32)
    again = pipeline.calibration_tokens(cut, tokenizer())
    np.testing.assert_array_equal(tokens, again)

  def test_calibration_needs_a_number(self):
    with self.assertRaisesRegex(ValueError, 'num_sequences=None'):
      pipeline.calibration_tokens(config(), tokenizer())

  @parameterized.parameters('none', 'window')
  def test_counts_are_those_of_the_scored_text(self, bos):
    cut = config(source=str(self.path), bos=bos, bos_token_id=300)
    windows = pipeline.evaluation_windows(cut, tokenizer())
    self.assertEqual(windows.num_scored, windows.tokens.shape[0] * 7)
    level = tokenizer()
    scored = [
      ''.join(level.id_to_token(int(t)) for t in window[1:])
      for window in windows.tokens
    ]
    # One letter of the byte alphabet is one byte. A character that a window
    # cuts is counted whole (at most 4 bytes) where its first byte is.
    off = windows.nbytes - np.array([len(s) for s in scored])
    self.assertLessEqual(np.abs(off).max(), 3)
    self.assertEqual(np.median(off), 0)
    text = self.path.read_text('utf-8')
    self.assertLessEqual(windows.words.sum(), len(text.split()))
    self.assertGreater(windows.words.sum(), 0.6 * len(text.split()))
    self.assertRegex(windows.description, 'a.txt, windows of 8 tokens, ')

  def test_evaluation_does_not_shuffle(self):
    with self.assertRaisesRegex(ValueError, 'shuffle=True; evaluation takes'):
      pipeline.evaluation_windows(config(shuffle=True), tokenizer())


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'bos': 'both'}, r"bos='both'; allowed are \['document', 'none'"),
    ({'bos': 'window'}, "bos='window' without bos_token_id"),
    ({'num_sequences': 0}, 'num_sequences=0; it must be at least 1'),
    ({'sequence_length': 1}, 'sequence_length=1; it must be at least 2'),
  )
  def test_refusals(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      pipeline.DataConfig(**changes)

  def test_description_names_corpus_window_and_bos(self):
    cut = config(bos='window', bos_token_id=1, sequence_length=2048)
    self.assertEqual(
      cut.description, 'x.txt, windows of 2048 tokens, BOS per window'
    )


if __name__ == '__main__':
  absltest.main()
