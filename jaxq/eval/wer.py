"""Word error rate: what part of a transcript's words are wrong.

  WER = (substitutions + deletions + insertions) / words of the reference

over the alignment with the fewest errors (Levenshtein's distance on words). It
can pass 1 where words are invented. Both texts are normalised first: lower
case, no punctuation but apostrophes within words, single spaces. That is less
than Whisper's own English normaliser does (numbers, spellings, contractions),
so a figure here compares with another one of jaxq only.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

_NOT_WORDS = re.compile(r"[^\w\s']|_")
_LOOSE_APOSTROPHES = re.compile(r"(?<!\w)'|'(?!\w)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordErrors:
  """errors: words to change. words: of the references."""

  errors: int
  words: int

  @property
  def rate(self) -> float:
    """WER."""
    return self.errors / self.words


def words(text: str) -> list[str]:
  """The normalised words of a text."""
  text = _NOT_WORDS.sub(' ', text.lower().replace('\u2019', "'"))
  return _LOOSE_APOSTROPHES.sub(' ', text).split()


def distance(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
  """The fewest substitutions, deletions and insertions between two lists."""
  row = np.arange(len(hypothesis) + 1)
  for i, word in enumerate(reference, start=1):
    same = np.array([other == word for other in hypothesis], bool)
    above = np.minimum(row[1:] + 1, row[:-1] + ~same)
    new = [i]
    for best in above.tolist():
      new.append(min(best, new[-1] + 1))
    row = np.array(new)
  return int(row[-1])


def word_errors(
  references: Sequence[str], hypotheses: Sequence[str]
) -> WordErrors:
  """The errors of all clips over the words of all references.

  Raises:
    ValueError: lists of different lengths, or references without a word.
  """
  if len(references) != len(hypotheses):
    raise ValueError(
      f'wer: {len(references)} references and {len(hypotheses)} hypotheses; '
      'each clip needs both. Pass lists of equal length.'
    )
  pairs = [
    (words(reference), words(hypothesis))
    for reference, hypothesis in zip(references, hypotheses, strict=True)
  ]
  total = sum(len(reference) for reference, _ in pairs)
  if not total:
    raise ValueError(
      'wer: the references hold no words; a rate needs at least one. Give the '
      'text that was spoken.'
    )
  return WordErrors(errors=sum(distance(*pair) for pair in pairs), words=total)
