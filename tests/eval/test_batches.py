"""Tests of jaxq.eval.batches."""

import os
import subprocess
import sys

import jax
import numpy as np
from absl.testing import absltest

from jaxq.eval import batches

_FOUR_DEVICES = """
import jax, numpy as np
from jax.sharding import Mesh
from jaxq.eval import batches
mesh = Mesh(np.array(jax.devices()).reshape(4, 1), ('data', 'model'))
tokens = np.arange(12).reshape(6, 2)
weight = batches.replicate(jax.numpy.full((2,), 2), mesh)
assert len(weight.sharding.device_set) == 4
shapes = []
@jax.jit
def double(x):
  shapes.append(x.shape)
  return x * weight[None], x.sum(axis=1)
done = []
out, total = batches.run(
  double, tokens, mesh=mesh, progress=lambda *a: done.append(a)
)
np.testing.assert_array_equal(out, tokens * 2)
np.testing.assert_array_equal(total, tokens.sum(axis=1))
assert shapes == [(4, 2)], shapes
assert done == [(4, 6), (6, 6)], done
"""


class BatchesTest(absltest.TestCase):
  def test_one_device(self):
    tokens = np.arange(6).reshape(3, 2)
    done = []
    out = batches.run(
      jax.jit(lambda x: {'a': x + 1}),
      tokens,
      progress=lambda *args: done.append(args),
    )
    np.testing.assert_array_equal(out['a'], tokens + 1)
    self.assertEqual(done, [(1, 3), (2, 3), (3, 3)])

  def test_mesh_of_four_devices_pads_the_last_batch(self):
    flags = '--xla_force_host_platform_device_count=4'
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}
    done = subprocess.run(
      [sys.executable, '-c', _FOUR_DEVICES],
      env=env,
      capture_output=True,
      text=True,
    )
    self.assertEqual(done.returncode, 0, done.stderr)

  def test_messages(self):
    f = jax.jit(lambda x: x)
    with self.assertRaisesRegex(TypeError, 'dtype float64; .*integers'):
      batches.run(f, np.zeros((2, 3)))
    for shape in ((0, 3), (2, 1), (3,)):
      with self.assertRaisesRegex(ValueError, r'shape \(.*T >= 2.*more text'):
        batches.run(f, np.zeros(shape, np.int32))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ('x',))
    with self.assertRaisesRegex(ValueError, r"axes \['x'\]; .*'data'"):
      batches.run(f, np.zeros((2, 3), np.int32), mesh=mesh)


if __name__ == '__main__':
  absltest.main()
