"""Fingerprints of model files: quick, stable, and free of absolute paths."""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable

_MIB = 1 << 20


def fingerprint(
  files: Iterable[tuple[str, pathlib.Path, int]], config: dict
) -> str:
  """sha256 over names, sizes, ends and headers of files, and the config.

  Reads the first MiB (more where the header is longer) and the last MiB of
  each file, so it takes milliseconds for a model of any size.

  Args:
    files: (name relative to the source, path, header bytes) per file.
    config: the source's configuration; must be JSON.

  Returns:
    64 hexadecimal digits.
  """
  digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
  for name, path, header_nbytes in sorted(files):
    size = path.stat().st_size
    digest.update(f'\n{name}:{size}\n'.encode())
    with path.open('rb') as file:
      digest.update(file.read(max(_MIB, header_nbytes)))
      file.seek(max(0, size - _MIB), os.SEEK_SET)
      digest.update(file.read(_MIB))
  return digest.hexdigest()
