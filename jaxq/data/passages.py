"""Text in passages, for models that read whole texts: padded, with a mask.

A passage is a paragraph of a document. Short ones (headings, lists) are left
out, long ones cut, and of those that remain `num_passages` are taken at even
distances, so that every document is there in proportion. A batch is

  {'tokens' (num, length) int32, 'mask' (num, length) bool}

with special tokens as the tokenizer puts them and False behind the last one.

`pairs` makes a retrieval task of the same text, without labels: the first
sentence of a paragraph must find the rest of it among the rests of all.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
import tokenizers

from jaxq.data import text as text_lib

_SENTENCE_END = re.compile(r'(?<=[.!?])\s+(?=[A-Z"(])')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassageConfig:
  """What to read and how to cut it.

  Attributes:
    source: see `jaxq.data.text`.
    num_passages: how many to take.
    length: tokens that a batch is wide; longer passages are cut.
    min_words: paragraphs of fewer words are left out.
    pad_token_id: what fills a row up.
  """

  source: str = 'wiki-sample:calibration'
  num_passages: int = 64
  length: int = 128
  min_words: int = 12
  pad_token_id: int = 0

  def __post_init__(self):
    for name, least in (('num_passages', 1), ('length', 4), ('min_words', 1)):
      if getattr(self, name) < least:
        raise ValueError(
          f'PassageConfig: {name}={getattr(self, name)}; it must be at least '
          f'{least}. {getattr(PassageConfig, name)} is the default.'
        )

  @property
  def description(self) -> str:
    """Corpus and cut, as they stand beside every figure."""
    return f'{self.source}, passages of at most {self.length} tokens'


def passages(config: PassageConfig) -> list[str]:
  """The paragraphs that `config` takes.

  Raises:
    ValueError: the source has too few; see also `text.read`.
  """
  found = [p for p in _paragraphs(config.source) if _is_long(p, config)]
  return _evenly(found, config)


def pairs(config: PassageConfig) -> tuple[list[str], list[str]]:
  """First sentences, and the rests of the same paragraphs.

  Raises:
    ValueError: the source has too few paragraphs of two sentences.
  """
  found = []
  for paragraph in _paragraphs(config.source):
    parts = _SENTENCE_END.split(paragraph, maxsplit=1)
    if len(parts) == 2 and all(_is_long(part, config) for part in parts):
      found.append((parts[0], parts[1]))
  firsts, rests = zip(*_evenly(found, config), strict=True)
  return list(firsts), list(rests)


def encode(
  texts: Sequence[str],
  tokenizer: tokenizers.Tokenizer,
  config: PassageConfig,
) -> dict[str, np.ndarray]:
  """Texts -> {'tokens' (num, length) int32, 'mask' (num, length) bool}.

  A text that is too long keeps its first tokens and its last special one.
  """
  tokens = np.full((len(texts), config.length), config.pad_token_id, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for row, encoding in enumerate(tokenizer.encode_batch(list(texts))):
    ids = encoding.ids
    if len(ids) > config.length:
      closes = encoding.special_tokens_mask[-1]
      ids = ids[: config.length - closes] + ids[len(ids) - closes :]
    tokens[row, : len(ids)] = ids
    mask[row, : len(ids)] = True
  return {'tokens': tokens, 'mask': mask}


def calibration_batch(
  config: PassageConfig, tokenizer: tokenizers.Tokenizer
) -> dict[str, np.ndarray]:
  """The passages of `config`, encoded."""
  return encode(passages(config), tokenizer, config)


def _paragraphs(source: str) -> list[str]:
  return [
    ' '.join(paragraph.split())
    for document in text_lib.read(source)
    for paragraph in document.split('\n')
  ]


def _is_long(paragraph: str, config: PassageConfig) -> bool:
  return len(paragraph.split()) >= config.min_words


def _evenly(found: list, config: PassageConfig) -> list:
  num = config.num_passages
  if len(found) < num:
    raise ValueError(
      f'{config.source}: has {len(found)} passages of {config.min_words} words '
      f'or more; {num} were asked. Give more text, or ask for fewer.'
    )
  return [found[i * len(found) // num] for i in range(num)]
