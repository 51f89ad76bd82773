"""Documents: where the text of a calibration or an evaluation comes from.

A source is `wiki-sample:calibration`, `wiki-sample:evaluation`, a .txt file
(one document), a .jsonl file (one document a line, in the field `text`), or a
folder, searched for both in the order of their names.
"""

import json
import pathlib
from collections.abc import Iterator

from jaxq.data import wiki

SUFFIXES = ('.jsonl', '.txt')
_WIKI = 'wiki-sample'


def read(source: str) -> Iterator[str]:
  """Yields the documents of a source that are not blank.

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: unknown split or suffix, no document at all, text that is not
      UTF-8, or a line that is not a JSON object with a string `text`.
  """
  empty = True
  for document in _documents(source):
    if document.strip():
      empty = False
      yield document
  if empty:
    raise ValueError(
      f'{source}: holds no text; at least one document that is not blank is '
      'needed. Give another file.'
    )


def _documents(source: str) -> Iterator[str]:
  name, _, split = source.partition(':')
  if name == _WIKI:
    for title, text in wiki.wiki_articles(split):
      yield f'{title}\n\n{text}'
    return
  path = pathlib.Path(source).expanduser()
  if path.is_dir():
    paths = sorted(p for p in path.rglob('*') if p.suffix in SUFFIXES)
    if not paths:
      raise ValueError(
        f'{source}: the folder holds no {" or ".join(SUFFIXES)} file; put the '
        'text there or give another folder.'
      )
  else:
    paths = [path]
  for file in paths:
    yield from _read_file(file)


def _read_file(path: pathlib.Path) -> Iterator[str]:
  if not path.is_file():
    raise FileNotFoundError(
      f'{path}: no such file or folder; data is a path to {", ".join(SUFFIXES)}'
      f' or a folder of those, or {_WIKI}:SPLIT with SPLIT one of '
      f'{sorted(wiki.SPLITS)}.'
    )
  if path.suffix not in SUFFIXES:
    raise ValueError(
      f'{path}: ends in {path.suffix!r}; allowed are {list(SUFFIXES)}. Rename '
      'or convert the file.'
    )
  if path.suffix == '.txt':
    yield _decode(path.read_bytes(), str(path))
    return
  with path.open('rb') as file:
    for number, line in enumerate(file, start=1):
      if line.strip():
        yield _parse_line(line, f'{path}, line {number}')


def _parse_line(line: bytes, where: str) -> str:
  try:
    row = json.loads(_decode(line, where))
  except json.JSONDecodeError as e:
    raise ValueError(
      f'{where}: is not JSON ({e.msg} at column {e.colno}); each line of a '
      '.jsonl file is one object. Correct the line.'
    ) from e
  if not isinstance(row, dict) or not isinstance(row.get('text'), str):
    found = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise ValueError(
      f'{where}: has no string field "text" (found {found}); each line is an '
      'object with one. Rename the field.'
    )
  return row['text']


def _decode(data: bytes, where: str) -> str:
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as e:
    raise ValueError(
      f'{where}: is not UTF-8 (byte {e.start}); text must be UTF-8. Convert '
      'the file.'
    ) from e
