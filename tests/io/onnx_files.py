"""Writes ONNX files from Python data, field by field."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.io import encoder_files

_KINDS = {'float32': 1, 'int64': 7, 'float16': 10}


def varint(value: int) -> bytes:
  """The wire format of an integer."""
  value &= (1 << 64) - 1
  out = b''
  while value > 0x7F:
    out += bytes([value & 0x7F | 0x80])
    value >>= 7
  return out + bytes([value])


def field(number: int, value: bytes | str | int) -> bytes:
  """One field of a message."""
  if isinstance(value, int):
    return varint(number << 3) + varint(value)
  data = value.encode() if isinstance(value, str) else value
  return varint(number << 3 | 2) + varint(len(data)) + data


def tensor(name: str, array: np.ndarray) -> bytes:
  """A TensorProto with raw data."""
  out = b''.join(field(1, int(size)) for size in array.shape)
  out += field(2, _KINDS[array.dtype.name])
  return out + field(8, name) + field(9, array.tobytes())


def node(
  op: str, inputs: Sequence[str], output: str, **attributes: Any
) -> bytes:
  """A NodeProto; attributes are arrays, integers or floats."""
  out = b''.join(field(1, name) for name in inputs)
  out += field(2, output) + field(4, op)
  for name, value in attributes.items():
    one = field(1, name)
    if isinstance(value, np.ndarray):
      one += field(5, tensor('', value))
    elif isinstance(value, float):
      one += varint(2 << 3 | 5) + struct.pack('<f', value)
    else:
      one += field(3, value)
    out += field(5, one)
  return out


def model(nodes: Sequence[bytes], tensors: Mapping[str, np.ndarray]) -> bytes:
  """A ModelProto with one input x (any, 3) and one output y."""
  dims = field(1, field(2, 'batch')) + field(1, field(1, 3))
  info = field(1, field(1, 1) + field(2, dims))
  graph = b''.join(field(1, n) for n in nodes)
  graph += b''.join(field(5, tensor(n, a)) for n, a in tensors.items())
  graph += field(11, field(1, 'x') + field(2, info))
  graph += field(12, field(1, 'y'))
  return field(1, 8) + field(2, 'made by a test') + field(7, graph)


def vit(config: Mapping[str, Any], seed: int = 0) -> bytes:
  """A graph with what jaxq.io.onnx_vit looks at; it computes nothing.

  Kernels and positions are constants with made-up names, as exporters have it.
  """
  named = encoder_files.dinov2_tensors(dict(config), seed)
  tensors: dict[str, np.ndarray] = {}
  nodes = []
  positions = named.pop('embeddings.position_embeddings')
  tensors['onnx::Concat_1'] = positions[:, :1]
  tensors['onnx::Reshape_2'] = positions[:, 1:]
  for name, array in named.items():
    full = f'backbone.{name}'
    if name.endswith('.weight') and array.ndim == 2:
      kernel = f'onnx::MatMul_{len(tensors)}'
      tensors[kernel] = np.ascontiguousarray(array.T)
      stem = full.removesuffix('.weight')
      nodes.append(node('MatMul', ['h', kernel], f'{stem}/product'))
      nodes.append(node('Add', [f'{stem}.bias', f'{stem}/product'], stem))
    else:
      tensors[full] = array
  heads = config['num_attention_heads']
  sizes = (heads, config['hidden_size'] // heads)
  for i, size in enumerate(sizes):
    nodes.append(node('Constant', [], f's{i}', value=np.array([size])))
  query = 'backbone.encoder.layer.0.attention.attention.query'
  nodes.append(node('Concat', ['batch', 's0', 's1'], 'shape', axis=0))
  nodes.append(node('Reshape', [query, 'shape'], 'heads'))
  norm = 'backbone.encoder.layer.0.norm1'
  eps = float(config['layer_norm_eps'])
  nodes.append(
    node(
      'LayerNormalization',
      ['x', f'{norm}.weight', f'{norm}.bias'],
      norm,
      epsilon=eps,
    )
  )
  nodes.append(node('Add', ['z', 'backbone.layernorm.bias'], 'features'))
  nodes.append(node('Erf', ['u'], 'erf'))
  return model(nodes, tensors)
