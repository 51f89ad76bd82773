"""Tests of jaxq.io.onnx on files written field by field."""

import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from jaxq.io import onnx
from tests.io import onnx_files


class OnnxTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def read(self, data):
    path = self.folder / 'model.onnx'
    path.write_bytes(data)
    return onnx.read(path)

  def test_nodes_tensors_and_shapes(self):
    w = np.arange(6, dtype=np.float32).reshape(3, 2)
    nodes = [
      onnx_files.node('Constant', [], 'c', value=np.array([-1, 300])),
      onnx_files.node('MatMul', ['x', 'w'], 'y', axis=-1, epsilon=0.5),
    ]
    graph = self.read(onnx_files.model(nodes, {'w': w}))
    self.assertEqual([n.op for n in graph.nodes], ['Constant', 'MatMul'])
    self.assertEqual(graph.nodes[1].inputs, ('x', 'w'))
    self.assertEqual(graph.nodes[1].outputs, ('y',))
    self.assertEqual(graph.nodes[1].attributes, {'axis': -1, 'epsilon': 0.5})
    value = graph.nodes[0].attributes['value'].array()
    np.testing.assert_array_equal(value, [-1, 300])
    np.testing.assert_array_equal(graph.tensors['w'].array(), w)
    self.assertEqual(graph.inputs, {'x': (None, 3)})
    self.assertEqual(list(graph.outputs), ['y'])

  def test_values_outside_raw_data(self):
    floats = np.array([1.5, -2.0], '<f4')
    proto = onnx_files.field(1, 2) + onnx_files.field(2, 1)
    proto += onnx_files.field(4, floats.tobytes()) + onnx_files.field(8, 'w')
    ints = onnx_files.field(1, 2) + onnx_files.field(2, 7)
    packed = onnx_files.varint(-3) + onnx_files.varint(4)
    ints += onnx_files.field(7, packed) + onnx_files.field(8, 'i')
    graph = onnx_files.field(5, proto) + onnx_files.field(5, ints)
    tensors = self.read(onnx_files.field(7, graph)).tensors
    np.testing.assert_array_equal(tensors['w'].array(), floats)
    np.testing.assert_array_equal(tensors['i'].array(), [-3, 4])

  def test_messages(self):
    with self.assertRaisesRegex(FileNotFoundError, 'no such file'):
      onnx.read(self.folder / 'nothing.onnx')
    with self.assertRaisesRegex(ValueError, 'is empty'):
      self.read(b'')
    whole = onnx_files.model([], {'w': np.ones(4, np.float32)})
    with self.assertRaisesRegex(ValueError, 'no ONNX file, or truncated'):
      self.read(whole[:-30])
    with self.assertRaisesRegex(ValueError, 'no ONNX file'):
      self.read(b'not an onnx file at all')
    short = onnx_files.tensor('w', np.ones(4, np.float32))
    short = onnx_files.field(1, 9) + short
    graph = self.read(onnx_files.field(7, onnx_files.field(5, short)))
    with self.assertRaisesRegex(ValueError, r'4 values do not fill.*\(9, 4\)'):
      graph.tensors['w'].array()
    external = onnx_files.field(8, 'w') + onnx_files.field(13, b'')
    with self.assertRaisesRegex(NotImplementedError, 'in another file'):
      self.read(onnx_files.field(7, onnx_files.field(5, external)))
    strings = onnx_files.field(8, 'w') + onnx_files.field(2, 8)
    with self.assertRaisesRegex(NotImplementedError, 'has data type 8'):
      self.read(onnx_files.field(7, onnx_files.field(5, strings)))


if __name__ == '__main__':
  absltest.main()
