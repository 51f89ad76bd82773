"""Speech with what was said: packaged clips, or a folder of NAME.wav, NAME.txt.

  speech:calibration  a line of Beckett's and the first sentence of A Tale of
                      Two Cities, read; from each phrase on as much as fits, so
                      that little of a window is silence
  speech:evaluation   23 s of a telephone talk of two women in four clips, with
                      the transcript that came with it

Speakers, rooms and microphones of the two are different. The reading has the
whole band up to 8 kHz and the telephone only half of it: calibrated the other
way round, a method would take the upper half for silence and spend no accuracy
on it. It is little: 54 s and 23 s; figures on it rank methods and are no
benchmark of a model. The reading was recorded at 48 kHz and is filtered and
decimated to 16 kHz here; its text is the book's.
"""

import dataclasses
import pathlib

import numpy as np

from jaxq.data import audio, packaged

SPLITS = ('calibration', 'evaluation')
_LONGEST_READING = 28.5  # Seconds of a stretch.
_LONGEST_TALK = 6.6
_TAPS = 97  # Of the filter before the decimation; 7 kHz pass, 8 kHz stop.
_CUTOFF = 7500.0

# Start in seconds, words up to the next one.
_TWO_CITIES = (
  (0.0, 'It was the best of times, it was the worst of times,'),
  (4.6, 'it was the age of wisdom, it was the age of foolishness,'),
  (8.3, 'it was the epoch of belief, it was the epoch of incredulity,'),
  (13.1, 'it was the season of Light, it was the season of Darkness,'),
  (16.9, 'it was the spring of hope, it was the winter of despair,'),
  (20.8, 'we had everything before us, we had nothing before us,'),
  (
    24.2,
    'we were all going direct to Heaven, we were all going direct the other '
    'way',
  ),
  (
    28.6,
    'in short, the period was so far like the present period, that some of its '
    'noisiest authorities insisted on its being received, for good or for '
    'evil, in the superlative degree of comparison only.',
  ),
)
_BECKETT = (
  'Ever tried. Ever failed. No matter. Try again. Fail again. Fail better.'
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
  """samples: (N,) float32 at 16 kHz. text: what is said in them."""

  name: str
  samples: np.ndarray
  text: str


def load(source: str, count: int | None = None) -> list[Clip]:
  """The clips of 'speech:calibration', 'speech:evaluation' or a folder.

  Args:
    source: one of these.
    count: at most so many, spread evenly over all; None: all.

  Raises:
    FileNotFoundError: no such folder, or a clip without its text.
    ValueError: an unknown split, a folder without clips, a clip that is not 16
      kHz mono or longer than 30 s.
    ConnectionError: the packaged clips cannot be had.
  """
  name, _, split = source.partition(':')
  if name == 'speech' and not pathlib.Path(source).exists():
    if split not in SPLITS:
      raise ValueError(
        f'{source}: the packaged clips come in {list(SPLITS)}. Give '
        "'speech:calibration', say, or a folder."
      )
    folder = packaged.fetch('speech')
    clips = _reading(folder) if split == 'calibration' else _talk(folder)
  else:
    clips = _folder(pathlib.Path(source).expanduser())
  for clip in clips:
    seconds = clip.samples.size / audio.RATE
    if clip.samples.size > audio.WINDOW:
      raise ValueError(
        f'{source}: {clip.name} is {seconds:.1f} s long; allowed are 30 s, so '
        'that one window holds all of its text. Cut it.'
      )
  if count is None or count >= len(clips):
    return clips
  return [clips[i * len(clips) // count] for i in range(count)]


def _folder(folder: pathlib.Path) -> list[Clip]:
  if not folder.is_dir():
    raise FileNotFoundError(
      f'{folder}: no such folder; speech is a folder of NAME.wav and NAME.txt, '
      "or 'speech:calibration' or 'speech:evaluation'. Give one of these."
    )
  clips = []
  for path in sorted(folder.glob('*.wav')):
    text = path.with_suffix('.txt')
    if not text.is_file():
      raise FileNotFoundError(
        f'{text}: no such file; each clip needs the text that is said in it. '
        f'Write it down beside {path.name}.'
      )
    clips.append(
      Clip(
        name=path.stem,
        samples=audio.read_wav(path),
        text=text.read_text('utf-8').strip(),
      )
    )
  if not clips:
    raise ValueError(
      f'{folder}: holds no .wav file; speech is a folder of NAME.wav and '
      'NAME.txt. Give another folder.'
    )
  return clips


def _reading(folder: pathlib.Path) -> list[Clip]:
  """Beckett, and from each phrase on as many whole phrases as fit."""
  samples, rate = audio.read_pcm(folder / 'two_cities.wav')
  samples = decimate(samples, rate)
  starts = [start for start, _ in _TWO_CITIES]
  ends = [*starts[1:], len(samples) / audio.RATE]
  beckett = audio.read_wav(folder / 'beckett.wav')
  clips = [Clip(name='beckett', samples=beckett, text=_BECKETT)]
  for first, start in enumerate(starts):
    last = max(i for i, e in enumerate(ends) if e - start <= _LONGEST_READING)
    clips.append(
      Clip(
        name=f'two cities from {start:.1f} s',
        samples=_cut(samples, start, ends[last]),
        text=' '.join(text for _, text in _TWO_CITIES[first : last + 1]),
      )
    )
  return clips


def _talk(folder: pathlib.Path) -> list[Clip]:
  """Whole turns together, as many as fit; no two clips overlap."""
  samples = audio.read_wav(folder / 'talk.wav')
  groups: list[list[tuple[float, float, str]]] = []
  for line in (folder / 'talk.stm').read_text('utf-8').splitlines():
    _, _, _, start, end, text = line.split(' ', 5)
    turn = (float(start), float(end), text.strip())
    if groups and turn[1] - groups[-1][0][0] <= _LONGEST_TALK:
      groups[-1].append(turn)
    else:
      groups.append([turn])
  # A cut lies halfway into the pause between two clips.
  starts = [group[0][0] for group in groups]
  ends = [group[-1][1] for group in groups]
  cuts = [starts[0] - 0.5]
  cuts += [(e + s) / 2 for e, s in zip(ends, starts[1:], strict=False)]
  cuts.append(len(samples) / audio.RATE)
  return [
    Clip(
      name=f'talk from {group[0][0]:.1f} s',
      samples=_cut(samples, cuts[i], cuts[i + 1]),
      text=' '.join(text for _, _, text in group),
    )
    for i, group in enumerate(groups)
  ]


def decimate(samples: np.ndarray, rate: int) -> np.ndarray:
  """Samples (N,) of a rate that is a multiple of 16 kHz -> those at 16 kHz.

  Raises:
    ValueError: another rate.
  """
  factor, rest = divmod(rate, audio.RATE)
  if rest or not factor:
    raise ValueError(
      f'speech.decimate: {rate} Hz; allowed are multiples of {audio.RATE} Hz. '
      'Resample with another tool.'
    )
  if factor == 1:
    return samples
  offsets = np.arange(_TAPS) - _TAPS // 2
  lowpass = np.sinc(2 * _CUTOFF / rate * offsets) * np.blackman(_TAPS + 2)[1:-1]
  filtered = np.convolve(samples, lowpass / lowpass.sum(), mode='same')
  return filtered[::factor].astype(np.float32)


def _cut(samples: np.ndarray, start: float, end: float) -> np.ndarray:
  """The samples between two times in seconds."""
  return samples[round(start * audio.RATE) : round(end * audio.RATE)]
