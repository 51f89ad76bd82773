"""MosaicQA: videos of real handwritten digits, questions and their evidence.

A frame is a grid of cells of 8 x 8 pixels. A few cells hold a handwritten
digit, the others are noise; a frame shows what its predecessor showed with
probability `repeat`. About such a video there are questions of one-token
answers, and for each it is known which cells it can be answered from:

  cell      [cell f r c]     which digit is there in frame f?     that cell
  presence  [presence d]     is there a d anywhere? (balanced)    the d's, or
                             all digits where there is none
  count     [count]          how many different digits are there? all digits
  order     [order d e]      which of two comes first? (balanced) the first d's
                             and the first e's

So most of the tokens are of no use, most of the others repeat, and how many
are needed, and which, depends on the question: what a reducer of visual tokens
has to know. Chance is 10 %, 50 %, about 25 % and 50 %.

A sample is drawn from (seed, split, index) alone: the same on every host, in
any order. Training samples show training digits only, test samples test digits.
The other variants (sound, captions, text to image) are in `mosaic_variants`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from jaxq.data import digits as digits_lib

VERSION = 1  # Of the samples: raised where a config would give others.
QUESTIONS = ('cell', 'presence', 'count', 'order')
SOUND_QUESTIONS = ('tone_frame', 'tone_digit')
KINDS = QUESTIONS + SOUND_QUESTIONS
QUESTION_LENGTH = 4  # Tokens; the answer is what follows the last.
VARIANTS = ('video', 'image', 'audio', 'caption')
EMPTY = 10  # Of `cells`: a cell without a digit.
IGNORE = -1  # Of `targets`: nothing is to be predicted here.
MOST_FRAMES, MOST_ROWS = 16, 16
TONES = 8

# Repeated so often, training never sees a sample twice.
_ENDLESS = 1 << 31


def _vocabulary() -> tuple[str, ...]:
  words = ['pad', 'empty', 'yes', 'no', 'end', 'caption']
  words += KINDS
  counts = {'d': 10, 'n': 11, 'f': MOST_FRAMES, 'r': MOST_ROWS, 'c': MOST_ROWS}
  for letter, number in (counts | {'k': TONES}).items():
    words += [f'{letter}{i}' for i in range(number)]
  return tuple(words)


VOCABULARY = _vocabulary()
TOKENS: Mapping[str, int] = {word: i for i, word in enumerate(VOCABULARY)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MosaicConfig:
  """What is shown and asked.

  Attributes:
    variant: 'video' and 'image' (one frame) ask the questions above; 'audio'
      has sounds too, 'caption' wants all digits listed (`mosaic_variants`).
    split: 'train' or 'test'.
    frames, rows, columns: T frames of rows x columns cells.
    min_digits, max_digits: of a frame, drawn evenly.
    repeat: probability that a frame shows what the one before it did.
    noise: standard deviation of every pixel, of 1 from black to white.
    shift: pixels that a training digit is moved by at most, either way.
    questions: kinds to draw from, evenly.
    questions_per_sample: Q.
    seed: of everything.
  """

  variant: str = 'video'
  split: str = 'train'
  frames: int = 8
  rows: int = 4
  columns: int = 4
  min_digits: int = 0
  max_digits: int = 3
  repeat: float = 0.7
  noise: float = 0.1
  shift: int = 1
  questions: tuple[str, ...] = QUESTIONS
  questions_per_sample: int = 8
  seed: int = 0

  def __post_init__(self):
    _check_one_of('variant', self.variant, VARIANTS)
    _check_one_of('split', self.split, digits_lib.SPLITS)
    for name, most in (
      ('frames', MOST_FRAMES),
      ('rows', MOST_ROWS),
      ('columns', MOST_ROWS),
      ('questions_per_sample', 1 << 16),
    ):
      if not 1 <= getattr(self, name) <= most:
        raise ValueError(
          f'MosaicConfig: {name}={getattr(self, name)}; allowed 1..{most}.'
        )
    cells = self.rows * self.columns
    if not 0 <= self.min_digits <= self.max_digits <= cells:
      raise ValueError(
        f'MosaicConfig: min_digits={self.min_digits}, max_digits='
        f'{self.max_digits} of {cells} cells; 0 <= min <= max <= cells is '
        'needed.'
      )
    if not 0 <= self.repeat <= 1 or self.noise < 0 or self.shift < 0:
      raise ValueError(
        f'MosaicConfig: repeat={self.repeat}, noise={self.noise}, shift='
        f'{self.shift}; repeat is a probability, the others are not negative.'
      )
    known = QUESTIONS + (SOUND_QUESTIONS if self.variant == 'audio' else ())
    for kind in self.questions or ('',):
      _check_one_of('questions', kind, known)

  @property
  def grid(self) -> tuple[int, int, int]:
    """Cells: (T, rows, columns)."""
    return self.frames, self.rows, self.columns

  @property
  def frame_shape(self) -> tuple[int, int]:
    """Pixels of a frame: (height, width)."""
    return self.rows * digits_lib.SIDE, self.columns * digits_lib.SIDE

  @property
  def description(self) -> str:
    """What stands beside every figure."""
    return (
      f'MosaicQA {self.variant}, {self.frames} frames of {self.rows} x '
      f'{self.columns} cells, {self.split} digits'
    )


def image_config(**fields: Any) -> MosaicConfig:
  """The image variant: one frame of 8 x 8 cells, many of them digits."""
  defaults: dict[str, Any] = {'frames': 1, 'rows': 8, 'columns': 8}
  defaults |= {'min_digits': 8, 'max_digits': 24, 'questions': QUESTIONS[:3]}
  return MosaicConfig(variant='image', **(defaults | fields))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
  """What a video shows.

  cells (T, rows, columns) int32: the class of each cell's digit, or EMPTY.
  frames (T, height, width) float32: the pixels.
  """

  cells: np.ndarray
  frames: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Question:
  """One question.

  tokens: up to QUESTION_LENGTH words. answer: a word. evidence (T, rows,
  columns) bool: the cells that it is answered from.
  """

  tokens: tuple[str, ...]
  answer: str
  evidence: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
  """What questions are made of.

  cells, shown: (T, rows, columns): classes, and where there is a digit.
  places: (t, r, c) of all digits. first: digit -> the frame it is first seen
  in. pairs: (d, e) where d is seen first.
  """

  cells: np.ndarray
  shown: np.ndarray
  places: Sequence[tuple[int, int, int]]
  first: Mapping[int, int]
  pairs: Sequence[tuple[int, int]]


def facts_of(cells: np.ndarray) -> Facts:
  """Facts of cells (T, rows, columns)."""
  shown = cells != EMPTY
  places = [(t, r, c) for t, r, c in np.argwhere(shown).tolist()]
  first: dict[int, int] = {}
  for place in places:
    first.setdefault(int(cells[place]), place[0])
  pairs = [(d, e) for d in first for e in first if first[d] < first[e]]
  return Facts(
    cells=cells, shown=shown, places=places, first=first, pairs=pairs
  )


class Samples:
  """The samples of a config: a random-access source for grain.

  A sample is a dict of
    frames (T, height, width) float32;  cells (T, rows, columns) int32;
    text (Q, L) int32: tokens of Q questions, each padded behind its last;
    targets (Q, L) int32: what follows each token, IGNORE but for the answer;
    kind (Q,) int32: index in KINDS;
    evidence (Q, T, rows, columns) bool.
  """

  def __init__(
    self, config: MosaicConfig, digits: digits_lib.Digits | None = None
  ):
    """digits: None loads those of the split; test doubles may give others."""
    if config.variant not in ('video', 'image'):
      raise ValueError(
        f'mosaic.Samples: variant={config.variant!r}; allowed here are '
        "['image', 'video']. Use mosaic_variants.samples, which has them all."
      )
    self._config = config
    self._digits = digits_lib.load(config.split) if digits is None else digits
    self._by_class = [
      self._digits.of_class(d) for d in range(digits_lib.CLASSES)
    ]
    self._shift = config.shift if config.split == 'train' else 0
    around = ((0, 0), (self._shift, self._shift), (self._shift, self._shift))
    self._images = np.pad(self._digits.images, around)

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
    rng = self.rng(int(index))
    scene = self.scene(rng)
    facts = facts_of(scene.cells)
    draws = rng.random((self._config.questions_per_sample, 4)).tolist()
    kinds = [pick(self._config.questions, draw[0]) for draw in draws]
    questions = [
      ask(kind, facts, draw[1:])
      for kind, draw in zip(kinds, draws, strict=True)
    ]
    return pack(scene, questions)

  def rng(self, index: int) -> np.random.Generator:
    """What sample `index` is drawn with."""
    config = self._config
    return np.random.default_rng(
      (config.seed, digits_lib.SPLITS.index(config.split), index)
    )

  def scene(self, rng: np.random.Generator) -> Scene:
    """Draws what is shown."""
    config, side = self._config, digits_lib.SIDE
    T, rows, columns = config.grid
    cells = np.full((T, rows * columns), EMPTY, np.int32)
    frames = np.zeros((T, rows * columns, side, side), np.float32)
    for t in range(T):
      if t and rng.random() < config.repeat:
        cells[t], frames[t] = cells[t - 1], frames[t - 1]
        continue
      number = int(rng.integers(config.min_digits, config.max_digits + 1))
      places = rng.permutation(rows * columns)[:number]
      cells[t, places] = rng.integers(digits_lib.CLASSES, size=number)
      for place, draws in zip(places, rng.random((number, 3)), strict=True):
        choice = pick(self._by_class[cells[t, place]], draws[0])
        frames[t, place] = self._moved(choice, draws[1:])
    tiled = frames.reshape(T, rows, columns, side, side).swapaxes(2, 3)
    shown = tiled.reshape(T, *config.frame_shape)
    noise = rng.standard_normal(shown.shape, np.float32)
    return Scene(
      cells=cells.reshape(config.grid),
      frames=shown + np.float32(config.noise) * noise,
    )

  def _moved(self, choice: int, draws: np.ndarray) -> np.ndarray:
    """Digit `choice` (8, 8), moved by two draws of [0, 1).

    Half of the digits stay on their row, half on their column.
    """
    places = (*range(self._shift + 1), *range(self._shift, 2 * self._shift + 1))
    y, x = pick(places, draws[0]), pick(places, draws[1])
    side = digits_lib.SIDE
    return self._images[choice, y : y + side, x : x + side]


def ask(kind: str, facts: Facts, draws: Sequence[float]) -> Question:
  """Draws a question of a kind about what is shown.

  Where the video cannot carry it (`cell` without any digit, `order` with fewer
  than two that begin apart) it is one of presence.

  Args:
    kind: of QUESTIONS.
    facts: from `facts_of`.
    draws: three numbers, evenly from [0, 1).
  """
  if kind == 'count':
    return Question(
      tokens=('count',), answer=f'n{len(facts.first)}', evidence=facts.shown
    )
  if kind == 'cell' and facts.places:
    t, r, c = pick(facts.places, draws[0])
    evidence = np.zeros_like(facts.shown)
    evidence[t, r, c] = True
    return Question(
      tokens=('cell', f'f{t}', f'r{r}', f'c{c}'),
      answer=f'd{facts.cells[t, r, c]}',
      evidence=evidence,
    )
  if kind == 'order' and facts.pairs:
    return _order(facts, draws)
  return _presence(facts, draws)


def pick(items: Sequence[Any], draw: float) -> Any:
  """The item that a number of [0, 1) falls on."""
  return items[int(draw * len(items))]


def pack(scene: Scene, questions: list[Question]) -> dict[str, np.ndarray]:
  """A scene and questions about it as a sample's arrays."""
  Q = len(questions)
  text = np.full((Q, QUESTION_LENGTH), TOKENS['pad'], np.int32)
  targets = np.full((Q, QUESTION_LENGTH), IGNORE, np.int32)
  for i, question in enumerate(questions):
    ids = [TOKENS[word] for word in question.tokens]
    text[i, : len(ids)] = ids
    targets[i, len(ids) - 1] = TOKENS[question.answer]
  return {
    'frames': scene.frames,
    'cells': scene.cells,
    'text': text,
    'targets': targets,
    'kind': np.array([KINDS.index(q.tokens[0]) for q in questions], np.int32),
    'evidence': np.stack([q.evidence for q in questions]),
  }


def dataset(
  source: Any,
  batch_size: int,
  *,
  start: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.MapDataset:
  """Batches of a source's samples, those of one process.

  Args:
    source: Samples, or another variant's.
    batch_size: samples of a batch over all processes.
    start: the batch that element 0 is to be; how a run is resumed.
    process_index, process_count: `jax.process_index()`, `jax.process_count()`.

  Raises:
    ValueError: processes that do not divide the batch.
  """
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f'mosaic.dataset: batch_size={batch_size} for {process_count} processes; '
      'they must divide it. Choose a multiple.'
    )
  ordered = grain.MapDataset.source(source)[start * batch_size :]
  mine = ordered[process_index::process_count]
  return mine.batch(batch_size // process_count, drop_remainder=True)


def token_evidence(evidence: np.ndarray, patch_size: int) -> np.ndarray:
  """Evidence cells (..., T, rows, columns) -> tokens (..., N), in raster order.

  Raises:
    ValueError: patch_size does not divide a cell.
  """
  side = digits_lib.SIDE
  if patch_size < 1 or side % patch_size:
    raise ValueError(
      f'mosaic: patch_size={patch_size}; a cell has {side} pixels, which it '
      f'must divide. Use {side // 2} or {side}.'
    )
  times = side // patch_size
  fine = evidence.repeat(times, axis=-2).repeat(times, axis=-1)
  return fine.reshape(*evidence.shape[:-3], -1)


def words(tokens: Any) -> list[str]:
  """Token ids as words."""
  return [VOCABULARY[int(i)] for i in np.asarray(tokens).reshape(-1)]


def _presence(facts: Facts, draws: Sequence[float]) -> Question:
  """As often about a digit that is there as about one that is not."""
  present = sorted(facts.first)
  absent = [d for d in range(digits_lib.CLASSES) if d not in facts.first]
  wanted = present if draws[0] < 0.5 else absent
  digit = pick(wanted or present or absent, draws[1])
  there = digit in facts.first
  return Question(
    tokens=('presence', f'd{digit}'),
    answer='yes' if there else 'no',
    evidence=facts.cells == digit if there else facts.shown,
  )


def _order(facts: Facts, draws: Sequence[float]) -> Question:
  """Of two digits that are first seen in different frames."""
  earlier, later = pick(facts.pairs, draws[0])
  d, e = (earlier, later) if draws[1] < 0.5 else (later, earlier)
  evidence = np.zeros_like(facts.shown)
  for digit in (d, e):
    frame = facts.first[digit]
    evidence[frame] |= facts.cells[frame] == digit
  return Question(
    tokens=('order', f'd{d}', f'd{e}'), answer=f'd{earlier}', evidence=evidence
  )


def _check_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
  if value not in allowed:
    raise ValueError(
      f'MosaicConfig: {name}={value!r}; allowed are {sorted(allowed)}.'
    )
