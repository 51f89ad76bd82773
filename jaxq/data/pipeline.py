"""Text to packed windows of tokens, as grain datasets.

Documents are tokenized one by one, joined in order and cut into windows
(num, length) int32 without overlap; what does not fill a window is dropped.
The corpus is held as tokens, four bytes each. The same config gives the same
windows; a process sees every `process_count`-th of them, so that together
they see each once; an iterator's state is a few bytes of JSON.

For the word- and byte-normalised perplexity every token also knows how many
words start in it and how many UTF-8 bytes it adds. Both come from the
tokenizer's offsets, and text that a tokenizer drops between two tokens counts
for the later one, so that the sums over a document are the document's.
"""

import dataclasses
import json
import re
from collections.abc import Iterable

import grain
import numpy as np
import tokenizers

from jaxq.data import text as text_lib

BOS = ('none', 'document', 'window')


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """What to read and how to cut it.

  Attributes:
    source: see `jaxq.data.text`.
    num_sequences: windows to take; None takes all (evaluation only).
    sequence_length: tokens in a window, BOS included.
    bos: where to put `bos_token_id`: 'none', before each 'document', or at
      the head of each 'window'.
    bos_token_id: needed unless bos is 'none'.
    separator: text appended to each document but the last.
    shuffle: take the windows in an order drawn from `seed`.
    seed: of the shuffle.
  """

  source: str = 'wiki-sample:calibration'
  num_sequences: int | None = 64
  sequence_length: int = 512
  bos: str = 'none'
  bos_token_id: int | None = None
  separator: str = '\n\n'
  shuffle: bool = False
  seed: int = 0

  def __post_init__(self):
    if self.bos not in BOS:
      raise ValueError(
        f'DataConfig: bos={self.bos!r}; allowed are {sorted(BOS)}.'
      )
    if self.bos != 'none' and self.bos_token_id is None:
      raise ValueError(
        f'DataConfig: bos={self.bos!r} without bos_token_id; give the id of '
        "the model's BOS token, or set bos='none'."
      )
    if self.num_sequences is not None and self.num_sequences < 1:
      raise ValueError(
        f'DataConfig: num_sequences={self.num_sequences}; it must be at least '
        '1. Give a positive number, or None for all windows.'
      )
    if self.sequence_length < 2:
      raise ValueError(
        f'DataConfig: sequence_length={self.sequence_length}; it must be at '
        'least 2, as the first token of a window predicts the second.'
      )

  @property
  def description(self) -> str:
    """Corpus, window and BOS, as they stand beside every figure."""
    bos = 'without BOS' if self.bos == 'none' else f'BOS per {self.bos}'
    return f'{self.source}, windows of {self.sequence_length} tokens, {bos}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
  """Tokens (n,) int32 with the words and UTF-8 bytes each adds, (n,) int32."""

  tokens: np.ndarray
  words: np.ndarray
  nbytes: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationWindows:
  """Windows to score and what their scored tokens cover.

  The first token of a window is context only, so it is not counted.

  Attributes:
    tokens: (num, length) int32.
    words: (num,) int64, words starting in tokens 1.. of each window.
    nbytes: (num,) int64, UTF-8 bytes of tokens 1.. of each window.
    description: corpus, window and BOS.
  """

  tokens: np.ndarray
  words: np.ndarray
  nbytes: np.ndarray
  description: str

  @property
  def num_scored(self) -> int:
    """Tokens with a prediction: all but the first of each window."""
    return self.tokens.shape[0] * (self.tokens.shape[1] - 1)


class Windows:
  """A random-access grain source of the windows (length,) of a corpus."""

  def __init__(self, config: DataConfig, corpus: Corpus):
    self._config = config
    self._tokens = corpus.tokens
    self._stride = config.sequence_length - (config.bos == 'window')

  def __len__(self) -> int:
    return self._tokens.size // self._stride

  def __getitem__(self, index: int) -> np.ndarray:
    start = int(index) * self._stride
    window = self._tokens[start : start + self._stride]
    if self._config.bos == 'window':
      window = np.concatenate([[self._config.bos_token_id], window])
    return window.astype(np.int32)


def load(config: DataConfig, tokenizer: tokenizers.Tokenizer) -> Corpus:
  """Reads and tokenizes the source of `config`."""
  return tokenize(text_lib.read(config.source), config, tokenizer)


def tokenize(
  documents: Iterable[str],
  config: DataConfig,
  tokenizer: tokenizers.Tokenizer,
) -> Corpus:
  """Tokenizes and joins documents; adds no special token but the BOS."""
  tokens, words, nbytes = [], [], []
  bos = np.array([config.bos_token_id or 0], np.int32)[
    : config.bos == 'document'
  ]
  nothing = np.zeros(bos.size, np.int32)
  for document in _separated(documents, config.separator):
    encoding = tokenizer.encode(document, add_special_tokens=False)
    document_words, document_nbytes = _counts(document, encoding.offsets)
    tokens += [bos, np.asarray(encoding.ids, np.int32)]
    words += [nothing, document_words]
    nbytes += [nothing, document_nbytes]
  if not tokens:
    raise ValueError(
      f'{config.source}: holds no document; at least one is needed. Give '
      'another source.'
    )
  return Corpus(
    tokens=np.concatenate(tokens),
    words=np.concatenate(words),
    nbytes=np.concatenate(nbytes),
  )


def dataset(
  config: DataConfig,
  corpus: Corpus,
  *,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.MapDataset:
  """The windows of one process: `num_sequences` of them over all processes.

  Args:
    config: how to cut.
    corpus: from `load`.
    process_index: `jax.process_index()`.
    process_count: `jax.process_count()`.

  Returns:
    A dataset of (length,) int32; element j is window
    `process_index + j * process_count` of the (shuffled) order.

  Raises:
    ValueError: fewer windows than asked, or a process index out of range.
  """
  if not 0 <= process_index < process_count:
    raise ValueError(
      f'dataset: process_index={process_index}, process_count={process_count};'
      ' the index must be in 0..count-1. Pass jax.process_index() and '
      'jax.process_count().'
    )
  windows = Windows(config, corpus)
  wanted = config.num_sequences or len(windows)
  if len(windows) < max(wanted, 1):
    raise ValueError(
      f'{config.source}: has {corpus.tokens.size} tokens, which fill '
      f'{len(windows)} windows of {config.sequence_length}; {max(wanted, 1)} '
      'were asked. Give more text, or ask for fewer or shorter windows.'
    )
  ordered = grain.MapDataset.source(windows).seed(config.seed)
  if config.shuffle:
    ordered = ordered.shuffle()
  return ordered[:wanted][process_index::process_count]


def get_state(iterator: grain.DatasetIterator) -> bytes:
  """The position of an iterator over a dataset, as JSON."""
  return json.dumps(iterator.get_state(), sort_keys=True).encode()


def set_state(iterator: grain.DatasetIterator, state: bytes) -> None:
  """Puts an iterator over the same dataset where `get_state` was taken."""
  try:
    iterator.set_state(json.loads(state))
  except (ValueError, KeyError, TypeError) as e:
    raise ValueError(
      f'set_state: {state[:60]!r} is no state of this iterator; allowed is '
      'what get_state returned for the same dataset. Start from the beginning.'
    ) from e


def calibration_tokens(
  config: DataConfig, tokenizer: tokenizers.Tokenizer
) -> np.ndarray:
  """The windows of `config`: (num_sequences, sequence_length) int32."""
  if config.num_sequences is None:
    raise ValueError(
      'calibration_tokens: num_sequences=None; calibration needs a number. '
      'Set num_sequences.'
    )
  return _stack(dataset(config, load(config, tokenizer)))


def evaluation_windows(
  config: DataConfig, tokenizer: tokenizers.Tokenizer
) -> EvaluationWindows:
  """Non-overlapping windows in the order of the text, with their counts.

  Raises:
    ValueError: `shuffle` is set, or fewer windows than asked.
  """
  if config.shuffle:
    raise ValueError(
      'evaluation_windows: shuffle=True; evaluation takes windows in the '
      'order of the text. Set shuffle=False.'
    )
  corpus = load(config, tokenizer)
  tokens = _stack(dataset(config, corpus))
  return EvaluationWindows(
    tokens=tokens,
    words=_scored(corpus.words, config, len(tokens)),
    nbytes=_scored(corpus.nbytes, config, len(tokens)),
    description=config.description,
  )


def _stack(windows: grain.MapDataset) -> np.ndarray:
  return np.stack([windows[i] for i in range(len(windows))])


def _scored(counts: np.ndarray, config: DataConfig, num: int) -> np.ndarray:
  """Sums counts (n,) over the scored tokens of each window: (num,) int64."""
  stride = config.sequence_length - (config.bos == 'window')
  per_window = counts[: num * stride].reshape(num, stride)
  first = 0 if config.bos == 'window' else 1  # BOS is then the context.
  return per_window[:, first:].sum(axis=1, dtype=np.int64)


def _separated(documents: Iterable[str], separator: str):
  """Yields documents, each but the last with the separator behind it."""
  previous = None
  for document in documents:
    if previous is not None:
      yield previous + separator
    previous = document
  if previous is not None:
    yield previous


def _counts(document: str, offsets) -> tuple[np.ndarray, np.ndarray]:
  """Words and bytes per token, (n,) int32 each, from character offsets."""
  if not offsets:
    return np.zeros(0, np.int32), np.zeros(0, np.int32)
  # Tokens inside one character share its offsets: the first one counts it.
  ends = np.maximum.accumulate(np.asarray(offsets, np.int64)[:, 1])
  ends[-1] = len(document)
  edges = np.concatenate([[0], ends])  # (n + 1,)
  codes = np.frombuffer(document.encode('utf-32-le'), np.uint32)
  width = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
  word_starts = np.zeros(codes.size, np.int64)
  word_starts[[m.start() for m in re.finditer(r'\S+', document)]] = 1
  return tuple(
    np.diff(np.concatenate([[0], np.cumsum(x)])[edges]).astype(np.int32)
    for x in (word_starts, width)
  )
