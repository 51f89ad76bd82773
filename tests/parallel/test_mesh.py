"""Tests of jaxq.parallel.mesh."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized
from jax.sharding import AbstractMesh, PartitionSpec

from jaxq.nn import linear, routed_low_rank
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.parallel import mesh as mesh_lib

GRID = AbstractMesh((2, 4), mesh_lib.AXES)
COLUMNS, ROWS = PartitionSpec(None, 'model'), PartitionSpec('model', None)
WHOLE = PartitionSpec(None, None)


class MakeMeshTest(parameterized.TestCase):
  def test_axes_in_any_order_and_default_to_one(self):
    devices = jax.devices()[:1]
    for text in ('data:1,model:1', 'model:1', '', 'model:1,data:1'):
      mesh = mesh_lib.make_mesh(text, devices)
      self.assertEqual(dict(mesh.shape), {'data': 1, 'model': 1})

  @parameterized.parameters(
    ('data:2,model:4', '2 x model:4 needs 8 devices and there are 1'),
    ('tensor:1', "cannot read 'tensor:1'.*'data', 'model'"),
    ('data=2', "cannot read 'data=2'"),
    ('data:0', "cannot read 'data:0'"),
  )
  def test_messages(self, text, message):
    with self.assertRaisesRegex(ValueError, message):
      mesh_lib.make_mesh(text, jax.devices()[:1])

  def test_a_job_shares_its_devices_and_says_how_many_processes_have_them(self):
    devices = [mock.Mock(id=i) for i in range(8)]
    made = []
    with (
      mock.patch.object(jax, 'devices', return_value=devices),
      mock.patch.object(jax, 'device_count', return_value=8),
      mock.patch.object(jax, 'process_count', return_value=4),
    ):
      with self.assertRaisesRegex(
        ValueError,
        r'needs 2 devices and there are 8 \(4 processes x 2\); choose',
      ):
        mesh_lib.choose('data:2')
      with mock.patch.object(mesh_lib, 'Mesh', lambda grid, axes: grid.shape):
        for batch_size in (None, 16, 4, 6, 1):
          made.append(mesh_lib.choose('', batch_size))
    self.assertEqual(made, [(8, 1), (8, 1), (4, 2), (2, 4), (1, 8)])

  def test_a_process_alone_keeps_its_device(self):
    self.assertIsNone(mesh_lib.choose('', 8))

  def test_check_divides(self):
    mesh = mesh_lib.make_mesh('', jax.devices()[:1])
    mesh_lib.check_divides('batch_size', 3, mesh, 'data')

  def test_first_matching_rule_wins_and_none_is_replicated(self):
    mesh = mesh_lib.make_mesh('', jax.devices()[:1])
    tree = {'a': {'kernel': jax.numpy.ones((4, 4))}, 'b': jax.numpy.ones(3)}
    rules = (
      (r'a/kernel', PartitionSpec(None, 'model')),
      (r'kernel', PartitionSpec('model', None)),
    )
    out = mesh_lib.shardings(tree, rules, mesh)
    self.assertEqual(out['a']['kernel'].spec, PartitionSpec(None, 'model'))
    self.assertEqual(out['b'].spec, PartitionSpec(None))

  def test_empty_dicts_and_other_nodes_stay(self):
    mesh = mesh_lib.make_mesh('', jax.devices()[:1])
    tree = {
      'params': {'kernel': jnp.ones((4, 4))},
      'quant': {},
      'turn': {'hadamard': linear.OnlineHadamard(size=4)},
    }
    placed = mesh_lib.place(tree, ((r'kernel', COLUMNS),), mesh)
    self.assertEqual(placed['quant'], {})
    self.assertEqual(placed['turn'], tree['turn'])
    self.assertEqual(placed['params']['kernel'].sharding.spec, COLUMNS)

  def test_constrain_asks_for_the_layout_of_place(self):
    mesh = mesh_lib.make_mesh('', jax.devices()[:1])
    tree = {'params': {'kernel': jnp.ones((4, 4))}, 'quant': {}}
    self.assertIs(mesh_lib.constrain(tree, (), None), tree)
    constrain = functools.partial(
      mesh_lib.constrain, rules=((r'kernel', ROWS),), mesh=mesh
    )
    self.assertEqual(jax.eval_shape(constrain, tree)['quant'], {})
    self.assertIn(str(ROWS), str(jax.make_jaxpr(constrain)(tree)))


class QArrayShardingTest(parameterized.TestCase):
  """A QArray is sharded as its matrix is, or not at all along that axis."""

  def leaves(self, K, rule, **spec):
    spec = spec_lib.QuantSpec(**spec)
    x = jax.ShapeDtypeStruct((K, 16), jnp.float32)
    q = jax.eval_shape(lambda x: qarray.quantize(x, spec), x)
    tree = {'kernel': q, 'stacked': {'kernel': x}}
    out = mesh_lib.shardings(tree, ((r'kernel', rule),), GRID)
    return out['kernel'], q

  @parameterized.parameters(
    ('int4', 64, 'group', 16),
    ('int8', 64, 'group', 16),
    ('int3', 64, 'channel', -1),
    ('int8', 64, 'token', -1),
    ('int4', 64, 'tensor', -1),
    ('nvfp4', 64, 'group', 16),
  )
  def test_columns(self, dtype, K, granularity, group_size):
    out, q = self.leaves(
      K, COLUMNS, dtype=dtype, granularity=granularity, group_size=group_size
    )
    self.assertEqual(out.qvalue.spec, COLUMNS)
    wide = q.scale.shape[-1] > 1
    self.assertEqual(out.scale.spec, COLUMNS if wide else WHOLE)
    if q.tensor_scale is not None:
      self.assertEqual(out.tensor_scale.spec, WHOLE)

  @parameterized.parameters(
    # A shard of K / 4 rows must hold whole groups ...
    ('int4', 64, 'group', 16, True),
    ('int4', 96, 'group', 16, False),
    ('int8', 96, 'group', 16, False),
    # ... and, packed, whole tiles: the largest power of two dividing K.
    ('int4', 512, 'channel', -1, True),
    ('int4', 192, 'channel', -1, False),
    # Codes of 8 bits are not packed: any row may be the last.
    ('int8', 192, 'channel', -1, True),
    ('int8', 90, 'channel', -1, False),
  )
  def test_rows(self, dtype, K, granularity, group_size, fits):
    out, q = self.leaves(
      K, ROWS, dtype=dtype, granularity=granularity, group_size=group_size
    )
    self.assertEqual(out.qvalue.spec, ROWS if fits else WHOLE)
    tall = q.scale.shape[-2] > 1
    self.assertEqual(out.scale.spec, ROWS if fits and tall else WHOLE)

  def test_zero_points_lie_as_scales_do(self):
    out, _ = self.leaves(
      64, ROWS, dtype='int4', granularity='group', group_size=16,
      symmetric=False,
    )  # fmt: skip
    self.assertEqual(out.zero_point.spec, ROWS)

  @parameterized.parameters(
    (COLUMNS, WHOLE, COLUMNS, PartitionSpec(None)),
    (ROWS, ROWS, WHOLE, PartitionSpec('model')),
  )
  def test_low_rank_terms_lie_as_the_kernel_does(self, rule, a, b, weight):
    f = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    rows = spec_lib.QuantSpec(dtype='int8', granularity='token')
    packed = jax.eval_shape(lambda x: qarray.quantize(x, rows), f(6, 16))
    term = routed_low_rank.RoutedLowRank(f(64, 6), packed, f(64, 2), f(64), 2)
    tree = {'quant': {'up': {'low_rank': term}}, 'low_rank': f(64, 6)}
    out = mesh_lib.shardings(tree, ((r'up/kernel', rule),), GRID)
    placed = out['quant']['up']['low_rank']
    self.assertEqual((placed.a.spec, placed.router.spec), (a, a))
    self.assertEqual((placed.b.qvalue.spec, placed.b.scale.spec), (b, WHOLE))
    self.assertEqual(placed.weight.spec, weight)
    self.assertEqual(out['low_rank'].spec, WHOLE)

  def test_stacked_layers_are_not_sharded(self):
    spec = spec_lib.QuantSpec(dtype='int4', granularity='group', group_size=16)
    x = jax.ShapeDtypeStruct((8, 64, 16), jnp.float32)
    q = jax.eval_shape(lambda x: qarray.quantize(x, spec), x)
    out = mesh_lib.shardings({'kernel': q}, ((r'kernel', ROWS),), GRID)
    expected = PartitionSpec(None, 'model', None)
    self.assertEqual(out['kernel'].qvalue.spec, expected)
    self.assertEqual(out['kernel'].scale.spec, expected)


if __name__ == '__main__':
  absltest.main()
