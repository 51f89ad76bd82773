"""Weights, configuration and tokenizer of a Hugging Face directory.

config.json, one `model.safetensors` or shards with an index, tokenizer.json.
Each read opens the file, takes its tensors and closes it, so that memory is
O(one block); `lazy_block` reads nothing until a leaf is indexed, and then the
bytes of that part alone. What the configuration means is jaxq.io.hf_config's
matter, where the tensors stand jaxq.io.architectures'.
"""

import json
import pathlib
from collections.abc import Iterable

import ml_dtypes  # noqa: F401  NumPy learns bfloat16 from it.
import numpy as np
import safetensors
import tokenizers

from jaxq.io import (
  architectures,
  files,
  hf_config,
  lazy,
  safetensors_slices,
)
from jaxq.io import tokenizer as tokenizer_lib

_SINGLE = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'


class HfSource:
  """A `WeightSource` over a Hugging Face directory.

  Raises:
    FileNotFoundError: config.json, weights or a shard is missing.
    ValueError: files that are damaged or contradict the configuration.
    NotImplementedError: a model type or an option outside ours.
  """

  def __init__(self, path: str | pathlib.Path):
    self.path = pathlib.Path(path)
    path = self.path / 'config.json'
    self.config = hf_config.read(read_json(path), str(path))
    self._shard_of = tensor_files(self.path)
    found = {n for n in self._shard_of if not n.endswith('rotary_emb.inv_freq')}
    if self.config['tie_word_embeddings']:
      found.discard('lm_head.weight')
    architectures.check_names(found, self.config, 'hf', str(self.path))
    self._check_shapes()

  def outside(self) -> dict:
    """Embedding, final norm and untied head, float32; read on each call."""
    return self._read(architectures.outside(self.config))

  def block(self, i: int) -> dict:
    """Parameters of block i, float32; read on each call."""
    architectures.check_block(i, self.config, str(self.path))
    return self._read(architectures.block(self.config, i))

  def lazy_outside(self) -> dict:
    """`outside` with leaves that are read where they are indexed."""
    return self._read_lazily(architectures.outside(self.config))

  def lazy_block(self, i: int) -> dict:
    """`block` with leaves that are read where they are indexed."""
    architectures.check_block(i, self.config, str(self.path))
    return self._read_lazily(architectures.block(self.config, i))

  def tokenizer(self) -> tokenizers.Tokenizer:
    """The tokenizer of tokenizer.json, without truncation and padding."""
    return tokenizer_lib.from_file(
      self.path / 'tokenizer.json', self.config['vocab_size']
    )

  def fingerprint(self) -> str:
    """Identity of the directory's content, independent of where it lies."""
    names = sorted(set(self._shard_of.values()))
    names += [
      name
      for name in ('config.json', 'tokenizer.json')
      if (self.path / name).is_file()
    ]
    entries = []
    for name in names:
      path = self.path / name
      header = (
        path.stat().st_size if path.suffix == '.json' else header_nbytes(path)
      )
      entries.append((name, path, header))
    return files.fingerprint(entries, self.config)

  def _check_shapes(self) -> None:
    expected = architectures.every_tensor(self.config, 'hf')
    for shard in sorted(set(self._shard_of.values())):
      with open_file(self.path / shard) as file:
        present = set(file.keys())
        for name, tensor in expected.items():
          if self._shard_of[name] != shard:
            continue
          if name not in present:
            raise ValueError(
              f'{self.path / shard}: tensor {name} is missing, though '
              f'{_INDEX} says it is here. Fetch the shard again.'
            )
          shape = file.get_slice(name).get_shape()
          where = str(self.path / shard)
          architectures.check_shape(shape, tensor, where)

  def _read(self, entries: Iterable[architectures.Entry]) -> dict:
    by_shard: dict[str, list[architectures.Entry]] = {}
    for entry in entries:
      by_shard.setdefault(self._shard_of[entry.hf.name], []).append(entry)
    params: dict = {}
    for shard in sorted(by_shard):
      arrays: dict[str, np.ndarray] = {}
      with open_file(self.path / shard) as file:
        for entry in by_shard[shard]:
          name = entry.hf.name
          where = f'{self.path / shard}: tensor {name}'
          if name not in arrays:  # Leaves that share a tensor are neighbours.
            arrays = {name: floating(file.get_tensor(name), where)}
          leaf = entry.hf.leaf(arrays[name], entry.shape)
          architectures.place(params, entry, leaf, where)
    return params

  def _read_lazily(self, entries: Iterable[architectures.Entry]) -> dict:
    opened: dict[str, dict[str, lazy.LazyArray]] = {}
    params: dict = {}
    for entry in entries:
      name = entry.hf.name
      shard = self._shard_of[name]
      where = f'{self.path / shard}: tensor {name}'
      if shard not in opened:
        opened[shard] = safetensors_slices.tensors(self.path / shard)
      if name not in opened[shard]:  # `floating` says what is allowed.
        with open_file(self.path / shard) as file:
          floating(file.get_tensor(name), where)
      leaf = _lazy_leaf(opened[shard][name], entry, where)
      *folders, last = entry.path
      node = params
      for folder in folders:
        node = node.setdefault(folder, {})
      node[last] = leaf
    return params


def _lazy_leaf(
  tensor: lazy.LazyArray, entry: architectures.Entry, where: str
) -> lazy.LazyArray:
  """What `architectures.place` makes of a tensor, part by part."""
  transposed = entry.path[-1] == 'kernel'
  source = entry.hf

  def read(index: lazy.Index) -> np.ndarray:
    rows, *rest = index[::-1] if transposed else index
    rows = slice(rows.start + source.start, rows.stop + source.start)
    part = tensor[(rows, *rest)].astype(np.float32)
    part = part + np.float32(source.plus) if source.plus else part
    architectures.check_finite(part, where)
    return np.ascontiguousarray(part.T) if transposed else part

  return lazy.LazyArray(
    shape=entry.shape[::-1] if transposed else entry.shape,
    dtype=np.dtype(np.float32),
    read=read,
  )


def floating(array: np.ndarray, where: str) -> np.ndarray:
  """A float tensor of a file as float32; others are refused."""
  allowed = ('float64', 'float32', 'float16', 'bfloat16')
  if array.dtype.name not in allowed:
    raise NotImplementedError(
      f'{where} has dtype {array.dtype.name}; allowed are {sorted(allowed)}. '
      'Use the unquantized model.'
    )
  return array.astype(np.float32)


def tensor_files(folder: pathlib.Path) -> dict[str, str]:
  """Tensor name -> file name, from the index or the single file."""
  if (folder / _INDEX).is_file():
    shard_of = read_json(folder / _INDEX).get('weight_map')
    if not isinstance(shard_of, dict) or not shard_of:
      raise ValueError(
        f'{folder / _INDEX}: has no weight_map; an index maps tensor names to '
        'shards. Fetch it again.'
      )
    shards = sorted(set(shard_of.values()))
    missing = [s for s in shards if not (folder / s).is_file()]
    if missing:
      raise FileNotFoundError(
        f'{folder}: {len(missing)} of {len(shards)} shards are missing, first '
        f'{missing[0]}; all must lie beside {_INDEX}. Fetch them.'
      )
    return shard_of
  if not (folder / _SINGLE).is_file():
    raise FileNotFoundError(
      f'{folder}: has neither {_SINGLE} nor {_INDEX}; weights must be '
      'safetensors. Convert other formats first.'
    )
  with open_file(folder / _SINGLE) as file:
    return dict.fromkeys(file.keys(), _SINGLE)


def open_file(path: pathlib.Path):
  """A safetensors file, to be used in a `with`."""
  try:
    return safetensors.safe_open(str(path), framework='numpy')
  except (safetensors.SafetensorError, OSError) as e:
    raise ValueError(
      f'{path}: is truncated or damaged ({path.stat().st_size} bytes; the '
      f'reader says: {e}); a whole safetensors file is needed. Fetch it again.'
    ) from e


def header_nbytes(path: pathlib.Path) -> int:
  """Bytes in front of a safetensors file's data."""
  with path.open('rb') as file:
    return 8 + int.from_bytes(file.read(8), 'little')


def read_json(path: pathlib.Path) -> dict:
  """The object that a JSON file holds."""
  if not path.is_file():
    raise FileNotFoundError(
      f'{path}: no such file; a Hugging Face directory needs it. Give the '
      'directory that holds it.'
    )
  try:
    value = json.loads(path.read_text('utf-8'))
  except ValueError as e:
    raise ValueError(f'{path}: is not JSON ({e}). Fetch it again.') from e
  if not isinstance(value, dict):
    raise ValueError(
      f'{path}: holds a {type(value).__name__}; a JSON object is needed. '
      'Fetch it again.'
    )
  return value
