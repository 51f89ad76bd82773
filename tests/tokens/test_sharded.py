"""Selection on eight simulated devices equals selection on one."""

import json
import os
import subprocess
import sys

import jax
from absl.testing import absltest
from jax.sharding import Mesh

from jaxq.tokens import sharded
from tests.tokens import sharded_selection


class ShardedSelectionTest(absltest.TestCase):
  def test_equals_one_device(self):
    flags = '--xla_force_host_platform_device_count=8'
    done = subprocess.run(
      [sys.executable, '-m', sharded_selection.__name__],
      env=os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
      stdout=subprocess.PIPE,
      text=True,
      check=True,
    )
    rows = list(map(json.loads, done.stdout.splitlines()))
    self.assertLen(rows, 2)
    for row in rows:
      self.assertTrue(row['same'], row)
      self.assertTrue(row['tokens'], row)
      # What is kept moves, not the tokens that are chosen from.
      kept = 4 * sharded_selection.B * row['k_max'] * sharded_selection.D
      self.assertEqual(row['kinds'], ['all-reduce'])
      self.assertEqual(row['moved'], kept)

  def test_messages(self):
    mesh = Mesh(jax.devices()[:1], ('model',))
    with self.assertRaisesRegex(ValueError, "N=10 .*axis 'data'.*divide N"):
      sharded.check(10, mesh, 'data')


if __name__ == '__main__':
  absltest.main()
