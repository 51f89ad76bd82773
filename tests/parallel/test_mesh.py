"""Tests of jaxq.parallel.mesh."""

import jax
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec

from jaxq.parallel import mesh as mesh_lib


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


if __name__ == '__main__':
  absltest.main()
