"""The matmul kernels compile for TPUs that are not there.

A part of the matrix of formats, chips and rows: one case for each body and way
to unpack. `python -m pallas_kernels.static_schedule` compiles all of it.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxq.nn import kernel_matmul
from jaxq.numerics import binary
from jaxq.parallel import collectives
from pallas_kernels import ahead_of_time, planar, targets
from pallas_kernels.hadamard_quantize import api as hadamard_api
from pallas_kernels.norm_quantize import api as norm_api
from pallas_kernels.quantized_matmul import api as quantized
from pallas_kernels.quantized_matmul import base
from pallas_kernels.quantized_matmul import pallas_mosaic_tpu as quantized_tpu
from pallas_kernels.weight_only_matmul import api as weight_only
from pallas_kernels.weight_only_matmul import pallas_mosaic_tpu as weight_tpu

pytestmark = pytest.mark.slow
KERNEL = 'pallas_mosaic_tpu'
_ARRAY = re.compile(r'= (\w+)\[([\d,]+)\]\{([^}]*)\} ([\w-]+)\(')


def devices(test, topology):
  """The devices, or the test skips with the reason."""
  try:
    return ahead_of_time.devices(topology)
  except NotImplementedError as e:
    test.skipTest(str(e))


def weight_shapes(M, K, N, bits, group_size=-1, symmetric=True):
  groups = 1 if group_size < 0 else K // group_size
  codes = jnp.int8 if bits == 8 and symmetric else jnp.uint8
  shapes = [
    ((M, K), jnp.bfloat16),
    ((K * bits // 8, N), codes),
    ((groups, N), jnp.float32),
  ]
  return shapes if symmetric else [*shapes, ((groups, N), jnp.uint8)]


class KernelsAotTest(parameterized.TestCase):
  @parameterized.parameters(
    ('v5e', 16, 4, 128),
    ('v5e', 7, 4, 32, False),
    ('v5e', 1, 1, 128),
    ('v5p', 16, 2, 64),
    ('v6e', 16, 4, 64),
    ('v6e', 300, 4, 128, False),
    ('v6e', 16, 8),
    ('tpu7x', 64, 4, 128),
  )
  def test_weight_only(self, chip, M, bits, group_size=-1, symmetric=True):
    devices(self, targets.get(chip).topology)
    K, N = 1024, 1152  # N is no multiple of a block.
    f = functools.partial(
      weight_only.weight_only_matmul,
      bits=bits,
      group_size=group_size,
      implementation=KERNEL,
      chip=chip,
    )
    shapes = weight_shapes(M, K, N, bits, group_size, symmetric)
    self.check_memory(ahead_of_time.compile_for(chip, f, shapes), M, K, N, bits)

  @parameterized.parameters(('v5e', 1), ('v6e', 300), ('tpu7x', 16))
  def test_signs_and_salient_rows(self, chip, M):
    """PTQ1.61's kernels; neither part fills whole registers of bytes."""
    devices(self, targets.get(chip).topology)
    K, N, k = 1024, 1152, 208
    column = ((1, N), jnp.float16)
    parts = {
      'bits': (((K - k) // 8, N), jnp.uint8),
      'alpha': column,
      'mu': column,
      'r': ((K - k, 1), jnp.float16),
      'order': ((K, 1), jnp.uint16),
      'salient': ((k // 2, N), jnp.uint8),
      'scale': column,
      'zero_point': ((1, N), jnp.uint8),
    }

    def f(x, *leaves):
      w = binary.BinaryArray(
        **dict(zip(parts, leaves, strict=True)),
        salient_bits=4,
        shape=(K, N),
      )
      return kernel_matmul.matmul(x, w, None, chip=chip)

    x = ((M, K), jnp.bfloat16)
    program = ahead_of_time.compile_for(chip, f, [x, *parts.values()])
    for rows, bits in ((K - k, 1), (k, 4)):
      self.check_memory(program, M, rows, N, bits)

  @parameterized.parameters(
    ('v5e', 16, 8),
    ('v6e', 300, 8),
    ('v5e', 300, 4, 128),
    ('v5p', 16, 4, -1, False),
    ('tpu7x', 300, 8, -1, True, 'float8_e4m3fn'),
  )
  def test_quantized(
    self, chip, M, bits, group_size=-1, symmetric=True, x_format='int8'
  ):
    devices(self, targets.get(chip).topology)
    K, N = 1024, 1152
    f = functools.partial(
      quantized.quantized_matmul,
      bits=bits,
      group_size=group_size,
      x_format=x_format,
      implementation=KERNEL,
      chip=chip,
    )
    shapes = weight_shapes(M, K, N, bits, group_size, symmetric)
    if x_format != 'int8':
      shapes[1] = (shapes[1][0], x_format)
    self.check_memory(ahead_of_time.compile_for(chip, f, shapes), M, K, N, bits)

  def check_memory(self, program, M, K, N, bits):
    """No array of the weight's size is made, but copies into on-chip memory."""
    del M
    found = [
      f'{op} {dtype}[{dims}]'
      for dtype, dims, layout, op in _ARRAY.findall(program.as_text())
      if math.prod(map(int, dims.split(','))) in (K * N, K * N * bits // 8)
      and op != 'parameter'
      and 'S(1)' not in layout
    ]
    self.assertEmpty(found)

  @parameterized.parameters('v5e', 'v6e')
  def test_row_kernels(self, chip):
    devices(self, targets.get(chip).topology)
    options = {'implementation': KERNEL, 'chip': chip}
    norm = functools.partial(norm_api.norm_quantize, **options)
    x = ((40, 640), jnp.bfloat16)
    norms = ahead_of_time.compile_for(chip, norm, [x, ((640,), jnp.float32)])
    rotate = functools.partial(
      hadamard_api.hadamard_quantize, block=64, **options
    )
    rotations = ahead_of_time.compile_for(chip, rotate, [x])
    for program in (norms, rotations):  # A kernel, and not XLA's own fusions.
      self.assertIn('tpu_custom_call', program.as_text())

  @parameterized.parameters('weight_only', 'quantized')
  def test_sharded_over_4_by_4(self, op):
    """K over one axis, N over the other: one all-reduce, of float32."""
    mesh = Mesh(
      np.asarray(devices(self, 'v5e:4x4')).reshape(4, 4), ('data', 'model')
    )
    M, K, N = 16, 8192, 4096
    if op == 'weight_only':
      f = functools.partial(
        weight_only.weight_only_matmul, bits=4, group_size=128
      )
      shapes = weight_shapes(M, K, N, 4, 128)
      scale = P('data', 'model')
    else:
      f = functools.partial(quantized.quantized_matmul, bits=8)
      shapes = weight_shapes(M, K, N, 8)
      scale = P(None, 'model')
    f = functools.partial(
      f, implementation=KERNEL, chip='v5e', axis_name='data'
    )
    program = ahead_of_time.compile_sharded(
      mesh,
      f,
      shapes,
      (P(None, 'data'), P('data', 'model'), scale),
      P(None, 'model'),
    )
    text = program.as_text()
    found = collectives.collectives(text, mesh)
    self.assertEqual(
      [(c.kind, c.axes) for c in found], [('all-reduce', ('data',))]
    )
    # The cast to bfloat16 may be merged into its result, not into its sums.
    self.assertRegex(text, r'= f32\[\]\S* add\(')
    self.assertNotRegex(text, r'= bf16\[\]\S* add\(')
    self.assertEqual(M * N // 4 * 2, found[0].nbytes)

  @parameterized.parameters(*targets.TARGETS)
  def test_blocks_fit_the_chip(self, chip):
    """What the docstrings count is within the vector memory."""
    vmem = targets.get(chip).vmem
    for K, N in ((4096, 28672), (14336, 4096), (28672, 8192), (576, 1536)):
      for M in (1, 16, 64, 255, 2048):
        for bits, group in ((4, 64), (4, -1), (8, -1)):
          layout = planar.Planar(bits=bits, K=K, group_size=group)
          block = weight_tpu.pick_block(M, N, layout, jnp.float32, chip)
          weight_tpu.check_block(block, N, layout, jnp.float32)
          self.assertLess(weight_tpu.onchip_bytes(block, layout, 4), vmem)
        layout = planar.Planar(bits=8, K=K)
        sides = base.Sides(layout=layout, x_format='int8')
        block = quantized_tpu.pick_block(M, N, sides, chip)
        self.assertLess(quantized_tpu.onchip_bytes(block, sides, 2), vmem)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, "chip='v9'; allowed .'tpu7x'"):
      ahead_of_time.compile_for('v9', lambda x: x, [])
    devices(self, 'v5e:2x2')
    with self.assertRaisesRegex(NotImplementedError, "gives no 'v5e:3x5x7'"):
      ahead_of_time.devices('v5e:3x5x7')

  def test_a_chip_is_known_by_its_devices(self):
    for chip, target in targets.TARGETS.items():
      kind = devices(self, target.topology)[0].device_kind
      self.assertEqual(targets.chip_of_kind(kind), chip)
    self.assertEqual(jax.default_backend(), 'cpu')


if __name__ == '__main__':
  absltest.main()
