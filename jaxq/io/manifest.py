"""The manifest of a jaxq directory: what is in it, and is it all there.

manifest.json is written last and atomically, so its presence means that the
directory is complete:

  format, version   'jaxq' and the version of the layout; `read_manifest`
                    brings an older version up to date, one step at a time
  fingerprint       what the run depended on: a flat dict of strings
  model             {'family': ..., 'config': {...}}
  quantization      the scheme and the method, as the run described them
  num_blocks        blocks/00000 .. blocks/{num_blocks - 1}
  files             every other file: {path: {'sha256': ..., 'size': ...}}

It holds no time, host or path, and its keys are sorted: equal runs write
equal bytes.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

FORMAT = 'jaxq'
VERSION = 1
MANIFEST = 'manifest.json'
TEMPORARY = '.tmp-'  # Prefix of whatever is not finished yet.

# {version: function that turns a manifest of it into one of version + 1}.
MIGRATIONS: dict[int, Callable[[dict], dict]] = {}

_REQUIRED = ('files', 'fingerprint', 'model', 'num_blocks', 'quantization')
_SHOWN = 48  # Characters of a fingerprint's value in a message.


def read_manifest(directory: str | os.PathLike) -> dict[str, Any]:
  """The manifest of `directory`, brought to the present version.

  Raises:
    FileNotFoundError: there is no such directory.
    ValueError: not a jaxq directory, a damaged manifest, or one written by a
      later version of jaxq.
  """
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise FileNotFoundError(
      f'{directory}: no such directory; give one that jaxq wrote.'
    )
  path = directory / MANIFEST
  if not path.is_file():
    raise ValueError(
      f'{directory} is not a finished jaxq directory: it has no {MANIFEST}. '
      'Give one that jaxq wrote, or run the command that was writing it again.'
    )
  manifest = read_json(path)
  if not isinstance(manifest, dict) or manifest.get('format') != FORMAT:
    raise ValueError(
      f"{path} is not a jaxq manifest: 'format' must be {FORMAT!r}. "
      'Give a directory that jaxq wrote.'
    )
  version = check_version(path, manifest.get('version'), VERSION)
  for step in range(version, VERSION):
    manifest = MIGRATIONS[step](manifest) | {'version': step + 1}
  missing = sorted(set(_REQUIRED) - set(manifest))
  if missing:
    raise ValueError(
      f'{path} is damaged: {missing} missing; copy or make it again.'
    )
  return manifest


def check_version(path: pathlib.Path, version: Any, known: int) -> int:
  """`version`; ValueError unless it is one that this code can read."""
  if not isinstance(version, int) or version < 1:
    raise ValueError(
      f'{path}: version={version!r}; allowed 1..{known}. The file is damaged; '
      'copy or make it again.'
    )
  if version > known:
    raise ValueError(
      f'{path}: version={version}, and this jaxq reads 1..{known}; it was '
      'written by a later jaxq. Upgrade jaxq to read it.'
    )
  return version


def read_json(path: pathlib.Path) -> Any:
  """The JSON value in a file; ValueError if it was cut off or garbled."""
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(
      f'{path} is damaged: not JSON ({error}); copy or make it again.'
    ) from error


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes `value` atomically: after a crash the file is whole or absent."""
  text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False)
  write_text(path, text + '\n')


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes `text` atomically, as `write_json` does."""
  temporary = path.with_name(TEMPORARY + path.name)
  try:
    with open(temporary, 'w', encoding='utf-8', newline='') as f:
      f.write(text)
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
  sync(path.parent)


def sync(path: pathlib.Path) -> None:
  """Flushes one file, or one directory's list of names, to the disk."""
  fd = os.open(path, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


def sync_tree(directory: pathlib.Path) -> None:
  """Flushes all files and directories under and including `directory`."""
  for path in directory.rglob('*'):
    sync(path)
  sync(directory)


def remove_temporary(directory: pathlib.Path) -> None:
  """Removes what a killed run left half-written in `directory`."""
  for path in directory.glob(TEMPORARY + '*'):
    if path.is_dir():
      shutil.rmtree(path)
    else:
      path.unlink()


def file_records(
  directory: pathlib.Path, base: pathlib.Path | None = None
) -> dict[str, dict[str, Any]]:
  """{path relative to `base` or `directory`: sha256 and size} of all files."""
  return {
    path.relative_to(base or directory).as_posix(): file_record(path)
    for path in sorted(directory.rglob('*'))
    if path.is_file()
  }


def file_record(path: pathlib.Path) -> dict[str, Any]:
  """{'sha256': ..., 'size': ...} of one file."""
  with open(path, 'rb') as f:
    digest = hashlib.file_digest(f, 'sha256').hexdigest()
  return {'sha256': digest, 'size': path.stat().st_size}


def check_files(
  directory: pathlib.Path,
  files: dict[str, dict[str, Any]],
  contents: bool = False,
) -> None:
  """Raises ValueError naming the first file that is not as recorded.

  Args:
    directory: what the paths in `files` are relative to.
    files: as `file_records` gives them.
    contents: also read every file and compare checksums.
  """
  for name, record in sorted(files.items()):
    path = directory / name
    if not path.is_file():
      raise ValueError(f'{path} is missing; copy or make it again.')
    size = path.stat().st_size
    if size != record['size']:
      raise ValueError(
        f'{path} is damaged: it has {size} bytes and should have '
        f'{record["size"]}; copy or make it again.'
      )
    if contents and file_record(path) != record:
      raise ValueError(
        f'{path} is damaged: its SHA-256 is not the recorded one; copy or make '
        'it again.'
      )


def check_fingerprint(fingerprint: Any) -> None:
  """Raises TypeError unless it is a flat dict of strings."""
  if not isinstance(fingerprint, dict) or not all(
    isinstance(k, str) and isinstance(v, str) for k, v in fingerprint.items()
  ):
    raise TypeError(
      f'fingerprint={fingerprint!r}; it must be a flat dict of strings. '
      'Convert the values, or hash them.'
    )


def differences(there: dict[str, str], here: dict[str, str]) -> str:
  """'' if the fingerprints are equal, else the fields in which they differ."""
  return ', '.join(
    '{} ({} there, {} now)'.format(
      key, *_excerpts(there.get(key), here.get(key))
    )
    for key in sorted(set(there) | set(here))
    if there.get(key) != here.get(key)
  )


def _excerpts(a: str | None, b: str | None) -> tuple[str, str]:
  """Both values quoted and cut to the surroundings of the first difference."""
  first = len(os.path.commonprefix([a or '', b or '']))
  start = max(0, first - _SHOWN // 2)

  def excerpt(value):
    if value is None:
      return 'absent'
    if len(value) <= _SHOWN:
      return repr(value)
    end = start + _SHOWN
    head = '...' if start else ''
    tail = '...' if end < len(value) else ''
    return repr(head + value[start:end] + tail)

  return excerpt(a), excerpt(b)
