"""Tests of the Hopper kernels: layouts, lowering for CUDA, the interpreter.

No GPU is needed, and none is asked for: what only a card can show (the two
instructions that unpack, and every time) is benchmarks/gpu_kernels.py's.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from pallas_kernels import hopper, planar, rows, targets
from pallas_kernels.quantized_matmul import api as quantized
from pallas_kernels.quantized_matmul import pallas_mosaic_gpu as quantized_gpu
from pallas_kernels.weight_only_matmul import api as weight_only
from pallas_kernels.weight_only_matmul import arg_specs
from pallas_kernels.weight_only_matmul import pallas_mosaic_gpu as weight_gpu

pytestmark = pytest.mark.smoke  # The newest JAX has what the oldest lacks.
KERNEL: dict[str, Any] = {'implementation': 'pallas_mosaic_gpu', 'chip': 'h100'}
# bits, group_size, symmetric.
FORMATS = (
  (8, -1, True),
  (8, 64, False),
  (4, 128, True),
  (4, 64, True),
  (4, 32, False),
  (4, -1, False),
  (2, 128, True),
)


def draw(K, N, bits, group_size=-1, symmetric=True):
  """A weight of random codes: layout, (qvalue, scale, zero_point)."""
  rng = np.random.default_rng(K + N + bits)
  layout = planar.Planar(
    bits=bits, K=K, group_size=group_size, signed=symmetric
  )
  groups = 1 if group_size < 0 else K // group_size
  q = jnp.asarray(rng.integers(0, 256, (K * bits // 8, N)), jnp.uint8)
  if bits == 8 and symmetric:
    q = jax.lax.bitcast_convert_type(q, jnp.int8)
  scale = jnp.asarray(rng.uniform(0.5, 1.5, (groups, N)), jnp.float32)
  zero = None
  if not symmetric:
    zero = jnp.asarray(rng.integers(0, 2**bits, (groups, N)), jnp.uint8)
  return layout, (q, scale, zero)


def rows_of_x(M, K):
  x = np.random.default_rng(M).normal(size=(M, K))
  return jnp.asarray(x, jnp.bfloat16)


def needs_mosaic_gpu(test):
  if reason := hopper.why_not('h100'):
    test.skipTest(f'no Mosaic GPU: {reason}')


# Compiled as one: step by step they are dozens of small programs.
pack_words = jax.jit(hopper.pack_words, static_argnums=1)
pack_rows = jax.jit(hopper.pack_rows, static_argnums=1)
codes_of = jax.jit(hopper.codes_of, static_argnums=1)
unpack = jax.jit(planar.unpack, static_argnums=1)


def lower(f, *args):
  return jax.jit(f).trace(*args).lower(lowering_platforms=('cuda',))


class LayoutTest(parameterized.TestCase):
  @parameterized.parameters(*FORMATS)
  def test_packing_is_undone(self, bits, group_size, symmetric):
    layout, (q, _, _) = draw(512, 128, bits, group_size, symmetric)
    words = pack_words(q, layout)
    kt = hopper.tile_rows(bits)
    self.assertEqual(
      (words.shape, words.dtype), ((2, 512 // kt, 64, 16), 'int32')
    )
    codes = codes_of(words, layout)
    want = unpack(q, layout)
    np.testing.assert_array_equal(codes, want)
    self.assertEqual(codes.dtype, want.dtype)
    stored = hopper.stored(words, bits, symmetric)
    self.assertEqual((stored.shape, stored.dtype), (q.shape, q.dtype))

  def test_a_word_worked_by_hand(self):
    # Lane t = 2, word v = 1, field j = 3, half h = 1 of 4 bits is row
    # 1 * 32 + 3 * 8 + 2 * 2 + 1 of the tile: 61. Its code 5 is 13 unsigned.
    layout = planar.Planar(bits=4, K=128)
    codes = jnp.zeros((128, 64), jnp.int8).at[61, 7].set(5)
    fields = (codes & 15).astype(jnp.uint8).reshape(1, 2, 64, 64)
    q = (fields[:, 0] | fields[:, 1] << 4).reshape(64, 64)
    words = np.array(pack_words(q, layout))[0, 0].view(np.uint32)
    self.assertEqual(words[7, 4 * 2 + 1] >> (16 + 4 * 3), 13)
    words[7, 9] ^= np.uint32((13 ^ 8) << 28)
    np.testing.assert_array_equal(words, np.uint32(0x88888888))

  def test_a_register_of_codes_worked_by_hand(self):
    # Bytes 4 and 5 of 16 to 31: lane t = 1, odd nibbles 1 and 3 of word 0.
    order = np.asarray(hopper.reorder(jnp.arange(64)))
    self.assertEqual(order[16 + 4 * 1 + 0], 8 + 2 * 1)
    self.assertEqual(order[16 + 4 * 1 + 1], 16 + 8 + 2 * 1)
    self.assertEqual(order[16 + 4 * 1 + 2], 8 + 2 * 1 + 1)
    np.testing.assert_array_equal(np.sort(order[:32]), np.arange(32))
    np.testing.assert_array_equal(order[32:], order[:32] + 32)

  def test_bytes_of_words_are_sixteen_times_the_codes(self):
    """What the registers hold, in NumPy: (word & 0xf0f0f0f0) ^ 0x80808080."""
    layout, (q, _, _) = draw(128, 64, 4)
    words = np.asarray(pack_words(q, layout))[0, 0].view(np.uint32)  # (64, 16)
    found = np.zeros((64, 128), np.int8)
    for t in range(4):
      for v in range(4):
        for odd in range(2):
          word = words[:, 4 * t + v] << np.uint32(4 * (1 - odd))
          four = (word & np.uint32(0xF0F0F0F0)) ^ np.uint32(0x80808080)
          block = 16 * (2 * v + odd) + 4 * t
          found[:, block : block + 4] = four[:, None].view(np.int8)
    want = 16 * hopper.reorder(unpack(q, layout).T.astype(jnp.int32))
    np.testing.assert_array_equal(found, want)

  def test_words_to_rows(self):
    layout, (q, _, _) = draw(256, 128, 4)
    made = hopper.rows_of_words(pack_words(q, layout), layout)
    np.testing.assert_array_equal(made, pack_rows(q, layout))

  def test_rows_run_along_k(self):
    layout, (q, _, _) = draw(128, 192, 8)
    packed = pack_rows(q, layout)
    self.assertEqual((packed.shape, packed.dtype), ((3, 64, 128), 'int8'))
    np.testing.assert_array_equal(packed[1, 5], q[:, 69])
    np.testing.assert_array_equal(hopper.codes_of(packed, layout), q)

  @parameterized.parameters(
    (1, 64, 'bits=1; allowed .2, 4, 8'), (4, 96, 'N=96')
  )
  def test_messages(self, bits, N, message):
    layout, (q, _, _) = draw(512, N, bits)
    with self.assertRaisesRegex((ValueError, NotImplementedError), message):
      hopper.pack_words(q, layout)
    unsigned = planar.Planar(bits=8, K=128, signed=False)
    with self.assertRaisesRegex(ValueError, 'N=96, zero points: True; N must'):
      hopper.pack_rows(jnp.zeros((128, 96), jnp.uint8), unsigned)
    with self.assertRaisesRegex(ValueError, r'float32 \(2, 2, 2\) at bits=4'):
      hopper.stored(jnp.zeros((2, 2, 2)), 4, True)

  def test_registers_are_those_the_hardware_has(self):
    # Of (1, 2, 3, 4) warpgroups that compute; more would wait for ever.
    found = [hopper.compute_registers(n) for n in (1, 2, 3, 4)]
    self.assertEqual(found, [232, 232, 152, 104])
    # Beside one that quantizes 64 rows.
    self.assertEqual(hopper.compute_registers(4, 128), 88)
    self.assertEqual(hopper.start_registers(4), 96)

  def test_chips(self):
    self.assertEqual(targets.gpu_of_kind('NVIDIA H100 80GB HBM3'), 'h100')
    self.assertEqual(targets.gpu_of_kind('NVIDIA A100-SXM4-40GB'), '')
    self.assertIn("chip is 'a100'; it runs on", hopper.why_not('a100'))


class WeightOnlyTest(parameterized.TestCase):
  def test_packed_weights_serve_every_form(self):
    layout, (q, scale, zero) = draw(256, 64, 4, 64, False)
    words, x = pack_words(q, layout), rows_of_x(3, 256)
    f = functools.partial(weight_only.weight_only_matmul, bits=4, group_size=64)

    @jax.jit
    def both(w):
      y = f(x, w, scale, zero)
      return y, jax.grad(lambda x: jnp.sum(f(x, w, scale, zero)))(x)

    jax.tree.map(np.testing.assert_array_equal, both(words), both(q))

  @parameterized.product(fmt=FORMATS, M=(1, 16, 256), f32=(False, True))
  def test_lowers_for_cuda(self, fmt, M, f32):
    needs_mosaic_gpu(self)
    if f32 != (fmt[0] == 2) or weight_gpu.most_rows(fmt[0]) < M:
      self.skipTest('a part of the table is enough')
    layout, (q, scale, zero) = draw(1024, 512, *fmt)
    f = functools.partial(
      weight_only.weight_only_matmul,
      bits=fmt[0],
      group_size=fmt[1],
      out_dtype=jnp.float32 if f32 else None,
      **KERNEL,
    )
    words = pack_words(q, layout)
    text = lower(f, rows_of_x(M, 1024), words, scale, zero).as_text()
    self.assertIn('mosaic_gpu', text)

  @parameterized.parameters(
    (4, 64, False, 'post', 1),
    (4, 128, True, 'pre', 1),
    (8, -1, False, 'post', 2),
  )
  def test_interpreted_equals_base(self, bits, group, symmetric, scale, split):
    needs_mosaic_gpu(self)
    layout, (q, s, zero) = draw(512, 128, bits, group, symmetric)
    x = rows_of_x(5, 512)
    f = functools.partial(
      weight_only.weight_only_matmul,
      bits=bits,
      group_size=group,
      out_dtype=jnp.float32,
    )
    block = weight_gpu.Block(warpgroups=2, stages=2, split_k=split, scale=scale)
    words = pack_words(q, layout)
    y = f(x, words, s, zero, block=block, interpret=True, **KERNEL)
    wide = x.astype(jnp.float32)  # As exact as the weight that is stored.
    want = f(wide, q, s, zero, implementation='xla')
    # One scale or a scale of each sum is exact; 'pre' rounds to bfloat16.
    atol = 1e-5 if scale == 'post' else 4e-3
    np.testing.assert_allclose(y, want, atol=atol * np.abs(want).max())

  def test_blocks_fit(self):
    for spec in arg_specs.SPECS.values():
      if spec.bits == 1 or weight_gpu.most_rows(spec.bits) < spec.M:
        continue
      layout = planar.Planar(
        bits=spec.bits, K=spec.K, group_size=spec.group_size
      )
      for dtype in (jnp.bfloat16, jnp.float32):
        block = weight_gpu.pick_block(spec.M, spec.N, layout, dtype)
        weight_gpu.check_block(block, spec.M, spec.N, layout, dtype)
    layout = planar.Planar(bits=4, K=4096, group_size=128)
    # Four blocks of columns on 132 processors, 32 stages of K in all.
    self.assertEqual(weight_gpu.pick_block(1, 1024, layout).split_k, 8)

  @parameterized.named_parameters(
    ('stored', {'stored': True}, 'the weight is as stored; it takes hopper'),
    ('rows', {'M': 257}, 'M=257 at bits=4; it takes up to 256 rows'),
    ('dtype', {'x': jnp.float32}, 'x is float32; it takes bfloat16'),
    ('group', {'group': 256}, r'group_size=256; it takes \[-1, 32'),
    ('K', {'K': 192, 'bits': 8}, 'K=192; it takes multiples of 128'),
    ('chip', {'chip': 'v5e'}, "chip is 'v5e'; it runs on"),
  )
  def test_refusals(self, changed, message):
    needs_mosaic_gpu(self)
    bits, K = changed.get('bits', 4), changed.get('K', 512)
    group = changed.get('group', -1)
    layout, (q, scale, _) = draw(K, 64, bits, group)
    w = q if 'stored' in changed else pack_words(q, layout)
    x = rows_of_x(changed.get('M', 2), K).astype(changed.get('x', 'bfloat16'))
    options = {**KERNEL, 'chip': changed.get('chip', 'h100')}
    with self.assertRaisesRegex(NotImplementedError, message):
      weight_only.weight_only_matmul(
        x, w, scale, bits=bits, group_size=group, **options
      )

  def test_choice(self):
    layout, (q, _, _) = draw(512, 64, 4)
    words = pack_words(q, layout)
    x = jax.ShapeDtypeStruct((16, 512), jnp.bfloat16)
    choose = functools.partial(weight_only.choose, bits=4, chip='h100')
    self.assertEqual(choose(x, q), 'xla')
    wide = jax.ShapeDtypeStruct((2048, 512), jnp.bfloat16)
    self.assertEqual(choose(wide, words), 'xla')
    needs_mosaic_gpu(self)
    self.assertEqual(choose(x, words), 'pallas_mosaic_gpu')

  def test_wrong_blocks(self):
    for fields, message in (
      ({'warpgroups': 5}, 'warpgroups=5; allowed 1 to 4'),
      ({'stages': 1}, 'stages=1, split_k=1; they must be at least 2 and 1'),
      ({'scale': 'late'}, "scale='late'; allowed .'post', 'pre'"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        weight_gpu.Block(**fields)
    layout = planar.Planar(bits=4, K=512)
    check = functools.partial(
      weight_gpu.check_block, layout=layout, out_dtype=jnp.bfloat16
    )
    with self.assertRaisesRegex(
      ValueError, 'split_k=3 with N=256 and 4 stages'
    ):
      check(weight_gpu.Block(split_k=3), 16, 256)
    with self.assertRaisesRegex(ValueError, '8 stages of M=256 are .* 232448'):
      check(weight_gpu.Block(stages=8), 256, 256)


class QuantizedTest(parameterized.TestCase):
  def test_packed_weights_serve_every_form(self):
    layout, (q, scale, _) = draw(128, 64, 8)
    x = rows_of_x(3, 128)
    packed = pack_rows(q, layout)
    for name in ('xla', 'float'):
      f = jax.jit(
        functools.partial(
          quantized.quantized_matmul, bits=8, implementation=name
        )
      )
      np.testing.assert_array_equal(f(x, packed, scale), f(x, q, scale))

  @parameterized.product(
    x_format=('int8', 'float8_e4m3fn'), M=(3, 4096), bias=(False, True)
  )
  def test_lowers_for_cuda(self, x_format, M, bias):
    needs_mosaic_gpu(self)
    layout, (q, scale, _) = draw(256, 1536, 8)
    packed = pack_rows(q.astype(x_format), layout)
    f = functools.partial(
      quantized.quantized_matmul,
      bits=8,
      x_format=x_format,
      bias=scale if bias else None,
      **KERNEL,
    )
    x = jax.ShapeDtypeStruct((M, 256), jnp.bfloat16)
    text = lower(f, x, packed, scale).as_text()
    # Few rows are quantized in the kernel that multiplies.
    kernels = 1 if M == 3 else 2
    self.assertEqual(text.count('custom_call @mosaic_gpu'), kernels)

  def test_interpreted_equals_base(self):
    needs_mosaic_gpu(self)
    layout, (q, scale, _) = draw(256, 256, 8)
    x, bias = rows_of_x(70, 256), scale * 3
    f = functools.partial(
      quantized.quantized_matmul, x, scale=scale, bits=8, bias=bias
    )
    block = quantized_gpu.Block(bm=64, bn=128, stages=2, cluster=1)
    packed = pack_rows(q, layout)
    y = f(qvalue=packed, block=block, interpret=True, **KERNEL)
    want = f(qvalue=q, implementation='xla')
    np.testing.assert_allclose(  # A step of bfloat16.
      y.astype(jnp.float32), want.astype(jnp.float32), rtol=2**-7, atol=1e-2
    )

  @parameterized.parameters('int8', 'float8_e4m3fn')
  def test_interpreted_rows_are_quantized_as_base_does(self, x_format):
    needs_mosaic_gpu(self)
    x = rows_of_x(3, 256).at[1].set(0.0)
    codes, scale = quantized_gpu.quantize_rows(x, x_format, interpret=True)
    want, want_scale = rows.quantize(x, x_format)
    np.testing.assert_allclose(scale, want_scale, rtol=1e-6)
    np.testing.assert_array_equal(
      codes.astype(jnp.float32), want.astype(jnp.float32)
    )

  def test_blocks(self):
    self.assertEqual(quantized_gpu.pick_block(8192, 8192).bn, 256)
    self.assertEqual(quantized_gpu.pick_block(16, 8192).bn, 128)
    for fields, message in (
      ({'bn': 64}, 'bm=128, bn=64; they must be multiples of 64 and of 128'),
      ({'cluster': 3}, 'cluster=3, stages=4; allowed 1 or 2'),
      ({'stages': 9}, '9 stages of 128 . 256 rows are .* allowed 232448'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        quantized_gpu.Block(**fields)

  @parameterized.named_parameters(
    ('stored', {'stored': True}, 'the weight is as stored; it takes hopper'),
    ('N', {'N': 192}, 'K=128, N=192; it takes multiples of 128'),
    ('dtype', {'x': 'float16'}, 'x is float16; it takes bfloat16 or float32'),
    ('group', {'group': 64}, 'w has groups or zero points; it takes one'),
    ('words', {'bits': 2, 'K': 256}, 'words of bits=2, zero points: False; it'),
    ('group4', {'bits': 4, 'group': 32}, r'group_size=32; it takes .-1, 64'),
    ('many', {'bits': 4, 'group': 64, 'M': 65}, 'of words up to 64 rows of x'),
    ('zero', {'bits': 4, 'symmetric': False}, 'bits=4, zero points: True; it'),
  )
  def test_refusals(self, changed, message):
    needs_mosaic_gpu(self)
    group, bits = changed.get('group', -1), changed.get('bits', 8)
    K, N = changed.get('K', 128), changed.get('N', 128)
    layout, (q, scale, zero) = draw(
      K, N, bits, group, changed.get('symmetric', True)
    )
    pack = pack_rows if bits == 8 else pack_words
    w = q if 'stored' in changed else pack(q, layout)
    x = rows_of_x(changed.get('M', 2), K).astype(changed.get('x', 'bfloat16'))
    with self.assertRaisesRegex(NotImplementedError, message):
      quantized.quantized_matmul(
        x, w, scale, zero, bits=bits, group_size=group, **KERNEL
      )

  def test_a_block_that_does_not_divide(self):
    needs_mosaic_gpu(self)
    layout, (q, scale, _) = draw(128, 384, 8)
    w = pack_rows(q, layout)
    with self.assertRaisesRegex(
      ValueError, 'bn=256 with N=384; it must divide'
    ):
      quantized.quantized_matmul(
        rows_of_x(2, 128),
        w,
        scale,
        bits=8,
        block=quantized_gpu.Block(),
        **KERNEL,
      )

  def test_choice(self):
    layout, (q, _, _) = draw(256, 128, 8)
    packed = pack_rows(q, layout)
    x = jax.ShapeDtypeStruct((16, 256), jnp.bfloat16)
    choose = functools.partial(quantized.choose, bits=8, chip='h100')
    self.assertEqual(choose(x, q), 'float')
    # A TPU takes the weight as stored.
    self.assertEqual(choose(x, packed, chip='v5e'), 'xla')
    needs_mosaic_gpu(self)
    self.assertEqual(choose(x, packed), 'pallas_mosaic_gpu')


if __name__ == '__main__':
  absltest.main()
