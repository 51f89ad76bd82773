"""Tests of weight_only_matmul: the TPU kernel, interpreted, equals base.py."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from pallas_kernels import planar
from pallas_kernels.weight_only_matmul import api, base
from pallas_kernels.weight_only_matmul import pallas_mosaic_tpu as tpu

# bits, group_size, symmetric.
FORMATS = (
  (8, -1, True),
  (8, 64, False),
  (4, -1, True),
  (4, 128, True),
  (4, 64, False),
  (4, 32, True),
  (2, 128, True),
  (2, 32, False),
  (1, -1, True),
  (1, 64, True),
)


def make(M, K, N, bits, group_size, symmetric, scale_dtype='float32'):
  """x (M, K) bfloat16, QArray (K, N)."""
  spec = spec_lib.QuantSpec(
    dtype='binary' if bits == 1 else f'int{bits}',
    granularity='group' if group_size > 0 else 'channel',
    group_size=group_size,
    symmetric=symmetric,
    scale_dtype=scale_dtype,
  )
  rng = np.random.default_rng(M + K + N)
  x = jnp.asarray(rng.normal(size=(M, K)), jnp.bfloat16)
  w = jnp.asarray(rng.normal(size=(K, N)) / K**0.5 + 0.01, jnp.float32)
  return x, qarray.quantize(w, spec)


def run(x, q, **options):
  options = {
    'implementation': 'pallas_mosaic_tpu',
    'chip': 'v5e',
    'interpret': True,
    'out_dtype': jnp.float32,
    **options,
  }
  f = functools.partial(
    api.weight_only_matmul,
    bits=q.spec.bits,
    group_size=q.spec.group_size,
    **options,
  )
  return jax.jit(f)(x, q.qvalue, q.scale, q.zero_point)


def exact(x, q):
  """float64 product of what is stored."""
  return np.asarray(x, np.float64) @ np.asarray(qarray.dequantize(q))


def block(body, unpack='words', bm=16, bk=256, bn=128, **sub):
  return tpu.Block(bm=bm, bk=bk, bn=bn, body=body, unpack=unpack, **sub)


def one_tile_block(K, bits, body):
  """A block of all rows of a weight in one tile, whole registers of them."""
  registers = -(-(K * bits // 8) // planar.BYTE_ROWS) * planar.BYTE_ROWS
  return block(body, bk=registers * 8 // bits)


class KernelTest(parameterized.TestCase):
  def test_a_case_worked_by_hand(self):
    # Codes 1 everywhere but a 3 in row 0; scales 0.5 and 2.
    codes = jnp.ones((64, 2), jnp.int8).at[0, 0].set(3)
    spec = spec_lib.QuantSpec(dtype='int4', granularity='channel')
    q = qarray.from_codes(codes, jnp.array([[0.5, 2.0]]), None, spec)
    x = jnp.zeros((1, 64), jnp.bfloat16).at[0, 0].set(2).at[0, 63].set(10)
    np.testing.assert_array_equal(run(x, q), [[8.0, 24.0]])

  @parameterized.product(
    fmt=FORMATS, unpack=('words', 'native'), scale_dtype=('float32', 'bfloat16')
  )
  def test_few_rows_are_exact(self, fmt, unpack, scale_dtype):
    bits = fmt[0]
    if (unpack == 'native') != (bits == 8 or scale_dtype == 'bfloat16'):
      self.skipTest('one way to unpack per scale dtype is enough')
    if unpack == 'native' and bits == 1:
      self.skipTest('no chip has a 1-bit type')
    x, q = make(3, 256, 160, *fmt, scale_dtype)
    y = run(x, q, block=block('post', unpack))
    want = exact(x, q)
    # float32 sums of codes that are off by 136 at most, so 34 to 128 times as
    # large as the codes.
    np.testing.assert_allclose(y, want, atol=1e-4 * np.abs(want).max())

  @parameterized.product(fmt=FORMATS)
  def test_many_rows_are_base(self, fmt):
    x, q = make(24, 256, 160, *fmt)
    y = run(x, q, block=block('pre', bm=32))
    if fmt[1] < 0:  # Codes are exact; per-column scales come last.
      want, atol = exact(x, q), 1e-5
    else:  # The weight is rounded as base rounds it.
      want, atol = run(x, q, implementation='xla'), 1e-5
    np.testing.assert_allclose(y, want, atol=atol)

  @parameterized.product(body=('post', 'pre'), symmetric=(True, False))
  def test_blocks_along_all_axes(self, body, symmetric):
    K = 512 if symmetric else 2048  # Zero points come 32 groups at a time.
    x, q = make(20, K, 384, 4, 32, symmetric)
    sub = {'sub_n': 128}
    if body == 'pre':
      sub |= {'sub_k': 128}
    y = run(x, q, block=block(body, bk=K // 2, bn=256, **sub))
    want = run(x, q, implementation='xla')
    np.testing.assert_allclose(y, want, atol=0.02 * np.abs(want).max())

  @parameterized.parameters(1, 7, 8, 16, 17, 255)
  def test_rows_are_padded(self, M):
    x, q = make(M, 128, 128, 4, 64, True)
    y = run(x, q)
    self.assertEqual(y.shape, (M, 128))
    want = exact(x, q)
    # From 65 rows on the weight is rounded to bfloat16, after scaling.
    np.testing.assert_allclose(y, want, atol=0.01 * np.abs(want).max())

  def test_a_long_prefill(self):
    x, q = make(4096, 128, 128, 8, -1, True)
    np.testing.assert_allclose(run(x, q), exact(x, q), atol=1e-4)

  def test_padding_of_x_is_never_read(self):
    x, q = make(5, 128, 130, 4, -1, False)
    full = run(jnp.concatenate([x, jnp.full((11, 128), jnp.nan, x.dtype)]), q)
    np.testing.assert_array_equal(full[:5], run(x, q))

  @parameterized.parameters(
    (1, 264), (1, 2304), (2, 136), (4, 72), (4, 64), (8, 40)
  )
  def test_a_weight_in_one_tile_of_any_rows(self, bits, K):
    """K is no multiple of a unit; the kernel reads past the last bytes."""
    symmetric = bits == 1
    x, q = make(3, K, 160, bits, K, symmetric)
    self.assertEqual(q.qvalue.shape[0], K * bits // 8)
    want = exact(x, q)
    for body in ('post', 'pre'):
      made = run(x, q, block=one_tile_block(K, bits, body))
      np.testing.assert_allclose(made, want, atol=0.01 * np.abs(want).max())
    np.testing.assert_allclose(run(x, q), want, atol=1e-3 * np.abs(want).max())

  @hypothesis.settings(max_examples=6)
  @hypothesis.given(
    M=st.integers(1, 33),
    units=st.integers(1, 3),
    N=st.integers(1, 300),
    fmt=st.sampled_from(FORMATS),
  )
  def test_any_shape(self, M, units, N, fmt):
    x, q = make(M, 256 * units, N, *fmt)
    want = exact(x, q)
    y = run(x, q)
    np.testing.assert_allclose(y, want, atol=0.01 * np.abs(want).max())


class ApiTest(parameterized.TestCase):
  def test_gradient_is_that_of_the_float_matmul(self):
    x, q = make(4, 128, 128, 4, 32, True)
    w = qarray.dequantize(q).astype(jnp.bfloat16)

    def loss(x, f):
      return jnp.sum(jnp.sin(f(x).astype(jnp.float32)))

    got = jax.grad(loss)(x, lambda x: run(x, q))
    want = jax.grad(loss)(
      x, lambda x: jnp.matmul(x, w, preferred_element_type=jnp.float32)
    )
    np.testing.assert_allclose(
      np.asarray(got, np.float32), np.asarray(want, np.float32), atol=0.03
    )

  def test_vmap_is_a_loop(self):
    x, q = make(6, 128, 128, 4, 64, True)
    x = x.reshape(3, 2, 128)
    np.testing.assert_allclose(
      jax.vmap(lambda x: run(x, q))(x), run(x, q), atol=1e-6
    )
    stack = jax.tree.map(lambda a: jnp.stack([a, a, a[::-1]]), q.scale)
    got = jax.vmap(lambda x, s: run(x, dataclasses.replace(q, scale=s)))(
      x, stack
    )
    for i in range(3):
      one = dataclasses.replace(q, scale=stack[i])
      np.testing.assert_allclose(got[i], run(x[i], one), atol=1e-6)

  def test_base_is_what_layers_compute(self):
    x, q = make(4, 128, 24, 4, 32, False)
    got = run(x, q, implementation='xla', out_dtype=None)
    kernel = jnp.asarray(qarray.dequantize(q), x.dtype)
    want = jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
    self.assertEqual(got.dtype, x.dtype)
    np.testing.assert_array_equal(got, want.astype(x.dtype))

  def test_choice(self):
    x, q = make(4, 128, 128, 4, 64, True)
    choose = functools.partial(api.choose, bits=4, group_size=64)
    self.assertEqual(choose(x, q.qvalue), 'xla')  # On a CPU.
    for chip in ('v5e', 'v5p', 'v6e', 'tpu7x'):
      self.assertEqual(choose(x, q.qvalue, chip=chip), 'pallas_mosaic_tpu')
    self.assertEqual(choose(x, q.qvalue, chip='h100'), 'xla')
    wide = x.astype(jnp.float32)
    self.assertEqual(choose(wide, q.qvalue, chip='v5e'), 'xla')

  @parameterized.named_parameters(
    ('chip', {'chip': 'v4'}, "chip is 'v4'; it runs on .'tpu7x', 'v5e'"),
    ('dtype', {'x': jnp.float32}, 'x is float32; it takes bfloat16'),
    ('group', {'group': 16}, r'group_size=16; it takes \[-1, 32, 64, 128\]'),
    ('K', {'K': 96}, 'K=96 at bits=4 in tiles of 32; it takes multiples of 64'),
  )
  def test_a_named_kernel_refuses(self, changed, message):
    x, q = make(2, changed.get('K', 128), 8, 4, changed.get('group', -1), True)
    x = x.astype(changed.get('x', x.dtype))
    with self.assertRaisesRegex(NotImplementedError, message):
      run(x, q, chip=changed.get('chip', 'v5e'))

  @parameterized.named_parameters(
    ('name', {'implementation': 'triton'}, "'triton'.*'pallas_mosaic_tpu'"),
    ('bk', {'block': block('post', bk=64)}, r'bk=64 with K=128.*\[128\]'),
    ('bn', {'block': block('post', bk=128, bn=72)}, 'bn=72 with N=8'),
    ('bm', {'block': block('post', bk=128, bn=8, bm=8)}, 'bm=8; it must be a'),
  )
  def test_wrong_options(self, changed, message):
    x, q = make(2, 128, 8, 4, -1, True)
    with self.assertRaisesRegex(ValueError, message):
      run(x, q, **changed)

  def test_wrong_blocks(self):
    with self.assertRaisesRegex(ValueError, "unpack='bytes'; allowed .'native"):
      block('post', 'bytes')
    with self.assertRaisesRegex(ValueError, "body='both'; allowed .'post', 'p"):
      block('both')
    with self.assertRaisesRegex(ValueError, 'sub-tile of 48 in a block of 128'):
      block('post', sub_n=48)
    x, q = make(2, 256, 8, 1, -1, True)
    with self.assertRaisesRegex(ValueError, 'sub_k=128 with units of 256'):
      run(x, q, block=block('pre', bn=8, sub_k=128))
    with self.assertRaisesRegex(ValueError, "unpack='native' with bits=1"):
      run(x, q, block=block('post', 'native', bn=8))

  def test_tuned_blocks_fit_and_are_used(self):
    layout = planar.Planar(bits=4, K=8192, group_size=128)
    for chip in ('v5e', 'v5p', 'v6e', 'tpu7x'):
      for M in (1, 16, 64, 2048):
        found = tpu.pick_block(M, 28672, layout, jnp.float32, chip)
        tpu.check_block(found, 28672, layout, jnp.float32)
        limit = tpu.targets.get(chip).vmem
        self.assertLess(tpu.onchip_bytes(found, layout, 4), limit)

  def test_vjp_accumulates_in_float32(self):
    g = jnp.ones((1, 8), jnp.bfloat16)
    x, q = make(1, 128, 8, 4, -1, True)
    layout = planar.Planar(bits=4, K=128)
    dx = base.vjp_x(g, q.qvalue, q.scale, None, layout, x.dtype)
    want = np.sum(np.asarray(qarray.dequantize(q), np.float64), axis=1)
    np.testing.assert_allclose(np.asarray(dx[0], np.float64), want, atol=0.02)


if __name__ == '__main__':
  absltest.main()
