"""Tests of jaxq.data.mosaic_variants."""

import numpy as np
from absl.testing import absltest, parameterized

from jaxq.data import mosaic, mosaic_variants
from tests.data import mosaic_testing


class MosaicVariantsTest(parameterized.TestCase):
  def test_a_tone_sounds_once_and_is_asked_for(self):
    config = mosaic_variants.audio_config(noise=0.0, questions_per_sample=24)
    source = mosaic_variants.samples(config, mosaic_testing.digits())
    for index in range(6):
      sample = source[index]
      audio = sample['audio']
      self.assertEqual(audio.shape, (8, mosaic_variants.SLOTS, mosaic.TONES))
      self.assertEqual(audio.sum(), mosaic_variants.SOUNDING)
      frame_of = {int(k): int(t) for t, _, k in np.argwhere(audio)}
      self.assertLen(set(frame_of.values()), mosaic_variants.SOUNDING)
      for i, text in enumerate(sample['text']):
        words = mosaic.words(text)
        (answer,) = mosaic.words(sample['targets'][i].max())
        if words[0] == 'tone_frame':
          self.assertEqual(answer, f'f{frame_of[int(words[1][1:])]}')
          self.assertFalse(sample['evidence'][i].any())
        if words[0] == 'tone_digit':
          frame = frame_of[int(words[1][1:])]
          shown = sample['cells'][frame]
          shown = set(shown[shown != mosaic.EMPTY].tolist())
          self.assertEqual({int(answer[1:])}, shown)

  def test_caption_by_hand(self):
    cells = np.full((2, 2, 2), mosaic.EMPTY)
    cells[:, 0, 1] = 3
    cells[1, 1, 0] = 7
    words = mosaic_variants.caption(cells)
    self.assertEqual(' '.join(words), 'd3 r0 c1 d7 r1 c0 end')

  def test_captions(self):
    config = mosaic_variants.caption_config()
    sample = mosaic_variants.samples(config, mosaic_testing.digits())[2]
    words = mosaic_variants.caption(sample['cells'])
    said = sample['targets'][sample['targets'] != mosaic.IGNORE]
    self.assertEqual(mosaic.words(said), words)
    given = mosaic.words(sample['text'])[: len(words)]
    self.assertEqual(given, ['caption', *words[:-1]])
    self.assertLen(
      mosaic.words(sample['text']), mosaic_variants.caption_length(config)
    )

  def test_drawings_show_what_they_say(self):
    config = mosaic_variants.DrawingConfig(homograph=0.5, pool=0.5)
    source = mosaic_variants.Drawings(config, mosaic_testing.digits())
    leaks = []
    for index in range(40):
      sample = source[index]
      words = [mosaic_variants.DRAWING_VOCABULARY[i] for i in sample['text']]
      leaks.append(bool(sample['leaks']))
      pools = []
      for i, (start, end) in enumerate(sample['items']):
        name, digit = tuple(words[start:end]), int(sample['classes'][i])
        pools.append(words[start - 1] == 'pool')
        if name == mosaic_variants.HOMOGRAPH:
          sense = (
            mosaic_variants.POOL_SENSE
            if pools[-1]
            else mosaic_variants.DEFAULT_SENSE
          )
          self.assertEqual(digit, sense)
        else:
          self.assertEqual(name, mosaic_variants.NAMES[digit])
        y, x = (4, 8 * i) if sample['relation'] == 0 else (8 * i, 4)
        got = sample['image'][y : y + 8, x : x + 8]
        np.testing.assert_allclose(got, (digit + 1) / 11, rtol=1e-6)
      if leaks[-1]:
        self.assertEqual(sum(pools), 1)
    self.assertBetween(sum(leaks), 4, 20)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, 'pool=2; it is a probability'):
      mosaic_variants.DrawingConfig(pool=2)


if __name__ == '__main__':
  absltest.main()
