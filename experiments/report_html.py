"""Pieces of HTML that the report's sections share: plain functions to text."""

from collections.abc import Sequence

from experiments import report_charts as charts

text = charts.text


def section(title: str, explained: str, body: str) -> str:
  """A card with a question above, and what answers it."""
  said = f'<p>{text(explained)}</p>' if explained else ''
  return f'<section><h2>{text(title)}</h2>{said}{body}</section>'


def scroll(body: str) -> str:
  """What may be wider than a narrow screen."""
  return f'<div class="scroll">{body}</div>' if body else ''


def details(title: str, body: str) -> str:
  """What is folded away at first."""
  return f'<details><summary>{text(title)}</summary>{scroll(body)}</details>'


def table(
  head: Sequence[str],
  body: Sequence[Sequence[str]],
  name: str,
  words: bool = False,
) -> str:
  """A table whose first column is its rows' names."""
  top = ''.join(f'<th>{text(cell)}</th>' for cell in head)
  top = f'<thead><tr>{top}</tr></thead>' if any(head) else ''
  lines = ''.join(
    f'<tr><th>{text(line[0])}</th>'
    + ''.join(f'<td>{text(cell)}</td>' for cell in line[1:])
    + '</tr>'
    for line in body
  )
  kind = ' class="words"' if words else ''
  return f'<table id="{name}"{kind}>{top}<tbody>{lines}</tbody></table>'


def bytes_of(size: float) -> str:
  """'59.6 MB'."""
  for unit in ('B', 'kB', 'MB', 'GB'):
    if size < 1000 or unit == 'GB':
      break
    size /= 1000
  shown = f'{size:.3g}' if size < 1000 else f'{size:,.0f}'
  return f'{shown}\u00a0{unit}'


def duration(seconds: float) -> str:
  """'6.8 s', '2 min 54 s'."""
  if seconds < 90:
    return f'{seconds:.3g} s'
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes} min' if hours else f'{minutes} min {rest} s'
