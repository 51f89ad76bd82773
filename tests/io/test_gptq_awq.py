"""Tests of jaxq.io.gptq_awq against packers written as the formats' own loops.

`pack_gptq` and `pack_awq` set one field at a time, as the published packers do;
they share nothing with the reader.
"""

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.io import gptq_awq
from jaxq.numerics import qarray

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def put_stream(fields, bits):
  """(R, n) fields along the rows -> (R * bits / 32, n): a stream of bits."""
  out = np.zeros((fields.shape[0] * bits // 32, fields.shape[1]), np.uint64)
  for row in range(fields.shape[0]):
    for bit in range(bits):
      word, place = divmod(row * bits + bit, 32)
      value = (fields[row].astype(np.uint64) >> np.uint64(bit)) & np.uint64(1)
      out[word] |= value << np.uint64(place)
  return out.astype(np.uint32).view(np.int32)


def pack_gptq(codes, zeros, scales, bits, version, g_idx=None):
  """Codes (K, N), zeros and scales (G, N) -> the tensors of a GPTQ linear."""
  qzeros = put_stream(zeros.T, bits).T
  if version == 'gptq':  # Whole words less one in each field, with borrows.
    if bits == 3:
      qzeros = put_stream(((zeros.astype(int) - 1) % 8).T, 3).T
    else:
      ones = sum(1 << i for i in range(0, 32, bits))
      words = np.ascontiguousarray(qzeros).view(np.uint32)
      qzeros = (words - np.uint32(ones)).view(np.int32)
  K, groups = codes.shape[0], scales.shape[0]
  if g_idx is None:
    g_idx = np.arange(K) // (K // groups)
  return {
    'qweight': put_stream(codes, bits),
    'qzeros': np.ascontiguousarray(qzeros),
    'scales': scales.astype(np.float16),
    'g_idx': g_idx.astype(np.int32),
  }


def awq_words(fields):
  """(R, n) -> (R, n / 8) in AWQ's order of columns."""
  out = np.zeros((fields.shape[0], fields.shape[1] // 8), np.uint32)
  for column in range(out.shape[1]):
    for i in range(8):
      field = fields[:, column * 8 + ORDER[i]].astype(np.uint32)
      out[:, column] |= field << np.uint32(4 * i)
  return out.view(np.int32)


def pack_awq(codes, zeros, scales):
  """As pack_gptq, for AWQ."""
  return {
    'qweight': awq_words(codes),
    'qzeros': awq_words(zeros),
    'scales': scales.astype(np.float16),
  }


def made(bits, shape=(64, 32), groups=4, symmetric=False, seed=0):
  """Random codes from 0, zero points and scales that float16 holds."""
  rng = np.random.default_rng(seed)
  codes = rng.integers(0, 2**bits, shape).astype(np.uint8)
  zeros = rng.integers(0, 2**bits, (groups, shape[1])).astype(np.uint8)
  if symmetric:
    zeros[:] = 2 ** (bits - 1)
  scales = rng.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
  return codes, zeros, scales


def values(codes, zeros, scales):
  """(code - zero) * scale, float32."""
  repeat = codes.shape[0] // zeros.shape[0]
  zeros, scales = (np.repeat(a, repeat, axis=0) for a in (zeros, scales))
  difference = codes.astype(np.float32) - zeros.astype(np.float32)
  return difference * scales.astype(np.float32)


class GptqTest(parameterized.TestCase):
  def test_version_1_by_hand(self):
    # Zero point 0 was stored as 15 by a borrow from its neighbour, 5.
    words = np.array([[0x50 - 0x11]], np.int64)
    words = (words & 0xFFFFFFFF).astype(np.uint32)
    words = (words - np.uint32(0x11111100)).view(np.int32)
    got = gptq_awq._gptq_zeros(words, 4, 8, True)
    np.testing.assert_array_equal(got[0, :2], [0, 5])

  @parameterized.product(
    bits=(2, 3, 4, 8), version=('gptq', 'gptq_v2'), symmetric=(True, False)
  )
  def test_integers_are_exact(self, bits, version, symmetric):
    codes, zeros, scales = made(bits, symmetric=symmetric)
    tensors = pack_gptq(codes, zeros, scales, bits, version)
    config = {'bits': bits, 'checkpoint_format': version}
    q, permute = gptq_awq.read_gptq(tensors, config, 'w')
    self.assertIsNone(permute)
    self.assertEqual(q.spec.symmetric, symmetric)
    self.assertEqual(q.spec.group_size, 16)
    got = np.asarray(qarray.codes(q)).astype(int)
    shift = 2 ** (bits - 1) if symmetric else 0
    np.testing.assert_array_equal(got + shift, codes)
    if not symmetric:
      np.testing.assert_array_equal(q.zero_point, zeros)
    self.assertEqual(q.scale.dtype, np.float16)
    np.testing.assert_array_equal(q.scale, scales)
    np.testing.assert_array_equal(
      qarray.dequantize(q), values(codes, zeros, scales)
    )

  def test_one_group_is_per_channel(self):
    codes, zeros, scales = made(4, groups=1)
    tensors = pack_gptq(codes, zeros, scales, 4, 'gptq')
    q, _ = gptq_awq.read_gptq(tensors, {'bits': 4}, 'w')
    self.assertEqual(q.spec.granularity, 'channel')
    np.testing.assert_array_equal(
      qarray.dequantize(q), values(codes, zeros, scales)
    )

  def test_groups_out_of_order(self):
    codes, zeros, scales = made(4)
    g_idx = np.random.default_rng(1).permutation(np.arange(64) // 16)
    tensors = pack_gptq(codes, zeros, scales, 4, 'gptq', g_idx)
    q, permute = gptq_awq.read_gptq(tensors, {'bits': 4}, 'w')
    by_row = codes.astype(np.float32) - zeros[g_idx].astype(np.float32)
    w = by_row * scales[g_idx].astype(np.float32)
    x = np.random.default_rng(2).standard_normal((3, 64), np.float32)
    got = jnp.asarray(x[:, permute]) @ qarray.dequantize(q)
    np.testing.assert_allclose(got, x @ w, atol=1e-4)  # Another order of sums.
    np.testing.assert_array_equal(qarray.dequantize(q), w[permute])

  def test_messages(self):
    codes, zeros, scales = made(4)
    tensors = pack_gptq(codes, zeros, scales, 4, 'gptq')
    config = {'bits': 4}
    uneven = np.zeros(64, np.int32)
    with self.assertRaisesRegex(NotImplementedError, r'groups of 0 to 64 rows'):
      gptq_awq.read_gptq({**tensors, 'g_idx': uneven}, config, 'w')
    with self.assertRaisesRegex(ValueError, r'g_idx has shape \(8,\)'):
      gptq_awq.read_gptq({**tensors, 'g_idx': uneven[:8]}, config, 'w')
    with self.assertRaisesRegex(
      ValueError, r"tensors \['qzeros'\] are missing"
    ):
      gptq_awq.read_gptq(
        {k: v for k, v in tensors.items() if k != 'qzeros'}, config, 'w'
      )
    with self.assertRaisesRegex(ValueError, r'scales \(3, 32\).*dividing 64'):
      short = {**tensors, 'scales': scales[:3], 'qzeros': tensors['qzeros'][:3]}
      gptq_awq.read_gptq(short, config, 'w')

  @parameterized.parameters(
    ({'bits': 5}, r'bits=5; allowed are \[2, 3, 4, 8\]'),
    ({'bits': 4, 'checkpoint_format': 'marlin'}, "checkpoint_format='marlin'"),
    ({'bits': 4, 'is_marlin_format': True}, 'is_marlin_format=True'),
  )
  def test_unreadable_configs(self, config, message):
    with self.assertRaisesRegex(NotImplementedError, f'^here: {message}'):
      gptq_awq.check_gptq(config, 'here')


class AwqTest(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_integers_are_exact(self, symmetric):
    codes, zeros, scales = made(4, symmetric=symmetric)
    tensors = pack_awq(codes, zeros, scales)
    q, permute = gptq_awq.read_awq(tensors, {'bits': 4}, 'w')
    self.assertIsNone(permute)
    got = np.asarray(qarray.codes(q)).astype(int) + 8 * symmetric
    np.testing.assert_array_equal(got, codes)
    if not symmetric:
      np.testing.assert_array_equal(q.zero_point, zeros)
    np.testing.assert_array_equal(
      qarray.dequantize(q), values(codes, zeros, scales)
    )

  def test_without_zero_points(self):
    codes, zeros, scales = made(4, symmetric=True)
    tensors = pack_awq(codes, zeros, scales)
    del tensors['qzeros']
    q, _ = gptq_awq.read_awq(tensors, {'bits': 4}, 'w')
    np.testing.assert_array_equal(
      qarray.dequantize(q), values(codes, zeros, scales)
    )

  @parameterized.parameters(
    ({'bits': 3}, r'bits=3; allowed are \[4\]'),
    ({'w_bit': 8}, 'bits=8'),
    ({'bits': 4, 'version': 'GEMV'}, r"version='gemv'; allowed are \['gemm'\]"),
  )
  def test_unreadable_configs(self, config, message):
    with self.assertRaisesRegex(NotImplementedError, f'^here: {message}'):
      gptq_awq.check_awq(config, 'here')


if __name__ == '__main__':
  absltest.main()
