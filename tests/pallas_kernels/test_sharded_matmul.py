"""K sharded over eight simulated devices: one sum, of the right dtype."""

import json
import os
import subprocess
import sys

from absl.testing import absltest

from tests.pallas_kernels import sharded_matmul


class ShardedMatmulTest(absltest.TestCase):
  def test_one_sum_and_the_same_product(self):
    flags = '--xla_force_host_platform_device_count=8'
    done = subprocess.run(
      [sys.executable, '-m', sharded_matmul.__name__],
      env=os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
      stdout=subprocess.PIPE,
      text=True,
      check=True,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    self.assertLen(rows, 6)
    for row in rows:
      with self.subTest(row['case']):
        kind = row['case'].split()[0]
        # A shared scale lets codes be summed as they are.
        self.assertEqual(row['sums'], ['s32' if kind == 'static' else 'f32'])
        # Dynamic scales are per shard: finer, so not equal.
        limit = {'weight_only': 1e-5, 'static': 1e-6, 'dynamic': 0.02}[kind]
        self.assertLess(row['error'], limit)


if __name__ == '__main__':
  absltest.main()
