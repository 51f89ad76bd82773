"""A DINOv2-shaped vision transformer inside an exported ONNX graph.

Exporters keep the names of most parameters (those of jaxq.io.dinov2, behind a
prefix), but fold a linear's transposed kernel and the two parts of the position
table into constants with made-up names. They are found by what reads them: a
kernel is what the MatMul multiplies with whose output the named bias is added
to, and the position of the class token is joined to the grid of the others. Of
a graph with more than the backbone (a head for some task) only that is read.
"""

import pathlib
from typing import Any

import numpy as np

from jaxq.io import dinov2, encoder_source, files, onnx

_LAST = 'layernorm.weight'


class OnnxVitSource:
  """A jaxq.io.sources.WeightSource over an .onnx file.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged, or no such vision transformer.
  """

  family = 'vit'

  def __init__(self, path: str | pathlib.Path):
    self.path = pathlib.Path(path)
    self._graph = onnx.read(self.path)
    self._tensors = self._graph.tensors
    self._made_by = {o: n for n in self._graph.nodes for o in n.outputs}
    self._adds = [n for n in self._graph.nodes if n.op == 'Add']
    self._prefix = self._find_prefix()
    self._first, self._grid = self._find_positions()
    self.config = self._make_config()
    for i in range(self.config['num_hidden_layers']):
      for name in dinov2.block_table(i).values():
        self._name(name)

  def outside(self) -> dict:
    """Parameters outside the blocks, float32; read on each call."""
    table = dinov2.outside_table()
    positions = [self._tensors[n].array()[0] for n in (self._first, self._grid)]
    del table['positions/embedding']
    params = self._read(table)
    first = params['class_token']['embedding']
    params['class_token']['embedding'] = first.reshape(1, -1)
    params['positions'] = {
      'embedding': np.concatenate(positions).astype(np.float32)
    }
    return params

  def block(self, i: int) -> dict:
    """Parameters of block i, float32; read on each call."""
    encoder_source.check_block(i, self.config, str(self.path))
    return self._read(dinov2.block_table(i))

  def tokenizer(self) -> None:
    """None: it reads no text."""

  def fingerprint(self) -> str:
    """Identity of the file's content, independent of where it lies."""
    return files.fingerprint([(self.path.name, self.path, 0)], self.config)

  def output_name(self) -> str:
    """The graph's name of the features behind the last norm."""
    return self._add_of(f'{self._prefix}layernorm.bias').outputs[0]

  def _read(self, table: encoder_source.Table) -> dict:
    params: dict = {}
    for path, name in table.items():
      array = self._tensors[self._name(name)].array().astype(np.float32)
      if path.endswith('/kernel') and array.ndim == 2:
        array = array.T  # (in, out) in the graph; `put` expects (out, in).
      encoder_source.put(params, path, array)
    return params

  def _name(self, name: str) -> str:
    """The graph's name of a tensor that Hugging Face calls `name`."""
    full = self._prefix + name
    if full in self._tensors:
      return full
    if name.endswith('.weight'):
      add = self._add_of(full.removesuffix('weight') + 'bias')
      for source in add.inputs:
        matmul = self._made_by.get(source)
        if matmul is not None and matmul.op == 'MatMul':
          return matmul.inputs[1]
    raise self._refusal(f'has no tensor {full}')

  def _add_of(self, bias: str) -> onnx.Node:
    found = [node for node in self._adds if bias in node.inputs]
    if len(found) != 1:
      raise self._refusal(f'adds {bias} in {len(found)} places')
    return found[0]

  def _find_prefix(self) -> str:
    name = next((n for n in self._tensors if n.endswith(_LAST)), None)
    if name is None:
      raise self._refusal(f'has no tensor ...{_LAST}')
    return name.removesuffix(_LAST)

  def _find_positions(self) -> tuple[str, str]:
    """Names of the class token's position and of the grid of the others."""
    token = self._tensors.get(self._prefix + dinov2.CLASS_TOKEN)
    if token is None:
      raise self._refusal(f'has no tensor {self._prefix}{dinov2.CLASS_TOKEN}')
    C = token.shape[-1]
    tables = {
      name: tensor.shape[1]
      for name, tensor in self._tensors.items()
      if len(tensor.shape) == 3
      and tensor.shape[::2] == (1, C)
      and name != token.name
    }
    first = [name for name, rows in tables.items() if rows == 1]
    grid = [name for name, rows in tables.items() if rows > 1]
    if len(first) != 1 or len(grid) != 1:
      raise self._refusal(f'has tables of positions {sorted(tables)}')
    return first[0], grid[0]

  def _make_config(self) -> dict[str, Any]:
    """The keys of Hugging Face's Dinov2Config."""
    patches = self._tensors[self._name(f'{dinov2.PATCHES}.weight')].shape
    C, P = patches[0], patches[-1]
    side = round(self._tensors[self._grid].shape[1] ** 0.5)
    layer = f'{self._prefix}encoder.layer.'
    layers = {
      n.removeprefix(layer).split('.')[0]
      for n in self._tensors
      if n.startswith(layer)
    }
    up = self._tensors[self._name('encoder.layer.0.mlp.fc1.bias')]
    if up.shape[0] % C:
      raise self._refusal(f'has MLPs of {up.shape[0]} channels on {C}')
    return {
      'model_type': 'dinov2',
      'hidden_size': C,
      'num_hidden_layers': len(layers),
      'num_attention_heads': self._heads(C),
      'mlp_ratio': up.shape[0] // C,
      'patch_size': P,
      'image_size': P * side,
      'layer_norm_eps': self._norm_eps(),
      'hidden_act': self._activation(),
    }

  def _heads(self, C: int) -> int:
    """From the constants that split the first queries into heads."""
    add = self._add_of(
      f'{self._prefix}encoder.layer.0.attention.attention.query.bias'
    )
    for node in self._graph.nodes:
      if node.op == 'Reshape' and node.inputs[0] == add.outputs[0]:
        shape = self._made_by[node.inputs[1]]
        values = [self._constant(name) for name in shape.inputs]
        sizes = [int(v.reshape(-1)[0]) for v in values if v is not None]
        if len(sizes) >= 2 and sizes[-2] * sizes[-1] == C:
          return sizes[-2]
    raise self._refusal('does not show into how many heads it splits')

  def _norm_eps(self) -> float:
    """The constant that is added to the variance of the first norm."""
    norm = f'{self._prefix}encoder.layer.0.norm1.weight'
    scale = next((n for n in self._graph.nodes if norm in n.inputs), None)
    if scale is not None and scale.op == 'LayerNormalization':
      return _decimal(scale.attributes.get('epsilon', 1e-5))
    node = scale
    for op in ('Div', 'Sqrt', 'Add'):
      made = [self._made_by.get(name) for name in node.inputs] if node else []
      node = next((n for n in made if n is not None and n.op == op), None)
    values = [self._constant(name) for name in node.inputs] if node else []
    found = [float(v.reshape(-1)[0]) for v in values if v is not None]
    if len(found) != 1:
      raise self._refusal('does not show the epsilon of its norms')
    return _decimal(found[0])

  def _activation(self) -> str:
    ops = {node.op for node in self._graph.nodes}
    if 'Erf' in ops or 'Gelu' in ops:
      return 'gelu'
    raise self._refusal('has no exact GELU')

  def _constant(self, name: str) -> np.ndarray | None:
    """The value of a stored or a Constant tensor; None of a computed one."""
    if name in self._tensors:
      return self._tensors[name].array()
    node = self._made_by.get(name)
    if node is not None and node.op == 'Constant':
      return node.attributes['value'].array()
    return None

  def _refusal(self, what: str) -> ValueError:
    return ValueError(
      f'{self.path}: {what}; allowed are exports of vision transformers with '
      "DINOv2's parameters. Export the model from transformers."
    )


def _decimal(value: float) -> float:
  """1e-06, not its float32 neighbour."""
  return float(f'{value:.6g}')
