"""Tests of jaxq.numerics.fpx."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import linear
from jaxq.numerics import formats, fpx, qarray
from jaxq.numerics import spec as spec_lib

HALF = jnp.float32(0.5)  # Bias 1.
ALL = [(b, m) for b in range(3, 9) for m in range(b - 1) if b - 1 - m <= 6]


def numpy_fp(x, man_bits, bits, bias):
  """The paper's equations in float64."""
  exp_bits = bits - 1 - man_bits
  top = (2 - 2.0**-man_bits) * 2.0 ** (2.0**exp_bits - 1 - bias)
  x = np.clip(np.asarray(x, np.float64), -top, top)
  size = np.where(x == 0, 1e-300, np.abs(x))
  p = np.maximum(np.floor(np.log2(size) + bias), 1)
  v = 2.0 ** (p - man_bits - bias)
  return v * np.round(x / v)


class RoundTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
    (2, [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]),
    (0, [0, 1, 2, 4, 8, 16, 32, 64]),
  )
  def test_grids_of_four_bits_at_bias_one(self, man_bits, expected):
    codes = jnp.arange(8, dtype=jnp.uint8)
    np.testing.assert_array_equal(fpx.decode(codes, man_bits, 4) / 2, expected)
    grid = jnp.array(expected, jnp.float32)
    np.testing.assert_array_equal(
      fpx.round_to(grid, HALF, man_bits, 4), expected
    )
    self.assertEqual(float(fpx.largest(man_bits, 4)) / 2, expected[-1])

  def test_all_formats(self):
    x = jnp.sort(4 * jax.random.t(jax.random.key(0), 2.0, (400,)))
    scale = jnp.float32(0.3)

    @functools.partial(jax.jit, static_argnums=1)
    def run(man_bits, bits):
      y = fpx.round_to(x, scale, man_bits, bits)
      again = fpx.round_to(y, scale, man_bits, bits)
      mirrored = fpx.round_to(-x, scale, man_bits, bits)
      codes = fpx.encode(x, scale, man_bits, bits)
      return y, again, mirrored, codes, fpx.decode(codes, man_bits, bits)

    for bits, man_bits in ALL:
      y, again, mirrored, codes, values = map(
        np.asarray, run(jnp.int32(man_bits), bits)
      )
      expected = numpy_fp(x, man_bits, bits, -np.log2(np.float32(scale)))
      np.testing.assert_allclose(y, expected, rtol=1e-5)
      self.assertTrue(np.all(np.diff(y) >= 0))
      np.testing.assert_array_equal(again, y)
      np.testing.assert_array_equal(mirrored, -y)
      self.assertLess(int(codes.max()), 2**bits)
      np.testing.assert_array_equal(values * np.float32(scale), y)

  def test_e2m1_at_bias_one_is_float4(self):
    x = np.arange(-6, 6.001, 1 / 16, dtype=np.float32)  # All ties, too.
    expected = x.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(
      fpx.round_to(jnp.array(x), HALF, 1, 4), expected
    )

  def test_shifts_are_exact(self):
    x = jax.random.normal(jax.random.key(1), (64, 8)) * 3
    shift = jnp.arange(8)[None]
    scale = jnp.full((1, 8), 0.37)
    for man_bits in (0, 1, 2):
      direct = fpx.round_to(x, scale * formats.exp2(-shift), man_bits, 4)
      moved = fpx.round_to(x * formats.exp2(shift), scale, man_bits, 4)
      np.testing.assert_array_equal(direct, moved * formats.exp2(-shift))

  def test_a_format_that_is_data(self):
    x = jax.random.normal(jax.random.key(2), (16, 3))
    run = jax.jit(fpx.round_to, static_argnums=3)
    for man_bits in (0, 1, 2):
      np.testing.assert_array_equal(
        run(x, HALF, jnp.int32(man_bits), 4), fpx.round_to(x, HALF, man_bits, 4)
      )
    self.assertEqual(run._cache_size(), 1)


class FpxArrayTest(parameterized.TestCase):
  @parameterized.parameters((4, 32, True), (4, 9, False), (8, 32, False))
  def test_quantized_is_rounded(self, bits, K, packed):
    w = jax.random.normal(jax.random.key(0), (K, 3))
    scale = jnp.array([[0.1, 0.2, 0.3]])
    shift = jnp.arange(K) % 4
    q = fpx.quantize(w, scale, jnp.int32(bits - 2), bits, shift)
    self.assertEqual(q.is_packed, packed)
    qarray.validate(q)
    expected = fpx.round_to(w, scale, bits - 2, bits)
    expected = expected * formats.exp2(-shift)[:, None]
    np.testing.assert_array_equal(qarray.dequantize(q), expected)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), q)
    np.testing.assert_array_equal(
      qarray.dequantize(stacked), jnp.stack([expected, expected])
    )
    stored = (bits if packed else 8) + 32 / K + 8 / 3 + 8 / (3 * K)
    self.assertAlmostEqual(qarray.bits_per_weight(q), stored, places=5)

  def test_without_a_split_it_is_e2(self):
    x = jax.random.normal(jax.random.key(0), (32, 3))
    for bits, name in ((4, 'fp4_e2m1'), (6, 'e2m3')):
      np.testing.assert_array_equal(
        qarray.fake_quant(x, fpx.spec(bits, 'channel')),
        qarray.fake_quant(x, spec_lib.QuantSpec(dtype=name)),
      )

  def test_shifts_beyond_the_exponent_are_refused(self):
    scale, man_bits = np.ones((1, 1), np.float32), np.ones((1, 1), np.int8)
    for shift in ([0, 4], [-1, 3]):
      with self.assertRaisesRegex(
        ValueError, 'allowed 0 to 3.*file is damaged'
      ):
        linear.FpxInput(
          scale, man_bits, np.array(shift, np.int8), fpx.spec(4, 'tensor')
        )
    with self.assertRaisesRegex(ValueError, 'fpx: shifts from -2 to 1'):
      fpx.FpxArray(
        qvalue=np.zeros((2, 1), np.uint8),
        scale=scale,
        spec=fpx.spec(4, 'channel'),
        shape=(2, 1),
        man_bits=man_bits,
        row_shift=np.array([[-2], [1]], np.int8),
      )


if __name__ == '__main__':
  absltest.main()
