"""The one schema of every result: what was run, and what was measured.

A `Result` is one JSON file: a `RunInfo` (versions, device, commit, command and
resolved flags: enough to run it again) and rows, one per model or setting, of
`Metric`s. A metric carries its conventions (corpus, window, BOS, dtype, ...),
since a perplexity without them can be compared with nothing. Tables in the
terminal, in Markdown and in docs/ are all made from these rows.
"""

import dataclasses
import json
import math
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxq.eval import bootstrap

SCHEMA_VERSION = 1
_UPRIGHT = 3  # Rows that stand side by side in 80 columns.
_VERSION = 'schema_version'
_NON_FINITE = {'nan': math.nan, 'inf': math.inf, '-inf': -math.inf}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunInfo:
  """What ran: jax, python: versions. device: kind x count. flags: resolved."""

  jax: str
  python: str
  device: str
  commit: str
  command: str
  flags: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
  """One measured number.

  Attributes:
    name: what was measured: 'perplexity', 'bits per weight'.
    value: the number; a diverged one may be inf or nan.
    low, high: ends of its confidence interval, both or neither.
    unit: '' where the number has none.
    conventions: what it depends on, by name: corpus, window, bos, dtype.
  """

  name: str
  value: float
  low: float | None = None
  high: float | None = None
  unit: str = ''
  conventions: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if not isinstance(self.name, str) or not self.name:
      raise ValueError(
        f'Metric: name={self.name!r}; allowed is a text that is not empty. '
        'Say what was measured.'
      )
    for field in ('value', 'low', 'high'):
      number = getattr(self, field)
      if number is None and field != 'value':
        continue
      if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(
          f'Metric {self.name!r}: {field} is a {type(number).__name__}; '
          'allowed is a Python number. Convert it with float().'
        )
    if (self.low is None) != (self.high is None):
      raise ValueError(
        f'Metric {self.name!r}: low={self.low}, high={self.high}; an interval '
        'has both ends or none. Give the other one too.'
      )
    if self.low is not None and self.high is not None and self.low > self.high:
      raise ValueError(
        f'Metric {self.name!r}: low={self.low} is above high={self.high}; '
        'low <= high is needed. Swap them.'
      )

  @classmethod
  def of(
    cls,
    name: str,
    found: bootstrap.Interval,
    conventions: Mapping[str, Any],
    unit: str = '',
  ) -> 'Metric':
    """A value with the interval that was found for it."""
    return cls(
      name=name,
      value=found.value,
      low=found.low,
      high=found.high,
      unit=unit,
      conventions=dict(conventions),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """The metrics of one model or setting; `name` labels its line of a table."""

  name: str
  metrics: tuple[Metric, ...]

  def __post_init__(self):
    names = [metric.name for metric in self.metrics]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
      raise ValueError(
        f'Row {self.name!r}: metrics {twice} are given twice; a metric stands '
        'once in a row. Use two rows, or two names.'
      )

  def __getitem__(self, name: str) -> Metric:
    """The metric of that name; KeyError lists those that are there."""
    for metric in self.metrics:
      if metric.name == name:
        return metric
    raise KeyError(f'{name!r}; row {self.name!r} has {self._names()}')

  def _names(self) -> list[str]:
    return [metric.name for metric in self.metrics]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """Everything that one run measured."""

  run: RunInfo
  rows: tuple[Row, ...]


def run_info(flags: Mapping[str, Any] | None = None) -> RunInfo:
  """Describes this process; `flags` as from `cli.resolved_flags()`."""
  devices = jax.devices()
  return RunInfo(
    jax=jax.__version__,
    python=platform.python_version(),
    device=f'{devices[0].device_kind} x {len(devices)}',
    commit=_commit(),
    command=command(),
    flags=dict(flags or {}),
  )


def command() -> str:
  """The command line, with the module's name where `python -m` was used."""
  spec = getattr(sys.modules.get('__main__'), '__spec__', None)
  program = ['-m', spec.name] if spec else sys.argv[:1]
  return shlex.join(['python', *program, *sys.argv[1:]])


def save(path: str | os.PathLike, result: Result) -> None:
  """Writes `result` as JSON, atomically: the old file or all of the new one."""
  data = {_VERSION: SCHEMA_VERSION, **_encode(result)}
  text = json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False)
  write_text(path, text + '\n')


def load(path: str | os.PathLike) -> Result:
  """Reads and checks what `save` wrote.

  Args:
    path: the JSON file.

  Returns:
    The result, equal to the one saved.

  Raises:
    OSError: the file cannot be read.
    ValueError: it is not JSON, or not of this schema.
  """
  text = pathlib.Path(path).read_text(encoding='utf-8')
  try:
    data = json.loads(text)
  except json.JSONDecodeError as e:
    raise ValueError(
      f'{path}: not JSON ({e}); a result file is needed. Write it again.'
    ) from e
  version = data.get(_VERSION) if isinstance(data, dict) else None
  if version != SCHEMA_VERSION:
    raise ValueError(
      f'{path}: schema_version={version!r}; this jaxq reads '
      f'{SCHEMA_VERSION}. Run the measurement again, or use the jaxq that '
      'wrote it.'
    )
  where = str(path)
  fields = _fields(Result, {k: data[k] for k in data if k != _VERSION}, where)
  run = RunInfo(**_fields(RunInfo, fields['run'], f'{where}: run'))
  rows = []
  for i, row in enumerate(_sequence(fields['rows'], f'{where}: rows')):
    row = _fields(Row, row, f'{where}: rows[{i}]')
    metrics = tuple(
      _decode_metric(metric, f'{where}: rows[{i}].metrics[{j}]')
      for j, metric in enumerate(
        _sequence(row['metrics'], f'{where}: rows[{i}].metrics')
      )
    )
    rows.append(Row(name=row['name'], metrics=metrics))
  return Result(run=run, rows=tuple(rows))


def to_markdown(rows: Sequence[Row], *, upright: bool = False) -> str:
  """The table of `rows`, and below it the conventions of its metrics.

  Columns are the metrics in the order they are first seen, padded, so that the
  text reads as well in a terminal. A cell is the value, and its confidence
  interval where it has one. Conventions that differ between rows are listed
  per row: such numbers cannot be compared.

  Args:
    rows: what was measured.
    upright: a line per metric and a column per row, which fits a terminal.
  """
  columns: dict[str, str] = {}
  for row in rows:
    for metric in row.metrics:
      unit = f' ({metric.unit})' if metric.unit else ''
      columns.setdefault(metric.name, metric.name + unit)
  cells = [['', *columns.values()]]
  for row in rows:
    found = {metric.name: cell(metric) for metric in row.metrics}
    cells.append([row.name, *(found.get(name, '') for name in columns)])
  if upright:
    cells = [list(column) for column in zip(*cells, strict=True)]
  widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
  rule = ['-' * widths[0], *('-' * (w - 1) + ':' for w in widths[1:])]
  cells.insert(1, rule)
  lines = ['| ' + ' | '.join(_pad(line, widths)) + ' |' for line in cells]
  notes = conventions(rows, list(columns))
  return '\n'.join(lines + ([''] + notes if notes else [])) + '\n'


def print_table(rows: Sequence[Row], title: str = '') -> None:
  """Prints the table, on process 0 only; upright where rows are few."""
  if jax.process_index() == 0:
    table = to_markdown(rows, upright=len(rows) <= _UPRIGHT)
    print((title + '\n\n' if title else '') + table, flush=True)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a file atomically: complete under its name, or not there at all."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
  try:
    with open(partial, 'w', encoding='utf-8') as f:
      f.write(text)
      f.flush()
      os.fsync(f.fileno())
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def _encode(value: Any) -> Any:
  """Plain JSON data; inf and nan as text, since JSON has no such numbers."""
  if dataclasses.is_dataclass(value):
    fields = dataclasses.fields(value)
    return {f.name: _encode(getattr(value, f.name)) for f in fields}
  if isinstance(value, Mapping):
    return {str(key): _encode(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_encode(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  if value is None or isinstance(value, bool | int | float | str):
    return value
  return str(value)


def _decode_metric(data: Any, where: str) -> Metric:
  fields = _fields(Metric, data, where)
  for name in ('value', 'low', 'high'):
    if isinstance(fields.get(name), str):
      fields[name] = _NON_FINITE.get(fields[name], fields[name])
  try:
    return Metric(**fields)
  except (TypeError, ValueError) as e:
    raise ValueError(f'{where}: {e}') from e


def _fields(cls: type, data: Any, where: str) -> dict[str, Any]:
  """The fields of dataclass `cls` found in `data`; complete and no others."""
  if not isinstance(data, dict):
    raise ValueError(
      f'{where}: a {type(data).__name__}; allowed is an object with the fields '
      f'of {cls.__name__}. Write the file again.'
    )
  fields = dataclasses.fields(cls)
  needed = {
    f.name
    for f in fields
    if f.default is dataclasses.MISSING
    and f.default_factory is dataclasses.MISSING
  }
  unknown = sorted(data.keys() - {f.name for f in fields})
  missing = sorted(needed - data.keys())
  if unknown or missing:
    raise ValueError(
      f'{where}: unknown fields {unknown}, missing fields {missing}; allowed '
      f'are {[f.name for f in fields]}. Write the file again.'
    )
  return dict(data)


def _sequence(data: Any, where: str) -> list[Any]:
  if not isinstance(data, list):
    raise ValueError(
      f'{where}: a {type(data).__name__}; allowed is a list. Write the file '
      'again.'
    )
  return data


def cell(metric: Metric) -> str:
  """A metric as it stands in a table: value and interval."""
  if metric.low is None or metric.high is None:
    return _number(metric.value)
  return (
    f'{_number(metric.value)} [{_number(metric.low)}, {_number(metric.high)}]'
  )


def _number(value: float) -> str:
  """Four significant digits, without exponents in the everyday range."""
  if isinstance(value, int):
    return f'{value:,}'
  size = abs(value)
  if not math.isfinite(value) or (size and not 1e-4 <= size < 1e6):
    return f'{value:.3g}'
  if size >= 1000:
    return f'{value:,.0f}'
  digits = 3 - math.floor(math.log10(size)) if size else 0
  return f'{value:.{max(digits, 0)}f}'


def _pad(line: Sequence[str], widths: Sequence[int]) -> list[str]:
  """The first column to the left, numbers to the right."""
  padded = [cell.rjust(w) for cell, w in zip(line, widths, strict=True)]
  return [line[0].ljust(widths[0]), *padded[1:]]


def conventions(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
  """One line per set of conventions: the columns (and rows) it holds for."""
  by_text: dict[str, list[str]] = {}
  for column in columns:
    texts: dict[str, list[str]] = {}
    for row in rows:
      for metric in row.metrics:
        if metric.name == column and metric.conventions:
          pairs = metric.conventions.items()
          text = ', '.join(f'{key}={value}' for key, value in pairs)
          texts.setdefault(text, []).append(row.name)
    for text, names in texts.items():
      label = f'{column} of {", ".join(names)}' if len(texts) > 1 else column
      by_text.setdefault(text, []).append(label)
  return [f'{"; ".join(who)}: {text}.' for text, who in by_text.items()]


def _commit() -> str:
  """This checkout's commit, '-dirty' if changed; 'unknown' outside git."""
  root = pathlib.Path(__file__).resolve().parents[1]
  if not (root / '.git').exists():  # Installed, perhaps inside another repo.
    return 'unknown'
  describe = ['git', 'describe', '--always', '--dirty', '--abbrev=40']
  try:
    done = subprocess.run(
      [*describe, '--exclude=*'],
      cwd=root,
      capture_output=True,
      text=True,
      check=True,
      timeout=10,
    )
  except (OSError, subprocess.SubprocessError):
    return 'unknown'
  return done.stdout.strip()
