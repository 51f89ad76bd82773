"""The folder OUTPUT.run beside a quantized model: what a run left to read.

  resolved.flags       a flagfile that repeats the run
  run.json             versions, device, commit, command, number of blocks
  blocks.jsonl         one line per finished block: errors, bits, seconds
  channels/00000.npz   per block: absmax of each tap's channels, before, after
  results.json         what was measured (experiments.results)
  sensitivity.json     per linear, if experiments.sensitivity put one there
  report.html          all of it, to look at

A folder of an older version lacks some of them; whatever is there is read. The
calibration appends to it block by block, so a reader may meet a run that is
going on, or one that was killed while it wrote a line.
"""

import dataclasses
import json
import math
import os
import pathlib
import shlex
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import results

# {tap: (before, after)}, each (K,): absmax per channel.
Channels = Mapping[str, tuple[np.ndarray, np.ndarray]]

_BLOCKS = 'blocks'
_SENSITIVITY = 'sensitivity.json'
_FIELDS = {'index', 'output_sqnr_db', 'seconds', 'linears'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunData:
  """What a run folder holds.

  Attributes:
    path: the folder.
    blocks: lines of blocks.jsonl, by index.
    channels: per block index, {tap: (before, after)}; {} for older runs.
    info: what ran; None where neither run.json nor results.json is there.
    rows: of results.json; () if the model was not measured.
    flags: {name: value}, the values as text where only the flagfile tells them.
    num_blocks: of the model; None where run.json does not tell it.
    sensitivity: the rows of sensitivity.json, (linear, scheme, KL).
    damaged: what could not be read, one sentence each.
  """

  path: pathlib.Path
  blocks: tuple[Mapping[str, Any], ...]
  channels: Mapping[int, Channels]
  info: results.RunInfo | None
  rows: tuple[results.Row, ...]
  flags: Mapping[str, Any]
  num_blocks: int | None = None
  sensitivity: tuple[tuple[str, str, float], ...] = ()
  damaged: tuple[str, ...] = ()


def save_start(
  folder: pathlib.Path, info: results.RunInfo, model: str, num_blocks: int
) -> None:
  """Writes run.json, so that an unfinished run says what it is.

  Args:
    folder: the run folder.
    info: of this process.
    model: the source's name.
    num_blocks: of the model.
  """
  row = results.Row(
    name=model, metrics=(results.Metric(name=_BLOCKS, value=num_blocks),)
  )
  results.save(folder / 'run.json', results.Result(run=info, rows=(row,)))


def append_block(folder: pathlib.Path, report: Any) -> None:
  """Adds a finished block.

  Args:
    folder: the run folder; it exists.
    report: a driver.BlockReport.
  """
  line = {
    field.name: getattr(report, field.name)
    for field in dataclasses.fields(report)
    if field.name != 'channels'
  }
  line['linears'] = [dataclasses.asdict(linear) for linear in report.linears]
  if getattr(report, 'channels', None):
    _save_channels(folder, report.index, report.channels)
  with open(folder / 'blocks.jsonl', 'a', encoding='utf-8') as f:
    f.write(json.dumps(line) + '\n')


def keep_blocks(folder: pathlib.Path, done: int) -> None:
  """Drops what an earlier run, or the last moments of this one, left.

  Args:
    folder: the run folder.
    done: blocks below this index stay.
  """
  for name in ('results.json', 'report.html'):
    (folder / name).unlink(missing_ok=True)
  for path in (folder / 'channels').glob('*.npz'):
    if int(path.stem) >= done:
      path.unlink()
  path = folder / 'blocks.jsonl'
  if path.exists():
    lines = path.read_text('utf-8').splitlines(keepends=True)
    whole = [line for line in lines if line.endswith('\n')]
    kept = [line for line in whole if json.loads(line)['index'] < done]
    results.write_text(path, ''.join(kept))


def holds_run(folder: pathlib.Path) -> bool:
  """Whether there is something to report on."""
  names = ('blocks.jsonl', 'results.json')
  return any((folder / name).is_file() for name in names)


def load(folder: str | os.PathLike, sensitivity: str | None = None) -> RunData:
  """Reads a run folder, whatever it holds.

  Args:
    folder: OUTPUT.run, or OUTPUT itself.
    sensitivity: a sensitivity.json. None: the folder's own, or the one that
      lies beside the --bits_from of the run.

  Raises:
    FileNotFoundError: no such folder or file.
    ValueError: it holds nothing of a calibration, or a file is not of ours.
  """
  path = _find(pathlib.Path(folder))
  damaged: list[str] = []
  blocks = _load_blocks(path / 'blocks.jsonl', damaged)
  result = _load_result(path / 'results.json')
  started = _load_result(path / 'run.json')
  info = result.run if result else started.run if started else None
  flags = _load_flags(path / 'resolved.flags')
  if info is not None and info.flags:
    flags = dict(info.flags)
  return RunData(
    path=path,
    blocks=blocks,
    channels=_load_channels(path / 'channels', damaged),
    info=info,
    rows=result.rows if result else (),
    flags=flags,
    num_blocks=_num_blocks(started),
    sensitivity=_load_sensitivity(_sensitivity_file(path, flags, sensitivity)),
    damaged=tuple(damaged),
  )


def _find(folder: pathlib.Path) -> pathlib.Path:
  """The run folder that was meant."""
  for path in (folder, folder.with_name(folder.name + '.run')):
    if holds_run(path):
      return path
  if not folder.exists():
    raise FileNotFoundError(
      f'--run={folder}: no such folder; a run folder is OUTPUT.run beside the '
      'OUTPUT of experiments.calibrate. Give its path.'
    )
  raise ValueError(
    f'--run={folder}: holds neither blocks.jsonl nor results.json; a run '
    'folder is OUTPUT.run beside the OUTPUT of experiments.calibrate. Give its '
    'path.'
  )


def _load_blocks(path: pathlib.Path, damaged: list[str]) -> tuple:
  """The lines by index; the last one of an index counts."""
  if not path.exists():
    return ()
  found = {}
  lines = path.read_text('utf-8').splitlines()
  for number, line in enumerate(lines, 1):
    try:
      block = json.loads(line)
    except json.JSONDecodeError as e:
      if number == len(lines):  # Killed while it wrote.
        damaged.append(f'The last line of {path.name} is cut off.')
        continue
      raise ValueError(
        f'{path}, line {number}: not JSON ({e}); it is written by '
        'experiments.calibrate only. Run the calibration again.'
      ) from e
    missing = _FIELDS - block.keys() if isinstance(block, dict) else _FIELDS
    if missing:
      raise ValueError(
        f'{path}, line {number}: fields {sorted(missing)} are missing; it is '
        'written by experiments.calibrate only. Run the calibration again.'
      )
    found[block['index']] = block
  return tuple(found[i] for i in sorted(found))


def _load_result(path: pathlib.Path) -> results.Result | None:
  return results.load(path) if path.exists() else None


def _num_blocks(started: results.Result | None) -> int | None:
  if started is None or not started.rows:
    return None
  found = {m.name: m.value for m in started.rows[0].metrics}
  return int(found[_BLOCKS]) if _BLOCKS in found else None


def _load_flags(path: pathlib.Path) -> dict[str, Any]:
  """A flagfile as {name: text}; repeated flags become a list."""
  found: dict[str, Any] = {}
  if not path.exists():
    return found
  for line in path.read_text('utf-8').splitlines():
    if not line.startswith('--'):
      continue
    name, equals, value = line[2:].partition('=')
    text: Any = value
    if not equals:
      name, text = (name[2:], 'false') if name.startswith('no') else (name, '')
      text = text or 'true'
    if name in found:
      before = found[name] if isinstance(found[name], list) else [found[name]]
      text = [*before, text]
    found[name] = text
  return found


def command_of(run: RunData) -> str:
  """The command line; of an older run the head of its flagfile."""
  if run.info is not None:
    return run.info.command
  path = run.path / 'resolved.flags'
  if path.exists():
    first = path.read_text('utf-8').split('\n', 1)[0]
    if first.startswith('# '):
      return first[2:]
  return ''


def flag(run: RunData, name: str, default: str = '') -> str:
  """A flag's value as text; lists with commas."""
  value = run.flags.get(name)
  if value is None:
    value = _from_command(run, name)
  if value is None:
    return default
  if isinstance(value, bool):
    return 'true' if value else 'false'
  if isinstance(value, list | tuple):
    return ','.join(str(item) for item in value)
  return str(value)


def _from_command(run: RunData, name: str) -> str | None:
  try:
    words = shlex.split(command_of(run))
  except ValueError:
    return None
  found = [w for w in words if w.startswith(f'--{name}=')]
  return found[-1].partition('=')[2] if found else None


def _save_channels(
  folder: pathlib.Path, index: int, channels: Channels
) -> None:
  """Writes channels/<index>.npz, whole or not at all."""
  path = folder / 'channels' / f'{index:05d}.npz'
  path.parent.mkdir(parents=True, exist_ok=True)
  arrays: dict[str, Any] = {}
  for tap, (before, after) in channels.items():
    arrays[f'{tap}/before'] = np.asarray(before, np.float32)
    arrays[f'{tap}/after'] = np.asarray(after, np.float32)
  partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
  try:
    with open(partial, 'wb') as f:
      np.savez_compressed(f, **arrays)
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def _load_channels(
  folder: pathlib.Path, damaged: list[str]
) -> dict[int, Channels]:
  found: dict[int, Channels] = {}
  for path in sorted(folder.glob('*.npz')):
    try:
      with np.load(path) as arrays:
        taps = sorted({name.rpartition('/')[0] for name in arrays.files})
        found[int(path.stem)] = {
          tap: (arrays[f'{tap}/before'], arrays[f'{tap}/after']) for tap in taps
        }
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
      damaged.append(f'channels/{path.name} cannot be read.')
  return found


def _sensitivity_file(
  folder: pathlib.Path, flags: Mapping[str, Any], given: str | None
) -> pathlib.Path | None:
  """The one that was given, or the one that belongs to the run."""
  if given is not None:
    if not pathlib.Path(given).is_file():
      raise FileNotFoundError(
        f'--sensitivity={given}: no such file; it is the sensitivity.json that '
        'experiments.sensitivity writes. Give its path.'
      )
    return pathlib.Path(given)
  candidates = [folder / _SENSITIVITY]
  if flags.get('bits_from'):
    candidates.append(pathlib.Path(flags['bits_from']).parent / _SENSITIVITY)
  return next((path for path in candidates if path.is_file()), None)


def _load_sensitivity(path: pathlib.Path | None) -> tuple:
  """(linear, scheme, KL) from sensitivity.json, greatest KL first."""
  if path is None:
    return ()
  try:
    data = json.loads(path.read_text('utf-8'))
    rows = [
      (str(row['name']), str(row['scheme']), float(row['kl']))
      for row in data['layers']
    ]
  except (KeyError, TypeError, ValueError) as e:
    raise ValueError(
      f'{path}: not a sensitivity file ({e!r}); it holds {{"layers": [{{"name",'
      ' "scheme", "kl"}, ...]}. Write it again, or take it away.'
    ) from e
  return tuple(sorted(rows, key=lambda r: -r[2] if math.isfinite(r[2]) else 0))
