"""The report's sections on blocks, weights, activations, experts, sensitivity.

Each is a function of a run folder's data that returns HTML, or '' where the run
has nothing for it.
"""

import statistics
from collections.abc import Sequence

from experiments import report_charts as charts
from experiments import report_findings as findings
from experiments import report_html as parts
from experiments import run_folder

_ROWS = 24  # Of the weight heat map; experts are merged above it.
_PANEL = 480  # Two stand side by side.
_OUTLIERS = 12
_SENSITIVE = 20
_SIDES = (('before', 'before'), ('after', 'after'))

text, number = charts.text, charts.number


def outputs(
  run: run_folder.RunData, others: Sequence[run_folder.RunData]
) -> str:
  """Output SQNR by block, beside round to nearest and other runs."""
  if not run.blocks:
    return ''
  columns = [block['index'] for block in run.blocks]
  series = []
  accumulated = findings.output_sqnr(run, 'stream_sqnr_db')
  if _any(accumulated):
    series.append(
      charts.Series(
        name='accumulated from the first block',
        kind='s3',
        values=accumulated,
      )
    )
  for i, other in enumerate(others[:3]):
    by_index = {b['index']: b['output_sqnr_db'] for b in other.blocks}
    series.append(
      charts.Series(
        name=f'{findings.method(other)}, {findings.scheme(other)}',
        kind=f's{4 + i}',
        values=[by_index.get(c) for c in columns],
      )
    )
  rtn = findings.output_sqnr(run, 'rtn_sqnr_db')
  if _any(rtn):
    series.append(charts.Series(name='round to nearest', kind='s2', values=rtn))
  series.append(
    charts.Series(
      name=f'{findings.method(run)} (this run)',
      kind='s1',
      values=findings.output_sqnr(run, 'output_sqnr_db'),
    )
  )
  drawn = charts.lines(
    series,
    columns,
    label='Output SQNR of each block in dB',
    unit='dB, higher is better',
    mark=findings.weakest(run, 3),
    name='output-sqnr',
  )
  entries = [(s.name, s.kind) for s in reversed(series)]
  head = ['block', *(s.name for s in reversed(series)), 'seconds']
  body = [
    [str(c), *(number(s.values[i]) for s in reversed(series))]
    + [number(run.blocks[i]['seconds'])]
    for i, c in enumerate(columns)
  ]
  explained = (
    'Signal to noise of each block\u2019s output, quantized against float, '
    'both fed the same input. The three weakest are numbered.'
  )
  if _any(rtn):
    explained += (
      ' Round to nearest: the untouched block in the same formats, with no '
      'method.'
    )
  if _any(accumulated):
    explained += (
      ' Accumulated: against the untouched model, with the noise of all blocks '
      'before.'
    )
  return parts.section(
    'Which blocks hurt?',
    explained,
    (charts.legend(entries) if len(entries) > 1 else '')
    + parts.scroll(drawn)
    + parts.details('The numbers', parts.table(head, body, 'blocks')),
  )


def weights(run: run_folder.RunData) -> str:
  """Weight SQNR of every linear, and what each kind stores."""
  found = findings.kinds(run)
  if not found:
    return ''
  columns = [block['index'] for block in run.blocks]
  names = [kind.name for kind in found]
  if len(names) > _ROWS:  # Experts: the weakest of each kind.
    names = list(dict.fromkeys(_merged(name) for name in names))
  levels: dict[tuple[str, int], float] = {}
  for block in run.blocks:
    for linear in block['linears']:
      name = findings.short(linear['name'])
      name = name if len(found) <= _ROWS else _merged(name)
      place = (name, block['index'])
      levels[place] = min(linear['sqnr_db'], levels.get(place, 1e9))
  drawn = charts.heat(
    [name.rsplit('.', 1)[-1] if len(set(_tails(names))) == len(names) else name
     for name in names],
    columns,
    [[levels.get((name, c)) for c in columns] for name in names],
    label='SQNR of the weights of each linear in each block, in dB',
    unit='dB',
    name='weight-sqnr',
  )  # fmt: skip
  shown = list(levels.values())
  scale = (
    '<div class="legend"><span>'
    f'{number(max(shown))} dB</span><span class="ramp">'
    + ''.join(f'<i class="h{i}"></i>' for i in range(charts.STEPS))
    + f'</span><span>{number(min(shown))} dB: most noise</span></div>'
  )
  body = [
    [
      kind.name,
      f'{kind.size:,}',
      number(kind.bits, 3),
      parts.bytes_of(kind.size * kind.bits / 8),
      number(kind.mean_sqnr_db),
      number(kind.min_sqnr_db),
      str(kind.worst),
    ]
    for kind in found
  ]
  head = ['linear', 'weights', 'bits', 'stored', 'mean dB', 'least dB', 'where']
  return parts.section(
    'Which weights are rounded hardest?',
    'SQNR of each kernel against its float one. A method that corrects later '
    'rows for earlier errors may lose here and still win at the output.',
    scale
    + parts.scroll(drawn)
    + parts.scroll(parts.table(head, body, 'linears')),
  )


def channels(run: run_folder.RunData) -> str:
  """Activation outliers, before and after."""
  taps = findings.taps(run)
  if not taps:
    return ''
  columns = [block['index'] for block in run.blocks]
  panels = []
  for tap in taps:
    drawn = charts.lines(
      [
        charts.Series(
          name=name, kind=kind, values=findings.outlier_ratio(run, tap, which)
        )
        for which, (name, kind) in enumerate(_SIDES)
      ],
      columns,
      label=f'Largest channel over the median channel at {_tap(tap)}',
      unit='largest / median channel',
      log=True,
      width=_PANEL,
      height=200,
      name=f'outliers {tap}',
    )
    panels.append(
      f'<figure><figcaption>{text(_tap(tap))}</figcaption>'
      f'{parts.scroll(drawn)}</figure>'
    )
  rows = findings.outliers(run, 1000)
  worst = rows[:_OUTLIERS]
  listed = '<p class="note">No channel exceeds ten times the median one.</p>'
  if worst:
    head = ['tap', 'channel', 'worst block', 'before', 'after', 'blocks']
    body = [
      [
        _tap(row.tap),
        str(row.channel),
        str(row.block),
        f'{number(row.before)} \u00d7',
        f'{number(row.after)} \u00d7',
        str(len(row.blocks)),
      ]
      for row in worst
    ]
    listed = (
      f'<h3>The largest of {len(rows)} outlier channels</h3><p>In medians of '
      'the channels of their tap; an outlier is at ten or more, in so many '
      f'blocks.</p>{parts.scroll(parts.table(head, body, "outliers"))}'
    )
  return parts.section(
    'Which channels are outliers, and what became of them?',
    'The largest magnitude of each channel of a linear\u2019s input on the '
    'first samples: in the untouched model, and where the quantized kernel '
    'reads it.',
    charts.legend(_SIDES)
    + f'<div class="panels">{"".join(panels)}</div>{listed}'
    + _profiles(run, worst),
  )


def _profiles(
  run: run_folder.RunData, worst: Sequence[findings.Outlier]
) -> str:
  """All channels of each tap with a far outlier, where it is farthest."""
  places: dict[str, int] = {}
  for row in worst:
    places.setdefault(row.tap, row.block)
  made = []
  for tap, block in places.items():
    before, after = run.channels[block][tap]
    drawn = charts.profile(
      before.tolist(),
      after.tolist(),
      label=f'absmax of every channel at {_tap(tap)} of block {block}',
      name=f'profile {block} {tap}',
    )
    made.append(
      f'<figure><figcaption>{text(_tap(tap))}, block {block}: every channel'
      f'</figcaption>{parts.scroll(drawn)}</figure>'
    )
  return ''.join(made)


def experts(run: run_folder.RunData) -> str:
  """How many calibration tokens were routed to the experts of each block."""
  found = {
    block['index']: sorted(block['expert_tokens'])
    for block in run.blocks
    if block.get('expert_tokens')
  }
  if not found:
    return ''
  least = [counts[0] for counts in found.values()]
  median = [statistics.median(counts) for counts in found.values()]
  most = [counts[-1] for counts in found.values()]
  series = [
    charts.Series(name='most', kind='s3', values=most),
    charts.Series(name='median', kind='s2', values=median),
    charts.Series(name='least', kind='s1', values=least),
  ]
  drawn = charts.lines(
    series,
    list(found),
    label='Calibration tokens routed to an expert, by block',
    unit='tokens',
    zero=True,
    name='experts',
  )
  head = ['block', 'experts', 'least', 'median', 'most', 'without any']
  body = [
    [
      str(index),
      str(len(counts)),
      f'{counts[0]:,}',
      f'{statistics.median(counts):,g}',
      f'{counts[-1]:,}',
      str(counts.count(0)),
    ]
    for index, counts in found.items()
  ]
  return parts.section(
    'Did every expert see enough tokens?',
    'Calibration tokens routed to the experts of each block. An expert that '
    'saw few is fitted to few: give more --sequences, or --experts=all.',
    charts.legend([(s.name, s.kind) for s in reversed(series)])
    + parts.scroll(drawn)
    + parts.details('The numbers', parts.table(head, body, 'experts')),
  )


def sensitivity(run: run_folder.RunData) -> str:
  """KL when only one linear is quantized."""
  if not run.sensitivity:
    return ''
  total: dict[str, float] = {}
  for _, scheme, kl in run.sensitivity:
    total[scheme] = total.get(scheme, 0.0) + kl
  coarsest = max(total, key=lambda scheme: total[scheme])
  found = [row for row in run.sensitivity if row[1] == coarsest]
  rows = found[:_SENSITIVE]
  drawn = charts.bars(
    [name for name, _, _ in rows],
    [max(kl, 0.0) for _, _, kl in rows],
    label='KL to the float model when only this linear is quantized',
    unit='nats',
    name='sensitivity',
  )
  more = len(found) - len(rows)
  note = f'<p class="note">and {more} more, all below.</p>' if more else ''
  return parts.section(
    'Which linears deserve more bits?',
    'KL to the float model, in nats a token, when only this one is quantized, '
    f'to {coarsest}.',
    parts.scroll(drawn) + note,
  )


def _tap(tap: str) -> str:
  """'attention/q_proj/in' -> 'input of attention.q_proj'."""
  path = tap.removesuffix('/in').replace('/', '.')
  return f'input of {path}' if tap.endswith('/in') else path


def _merged(name: str) -> str:
  """Experts under one name: 'experts.3.up' -> 'experts.*.up'."""
  return '.'.join('*' if part.isdigit() else part for part in name.split('.'))


def _tails(names: Sequence[str]) -> list[str]:
  return [name.rsplit('.', 1)[-1] for name in names]


def _any(values: Sequence[float | None]) -> bool:
  return any(value is not None for value in values)
