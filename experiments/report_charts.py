"""Charts of the report: plain functions from numbers to inline SVG text.

Colours are classes, defined once by the page for light and dark. Every mark
carries its number, `data-value`, so that a test (or a script) reads back what
is drawn, and every column a text that the page shows under the pointer,
`data-tip`. Numbers that are not finite leave a gap.
"""

import dataclasses
import html
import math
from collections.abc import Iterable, Sequence
from typing import TypeGuard

WIDTH = 960
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 14, 34
STEPS = 7  # Colours of a heat map.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
  """One line. name: of the legend. kind: its colour class."""

  name: str
  kind: str
  values: Sequence[float | None]


def text(value: object) -> str:
  """Escaped for HTML, in text and in attributes."""
  return html.escape(str(value), quote=True)


def number(value: float | None, digits: int = 1) -> str:
  """A number for people, a dash where there is none."""
  if value is None or not math.isfinite(value):
    return '\u2013'
  if abs(value) >= 1e6 or (value and abs(value) < 1e-3):
    return f'{value:.2g}'
  return f'{value:,.{digits}f}'


def lines(
  series: Sequence[Series],
  columns: Sequence[int],
  *,
  label: str,
  unit: str,
  column: str = 'block',
  log: bool = False,
  zero: bool = False,
  width: int = WIDTH,
  height: int = 260,
  mark: Sequence[int] = (),
  name: str = '',
) -> str:
  """Lines over columns of equal distance.

  Args:
    series: drawn in order, the last on top; values one per column.
    columns: what the ticks below say, ascending.
    label: says to a screen reader what is shown.
    unit: of the values; stands above the axis.
    column: what a column is.
    log: a logarithmic axis; values <= 0 leave a gap.
    zero: the axis begins at 0.
    width, height: of the drawing.
    mark: positions whose value of the last series is written beside it.
    name: `data-chart`, to find it by.
  """
  shown = [v for s in series for v in s.values if _ok(v) and (not log or v > 0)]
  if not shown or not columns:
    return ''
  ticks = (
    log_ticks(min(shown), max(shown))
    if log
    else linear_ticks([*shown, 0.0] if zero else shown)
  )
  low, high = ticks[0], ticks[-1]
  bottom = height - _BOTTOM

  def y_of(value):
    if log:
      value, a, b = math.log(value), math.log(low), math.log(high)
    else:
      a, b = low, high
    return bottom - (value - a) / ((b - a) or 1) * (bottom - _TOP - 12)

  step = (width - _LEFT - _RIGHT) / len(columns)

  def x_of(i):
    return _LEFT + (i + 0.5) * step

  parts = [_open(height, label, name, width), _unit(unit)]
  for tick in ticks:
    y = y_of(tick)
    parts.append(
      f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" '
      f'y2="{y:.1f}"/><text class="tick y" x="{_LEFT - 8}" y="{y + 4:.1f}" '
      f'data-tick="{tick:.10g}" data-y="{y:.3f}">{_tick(tick)}</text>'
    )
  parts.append(_column_ticks(columns, x_of, bottom, step, column))
  for s in series:
    parts.append(_line(s, columns, x_of, y_of, step, log))
  for i in mark:
    value = series[-1].values[i]
    if _ok(value):
      parts.append(
        f'<text class="mark" x="{x_of(i):.1f}" y="{y_of(value) + 18:.1f}">'
        f'{columns[i]}</text>'
      )
  for i, c in enumerate(columns):
    rows = [f'{column} {c}'] + [
      f'{s.name}: {number(s.values[i])}{_suffix(unit)}'
      for s in reversed(series)
    ]
    parts.append(
      f'<rect class="hit" x="{x_of(i) - step / 2:.1f}" y="{_TOP}" '
      f'width="{step:.1f}" height="{bottom - _TOP}" '
      f'data-tip="{text(chr(10).join(rows))}"/>'
    )
  return ''.join(parts) + '</svg>'


def heat(
  rows: Sequence[str],
  columns: Sequence[int],
  values: Sequence[Sequence[float | None]],
  *,
  label: str,
  unit: str,
  column: str = 'block',
  name: str = '',
) -> str:
  """A heat map whose strongest colour is the smallest value.

  Args:
    rows, columns: their names.
    values: [row][column]; None is an empty cell.
    label, unit, column, name: as for `lines`.
  """
  shown = _finite(v for row in values for v in row)
  if not shown:
    return ''
  left, size = 112, 24
  step = (WIDTH - left - _RIGHT) / len(columns)
  bottom = _TOP + size * len(rows)
  parts = [_open(bottom + _BOTTOM, label, name)]
  gap = 2 if step > 8 else 0.5
  for r, (row, cells) in enumerate(zip(rows, values, strict=True)):
    y = _TOP + r * size
    parts.append(
      f'<text class="row" x="{left - 8}" y="{y + 16}">{text(row)}</text>'
    )
    for i, value in enumerate(cells):
      if value is None:
        continue
      kind = f'h{shade(value, shown)}' if _ok(value) else 'none'
      tip = f'{column} {columns[i]}, {row}\n{number(value)}{_suffix(unit)}'
      parts.append(
        f'<rect class="cell {kind}" x="{left + i * step:.1f}" y="{y}" '
        f'width="{max(step - gap, 1):.1f}" height="{size - 2}" rx="2" '
        f'data-row="{text(row)}" data-column="{columns[i]}" '
        f'data-value="{value:.6g}" data-tip="{text(tip)}"/>'
      )
  parts.append(
    _column_ticks(
      columns, lambda i: left + (i + 0.5) * step - 1, bottom, step, column, left
    )
  )
  return ''.join(parts) + '</svg>'


def bars(
  names: Sequence[str],
  values: Sequence[float],
  *,
  label: str,
  unit: str,
  notes: Sequence[str] = (),
  name: str = '',
) -> str:
  """Horizontal bars from zero, one a row.

  Args:
    names: of the rows.
    values: their lengths, >= 0.
    label, unit, name: as for `lines`.
    notes: written small beside the names.
  """
  top = max([v for v in values if _ok(v)], default=0)
  if not top:
    return ''
  left, size = 300, 22
  parts = [_open(_TOP + size * len(names) + 6, label, name)]
  for i, (row, value) in enumerate(zip(names, values, strict=True)):
    y = _TOP + i * size
    length = value / top * (WIDTH - left - 90) if _ok(value) else 0
    note = f' ({notes[i]})' if notes else ''
    shown = text(f'{number(value, 4)}{_suffix(unit)}')
    parts.append(
      f'<text class="row" x="{left - 8}" y="{y + 15}">{text(row + note)}</text>'
      f'<rect class="bar" x="{left}" y="{y + 3}" width="{length:.1f}" '
      f'height="{size - 7}" rx="2" data-row="{text(row)}" '
      f'data-value="{value:.6g}" data-tip="{text(row + note)}&#10;{shown}"/>'
      f'<text class="end" x="{left + length + 6:.1f}" y="{y + 15}">{shown}'
      '</text>'
    )
  return ''.join(parts) + '</svg>'


def profile(
  before: Sequence[float], after: Sequence[float], *, label: str, name: str = ''
) -> str:
  """absmax of every channel, before and after, on one logarithmic axis.

  Wide tensors are drawn as the largest channel of each of at most 480 bins.
  """
  every = max(1, math.ceil(len(before) / 480))
  bins = range(0, len(before), every)
  pairs = [
    (max(before[i : i + every]), max(after[i : i + every])) for i in bins
  ]
  shown = [v for pair in pairs for v in pair if _ok(v) and v > 0]
  if not shown:
    return ''
  ticks = log_ticks(min(shown), max(shown))
  height = 220
  bottom = height - _BOTTOM
  a, b = math.log(ticks[0]), math.log(ticks[-1])

  def y_of(value):
    if not _ok(value) or value <= 0:
      return bottom
    return bottom - (math.log(value) - a) / (b - a) * (bottom - _TOP - 12)

  step = (WIDTH - _LEFT - _RIGHT) / len(pairs)
  parts = [_open(height, label, name), _unit('absmax of the channel')]
  for tick in ticks:
    y = y_of(tick)
    parts.append(
      f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" '
      f'y2="{y:.1f}"/><text class="tick y" x="{_LEFT - 8}" y="{y + 4:.1f}">'
      f'{_tick(tick)}</text>'
    )
  for kind, which in (('before', 0), ('after', 1)):
    path = ' '.join(
      f'{"L" if i else "M"}{_LEFT + (i + 0.5) * step:.1f} {y_of(p[which]):.1f}'
      for i, p in enumerate(pairs)
    )
    parts.append(f'<path class="thin {kind}" d="{path}"/>')
  parts.append(
    f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom}" '
    f'y2="{bottom}"/><text class="tick" x="{_LEFT}" y="{bottom + 16}">0</text>'
    f'<text class="tick" x="{WIDTH - _RIGHT}" y="{bottom + 16}" '
    f'text-anchor="end">channel {len(before) - 1}</text>'
  )
  return ''.join(parts) + '</svg>'


def legend(entries: Sequence[tuple[str, str]]) -> str:
  """(name, kind) of each series, beside a sample of its colour."""
  items = ''.join(
    f'<span><i class="key {kind}"></i>{text(name)}</span>'
    for name, kind in entries
  )
  return f'<div class="legend">{items}</div>'


def shade(value: float, shown: Sequence[float]) -> int:
  """0 (the largest) .. STEPS - 1 (the smallest) on a linear scale."""
  low, high = min(shown), max(shown)
  if high - low < 1e-9:
    return 0
  return min(STEPS - 1, int((high - value) / (high - low) * STEPS))


def linear_ticks(shown: Sequence[float]) -> list[float]:
  """Four to seven round numbers that enclose the values, from 0 if near."""
  low, high = min(shown), max(shown)
  low = min(0.0, low) if low < 0.5 * high else low
  span = (high - low) or abs(high) or 1.0
  step = 10.0 ** math.floor(math.log10(span / 4))
  for factor in (2, 2.5, 2):  # 2, 5, 10 times.
    if span / step <= 5:
      break
    step *= factor
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [i * step for i in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
  """Powers of ten that enclose the values; 1, 2, 5 steps on short spans."""
  a, b = math.floor(math.log10(low)), math.ceil(math.log10(high) + 1e-9)
  if b - a > 3:
    every = math.ceil((b - a) / 6)
    exponents = list(range(a, b + every, every))
    return [10.0**e for e in exponents]
  all_ = [m * 10.0**e for e in range(a, b + 1) for m in (1, 2, 5)]
  first = max(t for t in all_ if t <= low * (1 + 1e-9))
  last = min([t for t in all_ if t >= high] or [all_[-1]])
  ticks = [t for t in all_ if first <= t <= last]
  return ticks if len(ticks) > 1 else [first, first * 10]


def _line(s, columns, x_of, y_of, step, log) -> str:
  """The path and the points of one series."""
  d, pen = [], 'M'
  points = []
  for i, value in enumerate(s.values):
    if not _ok(value) or (log and value <= 0):
      pen = 'M'
      continue
    x, y = x_of(i), y_of(value)
    d.append(f'{pen}{x:.1f} {y:.1f}')
    pen = 'L'
    points.append(
      f'<circle class="point {s.kind}" cx="{x:.1f}" cy="{y:.3f}" '
      f'r="{3.5 if step > 12 else 2}" data-series="{text(s.name)}" '
      f'data-column="{columns[i]}" data-value="{value:.8g}"/>'
    )
  return f'<path class="line {s.kind}" d="{" ".join(d)}"/>' + ''.join(points)


def _column_ticks(columns, x_of, bottom, step, column, left=_LEFT) -> str:
  """Numbers below the columns, as many as fit, and what they count."""
  every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if step * n >= 24)
  parts = [
    f'<text class="tick x" x="{x_of(i):.1f}" y="{bottom + 16}">{c}</text>'
    for i, c in enumerate(columns)
    if c % every == 0
  ]
  parts.append(
    f'<text class="tick" x="{left}" y="{bottom + 31}">{column}</text>'
  )
  return ''.join(parts)


def _open(height: float, label: str, name: str, width: int = WIDTH) -> str:
  return (
    f'<svg viewBox="0 0 {width} {height:g}" role="img" '
    f'aria-label="{text(label)}" data-chart="{text(name)}">'
  )


def _unit(unit: str) -> str:
  return f'<text class="tick" x="0" y="11">{text(unit)}</text>'


def _suffix(unit: str) -> str:
  short = unit.split(',')[0]
  return f' {short}' if len(short) <= 10 else ''


def _tick(value: float) -> str:
  if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
    return f'{value:.0e}'.replace('e-0', 'e-').replace('e+0', 'e')
  return f'{value:,.6g}'


def _finite(values: Iterable[float | None]) -> list[float]:
  return [v for v in values if v is not None and math.isfinite(v)]


def _ok(value: float | None) -> TypeGuard[float]:
  return value is not None and math.isfinite(value)
