"""The kernels of token reduction compile for TPUs that are not there.

One chip in every run of the tests, the others where slow ones run. What they
are for is checked too: no table of scores or weights is made in memory.
"""

import functools
from typing import Any

import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from pallas_kernels import ahead_of_time, targets
from pallas_kernels.attention_received import api as attention_received
from pallas_kernels.gather_rows import api as gather_rows
from pallas_kernels.nearest_center import api as nearest_center

BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32


def compiled(test, chip, f, shapes, **options):
  """The program, or the test skips with the reason."""
  try:
    ahead_of_time.devices(targets.get(chip).topology)
  except NotImplementedError as e:
    test.skipTest(str(e))
  f = functools.partial(
    f, implementation='pallas_mosaic_tpu', chip=chip, **options
  )
  return ahead_of_time.compile_for(chip, f, shapes)


def biased(x, c, bias, **options):
  return nearest_center.nearest_center(x, c, bias=bias, **options)


class TokenKernelsAotTest(parameterized.TestCase):
  def check(self, chip, dtype, width):
    """Every kernel, at sizes that no block divides."""
    N, K = 700, 1300
    shapes: list[Any] = [((N, width), dtype), ((K, width), dtype), ((K,), F32)]
    program = compiled(self, chip, biased, shapes, top=3)
    self.assertLess(self.made(program), 4 * N * K)

    B, T, S, H = 2, 600, 1300, 4
    shapes = [
      ((B, T, H, width), dtype),
      ((B, S, H // 2, width), dtype),
      ((B, H, T), F32),
    ]
    f = attention_received.attention_received
    program = compiled(self, chip, f, shapes, causal=True)
    self.assertLess(self.made(program), 4 * B * H * T * S)

    shapes = [((N, 256), dtype), ((100,), I32), ((100,), F32)]
    program = compiled(self, chip, gather_rows.gather_rows, shapes)
    self.assertLess(self.made(program), N * 256 * dtype.dtype.itemsize)

  def made(self, program):
    """Bytes of what is neither argument nor result."""
    return program.memory_analysis().temp_size_in_bytes

  def test_v5e(self):
    self.check('v5e', BF16, 128)

  @pytest.mark.slow
  @parameterized.parameters('v5p', 'v6e', 'tpu7x')
  def test_other_chips(self, chip):
    self.check(chip, BF16, 128)

  @pytest.mark.slow
  @parameterized.parameters('v5e', 'v6e')
  def test_narrow_and_float32(self, chip):
    self.check(chip, F32, 72)

  @pytest.mark.slow
  @parameterized.parameters('v5e', 'tpu7x')
  def test_fewer_than_a_block(self, chip):
    shapes: list[Any] = [((5, 64), BF16), ((7, 64), BF16)]
    compiled(self, chip, nearest_center.nearest_center, shapes)
    shapes = [((1, 1, 4, 64), BF16), ((1, 9, 4, 64), BF16), ((1, 4, 1), F32)]
    compiled(self, chip, attention_received.attention_received, shapes)
    shapes = [((16, 128), BF16), ((3,), I32)]
    compiled(self, chip, gather_rows.gather_rows, shapes)


if __name__ == '__main__':
  absltest.main()
