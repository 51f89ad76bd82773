"""Fingerprints of model files and code: quick, stable, without host or path."""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable

_MIB = 1 << 20
_ROOT = pathlib.Path(__file__).resolve().parents[2]
_PACKAGES = ('jaxq', 'models', 'pallas_kernels')


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


def code_hash() -> str:
  """SHA-256 over the sources of the library and the models."""
  digest = hashlib.sha256()
  for package in _PACKAGES:
    for path in sorted((_ROOT / package).rglob('*.py')):
      digest.update(str(path.relative_to(_ROOT)).encode())
      digest.update(path.read_bytes())
  return digest.hexdigest()
