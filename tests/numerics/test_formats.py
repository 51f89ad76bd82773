"""Tests of jaxq.numerics.formats."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.numerics import formats

# Formats that ml_dtypes has with the same special codes as ours.
ORACLES = {
  'e2m1': ml_dtypes.float4_e2m1fn,
  'e2m3': ml_dtypes.float6_e2m3fn,
  'e3m2': ml_dtypes.float6_e3m2fn,
  'e4m3': ml_dtypes.float8_e4m3fn,
  'e5m2': ml_dtypes.float8_e5m2,
}


def grid_and_midpoints(fmt):
  """All values of fmt, midpoints, and the float32 neighbours of midpoints."""
  codes = np.arange(fmt.max_code + 1, dtype=np.uint8)
  values = np.asarray(formats.decode_bits(codes, fmt))
  middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)
  up, down = np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)
  beyond = np.float32([1.01, 1.2, 4.0, 1e6]) * np.float32(fmt.max)
  positive = np.concatenate([values, middle, up, down, beyond])
  return np.concatenate([positive, -positive])


@functools.partial(jax.jit, static_argnames='fmt')
def _all_three(x, fmt):
  codes = formats.encode_bits(x, fmt)
  return formats.rne_saturate(x, fmt), codes, formats.decode_bits(codes, fmt)


class FloatFormatTest(parameterized.TestCase):
  def test_table_of_the_specification(self):
    for name, largest, smallest, emax in (
      ('e4m3', 448, 2**-9, 8),
      ('e5m2', 57344, 2**-16, 15),
      ('e2m1', 6, 0.5, 2),
      ('e3m2', 28, 2**-4, 4),
      ('e2m3', 7.5, 0.125, 2),
      ('e3m4', 31, 2**-6, 4),
    ):
      fmt = formats.get(name)
      self.assertEqual(
        (fmt.max, fmt.smallest_subnormal, fmt.emax), (largest, smallest, emax)
      )
      self.assertEqual(fmt.name, name)
    self.assertEqual(formats.FLOAT16.max, 65504)

  def test_fp4_grid_and_ties_by_hand(self):
    fmt = formats.get('e2m1')
    grid = formats.decode_bits(np.arange(16, dtype=np.uint8), fmt)
    np.testing.assert_array_equal(grid[:8], [0, 0.5, 1, 1.5, 2, 3, 4, 6])
    np.testing.assert_array_equal(grid[8:], -grid[:8])
    x = jnp.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -5.0])
    expected = [0, 1, 1, 2, 2, 4, 4, 6, -4]
    np.testing.assert_array_equal(formats.rne_saturate(x, fmt), expected)

  @parameterized.parameters(*sorted(ORACLES))
  def test_equals_ml_dtypes_at_values_and_midpoints(self, name):
    fmt, dtype = formats.get(name), ORACLES[name]
    x = grid_and_midpoints(fmt)
    expected = np.clip(x, -fmt.max, fmt.max).astype(dtype)
    rounded, codes, values = _all_three(x, fmt)
    np.testing.assert_array_equal(rounded, expected.astype(np.float32))
    np.testing.assert_array_equal(codes, expected.view(np.uint8))
    np.testing.assert_array_equal(values, expected.astype(np.float32))

  def test_eager_equals_jit(self):
    fmt = formats.get('e2m1')
    x = grid_and_midpoints(fmt)
    with jax.disable_jit():
      eager = _all_three(x, fmt)
    for have, want in zip(eager, _all_three(x, fmt), strict=True):
      np.testing.assert_array_equal(have, want)

  @parameterized.parameters('e1m0', 'e1m1', 'e3m0', 'e5m0', 'e4m2', 'e3m4')
  def test_generic_formats_round_to_the_nearest_value(self, name):
    fmt = formats.get(name)
    grid = np.asarray(
      formats.decode_bits(np.arange(2 ** (fmt.bits - 1), dtype=np.uint8), fmt)
    )
    self.assertTrue(np.all(np.diff(grid) > 0))
    self.assertEqual(grid[-1], fmt.max)
    x = np.random.default_rng(0).uniform(0, fmt.max, 300).astype(np.float32)
    nearest = grid[np.argmin(np.abs(x[:, None] - grid), axis=1)]
    rounded, _, values = _all_three(x, fmt)
    np.testing.assert_array_equal(rounded, nearest)
    np.testing.assert_array_equal(values, nearest)

  def test_float16_equals_numpy(self):
    rng = np.random.default_rng(1)
    x = (rng.standard_normal(500) * 2.0 ** rng.integers(-26, 15, 500)).astype(
      np.float32
    )
    np.testing.assert_array_equal(
      formats.rne_saturate(x, formats.FLOAT16),
      x.astype(np.float16).astype(np.float32),
    )

  @parameterized.parameters('e5m10', 'e0m3', 'float8')
  def test_unknown_format(self, name):
    with self.assertRaisesRegex(ValueError, f"'{name}'; allowed eXmY.*Use a"):
      formats.get(name)


class ExponentTest(parameterized.TestCase):
  def test_powers_of_two_are_in_their_own_bin(self):
    e = np.arange(-126, 128)
    x = np.ldexp(np.float32(1), e).astype(np.float32)
    np.testing.assert_array_equal(formats.exponent(x), e)
    below = np.nextafter(x[1:], np.float32(0))
    np.testing.assert_array_equal(formats.exponent(below), e[1:] - 1)
    np.testing.assert_array_equal(formats.exp2(jnp.asarray(e)), x)
    np.testing.assert_array_equal(formats.exponent(jnp.zeros(1)), [-127])

  def test_scaling_passes_through_no_subnormal_factor(self):
    x = jnp.array([2.0**127, 6.0 * 2.0**-100])
    e = jnp.array([-127, -27])
    np.testing.assert_array_equal(
      formats.scale_by_exp2(x, e), [1.0, 6.0 * 2.0**-127]
    )

  @parameterized.parameters(
    (4.0, 1.0, 1.0, 1.0), (6.0, 1.0, 1.0, 1.0), (6.001, 1.0, 2.0, 1.0),
    (6.99, 1.0, 2.0, 1.0), (7.0, 1.0, 2.0, 2.0), (7.99, 1.0, 2.0, 2.0),
    (8.0, 2.0, 2.0, 2.0), (0.0, 2.0**-127, 2.0**-127, 2.0**-127),
  )  # fmt: skip
  def test_mx_scale_by_hand(self, absmax, floor, ceil, nearest):
    fmt = formats.get('e2m1')
    rules = (('floor', floor), ('ceil', ceil), ('round', nearest))
    for rule, expected in rules:
      scale = np.asarray(formats.mx_scale(jnp.float32(absmax), fmt, rule))
      self.assertEqual(scale.view(np.uint32), np.float32(expected).view('u4'))


class Nf4Test(parameterized.TestCase):
  def test_levels_are_fixed_points_and_nearest_wins(self):
    codes = formats.encode_nf4(jnp.asarray(formats.NF4))
    np.testing.assert_array_equal(codes, np.arange(16))
    np.testing.assert_array_equal(formats.decode_nf4(codes), formats.NF4)
    x = np.random.default_rng(2).uniform(-1, 1, 200).astype(np.float32)
    nearest = np.argmin(np.abs(x[:, None] - formats.NF4), axis=1)
    np.testing.assert_array_equal(formats.encode_nf4(jnp.asarray(x)), nearest)


if __name__ == '__main__':
  absltest.main()
