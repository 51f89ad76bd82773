"""Tests of jaxq.parallel.arrays on one process; tests/multihost has several."""

import jax
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import NamedSharding, PartitionSpec

from jaxq.io import lazy
from jaxq.parallel import arrays
from jaxq.parallel import mesh as mesh_lib

X = np.arange(24, dtype=np.float32).reshape(4, 6)


class ArraysTest(parameterized.TestCase):
  @parameterized.parameters(lambda x: x, jax.numpy.asarray, lazy.of)
  def test_put_gives_the_values_and_the_sharding(self, make):
    mesh = mesh_lib.make_mesh('', jax.devices()[:1])
    sharding = NamedSharding(mesh, PartitionSpec('data', 'model'))
    placed = arrays.put(make(X), sharding)
    self.assertEqual(placed.sharding, sharding)
    np.testing.assert_array_equal(arrays.fetch(placed), X)

  def test_replicas_share_what_was_read(self):
    reads = []

    def read(index):
      reads.append(index)
      return X[index]

    array = lazy.LazyArray(shape=X.shape, dtype=X.dtype, read=read)
    mesh = mesh_lib.make_mesh('', jax.devices()[:1])
    arrays.put(array, NamedSharding(mesh, PartitionSpec(None, 'model')))
    self.assertLen(reads, 1)

  def test_what_one_process_has_is_stored_from_its_host(self):
    stored = arrays.to_store({'a': jax.numpy.asarray(X), 'b': X})
    self.assertIsInstance(stored['a'], np.ndarray)
    self.assertTrue(arrays.is_local(stored))

  def test_lazy_leaves_go_to_a_mesh_by_its_rules(self):
    mesh = mesh_lib.make_mesh('', jax.devices()[:1])
    rules = ((r'kernel', PartitionSpec(None, 'model')),)
    tree = {'mlp': {'kernel': lazy.of(X)}, 'empty': {}}
    placed = mesh_lib.place(tree, rules, mesh)
    np.testing.assert_array_equal(placed['mlp']['kernel'], X)
    self.assertEqual(placed['empty'], {})


if __name__ == '__main__':
  absltest.main()
