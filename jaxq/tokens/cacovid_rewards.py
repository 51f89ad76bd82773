"""Rewards in [0, 1] for the answers that CaCoVID's policy is trained by.

2026, https://arxiv.org/abs/2602.01649. Each kind of question has its own:

  multiple choice  1 where the first letter of the answer is the right one
  numeric          1 where both round to the same two decimals
  ocr              1 - word error rate
  free form        mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L
  regression       1 - relative error
"""

import collections
import re
from collections.abc import Callable, Sequence

import numpy as np

from jaxq.eval import wer

_NUMBER = re.compile(r'[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+')
_LETTER = re.compile(r'\b([A-Za-z])\b')


def reward(kind: str, answer: str, truth: str) -> float:
  """The reward of one answer.

  Args:
    kind: of KINDS.
    answer: the model's text.
    truth: the right one.

  Raises:
    ValueError: another kind.
  """
  if kind not in KINDS:
    raise ValueError(
      f'cacovid_rewards: kind={kind!r}; allowed {sorted(KINDS)}.'
    )
  return float(np.clip(KINDS[kind](answer, truth), 0.0, 1.0))


def choice(answer: str, truth: str) -> float:
  """Whether the first single letters agree; else the first characters."""
  return float(_letter(answer) == _letter(truth) != '')


def numeric(answer: str, truth: str) -> float:
  """Whether the first numbers agree at two decimals."""
  a, b = _number(answer), _number(truth)
  return float(a is not None and b is not None and round(a, 2) == round(b, 2))


def ocr(answer: str, truth: str) -> float:
  """1 - word error rate, not below 0."""
  reference = wer.words(truth)
  errors = wer.distance(reference, wer.words(answer))
  return max(0.0, 1 - errors / max(len(reference), 1))


def free_form(answer: str, truth: str) -> float:
  """The mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L."""
  a, b = wer.words(answer), wer.words(truth)
  return (rouge_n(a, b, 1) + rouge_n(a, b, 2) + rouge_l(a, b)) / 3


def regression(answer: str, truth: str) -> float:
  """1 - |answer - truth| / |truth|, not below 0."""
  a, b = _number(answer), _number(truth)
  if a is None or b is None:
    return 0.0
  return max(0.0, 1 - abs(a - b) / max(abs(b), 1e-9))


def rouge_n(answer: Sequence[str], truth: Sequence[str], n: int) -> float:
  """F1 of the n-grams that two lists of words share, counted."""
  grams = [
    collections.Counter(zip(*(words[i:] for i in range(n)), strict=False))
    for words in (answer, truth)
  ]
  common = sum((grams[0] & grams[1]).values())
  return _f1(common, sum(grams[0].values()), sum(grams[1].values()))


def rouge_l(answer: Sequence[str], truth: Sequence[str]) -> float:
  """F1 of the longest common subsequence of two lists of words."""
  row = [0] * (len(truth) + 1)
  for word in answer:
    above = row
    row = [0]
    for j, other in enumerate(truth):
      longer = above[j] + 1 if word == other else max(above[j + 1], row[-1])
      row.append(longer)
  return _f1(row[-1], len(answer), len(truth))


KINDS: dict[str, Callable[[str, str], float]] = {
  'choice': choice,
  'free_form': free_form,
  'numeric': numeric,
  'ocr': ocr,
  'regression': regression,
}


def _f1(common: int, first: int, second: int) -> float:
  if not common:
    return 0.0
  precision, recall = common / first, common / second
  return 2 * precision * recall / (precision + recall)


def _letter(text: str) -> str:
  found = _LETTER.search(text)
  return (found.group(1) if found else text.strip()[:1]).upper()


def _number(text: str) -> float | None:
  found = _NUMBER.search(text)
  return float(found.group().replace(',', '')) if found else None
