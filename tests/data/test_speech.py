"""Tests of jaxq.data.speech: packaged clips, folders, and decimation."""

import pathlib
import tempfile
import unittest

import numpy as np
from absl.testing import absltest, parameterized

from jaxq.data import audio, speech
from jaxq.eval import wer
from tests.data import test_audio


def packaged(split):
  try:
    return speech.load(f'speech:{split}')
  except OSError as e:  # No network and no cache.
    raise unittest.SkipTest(f'the clips cannot be had: {e}') from e


class PackagedTest(absltest.TestCase):
  def test_calibration(self):
    clips = packaged('calibration')
    self.assertLen(clips, 9)  # Beckett and eight phrases.
    self.assertEqual(clips[0].name, 'beckett')
    self.assertEqual(wer.words(clips[1].text)[3:5], ['best', 'of'])
    for clip in clips[1:]:
      seconds = clip.samples.size / audio.RATE
      self.assertBetween(seconds, 15, 28.5)
      self.assertBetween(len(wer.words(clip.text)) / seconds, 2, 4)
    self.assertAlmostEqual(
      clips[-1].samples.size / audio.RATE, 15.774, places=2
    )

  def test_evaluation(self):
    clips = packaged('evaluation')
    self.assertLen(clips, 4)
    text = ' '.join(clip.text for clip in clips)
    self.assertTrue(text.startswith("Hello? Hello? Oh, hello. I didn't"))
    self.assertTrue(text.endswith("I don't hear that in New Jersey now."))
    seconds = sum(clip.samples.size for clip in clips) / audio.RATE
    self.assertAlmostEqual(seconds, 30.0 - 6.18, places=2)  # The 6.18: silence.

  def test_count_is_spread(self):
    packaged('evaluation')
    names = [c.name for c in speech.load('speech:evaluation', 2)]
    self.assertEqual(names, ['talk from 6.7 s', 'talk from 17.8 s'])

  def test_unknown_split(self):
    with self.assertRaisesRegex(ValueError, r"\['calibration', 'evaluation'\]"):
      speech.load('speech:test')


class FolderTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def write(self, name, seconds=0.1, text='hello'):
    samples = test_audio.tone(440.0, seconds)
    test_audio.write_wav(self.folder / f'{name}.wav', samples)
    if text is not None:
      (self.folder / f'{name}.txt').write_text(text + '\n')

  def test_clips_in_order_of_names(self):
    self.write('b', text='two')
    self.write('a', text='one')
    clips = speech.load(str(self.folder))
    self.assertEqual(
      [(c.name, c.text) for c in clips], [('a', 'one'), ('b', 'two')]
    )
    self.assertEqual(clips[0].samples.shape, (1600,))

  def test_refused(self):
    with self.assertRaisesRegex(ValueError, 'holds no .wav file'):
      speech.load(str(self.folder))
    with self.assertRaisesRegex(FileNotFoundError, 'no such folder; speech is'):
      speech.load(str(self.folder / 'absent'))
    self.write('long', seconds=31)
    with self.assertRaisesRegex(ValueError, 'long is 31.0 s long; .*30 s'):
      speech.load(str(self.folder))
    self.write('long', text=None)
    (self.folder / 'long.txt').unlink()
    with self.assertRaisesRegex(FileNotFoundError, 'long.txt: no such file'):
      speech.load(str(self.folder))


class DecimateTest(parameterized.TestCase):
  def sine(self, hertz, rate, seconds=0.5):
    time = np.arange(int(seconds * rate)) / rate
    return np.sin(2 * np.pi * hertz * time).astype(np.float32)

  @parameterized.parameters(100.0, 1000.0, 6000.0)
  def test_low_tones_pass(self, hertz):
    got = speech.decimate(self.sine(hertz, 48000), 48000)
    want = self.sine(hertz, 16000)
    np.testing.assert_allclose(got[100:-100], want[100:-100], atol=5e-3)

  @parameterized.parameters(9000.0, 12000.0, 20000.0)
  def test_high_tones_do_not_fold(self, hertz):
    got = speech.decimate(self.sine(hertz, 48000), 48000)
    self.assertLess(np.abs(got[100:-100]).max(), 5e-3)

  def test_same_rate_and_other_rates(self):
    x = self.sine(100.0, 16000)
    self.assertIs(speech.decimate(x, 16000), x)
    with self.assertRaisesRegex(ValueError, '44100 Hz; allowed are multiples'):
      speech.decimate(x, 44100)


if __name__ == '__main__':
  absltest.main()
