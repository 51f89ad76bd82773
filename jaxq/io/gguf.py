"""Weights, configuration and tokenizer of a GGUF file, one block at a time.

The header is read with the `gguf` package's memory-mapped reader, which is
then dropped; tensors are read by offset, so that memory is O(one block) and
pages of earlier blocks do not stay mapped. Quantized types are dequantized to
float32 by `gguf.quants`; whoever compares against them must say so.

GGUF stores the q and k projections of Llama with rotary pairs interleaved,
(x0, y0, x1, y1, ...) in each head; ours is the half-split order
(x0, x1, ..., y0, y1, ...), so their rows are permuted back.
"""

import dataclasses
import pathlib
from typing import Any

import gguf
import numpy as np
import tokenizers

from jaxq.io import files, llama
from jaxq.io import tokenizer as tokenizer_lib

ARCHITECTURES = ('llama',)
TYPES = (
  *('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1'),
  *('Q4_K', 'Q5_K', 'Q6_K'),
)
_OPTIONAL = ('bos_token_id', 'eos_token_id', 'head_dim')


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
    self.config = _config(self.metadata, self.tensors, self.path)
    found = set(self.tensors)
    if self.config['tie_word_embeddings']:
      found.discard('output.weight')
    llama.check_names(found, self.config, 'gguf', str(self.path))
    for name, entry in llama.every_name(self.config, 'gguf').items():
      info = self.tensors[name]
      if info.type not in TYPES:
        raise NotImplementedError(
          f'{self.path}: tensor {name} has GGUF type {info.type}; allowed are '
          f'{sorted(TYPES)}. Convert the file to one of these types.'
        )
      llama.check_shape(name, info.shape, entry, self.config, str(self.path))

  def outside(self) -> dict:
    """Embedding, final norm and untied head, float32; read on each call."""
    return self._read(llama.outside(self.config), None)

  def block(self, i: int) -> dict:
    """Parameters of block i, float32; read on each call."""
    llama.check_block(i, self.config, str(self.path))
    return self._read(llama.BLOCK, i)

  def tokenizer(self) -> tokenizers.Tokenizer:
    """The tokenizer rebuilt from the file's metadata."""
    return tokenizer_lib.from_gguf(
      self.metadata, self.config['vocab_size'], str(self.path)
    )

  def fingerprint(self) -> str:
    """Identity of the file's content, independent of where it lies."""
    entry = (self.path.name, self.path, self._header_nbytes)
    return files.fingerprint([entry], self.config)

  def _read(self, entries, i: int | None) -> dict:
    params: dict = {}
    for entry in entries:
      name = entry.gguf.format(i=i)
      array = self._tensor(name)
      if entry.path[-2] in ('q_proj', 'k_proj'):
        array = half_split(array, array.shape[0] // self.config['head_dim'])
      llama.place(params, entry, array, f'{self.path}: tensor {name}')
    return params

  def _tensor(self, name: str) -> np.ndarray:
    """One tensor dequantized to float32, shape (out, in)."""
    info = self.tensors[name]
    raw = np.fromfile(self.path, np.uint8, info.nbytes, offset=info.offset)
    if raw.size != info.nbytes:
      raise ValueError(
        f'{self.path}: tensor {name} has {raw.size} of {info.nbytes} bytes; '
        'the file was cut or changed while in use. Fetch it again.'
      )
    if info.type in ('F32', 'F16'):
      values = raw.view(np.float32 if info.type == 'F32' else np.float16)
    else:
      kind = gguf.GGMLQuantizationType[info.type]
      rows = raw.reshape(int(np.prod(info.shape[:-1])), -1)
      values = gguf.quants.dequantize(rows, kind)
    return values.astype(np.float32).reshape(info.shape)


def half_split(w: np.ndarray, heads: int) -> np.ndarray:
  """Rows of (heads * D, C) from interleaved to half-split rotary order."""
  out, C = w.shape
  w = w.reshape(heads, out // heads // 2, 2, C)  # (H, D/2, pair, C)
  return w.swapaxes(1, 2).reshape(out, C)


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


def _config(metadata: dict, tensors: dict, path: pathlib.Path) -> dict:
  """The metadata of a GGUF file in Hugging Face key names."""
  arch = metadata.get('general.architecture')
  if arch not in ARCHITECTURES:
    raise NotImplementedError(
      f'{path}: architecture {arch!r}; allowed are {sorted(ARCHITECTURES)}. '
      'Use a model of one of these.'
    )

  def get(key: str, default: Any = None) -> Any:
    return metadata.get(f'{arch}.{key}', default)

  scaling = get('rope.scaling.type', 'none')
  if scaling != 'none' or 'rope_freqs.weight' in tensors:
    raise NotImplementedError(
      f'{path}: uses scaled rotary frequencies (rope.scaling.type={scaling!r},'
      f' rope_freqs.weight {"" if "rope_freqs.weight" in tensors else "not "}'
      'present); allowed is none. Use a model without rope scaling.'
    )
  if get('expert_count', 0):
    raise NotImplementedError(
      f'{path}: has {get("expert_count")} experts; allowed are dense models '
      'only. Use a model without mixture of experts.'
    )
  embedding = tensors.get('token_embd.weight')
  config = {
    'model_type': 'llama',
    'vocab_size': get('vocab_size', embedding and embedding.shape[0]),
    'hidden_size': get('embedding_length'),
    'intermediate_size': get('feed_forward_length'),
    'num_hidden_layers': get('block_count'),
    'num_attention_heads': get('attention.head_count'),
    'num_key_value_heads': get(
      'attention.head_count_kv', get('attention.head_count')
    ),
    'rope_theta': float(get('rope.freq_base', 10000.0)),
    'rms_norm_eps': get('attention.layer_norm_rms_epsilon'),
    'max_position_embeddings': get('context_length'),
    'tie_word_embeddings': 'output.weight' not in tensors,
    'hidden_act': 'silu',
    'bos_token_id': metadata.get('tokenizer.ggml.bos_token_id'),
    'eos_token_id': metadata.get('tokenizer.ggml.eos_token_id'),
    'head_dim': get('attention.key_length'),
  }
  missing = sorted(
    key
    for key, value in config.items()
    if value is None and key not in _OPTIONAL
  )
  if missing:
    raise ValueError(
      f'{path}: the metadata lacks {missing}; a llama file must give them. '
      'Convert the model again.'
    )
  llama.check_config(config, str(path))
  for key in ('rope.dimension_count', 'attention.value_length'):
    if get(key, config['head_dim']) != config['head_dim']:
      raise NotImplementedError(
        f'{path}: {arch}.{key}={get(key)}, head size {config["head_dim"]}; '
        'allowed is the same number. Use a model that rotates whole heads.'
      )
  return config
