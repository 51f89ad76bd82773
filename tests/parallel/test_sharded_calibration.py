"""A calibration on eight simulated devices equals one on a single device."""

import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxq.numerics import qarray
from jaxq.quant import gptq
from tests import simulated
from tests.parallel import sharded_calibration

pytestmark = pytest.mark.slow

COLUMNS, ROWS, WHOLE = (
  "(None, 'model')",
  "('model', None)",
  '(None, None)',
)


class ShardedCalibrationTest(parameterized.TestCase):
  @parameterized.parameters(
    ('8/4', 'gptq', 'w8a8', 'rotate', 'awq', 'os_plus_gptq', 'outliertune'),
    ('8/4', 'mergequant'),
    ('8/4', 'llm_fp4'),
    ('8/4', 'ptq161'),
    ('8/4', 'quant_experts'),
    ('9/3', 'gptq_prefix'),
  )
  def test_equals_one_device(self, heads, *methods):
    for row in simulated.rows(sharded_calibration, heads, *methods):
      with self.subTest(row['method']):
        self.check_numbers(row)
        self.check_shardings(row['shardings'], heads, row['method'])
        self.assertTrue(row['replicated'], 'statistics')

  def check_numbers(self, row):
    print(
      f'{row["heads"]} heads, {row["method"]}: {row["different"]} of '
      f'{row["codes"]} codes differ, in {row["columns"]} columns that start '
      f'with a tie; scales within {row["scale_error"]:.0e}'
    )
    self.assertGreater(row['codes'], 0)
    # Equal but for ties, each of which was found to be one where the row has a
    # Hessian to find it by.
    self.assertLessEqual(row['different'], 2e-4 * row['codes'])
    self.assertEmpty(row['unexplained'])
    self.assertLess(row['scale_error'], 1e-5)
    # A rounded activation can be a tie as well, and is then off by a 127th of
    # its token's largest: these outputs are a hundred times less alike.
    rounded = (
      'w8a8',
      'os_plus_gptq',
      'outliertune',
      'mergequant',
      'llm_fp4',
      'quant_experts',
    )
    # Adam's first step is the sign of a gradient, which may be next to zero.
    slack = 100 if row['method'] in (*rounded, 'ptq161') else 1
    self.assertLess(row['output_error'], slack * 1e-4)
    if row['apart'] is None:
      self.assertLess(row['logit_error'], slack * 1e-4)
    else:
      self.check_tokens(**row['apart'])
    one, many = row['perplexities']
    self.assertLess(abs(many / one - 1), (10 if slack > 1 else 1) * 1e-4)

  def check_tokens(self, devices, control):
    """Tokens that no tie touched agree to float rounding; the others few."""
    print('eight devices:', devices, 'control:', control)
    self.assertLessEqual(devices['rerouted'], 0.02 * devices['tokens'])
    self.assertLessEqual(devices['tied'], 0.1 * devices['tokens'])
    self.assertGreater(devices['untouched'], 0.8 * devices['tokens'])
    self.assertLess(devices['untouched_error'], 1e-5)
    # A token that does go to the other expert is counted, and shows.
    self.assertGreater(control['rerouted'], 0)
    self.assertGreater(control['error'], 1e-3)
    self.assertGreater(control['untouched'], 0)
    self.assertLess(control['untouched_error'], 1e-6)

  def check_shardings(self, seen, heads, method):
    attention = heads == '8/4'
    for step in ('forward', 'observe'):
      self.assertEqual(seen[f'{step} x'], ["('data', None, None)"])
      for name, layout in (
        ('attention/q_proj', COLUMNS if attention else WHOLE),
        ('attention/v_proj', COLUMNS if attention else WHOLE),
        ('attention/o_proj', ROWS if attention else WHOLE),
        ('mlp/gate_proj', COLUMNS),
        ('mlp/down_proj', ROWS),
      ):
        found = set(seen[f'{step} {name}/kernel'])
        # A scale per channel has one row, which no axis can divide.
        self.assertIn(layout, found)
        self.assertLessEqual(found, {layout, WHOLE})
      self.assertEqual(seen[f'{step} post_norm/scale'], ['(None,)'])
    self.assertEqual(seen['forward y'], ["('data', None, None)"])
    for name in ('attention/q_proj', 'attention/o_proj', 'mlp/down_proj'):
      # Scales and shifts per row have one column.
      whole = [WHOLE] if method in ('llm_fp4', 'ptq161') else []
      self.assertCountEqual(seen[f'apply {name}/kernel'], [COLUMNS, *whole])


class TieTest(parameterized.TestCase):
  """The explanation of a difference is itself tested."""

  def test_distance_from_a_tie(self):
    x = np.random.default_rng(0).normal(size=(64, 16))
    hessian = jnp.asarray(x.T @ x, jnp.float32)
    kernel = np.random.default_rng(1).normal(size=(16, 4)).astype(np.float32)
    config = sharded_calibration.GPTQ_W4
    q = gptq.quantize(jnp.asarray(kernel), hessian, config)
    first = int(gptq.feedback(hessian, config).order[0])
    # The first row is rounded from the kernel itself: put it on a boundary,
    # within the group's range, and nudge it to either side.
    scale = float(np.asarray(q.scale)[0, 2])
    kernel[first, 2] = 1.5 * scale
    far, order = sharded_calibration.distance_from_tie(
      kernel, hessian, q, config
    )
    self.assertEqual(order[0], first)
    self.assertLess(far[0, 2], 1e-6)
    self.assertGreater(np.min(far[0, [0, 1, 3]]), 1e-3)
    below, above = kernel.copy(), kernel.copy()
    below[first, 2] -= 1e-5
    above[first, 2] += 1e-5
    a, b = (
      np.asarray(qarray.codes(gptq.quantize(jnp.asarray(k), hessian, config)))
      for k in (below, above)
    )
    self.assertEqual(abs(int(a[first, 2]) - int(b[first, 2])), 1)
    np.testing.assert_array_equal(a[:, [0, 1, 3]], b[:, [0, 1, 3]])


if __name__ == '__main__':
  absltest.main()
