"""The folder of a training: what is in it and how it gets there.

  config.json     what `claim` was given; another one is refused
  state/          the last checkpoint (Orbax), until the run is complete
  params/         the parameters (Orbax), when it is
  metrics.jsonl   a line per report

All of it is written by process 0; every tree arrives by a rename.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxq.io import manifest, trees

STATE, PARAMS, CONFIG = 'state', 'params', 'config.json'
_METRICS = 'metrics.jsonl'


def is_complete(folder: str | os.PathLike) -> bool:
  """Whether the parameters are there."""
  return (pathlib.Path(folder) / PARAMS / trees.STRUCTURE).is_file()


def content_hash(description: Mapping[str, Any]) -> str:
  """16 hexadecimal digits of a description in JSON's types."""
  text = json.dumps(description, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def claim(folder: pathlib.Path, description: Mapping[str, Any]) -> None:
  """Writes config.json, or checks that it is this one.

  Raises:
    ValueError: it is of another job; the message names what differs.
  """
  path = folder / CONFIG
  if not path.is_file():
    if jax.process_index() == 0:
      folder.mkdir(parents=True, exist_ok=True)
      manifest.write_json(path, description)
    return
  found = manifest.read_json(path)
  if found != description:
    different = sorted(
      f'{group}.{name}'
      for group, fields in description.items()
      for name, value in fields.items()
      if found.get(group, {}).get(name) != value
    )
    raise ValueError(
      f'{folder}: holds the training of another model, which differs in '
      f'{", ".join(different)}; a folder is of one. Give another --output.'
    )


def log(folder: pathlib.Path, progress: Any) -> None:
  """Adds a line, the fields of a dataclass."""
  if jax.process_index() == 0:
    with open(folder / _METRICS, 'a', encoding='utf-8') as f:
      f.write(json.dumps(dataclasses.asdict(progress)) + '\n')


def save(folder: pathlib.Path, state: Mapping[str, Any]) -> None:
  """Replaces the checkpoint; a kill leaves the old or the new one."""
  if jax.process_index() == 0:
    _write_tree(folder / STATE, dict(state))


def restore(
  folder: pathlib.Path, phases: Sequence[str]
) -> dict[str, Any] | None:
  """The last checkpoint; log lines behind it are dropped.

  Args:
    folder: of the training.
    phases: names of the phases in order; a checkpoint and a line know theirs.
  """
  for name in ('state', '.state.partial', '.state.old'):
    # Killed between two renames, a whole one has another name.
    if (folder / name / trees.STRUCTURE).is_file():
      saved = trees.load(folder / name)
      break
  else:
    saved = None
  path = folder / _METRICS
  if jax.process_index() == 0 and path.is_file():
    kept = []
    for line in path.read_text('utf-8').splitlines(keepends=True):
      if line.endswith('\n') and saved is not None:
        read = json.loads(line)
        at = (phases.index(read['phase']), read['step'])
        if at <= (int(saved['phase']), int(saved['step'])):
          kept.append(line)
    path.write_text(''.join(kept), 'utf-8')
  return saved


def finish(folder: pathlib.Path, params: Mapping[str, Any]) -> None:
  """Writes the parameters; then the checkpoint is of no more use."""
  if jax.process_index() == 0:
    _write_tree(folder / PARAMS, dict(params))
    shutil.rmtree(folder / STATE, ignore_errors=True)


def _write_tree(path: pathlib.Path, tree: dict[str, Any]) -> None:
  partial = path.with_name(f'.{path.name}.partial')
  old = path.with_name(f'.{path.name}.old')
  for leftover in (partial, old):
    shutil.rmtree(leftover, ignore_errors=True)
  partial.mkdir(parents=True)
  trees.save(partial, tree)
  if path.exists():
    os.replace(path, old)
  os.replace(partial, path)
  shutil.rmtree(old, ignore_errors=True)
