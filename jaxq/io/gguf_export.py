"""Writes a model as one GGUF file: Q8_0, Q4_0, or with float matrices.

Both types hold 32 values of one row of W^T, so 32 along K of a column of our
(K, N), as integers times one float16 step d:

  Q8_0   d, 32 int8                          8.5 bits per weight
  Q4_0   d, 32 of 4 bits, offset by 8        4.5; byte j holds values j, 16 + j

A kernel that is quantized already fits exactly where its integers do and its
groups end where blocks end: symmetric, of at most that many bits, per channel
or in groups of a multiple of 32. Then its integers are written unchanged and
only the steps are rounded, to float16: by a factor of 2^-11, more below 6e-5
(`Summary.rounded`). What does not fit is refused: rounding it again would lose
what the calibration gained.

A float linear is rounded to nearest, by the `gguf` package, as llama.cpp does.
Norms, biases and routers stay float32; what else is float becomes `rest`.

Blocks are read twice, first to plan the header and then to write, so memory is
O(one block). The file takes its name when it is whole.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import gguf
import jax
import numpy as np

from jaxq.io import architectures, gguf_config, gguf_tokenizer
from jaxq.io import gguf as gguf_reader
from jaxq.numerics import binary, qarray

TYPES = {'Q4_0': 4, 'Q8_0': 8}  # To the bits of their integers.
REST_TYPES = ('BF16', 'F16', 'F32', 'Q8_0')
_BLOCK = 32
_FILE_TYPES = {'Q4_0': 2, 'Q8_0': 7}  # llama.cpp's general.file_type.


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufExportConfig:
  """type: of linears, of TYPES. rest: of other matrices, of REST_TYPES."""

  type: str = 'Q4_0'
  rest: str = 'F16'

  def __post_init__(self):
    for name, allowed in (('type', TYPES), ('rest', REST_TYPES)):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'GgufExportConfig: {name}={getattr(self, name)!r}; allowed '
          f'{sorted(allowed)}. Use one of them.'
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
  """What was written.

  counts: type -> tensors. exact: linears whose integers were kept.
  rounded: the largest relative change of a step by float16.
  """

  path: pathlib.Path
  nbytes: int
  counts: dict[str, int]
  exact: int
  rounded: float

  def __str__(self) -> str:
    counts = ', '.join(f'{n} {kind}' for kind, n in sorted(self.counts.items()))
    kept = (
      f'; {self.exact} linears with their integers unchanged, their scales '
      f'rounded by at most {self.rounded:.1e}'
      if self.exact
      else ''
    )
    return f'{self.path}: {self.nbytes / 1e6:.1f} MB, {counts}{kept}'


@dataclasses.dataclass
class _Piece:
  """A tensor of the file: the leaves it holds, in the order of its rows."""

  name: str
  shape: tuple[int, ...]
  entries: list[architectures.Entry]
  leaves: list[Any]
  type: str = ''


def export(
  source: Any, path: pathlib.Path, config: GgufExportConfig
) -> Summary:
  """Writes the model of `source` to `path`.

  Args:
    source: a WeightSource of a decoder, or a Checkpoint, whose blocks hold
      'params' and 'quant'.
    path: of the file; replaced if it is there.
    config: types.

  Raises:
    NotImplementedError: a model, tokenizer or quantization that GGUF cannot
      hold; the message names the linear.
    ValueError: sizes that make no whole blocks, or values beyond float16.
    OSError: the disk is full or fails; nothing is left behind.
  """
  _check_family(source)
  outside = source.outside()
  model = dict(source.config, tie_word_embeddings='head' not in outside)
  del outside
  metadata = gguf_config.write(model)
  metadata |= gguf_tokenizer.metadata(source.tokenizer(), model)
  arch = architectures.GGUF_ARCHITECTURES[model['model_type']]
  part = path.with_name(f'.{path.name}.part')
  writer = gguf.GGUFWriter(str(part), arch)
  try:
    _add_metadata(writer, metadata, path.stem, config)
    counts: dict[str, int] = {}
    for piece in _pieces(source, model, config):
      counts[piece.type] = counts.get(piece.type, 0) + 1
      kind = gguf.GGMLQuantizationType[piece.type]
      size = _row_bytes(piece.shape[-1], piece.type)
      shape = (*piece.shape[:-1], size)
      nbytes = int(np.prod(shape))
      writer.add_tensor_info(
        piece.name, shape, np.dtype(np.uint8), nbytes, raw_dtype=kind
      )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    exact, rounded = 0, 0.0
    for piece in _pieces(source, model, config):
      data, kept, change = _encode(piece, arch, model)
      writer.write_tensor_data(data)
      exact, rounded = exact + kept, max(rounded, change)
    writer.close()
    with part.open('rb') as file:
      os.fsync(file.fileno())
    gguf_reader.GgufSource(part)  # Names, shapes and metadata are read back.
    os.replace(part, path)
  finally:
    writer.close()
    part.unlink(missing_ok=True)
  return Summary(
    path=path,
    nbytes=path.stat().st_size,
    counts=counts,
    exact=exact,
    rounded=rounded,
  )


def misfit(q: qarray.QArray, kind: str) -> str:
  """Why a quantized kernel does not fit a type exactly; '' if it does."""
  spec, (K, _) = q.spec, q.shape
  if not spec.is_integer:
    return f'it holds {spec.dtype}, not integers'
  if spec.bits > TYPES[kind]:
    return f'it has {spec.bits} bits'
  if not spec.symmetric:
    return 'it is asymmetric'
  if spec.granularity == 'token':
    return 'its scales belong to rows of K'
  if spec.granularity == 'group' and spec.group_size % _BLOCK:
    return f'its groups of {spec.group_size} are no multiple of {_BLOCK}'
  if K % _BLOCK:
    return f'its K={K} is no multiple of {_BLOCK}'
  return ''


def encode(q: qarray.QArray, kind: str) -> tuple[np.ndarray, float]:
  """A kernel (K, N) as rows of blocks, and how much its steps were rounded.

  Args:
    q: one that `misfit` has no reason against.
    kind: of TYPES.

  Returns:
    uint8 (N, bytes of K values), and the largest relative change of a step
    that belongs to an integer other than 0.

  Raises:
    ValueError: a step that float16 cannot hold.
  """
  codes = np.asarray(qarray.codes(q)).astype(np.int8).T  # (N, K)
  N, K = codes.shape
  codes = codes.reshape(N, K // _BLOCK, _BLOCK)
  scale = np.asarray(q.scale, np.float32).T  # (N or 1, 1 or K/G)
  scale = np.repeat(scale, codes.shape[1] // scale.shape[1], axis=1)
  scale = np.broadcast_to(scale, codes.shape[:2])
  with np.errstate(over='ignore'):
    d = scale.astype(np.float16)
  used = np.any(codes, axis=-1)
  if not np.all(np.isfinite(d)) or np.any(used & (d == 0)):
    raise ValueError(
      f'scales from {scale.min():g} to {scale.max():g}; GGUF stores them in '
      'float16, which ends at 65504 and 6e-8. Scale the weights first.'
    )
  change = np.abs(d.astype(np.float32) - scale)[used] / scale[used]
  fields: Any = codes.view(np.uint8)
  if kind == 'Q4_0':
    fields, half = fields + np.uint8(8), _BLOCK // 2  # Wraps to 0..15.
    fields = fields[..., :half] | (fields[..., half:] << 4)
  blocks = np.concatenate([d[..., None].view(np.uint8), fields], axis=-1)
  return blocks.reshape(N, -1), float(change.max(initial=0.0))


def _check_family(source: Any) -> None:
  family = getattr(source, 'family', 'decoder')
  if family != 'decoder':
    raise NotImplementedError(
      f'export: the model is of the family {family!r}; GGUF as written here '
      "holds ['decoder']. Export to another format."
    )


def _add_metadata(writer, metadata, name: str, config) -> None:
  writer.add_name(name)
  writer.add_file_type(_FILE_TYPES[config.type])
  writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
  for key, value in metadata.items():
    match value:
      case bool():
        writer.add_bool(key, value)
      case int():
        writer.add_uint32(key, value)
      case float():
        writer.add_float32(key, value)
      case str():
        writer.add_string(key, value)
      case list():
        writer.add_array(key, value)


def _pieces(source, model, config) -> Iterator[_Piece]:
  """Every tensor of the file with its leaves, one block in memory."""
  for name, array in gguf_config.rope_tensors(model).items():
    yield _Piece(name, array.shape, [], [array], 'F32')
  yield from _group(
    architectures.outside(model), source.outside(), False, config, 'outside'
  )
  for i in range(model['num_hidden_layers']):
    params = source.block(i)
    quantized = 'params' in params
    if quantized:
      _check_quant(params['quant'], i)
      params = params['params']
    entries = architectures.block(model, i)
    yield from _group(entries, params, quantized, config, f'block {i}')


def _check_quant(quant: dict, i: int) -> None:
  """Refuses quantized inputs and online rotations."""
  found = {}
  leaves, _ = jax.tree_util.tree_flatten_with_path(
    quant, is_leaf=lambda x: not isinstance(x, dict)
  )
  for path, leaf in leaves:
    found['/'.join(str(key.key) for key in path)] = type(leaf).__name__
  if found:
    where, what = next(iter(found.items()))
    raise NotImplementedError(
      f'export: block {i} has {what} at {where}; GGUF holds weights only. '
      'Calibrate with a scheme of weights only (such as W4A16) and without '
      'online rotations.'
    )


def _group(
  entries: Iterable[architectures.Entry], params, quantized, config, where
) -> Iterator[_Piece]:
  """Leaves by the tensor that holds them, each tensor with its type."""
  pieces: dict[str, _Piece] = {}
  for entry in entries:
    place, node = entry.gguf, params
    for key in entry.path:
      node = node[key]
    assert place is not None  # gguf_config.write refused the others.
    piece = pieces.setdefault(
      place.name, _Piece(place.name, place.shape, [], [])
    )
    piece.entries.append(entry)
    piece.leaves.append(node)
    path = f'{where}: {"/".join(entry.path)}'
    kind = _type_of(entry, node, quantized, config, path)
    if piece.type and piece.type != kind:
      raise NotImplementedError(
        f'export: {path} is {kind} and {piece.entries[0].path[-2]} is '
        f'{piece.type}, but they share the tensor {place.name}; GGUF gives a '
        'tensor one type. Quantize both, or keep both float.'
      )
    piece.type = kind
  yield from pieces.values()


def _type_of(entry, leaf, quantized: bool, config, path: str) -> str:
  if isinstance(leaf, binary.BinaryArray):
    raise NotImplementedError(
      f'export: {path} holds signs and some of its rows at '
      f'{leaf.salient_bits} bits (ptq161); GGUF gives a tensor one type. Keep '
      'the jaxq directory, or calibrate with another --method.'
    )
  if isinstance(leaf, qarray.QArray):
    reason = misfit(leaf, config.type)
    if reason:
      raise NotImplementedError(
        f'export: {path} does not fit {config.type}: {reason}; allowed are '
        f'symmetric integers of at most {TYPES[config.type]} bits, per channel '
        f'or in groups of a multiple of {_BLOCK}. {_advice(leaf, config.type)}'
      )
    return config.type
  if len(entry.shape) == 1 or entry.path[-2] == 'router':
    return 'F32'
  linear = entry.path[-1] == 'kernel' and entry.path[0] != 'head'
  kind = config.type if linear and not quantized else config.rest
  if kind in TYPES and entry.shape[-1] % _BLOCK:
    raise ValueError(
      f'export: {path} has K={entry.shape[-1]}; {kind} needs a multiple of '
      f'{_BLOCK}. '
      + (
        'Use a model whose sizes are such multiples.'
        if linear and not quantized
        else 'Write it as F16 (--gguf_rest=F16).'
      )
    )
  return kind


def _advice(q: qarray.QArray, kind: str) -> str:
  if kind == 'Q4_0' and not misfit(q, 'Q8_0'):
    return 'Export as Q8_0, which it fits.'
  return (
    f'Calibrate again with symmetric int{TYPES[kind]} and group_size=32, or '
    'export the float model.'
  )


def _row_bytes(K: int, kind: str) -> int:
  per_block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
  return K // per_block * nbytes


def _encode(piece: _Piece, arch: str, model) -> tuple[np.ndarray, int, float]:
  """The bytes of a tensor, its kernels kept exactly, their largest change."""
  rows, exact, rounded = [], 0, 0.0
  for i, leaf in enumerate(piece.leaves):
    path = piece.entries[i].path if piece.entries else ('', '')
    turned = gguf_reader.interleaved(path, arch)
    if isinstance(leaf, qarray.QArray):
      try:
        data, change = encode(leaf, piece.type)
      except ValueError as e:
        raise ValueError(f'export: tensor {piece.name} has {e}') from e
      exact, rounded = exact + 1, max(rounded, change)
      if turned:  # Rows of bytes are rows of weights.
        data = gguf_reader.interleave(data, data.shape[0] // model['head_dim'])
    else:
      leaf = np.asarray(leaf, np.float32)
      leaf = leaf.T if path[-1] == 'kernel' else leaf  # (out, in)
      if turned:
        leaf = gguf_reader.interleave(leaf, leaf.shape[0] // model['head_dim'])
      data = _float_rows(leaf, piece)
    rows.append(data)
  shape = (*piece.shape[:-1], _row_bytes(piece.shape[-1], piece.type))
  return np.concatenate(rows).reshape(shape), exact, rounded


def _float_rows(leaf: np.ndarray, piece: _Piece) -> np.ndarray:
  """(out, in) or (n,) -> uint8 (out, bytes) or (bytes,)."""
  kind = gguf.GGMLQuantizationType[piece.type]
  largest = float(np.abs(leaf).max(initial=0.0))
  if piece.type == 'F16' and largest > float(np.finfo(np.float16).max):
    raise ValueError(
      f'export: tensor {piece.name} reaches {largest:g}; F16 ends at 65504. '
      'Write it as BF16 or F32 (--gguf_rest).'
    )
  leaf = np.ascontiguousarray(leaf)
  return np.ascontiguousarray(gguf.quants.quantize(leaf, kind)).view(np.uint8)
