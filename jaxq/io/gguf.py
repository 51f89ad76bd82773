"""Weights, configuration and tokenizer of a GGUF file, one block at a time.

The header is read with the `gguf` package's memory-mapped reader, which is
then dropped; tensors are read by offset, so that memory is O(one block) and
pages of earlier blocks do not stay mapped. Quantized types are dequantized to
float32 by `gguf.quants`; whoever compares against them must say so.

Where tensors stand is jaxq.io.architectures' matter, what the metadata means
jaxq.io.gguf_config's. Files of the architecture llama hold the q and k
projections with rotary pairs interleaved, (x0, y0, x1, y1, ...) in each head;
ours is the half-split order (x0, x1, ..., y0, y1, ...), so their rows are
permuted back. All other architectures store them as Hugging Face does.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterable

import gguf
import numpy as np
import tokenizers

from jaxq.io import architectures, files, gguf_config
from jaxq.io import tokenizer as tokenizer_lib

TYPES = (
  *('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1'),
  *('Q4_K', 'Q5_K', 'Q6_K'),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
  """Where a tensor lies: ggml type, shape (out, in), offset and bytes."""

  type: str
  shape: tuple[int, ...]
  offset: int
  nbytes: int


class GgufSource:
  """A `WeightSource` over one GGUF file.

  Attributes:
    config: plain dict in Hugging Face key names.
    metadata: the file's key-value pairs, tokenizer included.
    tensors: name -> TensorInfo.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not GGUF, truncated, or tensors that do not fit the metadata.
    NotImplementedError: an architecture, type or option outside ours.
  """

  def __init__(self, path: str | pathlib.Path):
    self.path = pathlib.Path(path)
    self.metadata, self.tensors, self._header_nbytes = _read_header(self.path)
    self.config = gguf_config.read(
      self.metadata,
      {name: info.shape for name, info in self.tensors.items()},
      lambda name: self._rows(name, 0, 1)[0],
      str(self.path),
    )
    found = set(self.tensors) - set(gguf_config.ROPE_TENSORS)
    where = str(self.path)
    architectures.check_names(found, self.config, 'gguf', where)
    expected = architectures.every_tensor(self.config, 'gguf')
    for name, tensor in expected.items():
      info = self.tensors[name]
      if info.type not in TYPES:
        raise NotImplementedError(
          f'{self.path}: tensor {name} has GGUF type {info.type}; allowed are '
          f'{sorted(TYPES)}. Convert the file to one of these types.'
        )
      architectures.check_shape(info.shape, tensor, where)

  def outside(self) -> dict:
    """Embedding, final norm and untied head, float32; read on each call."""
    return self._read(architectures.outside(self.config))

  def block(self, i: int) -> dict:
    """Parameters of block i, float32; read on each call."""
    architectures.check_block(i, self.config, str(self.path))
    return self._read(architectures.block(self.config, i))

  def tokenizer(self) -> tokenizers.Tokenizer:
    """The tokenizer rebuilt from the file's metadata."""
    return tokenizer_lib.from_gguf(
      self.metadata, self.config['vocab_size'], str(self.path)
    )

  def fingerprint(self) -> str:
    """Identity of the file's content, independent of where it lies."""
    entry = (self.path.name, self.path, self._header_nbytes)
    return files.fingerprint([entry], self.config)

  def _read(self, entries: Iterable[architectures.Entry]) -> dict:
    params: dict = {}
    for entry in entries:
      place = entry.gguf
      assert place is not None  # These architectures have GGUF names.
      leaf = self._leaf(place, entry.shape)
      if interleaved(entry.path, self.metadata['general.architecture']):
        leaf = half_split(leaf, leaf.shape[0] // self.config['head_dim'])
      where = f'{self.path}: tensor {place.name}'
      architectures.place(params, entry, leaf, where)
    return params

  def _leaf(
    self, place: architectures.Tensor, shape: tuple[int, ...]
  ) -> np.ndarray:
    """The leaf's own part of its tensor, float32, shape (out, in)."""
    if len(shape) == 1:
      return place.leaf(self._rows(place.name, 0, 1)[0], shape)
    first = (place.index or 0) * place.shape[-2] + place.start
    return self._rows(place.name, first, shape[0])

  def _rows(self, name: str, first: int, count: int) -> np.ndarray:
    """Rows of a tensor seen as (rows, in), dequantized to float32."""
    info = self.tensors[name]
    size = info.nbytes // math.prod(info.shape[:-1])  # Bytes of a row.
    raw = np.fromfile(
      self.path, np.uint8, count * size, offset=info.offset + first * size
    )
    if raw.size != count * size:
      raise ValueError(
        f'{self.path}: tensor {name} has {raw.size} of {count * size} bytes; '
        'the file was cut or changed while in use. Fetch it again.'
      )
    raw = raw.reshape(count, size)
    if info.type in ('F32', 'F16'):
      values = raw.view(np.float32 if info.type == 'F32' else np.float16)
    else:
      kind = gguf.GGMLQuantizationType[info.type]
      values = gguf.quants.dequantize(raw, kind)
    return values.astype(np.float32)


def interleaved(path: tuple[str, ...], arch: str) -> bool:
  """Whether files of `arch` hold this leaf with rotary pairs interleaved."""
  return arch == 'llama' and path[-2] in ('q_proj', 'k_proj')


def half_split(w: np.ndarray, heads: int) -> np.ndarray:
  """Rows of (heads * D, ...) from interleaved to half-split rotary order."""
  pairs = w.reshape(heads, w.shape[0] // heads // 2, 2, -1)  # (H, D/2, 2, C)
  return pairs.swapaxes(1, 2).reshape(w.shape)


def interleave(w: np.ndarray, heads: int) -> np.ndarray:
  """`half_split` inverted."""
  halves = w.reshape(heads, 2, w.shape[0] // heads // 2, -1)  # (H, 2, D/2, C)
  return halves.swapaxes(1, 2).reshape(w.shape)


def _read_header(path: pathlib.Path):
  """Returns metadata, tensor table and header size; checks the file."""
  if not path.is_file():
    raise FileNotFoundError(
      f'{path}: no such file; give the path of a GGUF file.'
    )
  with path.open('rb') as file:
    magic = file.read(4)
  if magic != b'GGUF':
    raise ValueError(
      f"{path}: starts with {magic!r}; a GGUF file starts with b'GGUF'. "
      'Give a GGUF file, or fetch it again.'
    )
  try:
    reader = gguf.GGUFReader(path)
    # A view past the end comes back short: the reader reports it as an index
    # or shape error, or not at all for the last numbers of a header.
    metadata = {k: f.contents() for k, f in reader.fields.items()}
  except (IndexError, ValueError, KeyError, OverflowError) as e:
    raise ValueError(
      f'{path}: is truncated or damaged ({path.stat().st_size} bytes; the '
      f'reader says: {e}); a whole GGUF file is needed. Fetch it again.'
    ) from e
  if reader.byte_order != 'I':
    raise NotImplementedError(
      f'{path}: has the other byte order; allowed is that of this machine. '
      'Convert the file.'
    )
  tensors = {}
  for t in reader.tensors:
    shape = tuple(int(n) for n in t.shape[::-1])
    tensors[t.name] = TensorInfo(
      type=t.tensor_type.name,
      shape=shape,
      offset=int(t.data_offset),
      nbytes=int(t.n_bytes),
    )
  return metadata, tensors, int(reader.data_offset)
