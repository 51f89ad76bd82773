"""Tests of jaxq.data.mosaic."""

import numpy as np
from absl.testing import absltest, parameterized

from jaxq.data import mosaic
from tests.data import mosaic_testing

CELLS = np.full((3, 2, 2), mosaic.EMPTY, np.int32)
CELLS[0, 0, 1] = 7
CELLS[1, 0, 1] = 7
CELLS[1, 1, 0] = 2
FACTS = mosaic.facts_of(CELLS)


def samples(**fields):
  config = mosaic.MosaicConfig(**fields)
  return mosaic.Samples(config, mosaic_testing.digits(config.split))


class MosaicTest(parameterized.TestCase):
  def test_questions_by_hand(self):
    self.assertEqual(FACTS.places, [(0, 0, 1), (1, 0, 1), (1, 1, 0)])
    self.assertEqual(FACTS.first, {7: 0, 2: 1})
    cell = mosaic.ask('cell', FACTS, (0.99, 0, 0))
    self.assertEqual(cell.tokens, ('cell', 'f1', 'r1', 'c0'))
    self.assertEqual(cell.answer, 'd2')
    np.testing.assert_array_equal(np.argwhere(cell.evidence), [[1, 1, 0]])
    count = mosaic.ask('count', FACTS, (0, 0, 0))
    self.assertEqual((count.answer, count.evidence.sum()), ('n2', 3))
    order = mosaic.ask('order', FACTS, (0, 0.9, 0))
    self.assertEqual(order.tokens, ('order', 'd2', 'd7'))
    self.assertEqual(order.answer, 'd7')
    np.testing.assert_array_equal(
      np.argwhere(order.evidence), [[0, 0, 1], [1, 1, 0]]
    )
    there = mosaic.ask('presence', FACTS, (0.1, 0.9, 0))
    self.assertEqual(there.tokens, ('presence', 'd7'))
    self.assertEqual((there.answer, there.evidence.sum()), ('yes', 2))
    absent = mosaic.ask('presence', FACTS, (0.9, 0, 0))
    self.assertEqual(absent.tokens, ('presence', 'd0'))
    self.assertEqual((absent.answer, absent.evidence.sum()), ('no', 3))

  @parameterized.parameters('cell', 'order')
  def test_an_empty_video_is_asked_for_presence(self, kind):
    facts = mosaic.facts_of(np.full((2, 2, 2), mosaic.EMPTY))
    question = mosaic.ask(kind, facts, (0.1, 0.5, 0))
    self.assertEqual(question.tokens[0], 'presence')
    self.assertEqual(question.answer, 'no')
    self.assertEqual(mosaic.ask('count', facts, (0, 0, 0)).answer, 'n0')

  def test_frames_show_the_cells(self):
    sample = samples(noise=0.0, shift=0, frames=4)[3]
    self.assertEqual(sample['frames'].shape, (4, 32, 32))
    self.assertEqual(sample['frames'].dtype, np.float32)
    means = sample['frames'].reshape(4, 4, 8, 4, 8).mean(axis=(2, 4))
    expected = np.where(
      sample['cells'] == mosaic.EMPTY, 0, (sample['cells'] + 1) / 11
    )
    np.testing.assert_allclose(means, expected, atol=1e-6)

  def test_the_same_whoever_asks_and_when(self):
    one, other = samples()[5], samples()[5]
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])
    self.assertFalse(np.array_equal(samples()[6]['frames'], one['frames']))
    self.assertFalse(np.array_equal(samples(seed=1)[5]['cells'], one['cells']))

  def test_test_digits_are_the_test_digits_and_stay_in_place(self):
    sample = samples(split='test', noise=0.0, min_digits=3)[0]
    shown = sample['frames'].reshape(8, 4, 8, 4, 8).swapaxes(2, 3)
    shown = shown[sample['cells'] != mosaic.EMPTY]  # (n, 8, 8)
    np.testing.assert_array_equal(shown[:, 0, 0], 0)
    self.assertTrue((shown[:, 0, 1] > 0).all())

  def test_training_digits_move(self):
    sample = samples(noise=0.0, min_digits=3)[0]
    shown = sample['frames'].reshape(8, 4, 8, 4, 8).swapaxes(2, 3)
    shown = shown[sample['cells'] != mosaic.EMPTY]
    lost = (shown == 0).sum(axis=(1, 2))
    self.assertContainsSubset(set(lost.tolist()), {0, 8, 15})
    self.assertGreater((lost > 0).mean(), 0.2)

  def test_frames_repeat_and_questions_are_balanced(self):
    source = samples(frames=8, questions_per_sample=16)
    drawn = [source[i] for i in range(80)]
    cells = np.stack([s['cells'] for s in drawn])
    same = (cells[:, 1:] == cells[:, :-1]).all(axis=(2, 3)).mean()
    self.assertBetween(same, 0.65, 0.85)  # Two new empty ones are alike.
    kinds = np.concatenate([s['kind'] for s in drawn])
    answers = np.concatenate([s['targets'].max(axis=1) for s in drawn])
    said = answers[kinds == mosaic.KINDS.index('presence')]
    self.assertBetween((said == mosaic.TOKENS['yes']).mean(), 0.4, 0.6)

  def test_text_and_targets(self):
    sample = samples(questions_per_sample=20)[1]
    for text, target, kind in zip(
      sample['text'], sample['targets'], sample['kind'], strict=True
    ):
      words = [w for w in mosaic.words(text) if w != 'pad']
      self.assertEqual(words[0], mosaic.KINDS[kind])
      (answered,) = np.flatnonzero(target != mosaic.IGNORE)
      self.assertEqual(answered, len(words) - 1)

  def test_evidence_of_tokens(self):
    evidence = np.zeros((1, 1, 2, 2), bool)
    evidence[0, 0, 1, 0] = True
    got = mosaic.token_evidence(evidence, 4)
    np.testing.assert_array_equal(np.flatnonzero(got[0]), [8, 9, 12, 13])
    np.testing.assert_array_equal(
      mosaic.token_evidence(evidence, 8)[0], [0, 0, 1, 0]
    )

  def test_processes_share_a_batch(self):
    source = samples()
    whole = mosaic.dataset(source, 4, start=2)[1]['cells']
    parts = [
      mosaic.dataset(source, 4, start=2, process_index=i, process_count=2)[1]
      for i in range(2)
    ]
    np.testing.assert_array_equal(whole[::2], parts[0]['cells'])
    np.testing.assert_array_equal(whole[1::2], parts[1]['cells'])
    np.testing.assert_array_equal(whole[0], source[12]['cells'])

  def test_image_variant(self):
    config = mosaic.image_config()
    self.assertEqual(config.grid, (1, 8, 8))
    sample = mosaic.Samples(config, mosaic_testing.digits())[0]
    shown = (sample['cells'] != mosaic.EMPTY).sum()
    self.assertBetween(shown, 8, 24)

  @parameterized.parameters(
    ({'variant': 'film'}, "variant='film'; allowed are"),
    ({'split': 'all'}, "split='all'; allowed"),
    ({'frames': 17}, r'frames=17; allowed 1..16'),
    ({'max_digits': 17}, 'max_digits=17 of 16 cells'),
    ({'repeat': 1.5}, 'repeat=1.5.*probability'),
    ({'questions': ('why',)}, "questions='why'; allowed"),
    ({'questions': ('tone_digit',)}, "questions='tone_digit'"),
    ({'questions': ()}, "questions=''"),
  )
  def test_messages_of_the_config(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      mosaic.MosaicConfig(**fields)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, 'batch_size=3 for 2 processes'):
      mosaic.dataset(samples(), 3, process_count=2)
    with self.assertRaisesRegex(ValueError, 'patch_size=3; a cell has 8'):
      mosaic.token_evidence(CELLS[None] > 0, 3)
    with self.assertRaisesRegex(ValueError, "'caption'; .*mosaic_variants"):
      samples(variant='caption')


if __name__ == '__main__':
  absltest.main()
