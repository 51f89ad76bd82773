"""Reads ONNX files: the graph and, lazily, its weights.

An ONNX file is one protocol buffer; this is the part of that format that a
weight reader needs, on top of the wire format itself (field number and wire
type in a varint, then a varint, 4, 8 or a counted number of bytes). Weights are
views of the mapped file: nothing is copied or held before it is asked for.

No operator is run here. A model's reader (jaxq.io.onnx_vit) looks at the nodes
to find out which tensor is which, and refuses a graph that it does not know.
"""

import dataclasses
import mmap
import os
import pathlib
import struct
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

# TensorProto.DataType -> NumPy.
_DTYPES = {
  1: np.float32,
  2: np.uint8,
  3: np.int8,
  5: np.int16,
  6: np.int32,
  7: np.int64,
  9: np.bool_,
  10: np.float16,
  11: np.float64,
  16: ml_dtypes.bfloat16,
}
# Repeated scalar fields of a TensorProto that may stand in for its raw bytes.
_TYPED_FIELDS = {4: '<f4', 10: '<f8'}
_VARINT_FIELDS = (5, 7)
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_GRAPH = 7  # Of ModelProto.


@dataclasses.dataclass(frozen=True)
class Node:
  """One operator. attributes: ints, floats, bytes, lists or Tensors by name."""

  op: str
  name: str
  inputs: tuple[str, ...]
  outputs: tuple[str, ...]
  attributes: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A stored tensor; `array()` reads it."""

  name: str
  dtype: Any
  shape: tuple[int, ...]
  data: memoryview | None
  values: tuple[Any, ...] = ()

  def array(self) -> np.ndarray:
    """The values, as a view of the file where it holds them raw.

    Raises:
      ValueError: bytes and shape do not agree.
    """
    if self.data is None:
      flat = np.array(self.values, self.dtype)
    elif len(self.data) % np.dtype(self.dtype).itemsize:
      flat = np.zeros(0, self.dtype)
    else:
      flat = np.frombuffer(self.data, self.dtype)
    if flat.size != int(np.prod(self.shape)):
      raise ValueError(
        f'ONNX tensor {self.name}: {flat.size} values do not fill its shape '
        f'{self.shape}; the file is damaged. Export or fetch it again.'
      )
    return flat.reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Graph:
  """Nodes in the order in which they run, and the weights by name.

  inputs, outputs: name -> shape; a size that is not fixed is None.
  """

  nodes: tuple[Node, ...]
  tensors: dict[str, Tensor]
  inputs: dict[str, tuple[int | None, ...]]
  outputs: dict[str, tuple[int | None, ...]]


def read(path: str | os.PathLike) -> Graph:
  """Opens an ONNX file.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is no ONNX file, or damaged.
    NotImplementedError: weights in another file, or of a type without one here.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(
      f'{path}: no such file; an .onnx file is needed. Give its path.'
    )
  if not path.stat().st_size:
    raise ValueError(f'{path}: is empty; an ONNX file is needed.')
  with path.open('rb') as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  try:
    found = [value for n, value in _fields(memoryview(mapped)) if n == _GRAPH]
    graph = _graph(found[-1])
  except (IndexError, TypeError, UnicodeDecodeError, struct.error) as e:
    raise ValueError(
      f'{path}: is no ONNX file, or truncated ({path.stat().st_size} bytes). '
      'Export or fetch it again.'
    ) from e
  return graph


def _graph(data: memoryview) -> Graph:
  nodes, tensors = [], {}
  inputs: dict[str, tuple] = {}
  outputs: dict[str, tuple] = {}
  for number, value in _fields(data):
    if number == 1:
      nodes.append(_node(value))
    elif number == 5:
      tensor = _tensor(value)
      tensors[tensor.name] = tensor
    elif number in (11, 12):
      name, shape = _value_info(value)
      (inputs if number == 11 else outputs)[name] = shape
  stored = {k: v for k, v in inputs.items() if k not in tensors}
  return Graph(tuple(nodes), tensors, stored, outputs)


def _node(data: memoryview) -> Node:
  inputs, outputs, name, op = [], [], '', ''
  attributes = {}
  for number, value in _fields(data):
    if number == 1:
      inputs.append(_text(value))
    elif number == 2:
      outputs.append(_text(value))
    elif number == 3:
      name = _text(value)
    elif number == 4:
      op = _text(value)
    elif number == 5:
      key, attribute = _attribute(value)
      attributes[key] = attribute
  return Node(op, name, tuple(inputs), tuple(outputs), attributes)


def _attribute(data: memoryview) -> tuple[str, Any]:
  name, found, floats, ints = '', None, [], []
  for number, value in _fields(data):
    if number == 1:
      name = _text(value)
    elif number == 2:
      (found,) = struct.unpack('<f', value)
    elif number == 3:
      found = _signed(value)
    elif number == 4:
      found = bytes(value)
    elif number == 5:
      found = _tensor(value)
    elif number == 7:
      floats += _floats(value)
    elif number == 8:
      ints += _varints(value)
  return name, ints or floats or found


def _tensor(data: memoryview) -> Tensor:
  dims: list[int] = []
  values: list[Any] = []
  kind, name, raw = 0, '', None
  for number, value in _fields(data):
    if number == 1:
      dims += _varints(value)
    elif number == 2:
      kind = value
    elif number in _TYPED_FIELDS:
      values += np.frombuffer(value, _TYPED_FIELDS[number]).tolist()
    elif number in _VARINT_FIELDS:
      values += _varints(value)
    elif number == 8:
      name = _text(value)
    elif number == 9:
      raw = value
    elif number == 13:
      raise NotImplementedError(
        f'ONNX tensor {name}: its data lies in another file; allowed are '
        'tensors inside the .onnx file. Export without external data.'
      )
  if kind not in _DTYPES:
    raise NotImplementedError(
      f'ONNX tensor {name}: has data type {kind}; allowed are {sorted(_DTYPES)}'
      ' of TensorProto.DataType. Export in float32.'
    )
  return Tensor(name, _DTYPES[kind], tuple(dims), raw, tuple(values))


def _value_info(data: memoryview) -> tuple[str, tuple[int | None, ...]]:
  """ValueInfoProto -> name and shape."""
  name, shape = '', []
  for number, value in _fields(data):
    if number == 1:
      name = _text(value)
    elif number == 2:  # TypeProto > tensor_type > shape > dim.
      for dim in _nested(value, 1, 2, 1):
        sizes = [v for n, v in _fields(dim) if n == 1]
        shape.append(sizes[0] if sizes else None)
  return name, tuple(shape)


def _nested(data: memoryview, *numbers: int) -> Iterator[memoryview]:
  """The messages at a path of field numbers."""
  if not numbers:
    yield data
    return
  for number, value in _fields(data):
    if number == numbers[0]:
      yield from _nested(value, *numbers[1:])


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
  """(field number, value) of a message: int, or memoryview of its bytes."""
  at = 0
  while at < len(data):
    key, at = _varint(data, at)
    number, wire = key >> 3, key & 7
    if wire == _VARINT:
      value, at = _varint(data, at)
      yield number, value
      continue
    if wire == _BYTES:
      size, at = _varint(data, at)
    elif wire in (_FIXED32, _FIXED64):
      size = 4 if wire == _FIXED32 else 8
    else:
      raise struct.error(f'wire type {wire}')
    if at + size > len(data):
      raise struct.error('a field reaches over the end')
    yield number, data[at : at + size]
    at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
  """The varint at `at`, and where it ends."""
  value = shift = 0
  while True:
    byte = data[at]
    value |= (byte & 0x7F) << shift
    at, shift = at + 1, shift + 7
    if byte < 0x80:
      return value, at


def _varints(value: Any) -> list[int]:
  """A repeated integer field: one value, or packed."""
  if isinstance(value, int):
    return [_signed(value)]
  out, at = [], 0
  while at < len(value):
    one, at = _varint(value, at)
    out.append(_signed(one))
  return out


def _floats(value: memoryview) -> list[float]:
  return np.frombuffer(value, '<f4').tolist()


def _signed(value: int) -> int:
  return value - (1 << 64) if value >= 1 << 63 else value


def _text(value: memoryview) -> str:
  return bytes(value).decode('utf-8')
