"""Whisper models of CTranslate2: model.bin, whole or in parts.

The file is little-endian and says, in this order,

  uint32 version; string name; uint32 revision; uint32 number of variables;
  per variable: string name; uint8 rank; uint32 each dimension; uint8 dtype;
    uint32 bytes; the values, row by row;
  uint32 number of aliases; per alias: string name, string of what it stands for

where a string is a uint16 length, its bytes and a zero, both counted. Opening
reads the headers only; tensors are read when they are asked for. Parts named
model.bin.part1, part2, ... are one file cut anywhere.

The dimensions of the model are those of its tensors; config.json beside it
holds the suppressed tokens, tokenizer.json the tokenizer.
"""

import bisect
import dataclasses
import json
import pathlib
import struct
from typing import Any

import ml_dtypes
import numpy as np
import tokenizers

from jaxq.io import files, whisper
from jaxq.io import tokenizer as tokenizer_lib

NAME = 'model.bin'
_VERSIONS = (5, 6)  # Since 5 a variable names its dtype.
_DTYPES = (
  np.dtype(np.float32),
  np.dtype(np.int8),
  np.dtype(np.int16),
  np.dtype(np.int32),
  np.dtype(np.float16),
  np.dtype(ml_dtypes.bfloat16),
)
_MOST_RANK, _LONGEST_NAME = 8, 1024
# Whisper's constants, which a CTranslate2 file need not hold.
_START, _END = '<|startoftranscript|>', '<|endoftext|>'
# Flags of the graph -> the values our model computes.
_FLAGS: dict[str, tuple[int, ...]] = {
  'encoder/pre_norm': (1,),
  'decoder/pre_norm': (1,),
  'decoder/scale_embeddings': (0,),
  'decoder/scale_outputs': (0,),
  'decoder/start_from_zero_embedding': (0,),
  'decoder/activation': (3,),  # GELU.
  'encoder/activation': (3,),
  'decoder/alignment_layer': None,  # type: ignore[dict-item]
  'decoder/alignment_heads': None,  # type: ignore[dict-item]
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variable:
  """Where a variable lies: offset of its values in the whole file."""

  shape: tuple[int, ...]
  dtype: np.dtype
  offset: int

  @property
  def nbytes(self) -> int:
    """Of its values."""
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Reader:
  """The variables of a model.bin, read one by one.

  Attributes:
    paths: the file, or its parts in order.
    name: of the model's kind, such as 'WhisperSpec'.
    variables: by name; aliases are among them.
    header_nbytes: of the first part, up to the first values.

  Raises:
    FileNotFoundError: no model.bin and no parts.
    ValueError: the file is cut short, or is no model.bin.
    NotImplementedError: another version of the format.
  """

  def __init__(self, folder: pathlib.Path):
    self.paths = find(folder)
    if not self.paths:
      raise FileNotFoundError(
        f'{folder}: has no {NAME} and no {NAME}.part1; a CTranslate2 directory '
        'needs one. Give the directory that holds it.'
      )
    self._where = str(self.paths[0])
    self._starts = [0]
    for path in self.paths:
      self._starts.append(self._starts[-1] + path.stat().st_size)
    self._at = 0
    self.variables: dict[str, Variable] = {}
    self._index()

  def read(self, name: str) -> np.ndarray:
    """The values of a variable, in its shape and dtype."""
    variable = self.variables[name]
    data = self._bytes(variable.offset, variable.nbytes)
    return np.frombuffer(data, variable.dtype).reshape(variable.shape)

  def _index(self) -> None:
    version = self._integer('I')
    if version not in _VERSIONS:
      raise NotImplementedError(
        f'{self._where}: version {version} of the format; allowed are '
        f'{list(_VERSIONS)}. Convert the model with a newer CTranslate2, or '
        'check that this is a model.bin of it.'
      )
    self.name = self._string()
    self.revision = self._integer('I')
    for _ in range(self._integer('I')):
      name, rank = self._string(), self._integer('B')
      if rank > _MOST_RANK:
        raise self._damaged(f'{name} has {rank} dimensions')
      shape = tuple(self._integer('I') for _ in range(rank))
      kind, nbytes = self._integer('B'), self._integer('I')
      if kind >= len(_DTYPES):
        raise self._damaged(f'{name} has dtype {kind}')
      variable = Variable(shape=shape, dtype=_DTYPES[kind], offset=self._at)
      if variable.nbytes != nbytes:
        raise self._damaged(f'{name} has {nbytes} bytes for shape {shape}')
      self.variables[name] = variable
      self._at += nbytes
      if self._at > self._starts[-1]:
        raise self._damaged(f'it ends within {name}')
    for _ in range(self._integer('I')):
      alias, name = self._string(), self._string()
      if name not in self.variables:
        raise self._damaged(f'{alias} stands for {name}, which is not there')
      self.variables[alias] = self.variables[name]

  def _integer(self, kind: str) -> int:
    size = struct.calcsize(kind)
    (value,) = struct.unpack(f'<{kind}', self._bytes(self._at, size))
    self._at += size
    return value

  def _string(self) -> str:
    length = self._integer('H')
    if not 0 < length <= _LONGEST_NAME:
      raise self._damaged(f'a name of {length} bytes')
    data = self._bytes(self._at, length)
    self._at += length
    try:
      return data.rstrip(b'\0').decode('utf-8')
    except UnicodeDecodeError as e:
      raise self._damaged('a name that is no text') from e

  def _bytes(self, offset: int, size: int) -> bytes:
    """`size` bytes from an offset, which may lie across parts."""
    found = []
    part = bisect.bisect_right(self._starts, offset) - 1
    while size:
      if part >= len(self.paths):
        raise self._damaged('it ends too early')
      with self.paths[part].open('rb') as file:
        file.seek(offset - self._starts[part])
        found.append(file.read(min(size, self._starts[part + 1] - offset)))
      size -= len(found[-1])
      offset += len(found[-1])
      part += 1
    return b''.join(found)

  def _damaged(self, what: str) -> ValueError:
    return ValueError(
      f'{self._where}: is damaged or no CTranslate2 model ({what}; '
      f'{self._starts[-1]} bytes in {len(self.paths)} files); a whole '
      f'{NAME} is needed. Fetch it again.'
    )


def find(folder: pathlib.Path) -> list[pathlib.Path]:
  """model.bin in a folder, or its parts in order; [] if neither is there."""
  if (folder / NAME).is_file():
    return [folder / NAME]
  parts: list[pathlib.Path] = []
  while (path := folder / f'{NAME}.part{len(parts) + 1}').is_file():
    parts.append(path)
  return parts


class CTranslate2Source:
  """A `WeightSource` over a Whisper model of CTranslate2.

  Raises:
    FileNotFoundError, ValueError, NotImplementedError: a file is missing,
      damaged, or of a model that is no Whisper or quantized.
  """

  family = 'whisper'

  def __init__(self, path: str | pathlib.Path):
    self.path = pathlib.Path(path)
    self._reader = Reader(self.path)
    if self._reader.name != 'WhisperSpec':
      raise NotImplementedError(
        f'{self.path}: is a {self._reader.name} of CTranslate2; allowed is '
        'WhisperSpec. Load another format of this model.'
      )
    tensors = self._tensors()
    self.config = self._read_config(tensors)
    shapes = {name: v.shape for name, v in tensors.items()}
    shapes.pop('decoder/projection/weight', None)  # The embedding again.
    whisper.check_tensors(shapes, self.config, 'ctranslate2', str(self.path))

  def outside(self) -> dict:
    """Parameters outside the blocks, float32; read on each call."""
    return self._read(whisper.OUTSIDE, None)

  def block(self, i: int) -> dict:
    """Parameters of block i, the encoder's first; read on each call."""
    half, layer = whisper.block(self.config, i, str(self.path))
    return self._read(whisper.entries(half), layer)

  def tokenizer(self) -> tokenizers.Tokenizer:
    """The tokenizer of tokenizer.json."""
    return tokenizer_lib.from_file(
      self.path / 'tokenizer.json', self.config['vocab_size']
    )

  def fingerprint(self) -> str:
    """Identity of the content, independent of where it lies."""
    paths = [*self._reader.paths]
    paths += [
      self.path / name
      for name in ('config.json', 'tokenizer.json')
      if (self.path / name).is_file()
    ]
    return files.fingerprint([(p.name, p, 0) for p in paths], self.config)

  def _tensors(self) -> dict[str, Variable]:
    """The variables of rank 1 and above that are weights; flags are checked."""
    tensors = {}
    for name, variable in self._reader.variables.items():
      if variable.dtype.kind in 'iu' and variable.shape:
        if name in _FLAGS:
          continue
        raise NotImplementedError(
          f'{self.path}: {name} is {variable.dtype}; allowed are float '
          'weights. Convert the model again without --quantization.'
        )
      if variable.shape:
        tensors[name] = variable
      elif _FLAGS.get(name) is not None:
        value = int(self._reader.read(name))
        if value not in _FLAGS[name]:
          raise NotImplementedError(
            f'{self.path}: {name}={value} changes the maths; allowed are '
            f'{list(_FLAGS[name])}. Use a model without it.'
          )
    return tensors

  def _read_config(self, tensors: dict[str, Variable]) -> dict[str, Any]:
    """The keys of a Hugging Face config.json, from tensors and tokenizer."""

    def size(name: str, axis: int) -> int:
      return tensors[name].shape[axis] if name in tensors else 0

    extra = self._json('config.json')
    positions = 'position_encodings/encodings'
    vocab_size, d_model = (
      size('decoder/embeddings/weight', axis) for axis in (0, 1)
    )
    config = {
      'model_type': 'whisper',
      'vocab_size': vocab_size,
      'd_model': d_model,
      'num_mel_bins': size('encoder/conv1/weight', 1),
      'max_source_positions': size(f'encoder/{positions}', 0),
      'max_target_positions': size(f'decoder/{positions}', 0),
      'suppress_tokens': _ids(extra, 'suppress_ids'),
      'begin_suppress_tokens': _ids(extra, 'suppress_ids_begin'),
      'tie_word_embeddings': True,
    }
    for half in ('encoder', 'decoder'):
      layers = 0
      while f'{half}/layer_{layers}/ffn/linear_0/weight' in tensors:
        layers += 1
      config[f'{half}_layers'] = layers
      config[f'{half}_ffn_dim'] = size(f'{half}/layer_0/ffn/linear_0/weight', 0)
      heads = f'{half}/num_heads'
      if heads in self._reader.variables:
        config[f'{half}_attention_heads'] = int(self._reader.read(heads))
    whisper.check_config(config, str(self.path))
    tokenizer = tokenizer_lib.from_file(
      self.path / 'tokenizer.json', vocab_size
    )
    config['decoder_start_token_id'] = tokenizer.token_to_id(_START)
    config['eos_token_id'] = tokenizer.token_to_id(_END)
    return config

  def _json(self, name: str) -> dict[str, Any]:
    path = self.path / name
    try:
      value = json.loads(path.read_text('utf-8'))
    except ValueError as e:
      raise ValueError(f'{path}: is not JSON ({e}). Fetch it again.') from e
    return value if isinstance(value, dict) else {}

  def _read(self, table: tuple[whisper.Entry, ...], i: int | None) -> dict:
    params: dict = {}
    for entry in table:
      name = entry.ctranslate2.format(i=i)
      part, number = entry.part
      array = np.split(self._reader.read(name), number)[part]
      whisper.place(params, entry, array, f'{self.path}: tensor {name}')
    return params


def _ids(config: dict[str, Any], key: str) -> list[int]:
  """A list of token ids; negative ones stand for no token."""
  return [i for i in config.get(key) or [] if i >= 0]
