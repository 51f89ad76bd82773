"""Whether one row of a quality table is better than another, by intervals.

A claim holds where the intervals of a metric lie apart in its direction; where
they overlap nothing is said.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

Claim = tuple[str, str]  # A row, and what it should be better than.


class Interval(NamedTuple):
  """A value and the ends of its 95 % interval."""

  value: float
  low: float
  high: float

  def __str__(self) -> str:
    return f'{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]'


def table(
  stored: Mapping[str, dict],
  claims: Sequence[Claim],
  metric: str,
  *,
  more: bool = False,
  prefix: str = '',
  level: str = '##',
) -> str:
  """A Markdown section with a row per claim; '' where none has both its rows.

  Args:
    stored: {name: what benchmarks.quality stores of it}.
    claims: without the prefix.
    metric: what they go by.
    more: whether more of it is better.
    prefix: of the stored names.
    level: of the heading.
  """
  lines = []
  for ours, beside in claims:
    a = interval(stored, prefix + ours, metric)
    b = interval(stored, prefix + beside, metric)
    if a is not None and b is not None:
      verdict = judge(a, b, more)
      lines.append(f'| {ours} | {a} | {beside} | {b} | {verdict} |\n')
  if not lines:
    return ''
  return (
    f'{level} Does what the papers claim hold?\n\nBy {metric}.\n\n'
    f'| this | | should be better than | | does it |\n|---|---|---|---|---|\n'
    + ''.join(lines)
  )


def judge(ours: Interval, beside: Interval, more: bool) -> str:
  """'yes', '**no**' or 'not told apart'."""
  better, worse = (ours, beside) if more else (beside, ours)
  if better.low > worse.high:
    return 'yes'
  return '**no**' if better.high < worse.low else 'not told apart'


def interval(
  stored: Mapping[str, dict], name: str, metric: str
) -> Interval | None:
  """Of a stored row's metric; None where there is none."""
  for found in stored.get(name, {}).get('row', {}).get('metrics', ()):
    if found['name'] == metric:
      return Interval(found['value'], found['low'], found['high'])
  return None
