"""Decoding on eight simulated devices equals decoding on one."""

import pytest
from absl.testing import absltest

from tests import simulated
from tests.kvcache import sharded_cache

pytestmark = pytest.mark.slow

NAMES = ('oscar', 'oscar_head', 'zipcache')  # KIVI's is OScaR's store.
# Heads that vote together, and heads that share their slots.
SELECTING = ('tokenselect', 'evict_heads')


class ShardedCacheTest(absltest.TestCase):
  def test_equals_one_device(self):
    found = simulated.rows(sharded_cache, *NAMES, *SELECTING)
    rows = {row['name']: row for row in found}
    self.assertCountEqual(rows, (*NAMES, *SELECTING))
    for name, row in rows.items():
      with self.subTest(name):
        # A code may round the other way where a sum over devices is in another
        # order; none of these did.
        self.assertLess(row['error'], 1e-4 * max(row['size'], 1.0))
        if name in SELECTING:  # Votes and places are whole by design.
          continue
        for leaf, spec in row['specs'].items():
          if leaf.endswith('.length'):
            continue
          whole = name == 'oscar' and leaf.endswith('.norm')
          self.assertEqual("'model'" not in spec, whole, f'{leaf}: {spec}')
          self.assertIn("'data'", spec, leaf)
    # One float per token is summed over the devices that share the heads.
    reduces = rows['oscar']['all_reduces']
    self.assertGreater(reduces['token'], reduces['head'])


if __name__ == '__main__':
  absltest.main()
