"""MosaicQA's other variants: sound, captions, and images to be drawn.

audio    a few tones sound, each once, at some frame: `audio` (T, 4, 8) holds
         the loudness of 8 pitches in 4 slots of each frame. Beside questions
         about the video there are [tone_frame k], when does tone k sound?,
         which the sound alone answers, and [tone_digit k], which digit is shown
         then?, which takes both. Frames are those of the video variant; digits
         are asked of frames that show one kind only.
caption  clips of two frames; the target lists their digits in raster order,
         'd3 r1 c2 d7 r0 c3 end', those of the second frame if they are new.
         The more there is to see, the longer it is.
drawing  prompts such as 'a thr ee left of a sev en' and the image, 16 x 16, of
         which they tell (text to image). Names are of two or three subtokens;
         'crane' is one digit by itself and another one behind the word 'pool',
         wherever in the prompt its author meant it to stay with one item.
"""

import dataclasses
from typing import Any

import numpy as np

from jaxq.data import digits as digits_lib
from jaxq.data import mosaic

SLOTS = 4  # Sound tokens of a frame.
SOUNDING = 3  # Tones of a video, at most one in a frame.
CLIP_FRAMES = 2
CANVAS = 16  # Pixels of a drawing's side.
NAMES: tuple[tuple[str, ...], ...] = (
  ('ze', 'ro'),
  ('o', 'ne'),
  ('t', 'wo'),
  ('th', 'r', 'ee'),
  ('fo', 'ur'),
  ('fi', 've'),
  ('s', 'ix'),
  ('se', 'v', 'en'),
  ('ei', 'g', 'ht'),
  ('ni', 'ne_'),
)
HOMOGRAPH = ('cra', 'ne__')  # DEFAULT_SENSE, but POOL_SENSE behind 'pool'.
DEFAULT_SENSE, POOL_SENSE = 4, 8
RELATIONS = ('left', 'above')
DRAWING_LENGTH = 16

_WORDS = ('pad', 'a', 'of', 'pool', *RELATIONS)
DRAWING_VOCABULARY: tuple[str, ...] = tuple(
  dict.fromkeys(
    [*_WORDS, *HOMOGRAPH, *(part for name in NAMES for part in name)]
  )
)
_DRAWING_TOKENS = {word: i for i, word in enumerate(DRAWING_VOCABULARY)}


def samples(
  config: mosaic.MosaicConfig, digits: digits_lib.Digits | None = None
) -> Any:
  """The random-access source of any variant."""
  sources: dict[str, Any] = {'audio': Audio, 'caption': Captions}
  return sources.get(config.variant, mosaic.Samples)(config, digits)


def audio_config(**fields: Any) -> mosaic.MosaicConfig:
  """The audio variant: questions of sound, of sight and of both."""
  questions = ('cell', 'presence', *mosaic.SOUND_QUESTIONS)
  defaults: dict[str, Any] = {'questions': questions, 'min_digits': 1}
  return mosaic.MosaicConfig(variant='audio', **(defaults | fields))


def caption_config(**fields: Any) -> mosaic.MosaicConfig:
  """The caption variant: clips of CLIP_FRAMES frames, up to 6 digits each."""
  defaults: dict[str, Any] = {'frames': CLIP_FRAMES, 'max_digits': 6}
  return mosaic.MosaicConfig(variant='caption', **(defaults | fields))


class Audio:
  """Samples as mosaic.Samples has them, and `audio` (T, SLOTS, TONES)."""

  def __init__(
    self, config: mosaic.MosaicConfig, digits: digits_lib.Digits | None = None
  ):
    self._config = config
    self._video = _seen(config, digits)

  def __len__(self) -> int:
    return len(self._video)

  def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
    config = self._config
    rng = self._video.rng(int(index))
    scene = self._video.scene(rng)
    facts = mosaic.facts_of(scene.cells)
    number = min(SOUNDING, config.frames)
    # tones[i] sounds in frames[i], and in no other.
    tones = rng.permutation(mosaic.TONES)[:number].tolist()
    frames = rng.permutation(config.frames)[:number].tolist()
    audio = np.float32(config.noise) * rng.standard_normal(
      (config.frames, SLOTS, mosaic.TONES), np.float32
    )
    audio[frames, rng.integers(SLOTS, size=number), tones] += 1
    sounds = list(zip(tones, frames, strict=True))
    draws = rng.random((config.questions_per_sample, 4)).tolist()
    questions = []
    for draw in draws:
      kind = mosaic.pick(config.questions, draw[0])
      questions.append(
        _ask_sound(kind, facts, sounds, draw[1:])
        if kind in mosaic.SOUND_QUESTIONS
        else mosaic.ask(kind, facts, draw[1:])
      )
    return {**mosaic.pack(scene, questions), 'audio': audio}


class Captions:
  """Clips and what is to be said of them, as one 'question' each.

  text (1, L): 'caption' and all of the caption but its end; targets (1, L): the
  caption. L is `caption_length`; kind is that of no question, -1.
  """

  def __init__(
    self, config: mosaic.MosaicConfig, digits: digits_lib.Digits | None = None
  ):
    self._config = config
    self._video = _seen(config, digits)

  def __len__(self) -> int:
    return len(self._video)

  def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
    scene = self._video.scene(self._video.rng(int(index)))
    words = caption(scene.cells)
    L = caption_length(self._config)
    said = [mosaic.TOKENS[word] for word in words]
    text = np.full((1, L), mosaic.TOKENS['pad'], np.int32)
    targets = np.full((1, L), mosaic.IGNORE, np.int32)
    text[0, : len(said)] = [mosaic.TOKENS['caption'], *said[:-1]]
    targets[0, : len(said)] = said
    return {
      'frames': scene.frames,
      'cells': scene.cells,
      'text': text,
      'targets': targets,
      'kind': np.full((1,), -1, np.int32),
      'evidence': (scene.cells != mosaic.EMPTY)[None],
    }


def caption(cells: np.ndarray) -> list[str]:
  """Cells (T, rows, columns) -> its words, 'end' last.

  A digit that stays in its cell is named once.
  """
  words = []
  for t, frame in enumerate(cells):
    for r, c in np.argwhere(frame != mosaic.EMPTY).tolist():
      if not t or cells[t - 1, r, c] != frame[r, c]:
        words += [f'd{frame[r, c]}', f'r{r}', f'c{c}']
  return [*words, 'end']


def caption_length(config: mosaic.MosaicConfig) -> int:
  """Tokens of the longest caption, its end counted."""
  return 3 * config.max_digits * config.frames + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawingConfig:
  """Prompts and their images.

  split: of the digits. homograph: probability that an item is named by
  HOMOGRAPH. pool: probability that the word 'pool' stands before an item.
  seed: of everything.
  """

  split: str = 'train'
  homograph: float = 0.2
  pool: float = 0.2
  seed: int = 0

  def __post_init__(self):
    for name in ('homograph', 'pool'):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(
          f'DrawingConfig: {name}={getattr(self, name)}; it is a probability, '
          'in [0, 1].'
        )


class Drawings:
  """Two digits side by side, or one above the other.

  A sample: text (DRAWING_LENGTH,) int32 of DRAWING_VOCABULARY, padded behind;
  image (16, 16) float32; classes (2,): of the two items; items (2, 2): start
  and end of each one's name in the text; relation: index in RELATIONS; leaks:
  whether 'pool' belongs to the other item than a homograph.
  """

  def __init__(
    self, config: DrawingConfig, digits: digits_lib.Digits | None = None
  ):
    self._config = config
    self._digits = digits_lib.load(config.split) if digits is None else digits
    self._by_class = [
      self._digits.of_class(d) for d in range(digits_lib.CLASSES)
    ]

  def __len__(self) -> int:
    return 1 << 31

  def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
    config = self._config
    split = digits_lib.SPLITS.index(config.split)
    rng = np.random.default_rng((config.seed, split, int(index)))
    relation = int(rng.integers(len(RELATIONS)))
    draws = rng.random((2, 2))
    homograph = draws[:, 0] < config.homograph
    pool = draws[:, 1] < config.pool
    senses = np.where(pool, POOL_SENSE, DEFAULT_SENSE)
    classes = np.where(homograph, senses, rng.integers(10, size=2))
    words: list[str] = []
    items = []
    for i in range(2):
      words += ['a', *['pool'] * int(pool[i])]
      name = HOMOGRAPH if homograph[i] else NAMES[classes[i]]
      items.append((len(words), len(words) + len(name)))
      words += name
      if i == 0:
        words += [RELATIONS[relation], 'of']
    text = np.full(DRAWING_LENGTH, _DRAWING_TOKENS['pad'], np.int32)
    text[: len(words)] = [_DRAWING_TOKENS[word] for word in words]
    return {
      'text': text,
      'image': self._draw(classes, relation, rng),
      'classes': classes.astype(np.int32),
      'items': np.array(items, np.int32),
      'relation': np.array(relation, np.int32),
      'leaks': np.array((homograph & ~pool & pool[::-1]).any()),
    }

  def _draw(
    self, classes: np.ndarray, relation: int, rng: np.random.Generator
  ) -> np.ndarray:
    """(16, 16): the digits in the middle of the half that is theirs."""
    side, middle = digits_lib.SIDE, (CANVAS - digits_lib.SIDE) // 2
    image = np.zeros((CANVAS, CANVAS), np.float32)
    for i, (digit, draw) in enumerate(zip(classes, rng.random(2), strict=True)):
      choice = mosaic.pick(self._by_class[digit], draw)
      top, left = (middle, i * side) if relation == 0 else (i * side, middle)
      image[top : top + side, left : left + side] = self._digits.images[choice]
    return image


def _seen(
  config: mosaic.MosaicConfig, digits: digits_lib.Digits | None
) -> mosaic.Samples:
  """What is shown, without the sounds or the captions."""
  questions = tuple(q for q in config.questions if q in mosaic.QUESTIONS)
  return mosaic.Samples(
    dataclasses.replace(
      config, variant='video', questions=questions or mosaic.QUESTIONS
    ),
    digits,
  )


def _ask_sound(
  kind: str, facts: mosaic.Facts, sounds: list[tuple[int, int]], draws: Any
) -> mosaic.Question:
  """A question about one of (tone, frame); of its frame where no digit fits."""
  plain = [
    (tone, frame)
    for tone, frame in sounds
    if np.unique(facts.cells[frame][facts.shown[frame]]).size == 1
  ]
  evidence = np.zeros_like(facts.shown)
  if kind == 'tone_digit' and plain:
    tone, frame = mosaic.pick(plain, draws[0])
    evidence[frame] = facts.shown[frame]
    digit = facts.cells[frame][facts.shown[frame]][0]
    return mosaic.Question(
      tokens=('tone_digit', f'k{tone}'), answer=f'd{digit}', evidence=evidence
    )
  tone, frame = mosaic.pick(sounds, draws[0])
  return mosaic.Question(
    tokens=('tone_frame', f'k{tone}'), answer=f'f{frame}', evidence=evidence
  )
