"""Tests of jaxq.io.words."""

import numpy as np
from absl.testing import absltest, parameterized

from jaxq.io import words


def stream(codes, bits):
  """The bits of a row of codes, low bits first, as Python integers."""
  number = 0
  for i, code in enumerate(codes):
    number |= int(code) << (i * bits)
  count = -(-len(codes) * bits // 32)
  return [(number >> (32 * w)) & 0xFFFFFFFF for w in range(count)]


class WordsTest(parameterized.TestCase):
  def test_by_hand(self):
    # Ten codes of 3 bits, then two bits of the eleventh; its third is next.
    codes = np.array([[1, 0, 0, 0, 0, 0, 0, 0, 0, 7, 6]], np.uint8)
    packed = words.pack(codes, 3).view(np.uint32)
    expected = 1 | 7 << 27 | (6 & 3) << 30
    np.testing.assert_array_equal(packed, [[expected, 6 >> 2]])

  @parameterized.product(bits=tuple(range(1, 9)), n=(1, 31, 32, 70))
  def test_dense_stream(self, bits, n):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (2, 3, n)).astype(np.uint8)
    packed = words.pack(codes, bits)
    self.assertEqual(packed.dtype, np.int32)
    self.assertEqual(packed.shape[-1], words.count(n, bits))
    self.assertEqual(
      packed[1, 2].view(np.uint32).tolist(), stream(codes[1, 2], bits)
    )
    np.testing.assert_array_equal(words.unpack(packed, bits, n), codes)

  def test_sparse_words_leave_bits_empty(self):
    word = 5 | 3 << 3 | 7 << 27  # Codes 0, 1 and 9; bits 30 and 31 are empty.
    packed = np.array([[word, 2]], np.uint32).view(np.int32)
    got = words.unpack(packed, 3, 11, dense=False)
    np.testing.assert_array_equal(got, [[5, 3, 0, 0, 0, 0, 0, 0, 0, 7, 2]])
    self.assertEqual(words.count(11, 3, dense=False), 2)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, r'2 words; 33 codes.*take 5'):
      words.unpack(np.zeros((1, 2), np.int32), 4, 33)
    for function in (words.pack, lambda c, b: words.unpack(c, b, 1)):
      with self.assertRaisesRegex(ValueError, 'bits=9; allowed 1..8'):
        function(np.zeros((1, 4), np.int32), 9)


if __name__ == '__main__':
  absltest.main()
