"""The report as one HTML file: inline CSS, inline SVG, nothing to fetch.

The page is sections of a run folder's data, each a function that returns HTML
or '' where the run has nothing for it; an older run has fewer sections. It
follows the reader's light or dark setting and reads without scripts, which
only show the numbers under the pointer.
"""

import statistics
from collections.abc import Sequence

from experiments import report_charts as charts
from experiments import report_findings as findings
from experiments import (
  report_html as parts,
)
from experiments import (
  report_layers,
  report_style,
  results,
  run_folder,
  token_pictures,
)

_METRICS = {  # Tiles: name -> what it is called there.
  'token perplexity': 'token perplexity',
  'KL': 'KL to the float model',
  'top-1 agreement': 'top-1 agreement',
}

text, number = charts.text, charts.number


def render(
  run: run_folder.RunData,
  others: Sequence[run_folder.RunData] = (),
) -> str:
  """The page.

  Args:
    run: what it is about.
    others: runs to compare with; they add lines and columns.
  """
  title = findings.title(run)
  sections = [
    _tiles(run),
    _warnings(run),
    _results(run, others),
    report_layers.outputs(run, others),
    report_layers.weights(run),
    report_layers.channels(run),
    report_layers.experts(run),
    report_layers.sensitivity(run),
    token_pictures.section(run.path),
    _cost(run),
    _flags(run),
    _environment(run),
  ]
  style, script = report_style.STYLE, report_style.SCRIPT
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark">'
    f'<title>{text(title)}</title><style>{style}</style></head><body><main>'
    f'<header><p class="over">jaxq calibration report</p><h1>{text(title)}</h1>'
    f'<p class="summary">{text(findings.summary(run, others))}</p></header>'
    + '\n'.join(section for section in sections if section)
    + f'</main><div id="tip" hidden></div><script>{script}</script></body>'
    '</html>\n'
  )


def _tiles(run: run_folder.RunData) -> str:
  """The few numbers one looks for first."""
  made = []
  reference, row = findings.measured(run)
  for name, label in _METRICS.items():
    metric = findings.metric(row, name)
    if metric is None:
      continue
    note = ''
    before = findings.metric(reference, name)
    if before is not None:
      note = f'float: {number(before.value, 2)}'
    elif metric.low is not None:
      note = f'{number(metric.low, 3)} to {number(metric.high, 3)}'
    digits = 2 if name == 'token perplexity' else 3
    made.append((label, number(metric.value, digits), note))
  width, size = findings.bits(run)
  if size:
    made.append(
      (
        'bits per weight',
        number(width, 2),
        f'{parts.bytes_of(size * width / 8)}; '
        f'bfloat16: {parts.bytes_of(size * 2)}',
      )
    )
  whole = findings.metric(row, 'calibration')
  seconds = sum(block['seconds'] for block in run.blocks)
  seconds = whole.value if whole else seconds
  if run.blocks:
    memory = findings.metric(row, 'peak memory')
    note = f'{number(memory.value, 2)} GB at the peak' if memory else ''
    note = note or f'{len(run.blocks)} blocks'
    made.append(('calibration', parts.duration(seconds), note))
  tiles = ''.join(
    f'<div class="tile"><span>{text(label)}</span><b>{text(value)}</b>'
    f'<small>{text(note)}</small></div>'
    for label, value, note in made
  )
  return f'<div class="tiles">{tiles}</div>' if tiles else ''


def _warnings(run: run_folder.RunData) -> str:
  said = findings.warnings(run)
  if not said:
    return ''
  items = ''.join(f'<li>{text(sentence)}</li>' for sentence in said)
  return (
    f'<section class="warnings"><h2>Warnings</h2><ul>{items}</ul></section>'
  )


def _results(
  run: run_folder.RunData, others: Sequence[run_folder.RunData]
) -> str:
  """Metrics down, models across, each with its interval."""
  rows = list(run.rows)
  for other in others:
    reference, row = findings.measured(other)
    rows += [row] if row is not None else []
  if not rows:
    return ''
  columns: dict[str, str] = {}
  for row in rows:
    for metric in row.metrics:
      unit = f' ({metric.unit})' if metric.unit else ''
      columns.setdefault(metric.name, metric.name + unit)
  head = ''.join(f'<th>{_path(row.name)}</th>' for row in rows)
  body = []
  for name, label in columns.items():
    cells = []
    for row in rows:
      found = findings.metric(row, name)
      value, _, interval = (
        results.cell(found).partition(' ') if found else ('', '', '')
      )
      small = f'<small>{text(interval)}</small>' if interval else ''
      exact = f' data-value="{found.value!r}"' if found else ''
      cells.append(
        f'<td data-metric="{text(name)}"{exact}>{text(value)}{small}</td>'
      )
    body.append(f'<tr><th>{text(label)}</th>{"".join(cells)}</tr>')
  notes = ''.join(
    f'<p class="note">{text(note)}</p>'
    for note in results.conventions(rows, list(columns))
  )
  return parts.section(
    'What does it cost in quality?',
    'In brackets: 95 % intervals, over blocks of tokens; those of the ratio '
    'are paired.',
    f'<div class="scroll"><table id="results"><thead><tr><th></th>{head}</tr>'
    f'</thead><tbody>{"".join(body)}</tbody></table></div>{notes}',
  )


def _cost(run: run_folder.RunData) -> str:
  """Seconds by block."""
  seconds = [block['seconds'] for block in run.blocks]
  if len(seconds) < 2:
    return ''
  drawn = charts.lines(
    [charts.Series(name='seconds', kind='s1', values=seconds)],
    [block['index'] for block in run.blocks],
    label='Seconds of work for each block',
    unit='s',
    zero=True,
    height=160,
    name='seconds',
  )
  return parts.section(
    'What did it cost to make?',
    f'{parts.duration(sum(seconds))} in all, '
    f'{statistics.median(seconds):.1f} s for the median block; the first also '
    'compiles.',
    parts.scroll(drawn),
  )


def _flags(run: run_folder.RunData) -> str:
  """The flags in force; those that were given are told by the command."""
  if not run.flags:
    return ''
  body = [
    [f'--{name}', run_folder.flag(run, name) or '\u2013'] for name in run.flags
  ]
  table = parts.table(['flag', 'value'], body, 'flags', words=True)
  return parts.section('Resolved flags', '', parts.scroll(table))


def _environment(run: run_folder.RunData) -> str:
  """What repeats the run."""
  body = [['command', run_folder.command_of(run)]]
  if run.info is not None:
    body += [
      ['commit', run.info.commit],
      ['device', run.info.device],
      ['JAX', run.info.jax],
      ['Python', run.info.python],
    ]
  body = [[name, value] for name, value in body if value]
  body.append(['folder', str(run.path)])
  table = parts.table(['', ''], body, 'environment', words=True)
  return parts.section('Environment', '', parts.scroll(table))


def _path(name: str) -> str:
  """A model's name that may break at its slashes."""
  return text(name).replace('/', '/<wbr>')
