"""Tests of quantized_matmul on Hopper beside few rows, without a GPU.

Words of 4 bits to int8 in registers, rows of 8 bits, and x quantized by the
kernel that multiplies; lowered for CUDA and run in Pallas's GPU interpreter.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from pallas_kernels import hopper_blocks, rows
from pallas_kernels.quantized_matmul import api as quantized
from pallas_kernels.quantized_matmul import pallas_mosaic_gpu as quantized_gpu
from tests.pallas_kernels import test_hopper as hopper_testing

pytestmark = pytest.mark.smoke  # The newest JAX has what the oldest lacks.


class FewRowsTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, -1, 'int4', False),
    (16, 128, 'int8', True),
    (16, 64, 'int8', False),
    (33, 128, 'int8', False),
    (64, -1, 'int8', True),
    (65, -1, 'int8', False),
  )
  def test_words_lower_for_cuda(self, M, group, x_format, bias):
    hopper_testing.needs_mosaic_gpu(self)
    layout, (q, scale, _) = hopper_testing.draw(512, 256, 4, group)
    f = functools.partial(
      quantized.quantized_matmul,
      bits=4,
      group_size=group,
      x_format=x_format,
      bias=scale[:1] if bias else None,
      **hopper_testing.KERNEL,
    )
    x = jax.ShapeDtypeStruct((M, 512), jnp.bfloat16)
    text = hopper_testing.lower(
      f, x, hopper_testing.pack_words(q, layout), scale
    ).as_text()
    kernels = 1 if M <= 16 else 2
    self.assertEqual(text.count('custom_call @mosaic_gpu'), kernels)

  @parameterized.parameters('int8', 'float8_e4m3fn')
  def test_64_rows_lower_fused(self, x_format):
    hopper_testing.needs_mosaic_gpu(self)
    layout, (q, scale, _) = hopper_testing.draw(512, 256, 8)
    block = hopper_blocks.Block(stages=3, fused=True)
    f = functools.partial(
      quantized.quantized_matmul, bits=8, x_format=x_format, block=block
    )
    x = jax.ShapeDtypeStruct((64, 512), jnp.float32)
    packed = hopper_testing.pack_rows(q.astype(x_format), layout)
    text = hopper_testing.lower(
      functools.partial(f, **hopper_testing.KERNEL), x, packed, scale
    ).as_text()
    self.assertEqual(text.count('custom_call @mosaic_gpu'), 1)

  @parameterized.parameters(
    # M, bits, group, x_format, split, fused, dtype
    (1, 4, -1, 'int8', 1, True, 'bfloat16'),
    (7, 4, 128, 'int8', 1, False, 'bfloat16'),
    (8, 4, 64, 'int4', 1, True, 'bfloat16'),
    (16, 8, -1, 'float8_e4m3fn', 1, True, 'bfloat16'),
    (17, 4, 128, 'int4', 2, True, 'float32'),
    (40, 8, -1, 'int8', 2, False, 'float32'),
  )
  def test_few_rows_interpreted_equal_base(
    self, M, bits, group, x_format, split, fused, dtype
  ):
    hopper_testing.needs_mosaic_gpu(self)
    layout, (q, scale, _) = hopper_testing.draw(512, 128, bits, group)
    if bits == 8:
      q = rows.encode(q.astype(jnp.float32), x_format)
    x = hopper_testing.rows_of_x(M, 512).at[0].set(0.0)
    f = functools.partial(
      quantized.quantized_matmul,
      x,
      scale=scale,
      bits=bits,
      group_size=group,
      x_format=x_format,
      bias=3 * scale[:1],
      out_dtype=dtype,
    )
    block = hopper_blocks.Block(
      warpgroups=2, stages=2, split_k=split, fused=fused
    )
    packed = (
      hopper_testing.pack_words if bits == 4 else hopper_testing.pack_rows
    )(q, layout)
    y = f(qvalue=packed, block=block, interpret=True, **hopper_testing.KERNEL)
    want = f(qvalue=q, implementation='xla')
    np.testing.assert_allclose(  # Sums are exact: an order of float32 sums.
      y.astype(jnp.float32),
      want.astype(jnp.float32),
      rtol=2**-7 if dtype == 'bfloat16' else 1e-5,
      atol=1e-2,
    )

  def test_many_rows_take_words_as_rows(self):
    hopper_testing.needs_mosaic_gpu(self)
    layout, (q, scale, _) = hopper_testing.draw(256, 128, 4)
    words, x = (
      hopper_testing.pack_words(q, layout),
      hopper_testing.rows_of_x(70, 256),
    )
    codes, x_scale = rows.quantize(x, 'int8')
    f = functools.partial(
      quantized.quantized_matmul, scale=scale, bits=4, x_scale=x_scale
    )
    block = quantized_gpu.Block(bm=64, bn=128, stages=2, cluster=1)
    y = f(codes, words, block=block, interpret=True, **hopper_testing.KERNEL)
    want = f(codes, q, implementation='xla')
    np.testing.assert_allclose(
      y.astype(jnp.float32), want.astype(jnp.float32), rtol=2**-7, atol=1e-2
    )
    with self.assertRaisesRegex(TypeError, 'take .*hopper_blocks.Block. Use'):
      f(
        codes[:2],
        words,
        x_scale=x_scale[:2],
        block=block,
        **hopper_testing.KERNEL,
      )
    fused = hopper_blocks.Block(warpgroups=2, fused=True)
    with self.assertRaisesRegex(ValueError, 'fused=True with x as codes: True'):
      f(
        codes[:2],
        words,
        x_scale=x_scale[:2],
        block=fused,
        **hopper_testing.KERNEL,
      )


if __name__ == '__main__':
  absltest.main()
