"""Tests of quantized_matmul: the TPU kernel, interpreted, equals base.py."""

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
from pallas_kernels import rows
from pallas_kernels.quantized_matmul import api
from pallas_kernels.quantized_matmul import pallas_mosaic_tpu as tpu

# dtype of w, group_size, symmetric, format of x.
FORMATS = (
  ('int8', -1, True, 'int8'),
  ('int8', -1, False, 'int8'),
  ('int4', -1, True, 'int8'),
  ('int4', -1, False, 'int4'),
  ('int4', 128, True, 'int8'),
  ('fp8_e4m3', -1, True, 'float8_e4m3fn'),
)


def make(M, K, N, dtype, group_size, symmetric):
  """x (M, K) bfloat16, QArray (K, N)."""
  spec = spec_lib.QuantSpec(
    dtype=dtype,
    granularity='group' if group_size > 0 else 'channel',
    group_size=group_size,
    symmetric=symmetric,
  )
  rng = np.random.default_rng(M + K + N)
  x = jnp.asarray(rng.normal(size=(M, K)), jnp.bfloat16)
  w = jnp.asarray(rng.normal(size=(K, N)) / K**0.5 + 0.01, jnp.float32)
  return x, qarray.quantize(w, spec)


def run(x, q, **options):
  fp8 = q.spec.dtype.startswith('fp8')
  options = {
    'implementation': 'pallas_mosaic_tpu',
    'chip': 'tpu7x' if fp8 else 'v5e',
    'interpret': True,
    'out_dtype': jnp.float32,
    **options,
  }
  arrays = {k: options.pop(k) for k in ('x_scale', 'bias') if k in options}
  f = functools.partial(
    api.quantized_matmul,
    bits=q.spec.bits,
    group_size=q.spec.group_size,
    **options,
  )
  return jax.jit(lambda *args, **kw: f(*args, **kw))(
    x, q.qvalue, q.scale, q.zero_point, **arrays
  )


def close(got, want):
  """Within float32 rounding of the epilogue; integer sums are exact."""
  np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max() + 1e-6)


class KernelTest(parameterized.TestCase):
  def test_a_case_worked_by_hand(self):
    # Row 0: absmax 12.7, so steps of 0.1: codes 127 and 10.
    x = jnp.zeros((2, 128)).at[0, 0].set(12.7).at[0, 5].set(1.0)
    codes = jnp.full((128, 3), 2, jnp.int8)
    spec = spec_lib.QuantSpec(dtype='int8', granularity='channel')
    q = qarray.from_codes(codes, jnp.array([[1.0, 0.5, 3.0]]), None, spec)
    y = run(x, q)
    want = [[27.4, 13.7, 82.2], [0.0, 0.0, 0.0]]  # A row of zeros stays so.
    np.testing.assert_allclose(y, want, rtol=1e-6)

  @parameterized.parameters(*FORMATS)
  def test_equals_base(self, dtype, group_size, symmetric, x_format):
    x, q = make(5, 256, 160, dtype, group_size, symmetric)
    bias = jnp.arange(160.0)[None]
    y = run(x, q, x_format=x_format, bias=bias)
    want = run(x, q, x_format=x_format, bias=bias, implementation='xla')
    close(y, want)
    simple = run(x, q, x_format=x_format, bias=bias, implementation='float')
    # The float path rounds both sides to bfloat16.
    np.testing.assert_allclose(simple, want, atol=0.01 * np.abs(want).max())

  @parameterized.parameters(*FORMATS[:5])
  def test_blocks_along_all_axes(self, dtype, group_size, symmetric, x_format):
    K = 2048 if group_size > 0 else 256
    x, q = make(70, K, 384, dtype, group_size, symmetric)
    block = tpu.Block(bm=32, bk=K // 2, bn=256, sub_m=16, sub_n=128)
    y = run(x, q, x_format=x_format, block=block)
    close(y, run(x, q, x_format=x_format, implementation='xla'))

  @parameterized.parameters(*FORMATS)
  def test_codes_with_their_scale(self, dtype, group_size, symmetric, x_format):
    x, q = make(9, 256, 128, dtype, group_size, symmetric)
    codes, scale = rows.quantize(x, x_format)
    y = run(codes, q, x_scale=scale)
    close(y, run(x, q, x_format=x_format))
    static = jnp.full((1, 1), 0.02)
    want = run(codes, q, x_scale=static, implementation='xla')
    close(run(codes, q, x_scale=static), want)

  @parameterized.parameters(1, 7, 8, 16, 17, 255)
  def test_rows_are_padded(self, M):
    x, q = make(M, 128, 128, 'int8', -1, True)
    y = run(x, q)
    self.assertEqual(y.shape, (M, 128))
    close(y, run(x, q, implementation='xla'))

  def test_a_long_prefill(self):
    x, q = make(4096, 128, 128, 'int8', -1, True)
    close(run(x, q), run(x, q, implementation='xla'))

  @hypothesis.settings(max_examples=5)
  @hypothesis.given(
    M=st.integers(1, 40),
    parts=st.integers(1, 3),
    N=st.integers(1, 300),
    fmt=st.sampled_from(FORMATS),
  )
  def test_any_shape(self, M, parts, N, fmt):
    x, q = make(M, 128 * parts, N, *fmt[:3])
    y = run(x, q, x_format=fmt[3])
    close(y, run(x, q, x_format=fmt[3], implementation='xla'))


class ApiTest(parameterized.TestCase):
  def test_rounding_is_that_of_numerics(self):
    x = make(16, 256, 8, 'int8', -1, True)[0].astype(jnp.float32)
    codes, scale = rows.quantize(x, 'int8')
    spec = spec_lib.QuantSpec(dtype='int8', granularity='token')
    q = qarray.quantize(x, spec)
    np.testing.assert_allclose(scale, q.scale, rtol=1e-6)
    # x / s and x * (1 / s) part on ties alone.
    self.assertLess(np.mean(np.asarray(codes) != np.asarray(q.qvalue)), 1e-3)

  def test_gradient_is_straight_through(self):
    x, q = make(4, 128, 128, 'int8', -1, True)
    g = jnp.asarray(np.random.default_rng(1).normal(size=(4, 128)), 'float32')
    got = jax.grad(lambda x: jnp.sum(run(x, q) * g))(x)
    want = np.asarray(g) @ np.asarray(qarray.dequantize(q)).T
    self.assertEqual(got.dtype, x.dtype)
    np.testing.assert_allclose(
      np.asarray(got, np.float32), want, atol=0.02 * np.abs(want).max()
    )

  def test_vmap_is_a_loop(self):
    x, q = make(6, 128, 128, 'int8', -1, True)
    x = x.reshape(3, 2, 128)
    close(jax.vmap(lambda x: run(x, q))(x), np.asarray(run(x, q)))
    scales = jnp.stack([q.scale, 2 * q.scale, 3 * q.scale])
    got = jax.vmap(lambda x, s: run(x, dataclasses.replace(q, scale=s)))(
      x, scales
    )
    for i in range(3):
      one = dataclasses.replace(q, scale=scales[i])
      close(got[i], np.asarray(run(x[i], one)))

  def test_choice(self):
    x, q = make(4, 128, 128, 'int8', -1, True)
    choose = functools.partial(api.choose, x, q.qvalue, bits=8)
    self.assertEqual(choose(), 'float')  # On a CPU.
    for chip in ('v5e', 'v5p', 'v6e'):
      self.assertEqual(choose(chip=chip), 'pallas_mosaic_tpu')
    self.assertEqual(choose(chip='tpu7x'), 'float')  # It has no int8 units.
    f8 = jnp.zeros((128, 128), 'float8_e4m3fn')
    fp8 = functools.partial(api.choose, x, f8, bits=8, x_format='float8_e4m3fn')
    self.assertEqual(fp8(chip='tpu7x'), 'pallas_mosaic_tpu')
    self.assertEqual(fp8(chip='v6e'), 'float')
    short = api.choose(x[:, :64], q.qvalue[:64], bits=8, chip='v5e')
    self.assertEqual(short, 'xla')  # Units, but K=64.
    x, q = make(65, 256, 128, 'int4', 128, True)
    grouped = functools.partial(api.choose, bits=4, group_size=128, chip='v6e')
    self.assertEqual(grouped(x, q.qvalue), 'float')  # Scales would dominate.
    self.assertEqual(grouped(x[:64], q.qvalue), 'pallas_mosaic_tpu')

  @parameterized.named_parameters(
    ('chip', {'chip': 'h100'}, "chip is 'h100'; it runs on"),
    (
      'format',
      {'chip': 'tpu7x'},
      r"tpu7x has no int8 unit, it has .'bf16', 'f",
    ),
    ('group', {'group': 32}, 'group_size=32; it takes multiples of 128'),
    ('bits', {'dtype': 'int2'}, 'bits=2; it takes 8 and 4'),
    ('K', {'K': 192}, 'K=192; it takes multiples of 128'),
    ('K4', {'K': 96, 'dtype': 'int4'}, 'K=96 at 4 bits; it takes mult'),
    ('half', {'x': jnp.float16}, 'x is float16; it takes bfloat16 or float32'),
  )
  def test_a_named_kernel_refuses(self, changed, message):
    dtype, group = changed.get('dtype', 'int8'), changed.get('group', -1)
    x, q = make(2, changed.get('K', 128), 8, dtype, group, True)
    x = x.astype(changed.get('x', x.dtype))
    with self.assertRaisesRegex(NotImplementedError, message):
      run(x, q, chip=changed.get('chip', 'v5e'))

  @parameterized.named_parameters(
    ('name', {'implementation': 'cuda'}, ValueError, "'cuda'.*'float', 'pal"),
    ('x_format', {'x_format': 'int3'}, ValueError, "x_format='int3'; allowed"),
    ('bias', {'bias': jnp.ones(8)}, ValueError, r'bias.*\(8,\).*\(1, 8\)'),
    ('both', {'x_scale': jnp.ones((1, 1))}, ValueError, 'with x_scale; codes'),
    ('mixed', {'x_format': 'float8_e4m3fn'}, TypeError, 'int8 and x is float8'),
    (
      'block',
      {'block': tpu.Block(bm=32, bk=64, bn=8)},
      ValueError,
      r'bk=64 with K=128.*allowed \[128\]',
    ),
    (
      'rows',
      {'block': tpu.Block(bm=8, bk=128, bn=8)},
      ValueError,
      'bm=8, bn=8 with N=8; they must be multiples of 32',
    ),
  )
  def test_wrong_options(self, changed, kind, message):
    x, q = make(2, 128, 8, 'int8', -1, True)
    with self.assertRaisesRegex(kind, message):
      run(x, q, **changed)

  def test_wrong_x(self):
    x, q = make(2, 128, 8, 'int8', -1, True)
    codes = x.astype(jnp.int8)
    with self.assertRaisesRegex(ValueError, 'x is int8 without x_scale'):
      run(codes, q)
    with self.assertRaisesRegex(TypeError, r"x is int32; allowed \['bfloat16'"):
      run(x.astype(jnp.int32), q)
    with self.assertRaisesRegex(ValueError, r'x_scale has shape \(3, 1\)'):
      run(codes, q, x_scale=jnp.ones((3, 1)))
    with self.assertRaisesRegex(ValueError, 'no rows'):
      run(x[:0], q)
    with self.assertRaisesRegex(ValueError, 'sub-tile of 48 in a block of 64'):
      tpu.Block(bm=64, bk=128, bn=128, sub_m=48)

  def test_fp8_beside_packed_weights_is_refused(self):
    x, q = make(2, 128, 8, 'int4', -1, True)
    with self.assertRaisesRegex(TypeError, 'both fp8'):
      run(x, q, x_format='float8_e4m3fn')


if __name__ == '__main__':
  absltest.main()
