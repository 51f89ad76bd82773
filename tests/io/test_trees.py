"""Tests of jaxq.io.trees."""

import dataclasses
import json
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from absl.testing import absltest, parameterized

from jaxq.io import trees
from jaxq.nn import linear, routed_low_rank
from jaxq.numerics import binary, fpx, qarray
from jaxq.numerics import spec as spec_lib
from tests.numerics import test_binary


def assert_same(test, found, expected):
  """Same structure, static fields, dtypes, shapes and bits."""
  test.assertEqual(jax.tree.structure(found), jax.tree.structure(expected))
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    a, b = np.asarray(a), np.asarray(b)
    test.assertEqual((a.dtype, a.shape), (b.dtype, b.shape))
    test.assertEqual(a.tobytes(), b.tobytes())


class TreesTest(parameterized.TestCase):
  def round_trip(self, tree):
    directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    trees.save(directory, tree)
    return trees.load(directory)

  def test_split_by_hand(self):
    kernel = qarray.QArray(
      qvalue=np.ones((4, 2), np.int8),
      scale=np.ones((1, 2), np.float32),
      zero_point=None,
      tensor_scale=None,
      spec=spec_lib.QuantSpec(dtype='int8', granularity='channel'),
      shape=(4, 2),
    )
    structure, arrays = trees.split({'kernel': kernel, 'none': {}})
    node = structure['items']['kernel']
    self.assertEqual(node['type'], 'QArray')
    self.assertEqual(node['static']['shape'], [4, 2])
    self.assertEqual(node['static']['spec']['dtype'], 'int8')
    self.assertIsNone(node['fields']['zero_point'])
    self.assertEqual(
      node['fields']['qvalue'],
      {'type': 'array', 'dtype': 'int8', 'shape': [4, 2]},
    )
    self.assertEqual(structure['items']['none'], {'type': 'dict', 'items': {}})
    self.assertEqual(list(arrays), ['kernel'])
    self.assertEqual(list(arrays['kernel']), ['qvalue', 'scale'])

  @parameterized.parameters(
    'bool', 'int8', 'int32', 'uint8', 'float16', 'float32', 'float64',
    'bfloat16', 'float8_e4m3fn', 'float8_e5m2', 'float8_e8m0fnu',
    'float4_e2m1fn', 'int4', 'uint4',
  )  # fmt: skip
  def test_dtypes_keep_their_bits(self, name):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    bits = np.arange(16 * dtype.itemsize, dtype=np.uint8)
    bits = bits % 2 if name == 'bool' else bits
    tree = {'a': bits.view(dtype).reshape(2, 8), 'scalar': dtype.type(1)}
    assert_same(self, self.round_trip(tree), tree)

  def test_special_values_keep_their_bits(self):
    bits = [0x7FC00000, 0xFFC00001, 0x80000000, 0, 1, 0x7F800000]
    values = np.array(bits, np.uint32).view(np.float32)
    tree = {
      'special': values,
      'zeros': np.zeros((3, 2), np.float32),
      'negative_zeros': -np.zeros(3, np.float32),
      'empty': np.zeros((0, 3), np.int8),
      'fortran': np.asfortranarray(np.arange(6).reshape(2, 3)),
      'device': jnp.arange(3),
    }
    assert_same(self, self.round_trip(tree), tree)

  @parameterized.product(
    spec=(
      dict(dtype='int8', granularity='channel'),
      dict(dtype='int4', granularity='group', group_size=32),
      dict(dtype='int3', granularity='group', group_size=64, symmetric=False),
      dict(dtype='fp8_e4m3', granularity='channel'),
      dict(dtype='mxfp4'),
      dict(dtype='nvfp4'),
      dict(dtype='nf4'),
    ),
    leading=((), (2,)),
  )
  def test_quantized_arrays(self, spec, leading):
    spec = spec_lib.QuantSpec(**spec)
    x = np.random.default_rng(0).normal(size=(*leading, 64, 8))
    kernel = qarray.quantize(jnp.asarray(x, jnp.float32), spec)
    found = self.round_trip({'kernel': kernel})['kernel']
    assert_same(self, found, kernel)
    np.testing.assert_array_equal(
      qarray.dequantize(found), qarray.dequantize(kernel)
    )

  @parameterized.parameters(True, False)
  def test_quant_collection(self, static):
    spec = spec_lib.QuantSpec(dtype='int8', granularity='token')
    scale = np.ones((1, 1), np.float32) if static else None
    tree = {
      'hadamard': linear.OnlineHadamard(size=64),
      'input': linear.ActQuant(scale=scale, zero_point=None, spec=spec),
      'steps': linear.StepInput(spec=spec),
      'fpx': linear.FpxInput(
        np.ones((1, 1), np.float32),
        np.ones((1, 1), np.int8),
        np.arange(4, dtype=np.int8) if static else None,
        fpx.spec(4, 'tensor'),
        restore=static,
      ),
      'kernel': fpx.quantize(
        jnp.ones((8, 2)), jnp.ones((1, 2)), jnp.int32(1), 4, jnp.arange(8)
      ),
      'split': linear.SplitInput(
        src=np.arange(2, dtype=np.int32),
        offset=np.zeros(6, np.float32),
        spec=spec,
      ),
      'binary': binary.pack(**test_binary.parts(k=8 if static else 0)),
      'low_rank': linear.LowRank(
        a=np.ones((4, 2), np.float32), b=np.ones((2, 3), np.float32)
      ),
      'routed': routed_low_rank.RoutedLowRank(
        a=qarray.quantize(jnp.ones((4, 3)), spec_lib.QuantSpec(dtype='int8')),
        b=np.ones((3, 2), ml_dtypes.bfloat16),
        router=np.ones((4, 2), ml_dtypes.bfloat16),
        weight=np.ones(4, np.float32) if static else None,
        shared=1,
        top_k=2 if static else 1,
      ),
    }
    assert_same(self, self.round_trip(tree), tree)

  def test_tree_without_arrays(self):
    tree = {'a': {}, 'b': {'c': linear.OnlineHadamard(size=8)}}
    assert_same(self, self.round_trip(tree), tree)

  @parameterized.parameters(*trees.NODE_TYPES)
  def test_every_field_is_in_the_table(self, name):
    node = trees.NODE_TYPES[name]
    fields = {field.name for field in dataclasses.fields(node.cls)}
    self.assertEqual({*node.arrays, *node.static}, fields)

  def test_plain_orbax_reads_it(self):
    directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    trees.save(directory, {'a': {'b': np.arange(3)}, 'c': np.ones(2)})
    found = ocp.PyTreeCheckpointer().restore(directory)
    np.testing.assert_array_equal(found['a']['b'], np.arange(3))
    np.testing.assert_array_equal(found['c'], np.ones(2))

  def test_lazy_leaves_are_the_eager_ones(self):
    q = qarray.quantize(
      jnp.arange(64.0).reshape(32, 2), spec_lib.QuantSpec(dtype='int4')
    )
    path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    tree = {
      'q': jax.device_get(q),
      'x': {'bf16': np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)},
      'e': np.arange(4, dtype=np.float32).astype(ml_dtypes.float8_e8m0fnu),
      'none': np.zeros((0, 2), np.float32),
    }
    trees.save(path, tree)
    lazy = trees.load(path, lazily=True)
    assert_same(self, lazy, trees.load(path))
    self.assertEqual(
      lazy['x']['bf16'][1:, 1:].tobytes(), tree['x']['bf16'][1:, 1:].tobytes()
    )

  def test_save_is_quick_and_quiet(self):
    """A block of usual size, 0.3 s on a free machine; five times that here."""
    directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    tree = {str(i): np.ones((576, 768), np.uint8) for i in range(20)}
    start = time.monotonic()
    with self.assertNoLogs('absl'):
      trees.save(directory, tree)
    self.assertLess(time.monotonic() - start, 1.5)

  def test_other_leaves_are_refused(self):
    for leaf, kind in ((1.0, 'float'), ([1], 'list'), ('a', 'str')):
      with self.assertRaisesRegex(TypeError, f'a/b is a {kind}; a tree may ho'):
        trees.split({'a': {'b': leaf}})
    with self.assertRaisesRegex(TypeError, 'a has dtype object; booleans and'):
      trees.split({'a': np.array([None])})
    with self.assertRaisesRegex(TypeError, 'must be a dict, not list'):
      trees.split([])

  @parameterized.parameters('a.b', 'a/b', '', 3)
  def test_keys_are_refused(self, key):
    with self.assertRaisesRegex(ValueError, 'x has the key .* Rename it'):
      trees.split({'x': {key: np.ones(1)}})

  def test_node_of_a_later_version(self):
    structure = {'type': 'dict', 'items': {'a': {'type': 'New', 'fields': {}}}}
    with self.assertRaisesRegex(ValueError, "a is of type 'New'; .*Upgrade"):
      trees.join(structure, {})

  @parameterized.parameters(
    ({},),
    ({'a': np.ones(2)},),
    ({'a': {}},),
    (np.ones(2),),
  )
  def test_arrays_that_do_not_fit(self, arrays):
    structure, _ = trees.split({'a': np.ones((2, 1), np.float32)})
    message = r'a: the structure says float32\(2, 1\) and the arrays hold'
    with self.assertRaisesRegex(ValueError, message):
      trees.join(structure, arrays)

  def test_damaged_directory(self):
    directory = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    trees.save(directory, {'a': np.arange(100.0)})
    (directory / 'a' / '.zarray').write_text('{')
    path = directory / 'structure.json'
    with self.assertRaisesRegex(ValueError, '.zarray is damaged: it has 1 byt'):
      trees.load(directory)
    found = json.loads(path.read_text())
    found['files']['a/.zarray']['size'] = 1
    path.write_text(json.dumps(found))
    with self.assertRaisesRegex(ValueError, 'damaged: Orbax cannot read it'):
      trees.load(directory)
    path.write_text(json.dumps(found | {'version': 9}))
    with self.assertRaisesRegex(ValueError, 'version=9, and this jaxq reads'):
      trees.load(directory)
    path.unlink()
    with self.assertRaisesRegex(ValueError, 'structure.json is missing'):
      trees.load(directory)


if __name__ == '__main__':
  absltest.main()
