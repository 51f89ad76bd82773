"""Tests of experiments.transcribe, transcription and speech on a tiny model."""

import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import models
from experiments import families, speech, transcription
from jaxq.data import audio
from tests.data import test_audio
from tests.io import whisper_files

WINDOW = 2 * whisper_files.CONFIG['max_source_positions'] * audio.HOP


class TinyModelTestCase(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    cls.source = str(whisper_files.write_hf(cls.folder / 'hf'))
    cls.model = models.load(cls.source)
    cls.speech = cls.folder / 'speech'
    cls.speech.mkdir()
    rng = np.random.default_rng(0)
    for i, text in enumerate(('one two', 'three', 'four five six', 'seven')):
      samples = 0.1 * rng.normal(0, 1, WINDOW - 100 * i).clip(-3, 3)
      test_audio.write_wav(cls.speech / f'{i}.wav', samples)
      (cls.speech / f'{i}.txt').write_text(text)


class TranscriptionTest(TinyModelTestCase):
  def clip(self, seed, windows=1):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.1, WINDOW * windows).astype(np.float32)

  def hear(self, clips, **how):
    return transcription.transcribe(self.model, clips, max_new_tokens=12, **how)

  def test_a_clip_alone_is_the_same_as_in_a_batch(self):
    clips = [self.clip(0), self.clip(1)[:1000], self.clip(2)]
    together = self.hear(clips)
    self.assertEqual(together, self.hear(clips, batch_size=2))
    self.assertEqual(together, [self.hear([clip])[0] for clip in clips])
    self.assertNotEmpty(together[0])

  def test_windows_are_joined(self):
    a, b = self.clip(0), self.clip(2)
    parts = [text for text in self.hear([a, b]) if text]
    self.assertEqual(self.hear([np.concatenate([a, b])]), [' '.join(parts)])

  def test_a_loop_is_heard_again(self):
    texts = {0.0: ['na ' * 60, 'a b'], 0.2: ['na ' * 50], 0.4: ['oh']}
    asked = []

    def generate(model, samples, prompt, max_new_tokens, temperature):
      asked.append((len(samples), temperature))
      return texts[temperature]

    with (
      mock.patch.object(transcription, '_generate', generate),
      mock.patch.object(transcription, '_text', lambda tokenizer, row: row),
    ):
      clips = [self.clip(0), self.clip(1)]
      heard = self.hear(clips, temperatures=(0.2, 0.4, 0.6))
      self.assertEqual(heard, ['oh', 'a b'])
      self.assertEqual(asked, [(2, 0.0), (1, 0.2), (1, 0.4)])
      self.assertEqual(self.hear(clips), texts[0.0])  # Greedy only.

  def test_another_try_is_the_same_alone(self):
    self.enterContext(mock.patch.object(transcription, 'LOOP', 0.0))
    clips = [self.clip(0), self.clip(1)]
    drawn = self.hear(clips, temperatures=(50.0,))
    self.assertEqual(drawn[1:], self.hear(clips[1:], temperatures=(50.0,)))
    self.assertNotEqual(drawn, self.hear(clips))

  def test_suppressed_tokens_never_come(self):
    own = transcription.speech_model(self.model.module)
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (5, 32)), jnp.float32)
    logits = np.asarray(own.head(self.model.variables, x))
    self.assertTrue(np.all(np.isneginf(logits[:, [3, 5]])))
    self.assertEqual(np.isneginf(logits).sum(), 10)
    first = np.asarray(own.first_head(self.model.variables, x))
    self.assertTrue(np.all(np.isneginf(first[:, [3, 5, whisper_files.END]])))
    self.assertEqual(np.isneginf(first).sum(), 15)

  def test_prompt(self):
    class Config:
      is_multilingual = True

    tokenizer = whisper_files.tokenizer()
    ids = transcription.prompt_ids(tokenizer, Config, 'de')
    self.assertEqual(
      [tokenizer.id_to_token(i) for i in ids],
      ['<|startoftranscript|>', '<|de|>', '<|transcribe|>', '<|notimestamps|>'],
    )
    with self.assertRaisesRegex(ValueError, r"=xx; allowed are \['de', 'en'\]"):
      transcription.prompt_ids(tokenizer, Config, 'xx')
    self.assertFalse(self.model.config.is_multilingual)
    with self.assertRaisesRegex(ValueError, '--language=de; .*English only'):
      transcription.prompt_ids(tokenizer, self.model.config, 'de')

  def test_other_families(self):
    class Other:
      family, name = 'decoder', 'smollm2-135m'

    with self.assertRaisesRegex(ValueError, 'is a decoder model; speech needs'):
      transcription.check_family(Other)

  def test_other_tokenizers(self):
    class Nothing:
      token_to_id = staticmethod(lambda token: None)

    with self.assertRaisesRegex(ValueError, 'has no token <.startoftranscript'):
      transcription.prompt_ids(Nothing, self.model.config, 'en')


class SpeechTest(TinyModelTestCase):
  def test_batch(self):
    choice = families.Choice(source=str(self.speech), samples=4)
    data, description = families.calibration_data(self.model, choice)
    self.assertEqual(data['features'].shape, (4, 24, 8))
    self.assertEqual(data['tokens'].shape, data['mask'].shape)
    self.assertEqual(data['tokens'].shape[1] % 8, 0)
    tokenizer = self.model.tokenizer
    row = data['tokens'][0][data['mask'][0]]
    self.assertEqual(tokenizer.decode(row.tolist()), ' one two')
    self.assertEqual(row[-1], whisper_files.END)
    self.assertRegex(description, '4 x 24 x 8 features of ')

  def test_few_clips_are_used_again(self):
    choice = families.Choice(source=str(self.speech), samples=64)
    data, _ = families.calibration_data(self.model, choice)
    self.assertLen(data['tokens'], 8)
    np.testing.assert_array_equal(data['tokens'][:4], data['tokens'][4:])

  def test_comparison_with_itself(self):
    choice = families.Choice(source=str(self.speech), samples=4)
    spoken = families.evaluation_data(self.model, choice)
    family = families.of(self.model)
    reference, row = family.compare(self.model, self.model, spoken)
    values = {metric.name: metric.value for metric in row.metrics}
    self.assertEqual(
      set(values), {'transcript NLL', 'WER', 'KL', 'top-1 agreement'}
    )
    self.assertEqual(values['top-1 agreement'], 1.0)
    self.assertAlmostEqual(values['KL'], 0.0, places=5)
    self.assertLen(reference.metrics, 2)
    (alone,) = family.compare(None, self.model, spoken)
    self.assertEqual(
      [m.value for m in alone.metrics], [m.value for m in reference.metrics]
    )

  def test_too_long(self):
    clip = speech.speech.Clip(
      name='a', samples=np.ones(WINDOW + 1, np.float32), text='a'
    )
    with self.assertRaisesRegex(ValueError, 'a: 0.2 s long; the model hears'):
      speech.batch_of(self.model, [clip])
    clip = speech.speech.Clip(
      name='a', samples=np.ones(100, np.float32), text='a' * 40
    )
    with self.assertRaisesRegex(ValueError, 'its text makes .* takes 32'):
      speech.batch_of(self.model, [clip])


class EntryPointTest(TinyModelTestCase):
  def run_it(self, *flags):
    return subprocess.run(
      [sys.executable, '-m', 'experiments.transcribe', *flags],
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
      capture_output=True,
      text=True,
    )

  def test_text_and_word_error_rate(self):
    path = str(self.speech / '0.wav')
    done = self.run_it(
      f'--source={self.source}', f'--audio={path}', '--max_new_tokens=5',
      '--reference=one two',
    )  # fmt: skip
    self.assertEqual(done.returncode, 0, done.stderr)
    (text,) = transcription.transcribe(
      self.model, [audio.read_wav(path)], max_new_tokens=5
    )
    self.assertEqual(done.stdout.strip('\n'), text)
    self.assertRegex(done.stderr, r'0.2 s of speech .*\nWER \d')

  def test_wrong_rate_is_one_line(self):
    path = self.folder / 'rate.wav'
    test_audio.write_wav(path, test_audio.tone(440.0), rate=8000)
    done = self.run_it(f'--source={self.source}', f'--audio={path}')
    self.assertEqual(done.returncode, 1)
    self.assertRegex(done.stderr, r'^error: .*8000 Hz; allowed is 16000 Hz')
    self.assertLen(done.stderr.strip().splitlines(), 1)


if __name__ == '__main__':
  absltest.main()
