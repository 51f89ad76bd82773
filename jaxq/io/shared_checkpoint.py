"""A checkpoint.Writer for all processes of a job.

Each process writes the shards of its own devices into a temporary folder, and
process 0, which alone holds the lock and the Writer, commits it by the same
rename as ever. So what is on disk after a kill of any process is what a single
one would leave. The directory must be one that all hosts see: a mounted bucket
or a network file system.

With one process there is nothing to share, and `open_writer` gives the Writer.
"""

import contextlib
import os
import pathlib
from typing import Any

import jax

from jaxq.io import checkpoint, manifest, trees
from jaxq.parallel import distributed


class SharedWriter:
  """The part of one process; used as checkpoint.Writer is, by all of them.

  Attributes:
    directory: the absolute path.
    complete: True if the directory is finished; nothing more can be saved.
  """

  def __init__(
    self, directory: str | os.PathLike, fingerprint: dict[str, str]
  ) -> None:
    """Opens, resumes or starts `directory`.

    Raises:
      ValueError, OSError: on process 0, as checkpoint.Writer.
      distributed.Elsewhere: on the others, where it did.
      OSError: this process sees another directory than process 0.
    """
    self.directory = pathlib.Path(os.path.abspath(directory))
    self._writer: checkpoint.Writer | None = None

    def open_() -> list[Any]:
      self._writer = writer = checkpoint.Writer(directory, fingerprint)
      names = (path.name for path in writer.directory.glob('blocks/*'))
      saved = [
        int(n) for n in names if n.isdigit() and writer.has_block(int(n))
      ]
      return [writer.complete, writer.has_outside(), saved]

    self.complete, self._outside, saved = distributed.on_first(open_)
    self._blocks = set(saved)
    self._check_same_place(fingerprint)
    distributed.barrier()  # It stays as it is until all have looked.

  def has_outside(self) -> bool:
    """Whether the parameters outside the blocks are saved."""
    return self._outside

  def save_outside(self, tree: dict[str, Any]) -> None:
    """Saves the parameters outside the blocks; replaces saved ones."""
    self._save(checkpoint.OUTSIDE, tree)
    self._outside = True

  def has_block(self, i: int) -> bool:
    """Whether block i is saved, which is to say all of it."""
    return i in self._blocks

  def save_block(self, i: int, tree: dict[str, Any]) -> None:
    """Saves block i atomically; replaces a saved one."""
    self._save(checkpoint.block_name(i), tree)
    self._blocks.add(i)

  def load_block(self, i: int) -> dict[str, Any]:
    """Block i as it was saved, its leaves read where they are indexed."""
    return trees.load(self.directory / checkpoint.block_name(i), lazily=True)

  def finish(
    self, manifest_extra: dict[str, Any], tokenizer_json: str | None
  ) -> None:
    """As checkpoint.Writer.finish, on process 0; the others wait."""

    def finish() -> None:
      assert self._writer is not None
      self._writer.finish(manifest_extra, tokenizer_json)

    distributed.on_first(finish)
    self.complete = True

  def close(self) -> None:
    """Gives up the lock."""
    if self._writer is not None:
      self._writer.close()

  def __enter__(self) -> 'SharedWriter':
    return self

  def __exit__(self, *unused_exception) -> None:
    self.close()

  def _save(self, name: str, tree: dict[str, Any]) -> None:
    """Every process its shards; then process 0 commits, and all go on."""
    with contextlib.ExitStack() as stack:

      def begin() -> str:
        assert self._writer is not None
        return str(stack.enter_context(self._writer.replacing(name)))

      temporary = pathlib.Path(distributed.on_first(begin))
      trees.save_arrays(temporary, tree)
      distributed.barrier()
      if self._writer is not None:
        trees.seal(temporary, tree)
    distributed.barrier()

  def _check_same_place(self, fingerprint: dict[str, str]) -> None:
    """Raises OSError if this host sees another directory than process 0."""
    name = manifest.MANIFEST if self.complete else checkpoint.IN_PROGRESS
    try:
      found = manifest.read_json(self.directory / name)
    except (OSError, ValueError):
      found = {}
    if found.get('fingerprint') != fingerprint:
      raise OSError(
        f'{self.directory}: process {jax.process_index()} does not see what '
        'process 0 wrote there; the output of a job must lie on a file system '
        'that all hosts share. Give the path of a mounted bucket or a network '
        'file system.'
      )


def open_writer(
  directory: str | os.PathLike, fingerprint: dict[str, str]
) -> checkpoint.Writer | SharedWriter:
  """The writer of this process, alone or one of several."""
  if jax.process_count() == 1:
    return checkpoint.Writer(directory, fingerprint)
  return SharedWriter(directory, fingerprint)
