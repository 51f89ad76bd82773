"""Tests of jaxq.data.audio: wav files, windows and log-mel features."""

import pathlib
import tempfile
import wave

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.data import audio


def tone(hertz, seconds=0.5, level=0.5):
  """A sine at 16 kHz, (N,) float32."""
  time = np.arange(int(seconds * audio.RATE)) / audio.RATE
  return (level * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def write_wav(path, samples, rate=audio.RATE, channels=1, width=2):
  """Writes samples (N,) as every channel of a wav file."""
  scaled = np.round(samples * (2 ** (8 * width - 1) - 1)).astype(np.int64)
  rows = np.repeat(scaled[:, None], channels, axis=1)
  data = rows.astype('<i8').view(np.uint8).reshape(-1, 8)[:, :width]
  with wave.open(str(path), 'wb') as file:
    file.setnchannels(channels)
    file.setsampwidth(width)
    file.setframerate(rate)
    file.writeframes(data.tobytes())
  return path


def log_mel_in_loops(samples, mels=80):
  """The definition, frame by frame and bin by bin, in float64."""
  half = audio.FRAME // 2
  mirrored = np.concatenate(
    [samples[half:0:-1], samples, samples[-2 : -half - 2 : -1]]
  ).astype(np.float64)
  time = np.arange(audio.FRAME)
  hann = np.sin(np.pi * time / audio.FRAME) ** 2
  turns = np.exp(
    -2j * np.pi * np.outer(np.arange(half + 1), time) / audio.FRAME
  )
  rows = []
  for i in range(len(samples) // audio.HOP):
    frame = mirrored[i * audio.HOP : i * audio.HOP + audio.FRAME] * hann
    power = np.abs(turns @ frame) ** 2
    rows.append(np.log10(np.maximum(power @ audio.mel_filters(mels), 1e-10)))
  y = np.array(rows)
  return (np.maximum(y, y.max() - 8) + 4) / 4


class LogMelTest(parameterized.TestCase):
  def test_mel_scale_is_slaneys(self):
    # 1 kHz is 15 mel and each octave of 6.4 above has 27 steps: of the 82
    # edges to 8 kHz = 45.2 mel the 27th lies at 15 + 0.07 mel.
    filters = audio.mel_filters(80)
    self.assertEqual(filters.shape, (201, 80))
    areas = filters.sum(axis=0) * 40.0  # Bins are 40 Hz apart.
    # Narrow triangles are sampled at two or three bins only.
    np.testing.assert_allclose(areas[41:], 1.0, atol=0.05)
    self.assertEqual(np.argmax(filters[25]), 26)  # 1 kHz.
    self.assertTrue(np.all(filters >= 0))
    self.assertTrue(np.all(np.any(filters > 0, axis=0)))

  @parameterized.parameters(80, 128)
  def test_equals_the_definition(self, mels):
    rng = np.random.default_rng(0)
    samples = tone(440.0, 0.1) + rng.normal(0, 0.01, 1600).astype(np.float32)
    got = np.asarray(audio.log_mel(samples[None], mels))[0]
    self.assertEqual(got.shape, (10, mels))
    # float32 against float64, on values between -1 and 1.5.
    want = log_mel_in_loops(samples, mels)
    np.testing.assert_allclose(got, want, atol=1e-4)

  def test_a_tone_lies_in_its_filter(self):
    y = np.asarray(audio.log_mel(tone(3000.0)[None]))[0]
    peak = audio.mel_filters(80)[75].argmax()  # 3 kHz.
    np.testing.assert_array_equal(y[5:-5].argmax(axis=1), peak)

  def test_range_is_80_decibels_per_clip(self):
    loud, quiet = tone(500.0), tone(500.0, level=1e-4)
    y = np.asarray(audio.log_mel(jnp.stack([loud, quiet])))
    # The quiet tone, 74 dB lower, meets the floor of 1e-10 before its own.
    np.testing.assert_allclose(y[0].max() - y[0].min(), 2.0, rtol=1e-6)
    np.testing.assert_allclose(y[0].max() - y[1].max(), 7.4 / 4, atol=1e-2)
    np.testing.assert_allclose(y[1].min(), -1.5)

  def test_silence_is_finite(self):
    y = audio.log_mel(jnp.zeros((1, 4800)))
    np.testing.assert_allclose(y, -1.5)  # (log10(1e-10) + 4) / 4.

  def test_batch_is_loop(self):
    clips = jnp.asarray(np.random.default_rng(1).normal(0, 0.1, (3, 1600)))
    clips = clips.astype(jnp.float32)
    batch = audio.log_mel(clips)
    for clip, y in zip(clips, batch, strict=True):
      np.testing.assert_allclose(audio.log_mel(clip[None])[0], y, atol=1e-6)

  def test_too_short(self):
    with self.assertRaisesRegex(ValueError, '200 samples; more than 200 are'):
      audio.log_mel(jnp.zeros((1, 200)))


class WavTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.path = self.folder / 'clip.wav'

  @parameterized.parameters(2, 4)
  def test_round_trip(self, width):
    samples = tone(440.0)
    got = audio.read_wav(write_wav(self.path, samples, width=width))
    self.assertEqual(got.dtype, np.float32)
    np.testing.assert_allclose(got, samples, atol=2.0**-15)  # One step.

  @parameterized.parameters(
    ({'rate': 44100}, '44100 Hz; allowed is 16000 Hz. Resample'),
    ({'channels': 2}, r'2 channels; allowed is 1 \(mono\). Mix it down'),
    ({'width': 1}, 'samples of 8 bits; allowed are 16 and 32'),
    ({'width': 3}, 'samples of 24 bits; allowed are 16 and 32'),
  )
  def test_refused(self, arguments, message):
    write_wav(self.path, tone(440.0, 0.01), **arguments)
    with self.assertRaisesRegex(ValueError, message):
      audio.read_wav(self.path)

  def test_empty(self):
    write_wav(self.path, np.zeros(0))
    with self.assertRaisesRegex(ValueError, 'holds no samples'):
      audio.read_wav(self.path)

  def test_no_wav(self):
    self.path.write_bytes(b'ID3 this is something else')
    with self.assertRaisesRegex(ValueError, 'is no PCM wav file .*Convert'):
      audio.read_wav(self.path)

  def test_absent(self):
    with self.assertRaisesRegex(FileNotFoundError, 'no such file; a 16 kHz'):
      audio.read_wav(self.path)


class WindowsTest(absltest.TestCase):
  def test_padded_with_silence(self):
    samples = np.ones(audio.WINDOW + 5, np.float32)
    got = audio.windows(samples)
    self.assertEqual(got.shape, (2, audio.WINDOW))
    np.testing.assert_array_equal(got[1, :6], [1, 1, 1, 1, 1, 0])
    self.assertEqual(got.sum(), samples.size)

  def test_refused(self):
    with self.assertRaisesRegex(ValueError, r'shape \(2, 5\); allowed is \(N,'):
      audio.windows(np.zeros((2, 5)))
    with self.assertRaisesRegex(ValueError, r'shape \(0,\)'):
      audio.windows(np.zeros(0))
    with self.assertRaisesRegex(ValueError, 'NaN or Inf'):
      audio.windows(np.array([0.0, np.nan]))


if __name__ == '__main__':
  absltest.main()
