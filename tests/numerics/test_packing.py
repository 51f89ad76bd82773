"""Tests of jaxq.numerics.packing."""

import hypothesis
import jax
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from jaxq.numerics import packing


class PackingTest(parameterized.TestCase):
  def test_four_rows_of_four_bits_by_hand(self):
    codes = np.array([[1], [2], [3], [15]], np.uint8)
    packed = packing.pack(codes, bits=4, tile=4)
    np.testing.assert_array_equal(packed, [[0x31], [0xF2]])

  def test_three_bits_are_a_plane_of_two_and_one_of_one(self):
    codes = np.array([[0], [1], [2], [3], [4], [5], [6], [7]], np.uint8)
    packed = packing.pack(codes, bits=3, tile=8)
    # Two byte rows of low pairs (rows i, i + 2, ...), one of top bits.
    low = [0 | 2 << 2 | 0 << 4 | 2 << 6, 1 | 3 << 2 | 1 << 4 | 3 << 6]
    np.testing.assert_array_equal(packed[:, 0], [*low, 0b11110000])

  @parameterized.parameters(1, 2, 4)
  def test_all_bytes_survive_unpack_then_pack(self, bits):
    packed = np.arange(256, dtype=np.uint8).reshape(16, 16)
    tile = 16 * 8 // bits
    codes = packing.unpack(packed, bits, tile)
    self.assertEqual(codes.shape, (tile, 16))
    self.assertLess(int(codes.max()), 2**bits)
    np.testing.assert_array_equal(packing.pack(codes, bits, tile), packed)

  @hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
  @hypothesis.given(
    bits=st.integers(1, 7),
    tiles=st.integers(1, 3),
    tile=st.sampled_from([8, 24, 64]),
    seed=st.integers(0, 99),
  )
  def test_round_trip_at_exactly_b_bits(self, bits, tiles, tile, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (2, tiles * tile, 3), dtype=np.uint8)
    with jax.disable_jit():
      packed = packing.pack(codes, bits, tile)
      back = packing.unpack(packed, bits, tile)
    self.assertEqual(8 * packed.size, bits * codes.size)
    np.testing.assert_array_equal(back, codes)

  @parameterized.parameters(*range(1, 9))
  def test_sign_extend(self, bits):
    values = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=np.int8)
    codes = values.view(np.uint8) & np.uint8(2**bits - 1)
    np.testing.assert_array_equal(packing.sign_extend(codes, bits), values)

  def test_tiles_are_groups_or_powers_of_two(self):
    self.assertEqual(packing.tile_rows(576), 64)
    self.assertEqual(packing.tile_rows(4096), 128)
    self.assertEqual(packing.tile_rows(576, 96), 96)
    self.assertEqual(packing.tile_rows(7), 1)
    self.assertTrue(packing.packable(4, 2))
    self.assertFalse(packing.packable(3, 4))
    self.assertFalse(packing.packable(8, 128))

  def test_messages(self):
    codes = np.zeros((12, 2), np.uint8)
    with self.assertRaisesRegex(ValueError, r'bits=8; allowed 1..7. Store'):
      packing.pack(codes, 8, 4)
    with self.assertRaisesRegex(
      ValueError, r'pack: K=12, tile=4, bits=3; .*multiple of 8. Use such'
    ):
      packing.pack(codes, 3, 4)
    with self.assertRaisesRegex(ValueError, 'unpack: K=24, tile=16, bits=4'):
      packing.unpack(codes, 4, 16)


if __name__ == '__main__':
  absltest.main()
