"""A quantized model on disk, written block by block and read block by block.

  OUTPUT/manifest.json      what is here (jaxq.io.manifest); written last
  OUTPUT/outside/           parameters outside the blocks
  OUTPUT/blocks/00000/ ...  {'params', 'quant'} of each block
  OUTPUT/tokenizer.json
  OUTPUT/in_progress.json   the run's fingerprint, until the manifest is there
  OUTPUT.lock               beside it, while a run is writing

`outside` and each block are Orbax directories as jaxq.io.trees writes them:
equal trees are equal bytes, and plain Orbax restores them too.

A block is written under a temporary name, flushed and renamed: it is there
whole or not at all. So a run killed at any moment goes on with the first block
that `has_block` denies, and ends with the bytes of an uninterrupted one.
Memory is that of one block. Several processes write through
jaxq.io.shared_checkpoint.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import tokenizers

from jaxq.io import manifest as manifest_lib
from jaxq.io import trees

IN_PROGRESS = 'in_progress.json'
TOKENIZER = 'tokenizer.json'
OUTSIDE = 'outside'

_RESERVED = frozenset(('format', 'version', 'fingerprint', 'files'))
_START_OVER = 'Choose another --output, or delete that directory.'


class Writer:
  """Writes one jaxq directory, going on where a killed run stopped.

  One process writes: of several, create it on process 0 only.

    with Writer(output, fingerprint) as writer:
      if not writer.complete:
        writer.save_outside(params)
        for i in range(num_blocks):
          if not writer.has_block(i):
            writer.save_block(i, {'params': ..., 'quant': ...})
        writer.finish({'model': ..., 'quantization': ...}, tokenizer_json)

  Attributes:
    directory: the absolute path.
    complete: True if the directory is finished; nothing more can be saved.
  """

  def __init__(
    self, directory: str | os.PathLike, fingerprint: dict[str, str]
  ) -> None:
    """Opens, resumes or starts `directory`.

    Args:
      directory: the output; made if absent, with its parents.
      fingerprint: all that the bytes depend on (data, flags, code, source,
        versions), as a flat dict of strings.

    Raises:
      ValueError: the directory is not empty and not of this run.
      OSError: another run is writing it, or it cannot be written.
    """
    manifest_lib.check_fingerprint(fingerprint)
    check_is_path(directory)
    self.directory = pathlib.Path(os.path.abspath(directory))
    self.complete = False
    self._fingerprint = dict(fingerprint)
    if self.directory.exists() and not self.directory.is_dir():
      raise ValueError(
        f'{self.directory} is a file; the output must be a directory. '
        'Choose another --output.'
      )
    self.directory.parent.mkdir(parents=True, exist_ok=True)
    self._lock: int | None = _lock(self._lock_path)
    try:
      self._open()
    except BaseException:
      self.close()
      raise

  def has_outside(self) -> bool:
    """Whether the parameters outside the blocks are saved."""
    return (self.directory / OUTSIDE / trees.STRUCTURE).is_file()

  def save_outside(self, tree: dict[str, Any]) -> None:
    """Saves the parameters outside the blocks; replaces saved ones."""
    self._save(OUTSIDE, tree)

  def load_outside(self) -> dict[str, Any]:
    """The saved parameters outside the blocks, as numpy arrays."""
    return trees.load(self.directory / OUTSIDE)

  def has_block(self, i: int) -> bool:
    """Whether block i is saved, which is to say all of it."""
    return (self.directory / block_name(i) / trees.STRUCTURE).is_file()

  def save_block(self, i: int, tree: dict[str, Any]) -> None:
    """Saves block i atomically; replaces a saved one.

    Raises:
      OSError: the disk is full or fails; what was saved before is untouched.
      TypeError, ValueError: a tree that `trees.split` refuses.
    """
    self._save(block_name(i), tree)

  def load_block(self, i: int) -> dict[str, Any]:
    """Block i as it was saved, with numpy arrays."""
    return trees.load(self.directory / block_name(i))

  def finish(
    self, manifest_extra: dict[str, Any], tokenizer_json: str | None
  ) -> None:
    """Writes the tokenizer and the manifest: the directory is complete.

    Args:
      manifest_extra: must hold 'model' ({'family': ..., 'config': {...}}) and
        'quantization'; 'num_blocks' if the config has no
        'num_hidden_layers'; what else it holds is kept.
      tokenizer_json: the text of tokenizer.json; None for a model without.

    Raises:
      ValueError: a block, the outside or a key of the manifest is missing.
      OSError: the disk is full or fails; calling again is safe.
    """
    self._check_writable()
    _check_extra(manifest_extra)
    expected = manifest_extra.get(
      'num_blocks', manifest_extra['model']['config'].get('num_hidden_layers')
    )
    names = [OUTSIDE, *(block_name(i) for i in range(expected))]
    files = {}
    for name in names:
      structure = self.directory / name / trees.STRUCTURE
      if not structure.is_file():
        raise ValueError(
          f'{self.directory}: {name} is missing and {expected} blocks must be '
          'saved before finish. Run the same command again.'
        )
      arrays = trees.read_structure(structure.parent)['files']
      for path, record in arrays.items():
        files[f'{name}/{path}'] = record
      files[f'{name}/{trees.STRUCTURE}'] = manifest_lib.file_record(structure)
    with _explain_full_disk(f'the manifest of {self.directory}'):
      if tokenizer_json is not None:
        tokenizer = self.directory / TOKENIZER
        manifest_lib.write_text(tokenizer, tokenizer_json)
        files[TOKENIZER] = manifest_lib.file_record(tokenizer)
      manifest_lib.write_json(
        self.directory / manifest_lib.MANIFEST,
        manifest_extra
        | {
          'format': manifest_lib.FORMAT,
          'version': manifest_lib.VERSION,
          'fingerprint': self._fingerprint,
          'num_blocks': expected,
          'files': files,
        },
      )
    self._set_complete()

  def close(self) -> None:
    """Lets other runs write this directory; loading still works."""
    if self._lock is not None:
      # Unlinked before it is released: see _lock.
      self._lock_path.unlink(missing_ok=True)
      os.close(self._lock)
      self._lock = None

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, *unused_exception) -> None:
    self.close()

  @property
  def _lock_path(self) -> pathlib.Path:
    return self.directory.with_name(self.directory.name + '.lock')

  def _open(self) -> None:
    """Finds out what the directory is, and makes it ours."""
    with _explain_full_disk(str(self.directory)):
      self.directory.mkdir(exist_ok=True)
      progress = self.directory / IN_PROGRESS
      if (self.directory / manifest_lib.MANIFEST).exists():
        found = manifest_lib.read_manifest(self.directory)
        self._check_same(found['fingerprint'], 'a finished run')
        manifest_lib.check_files(self.directory, found['files'])
        self._set_complete()
        return
      if progress.exists():
        found = manifest_lib.read_json(progress)
        if not isinstance(found, dict) or 'fingerprint' not in found:
          raise ValueError(
            f'{progress} is not of jaxq; the output must be a new or an empty '
            f'directory. {_START_OVER}'
          )
        self._check_same(found['fingerprint'], 'an unfinished run')
      else:
        self._check_empty()
      manifest_lib.remove_temporary(self.directory)
      if not progress.exists():
        head = {
          'format': manifest_lib.FORMAT,
          'version': manifest_lib.VERSION,
        }
        manifest_lib.write_json(
          progress, head | {'fingerprint': self._fingerprint}
        )
      (self.directory / 'blocks').mkdir(exist_ok=True)

  def _check_same(self, found: dict[str, str], what: str) -> None:
    differences = manifest_lib.differences(found, self._fingerprint)
    if differences:
      raise ValueError(
        f'{self.directory} holds {what} that differs from this one in '
        f'{differences}; one directory takes one run. {_START_OVER}'
      )

  def _check_empty(self) -> None:
    strangers = sorted(
      path.name
      for path in self.directory.iterdir()
      if not path.name.startswith(manifest_lib.TEMPORARY)
    )
    if strangers:
      raise ValueError(
        f'{self.directory} holds {strangers[:3]} and was not written by jaxq; '
        'the output must be a new or an empty directory. Choose another '
        '--output.'
      )

  def _check_writable(self) -> None:
    if self.complete or self._lock is None:
      state = 'complete' if self.complete else 'closed'
      raise ValueError(
        f'{self.directory} is {state}; nothing more can be saved. {_START_OVER}'
      )

  def _set_complete(self) -> None:
    """Tidies up after the manifest was written, by this or a killed run."""
    (self.directory / IN_PROGRESS).unlink(missing_ok=True)
    manifest_lib.remove_temporary(self.directory)
    manifest_lib.sync(self.directory)
    self.complete = True
    self.close()

  def _save(self, name: str, tree: dict[str, Any]) -> None:
    """Writes `tree` beside its place, then renames it there."""
    with self.replacing(name) as temporary:
      trees.save(temporary, tree)

  @contextlib.contextmanager
  def replacing(self, name: str) -> Iterator[pathlib.Path]:
    """An empty folder, which takes the place of `name` when the block ends.

    If the block fails the folder goes, and what was there before stays.

    Args:
      name: OUTSIDE, or of `block_name`.
    """
    self._check_writable()
    final = self.directory / name
    temporary = self.directory / (
      manifest_lib.TEMPORARY + name.replace('/', '-')
    )
    with _explain_full_disk(f'{name} of {self.directory}'):
      try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        if final.exists():
          replaced = temporary.with_name(temporary.name + '-replaced')
          os.rename(final, replaced)
          os.rename(temporary, final)
          shutil.rmtree(replaced)
        else:
          os.rename(temporary, final)
        manifest_lib.sync(final.parent)
      except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


class Checkpoint:
  """A finished jaxq directory: a weight source, read block by block.

  Attributes:
    directory: the path it was opened with.
    manifest: the whole manifest, in the present version.
  """

  def __init__(
    self, directory: str | os.PathLike, manifest: dict[str, Any]
  ) -> None:
    self.directory = pathlib.Path(directory)
    self.manifest = manifest

  @property
  def config(self) -> dict[str, Any]:
    """The model's configuration, in Hugging Face's key names."""
    return self.manifest['model']['config']

  @property
  def family(self) -> str:
    """Of models.loading.FAMILIES."""
    return self.manifest['model'].get('family', 'decoder')

  @property
  def num_blocks(self) -> int:
    return self.manifest['num_blocks']

  @property
  def quantization(self) -> dict[str, Any] | None:
    """The scheme and method, as the run that wrote it said; None: float."""
    return self.manifest['quantization']

  @property
  def run_fingerprint(self) -> dict[str, str]:
    """What the run that wrote it depended on."""
    return self.manifest['fingerprint']

  def outside(self) -> dict[str, Any]:
    """The parameters outside the blocks, as they were saved (numpy)."""
    return trees.load(self.directory / OUTSIDE)

  def block(self, i: int) -> dict[str, Any]:
    """Block i: {'params': ..., 'quant': ...}, as it was saved (numpy)."""
    return trees.load(self._folder(i))

  def lazy_outside(self) -> dict[str, Any]:
    """`outside` with leaves that are read where they are indexed."""
    return trees.load(self.directory / OUTSIDE, lazily=True)

  def lazy_block(self, i: int) -> dict[str, Any]:
    """`block` with leaves that are read where they are indexed."""
    return trees.load(self._folder(i), lazily=True)

  def tokenizer(self) -> tokenizers.Tokenizer | None:
    """The model's tokenizer; None where it has none."""
    path = self.directory / TOKENIZER
    return tokenizers.Tokenizer.from_file(str(path)) if path.exists() else None

  def fingerprint(self) -> str:
    """Names the contents: the manifest holds the checksum of every file."""
    data = (self.directory / manifest_lib.MANIFEST).read_bytes()
    return 'jaxq:' + hashlib.sha256(data).hexdigest()

  def _folder(self, i: int) -> pathlib.Path:
    if not 0 <= i < self.num_blocks:
      raise ValueError(
        f'block {i} of {self.directory}: allowed 0..{self.num_blocks - 1}.'
      )
    return self.directory / block_name(i)


def open_checkpoint(
  directory: str | os.PathLike, *, verify: bool = False
) -> Checkpoint:
  """Opens a finished jaxq directory; reads the manifest and no array.

  Args:
    directory: what a `Writer` wrote.
    verify: also read every file and compare its checksum; without it, the
      sizes are compared.

  Raises:
    FileNotFoundError: there is no such directory.
    ValueError: it is unfinished, damaged, of a later version or not jaxq's.
  """
  path = pathlib.Path(directory)
  if (path / IN_PROGRESS).exists() and not is_checkpoint(path):
    raise ValueError(
      f'{path} is unfinished; run the command that was writing it again.'
    )
  manifest = manifest_lib.read_manifest(path)
  manifest_lib.check_files(path, manifest['files'], contents=verify)
  return Checkpoint(path, manifest)


def is_checkpoint(directory: str | os.PathLike) -> bool:
  """Whether this is a finished jaxq directory (perhaps a damaged one)."""
  return (pathlib.Path(directory) / manifest_lib.MANIFEST).is_file()


def block_name(i: int) -> str:
  """The folder of block i, in the directory."""
  return f'blocks/{i:05d}'


def check_is_path(directory: str | os.PathLike) -> None:
  """Raises NotImplementedError for a URL, which is no place to write to."""
  scheme, found, _ = str(directory).partition('://')
  if found:
    raise NotImplementedError(
      f'--output={directory}: jaxq writes to file systems, not to {scheme}:// '
      'itself; allowed is a path. Mount the bucket on all hosts (gcsfuse, or '
      'the CSI driver of GKE) and give the path of the mount.'
    )


@contextlib.contextmanager
def _explain_full_disk(what: str):
  """Turns 'no space left', however it is raised, into one OSError."""
  try:
    yield
  except Exception as error:
    code = getattr(error, 'errno', None)
    # The array store raises ValueError with the system's words in it.
    if code not in (errno.ENOSPC, errno.EDQUOT) and (
      os.strerror(errno.ENOSPC) not in str(error)
    ):
      raise
    full = OSError(
      f'the disk is full: {what} was not saved, what was saved before is '
      'whole, and nothing half-written is left. Free some space and run the '
      'same command again to go on.'
    )
    full.errno = code or errno.ENOSPC
    raise full from error


def _lock(path: pathlib.Path) -> int:
  """Takes the lock file; the kernel releases it when the process dies."""
  while True:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
      fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if os.path.samestat(os.fstat(fd), path.stat()):
        return fd
    except FileNotFoundError:
      pass
    except BlockingIOError:
      os.close(fd)
      raise OSError(
        f'another run is writing {path.with_suffix("")} (it holds {path}). '
        'Wait for it to end, or choose another --output.'
      ) from None
    except BaseException:
      os.close(fd)
      raise
    os.close(fd)  # Its holder removed it meanwhile: lock the new one.


def _check_extra(extra: dict[str, Any]) -> None:
  """Raises ValueError unless the manifest can be made from `extra`."""
  clash = sorted(_RESERVED & set(extra))
  if clash:
    raise ValueError(
      f'manifest_extra has {clash}; finish sets them. Leave them out.'
    )
  model = extra.get('model')
  if (
    'quantization' not in extra
    or not isinstance(model, dict)
    or (not isinstance(model.get('config'), dict))
  ):
    raise ValueError(
      f"manifest_extra has {sorted(extra)}; it must hold 'model' (a dict with "
      "'config') and 'quantization'."
    )
  if not isinstance(
    extra.get('num_blocks', model['config'].get('num_hidden_layers')), int
  ):
    raise ValueError(
      "manifest_extra has no 'num_blocks' and its config has no "
      "'num_hidden_layers'; give num_blocks, the number of saved blocks."
    )
