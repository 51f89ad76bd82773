"""`open_source`: one door to a model's weights, whatever holds them.

A source reads lazily, one block at a time, so that a calibration needs the
memory of one block and not of the model.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

import tokenizers

from jaxq.data import packaged, packages
from jaxq.io import (
  bert,
  ctranslate2,
  dinov2,
  gguf,
  hf_quantized,
  hf_whisper,
  onnx_vit,
)


class WeightSource(Protocol):
  """What every reader offers.

  `config` is a plain dict in the key names of Hugging Face's config.json.
  `outside` and `block` return nested dicts of float32 NumPy arrays in our
  parameter tree, kernels (K, N), RoPE half-split; they read on every call
  and keep nothing. `fingerprint` is the same for the same content, wherever
  it lies. `tokenizer` is None where the model has none. A source whose model
  is no decoder has an attribute `family`, of models.loading.FAMILIES.
  """

  config: dict[str, Any]

  def outside(self) -> dict: ...

  def block(self, i: int) -> dict: ...

  def fingerprint(self) -> str: ...

  def tokenizer(self) -> tokenizers.Tokenizer | None: ...


# Ending of a file, or model_type of a config.json: what reads it. Other
# directories are decoders, float (hf) or quantized (hf_quantized).
FILES: dict[str, Callable[[pathlib.Path], WeightSource]] = {
  '.gguf': gguf.GgufSource,
  '.onnx': onnx_vit.OnnxVitSource,
}
DIRECTORIES: dict[str, Callable[[pathlib.Path], WeightSource]] = {
  'bert': bert.BertSource,
  'dinov2': dinov2.Dinov2Source,
  'ctranslate2': ctranslate2.CTranslate2Source,
  'whisper': hf_whisper.HfWhisperSource,
}
MANIFEST = 'manifest.json'
IN_PROGRESS = 'in_progress.json'  # Of a run that is not finished.


def kind(source: str) -> str:
  """'packaged', 'gguf', 'onnx', 'hf' or 'jaxq': what `source` names.

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
    if path.suffix.lower() in FILES:
      return path.suffix.lower().removeprefix('.')
    raise ValueError(
      f'{source}: the file does not end in {" or ".join(sorted(FILES))}; '
      'allowed are such a file, a Hugging Face directory, a jaxq directory or '
      'a packaged name. For safetensors give the directory.'
    )
  raise FileNotFoundError(
    f'{source}: no such file or directory, and no packaged model; packaged '
    f'names are {sorted(packages.PACKAGES)}. Give one of these or a path.'
  )


def open_source(source: str) -> WeightSource:
  """Opens a packaged name, a GGUF or ONNX file, or a Hugging Face directory.

  A jaxq directory (`kind(source) == 'jaxq'`) holds quantized arrays and is no
  WeightSource: the caller dispatches it to `jaxq.io.checkpoint`.
  """
  what = kind(source)
  if what == 'jaxq':
    raise ValueError(
      f'{source}: is a jaxq directory, which holds quantized arrays; allowed '
      'here are a .gguf or .onnx file, a Hugging Face directory or a packaged '
      'name. Load it with models.load.'
    )
  if what == 'packaged':
    path = packaged.fetch(source)
    if source not in _models():
      raise ValueError(
        f'{source}: is packaged data ({packages.PACKAGES[source].title}), not '
        f'a model; allowed are {_models()}. Give one of these.'
      )
  else:
    path = pathlib.Path(source).expanduser()
  if path.is_file():
    return FILES[path.suffix.lower()](path)
  return DIRECTORIES.get(_model_type(path), hf_quantized.open_directory)(path)


def _model_type(folder: pathlib.Path) -> str:
  """model_type of config.json; '' where it cannot be read."""
  if ctranslate2.find(folder):
    return 'ctranslate2'  # Its config.json names none.
  try:
    return str(json.loads((folder / 'config.json').read_text())['model_type'])
  except (OSError, ValueError, KeyError, TypeError):
    return ''  # The reader says what is wrong.


def _models() -> list[str]:
  """The packaged models: a file that FILES can read, or a configuration."""
  return sorted(
    name
    for name, package in packages.PACKAGES.items()
    if package.file.endswith(tuple(FILES))
    or any(member.file == 'config.json' for member in package.members)
  )
