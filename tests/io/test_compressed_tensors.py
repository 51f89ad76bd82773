"""Tests of jaxq.io.compressed_tensors: arguments and tensors, both ways."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.io import compressed_tensors as ct
from jaxq.io import words
from jaxq.nn import linear, matmul
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib

QuantSpec = spec_lib.QuantSpec
SPECS = {
  **{f'int{b}': QuantSpec(dtype=f'int{b}') for b in range(2, 9)},
  'int4_g16': QuantSpec(dtype='int4', granularity='group', group_size=16),
  'int4_g16_asym': QuantSpec(
    dtype='int4', granularity='group', group_size=16, symmetric=False
  ),
  'int3_asym': QuantSpec(dtype='int3', symmetric=False),
  'int8_asym': QuantSpec(dtype='int8', symmetric=False),
  'int8_tensor': QuantSpec(dtype='int8', granularity='tensor'),
  'int4_float16_scale': QuantSpec(dtype='int4', scale_dtype='float16'),
  'fp8_channel': QuantSpec(dtype='fp8_e4m3'),
  'fp8_tensor': QuantSpec(dtype='fp8_e4m3', granularity='tensor'),
  'mxfp4': QuantSpec(dtype='mxfp4'),
  'mxfp8': QuantSpec(dtype='mxfp8'),
  'nvfp4': QuantSpec(dtype='nvfp4'),
}
TOKEN = QuantSpec(dtype='int8', granularity='token')


def kernel(spec, shape=(64, 24), seed=0):
  """A random QArray."""
  w = np.random.default_rng(seed).standard_normal(shape, np.float32)
  return qarray.quantize(jnp.asarray(w), spec)


class TensorsTest(parameterized.TestCase):
  def test_four_bits_by_hand(self):
    spec = QuantSpec(dtype='int4')
    codes = np.array([[-8, 7], [0, 1], [3, -1], [2, 5]], np.int8)  # (K, N)
    q = ct.assemble(codes, np.array([[0.5, 2.0]], np.float32), None, spec)
    tensors = ct.write(q, ct.PACKED)
    # Row n of the file is column n, each code plus 8, k = 0 lowest.
    expected = [[0x0 | 0x8 << 4 | 0xB << 8 | 0xA << 12]]
    expected.append([0xF | 0x9 << 4 | 0x7 << 8 | 0xD << 12])
    np.testing.assert_array_equal(tensors['weight_packed'], expected)
    np.testing.assert_array_equal(tensors['weight_shape'], [2, 4])
    np.testing.assert_array_equal(tensors['weight_scale'], [[0.5], [2.0]])

  @parameterized.product(name=sorted(SPECS), inputs=(None, TOKEN))
  def test_round_trip_is_exact(self, name, inputs):
    spec = SPECS[name]
    q = kernel(spec)
    tensors = ct.write(q, ct.format_of(spec, inputs))
    args = ct.args_of(spec)
    got = ct.read(tensors, ct.weight_spec(args, 'w'), args, 'w')
    self.assertEqual(got.spec, spec)
    self.assertEqual(got.shape, q.shape)
    np.testing.assert_array_equal(got.qvalue, q.qvalue)
    if q.zero_point is not None:
      np.testing.assert_array_equal(got.zero_point, q.zero_point)
    np.testing.assert_array_equal(
      got.scale.astype(np.float32), np.asarray(q.scale, np.float32)
    )
    if q.tensor_scale is not None:  # Stored as its reciprocal.
      np.testing.assert_allclose(got.tensor_scale, q.tensor_scale, rtol=3e-7)

  def test_words_with_gaps_of_older_versions(self):
    spec = QuantSpec(dtype='int3')
    q = kernel(spec)
    tensors = ct.write(q, ct.PACKED)
    unsigned = words.unpack(tensors['weight_packed'], 3, 64).astype(np.uint32)
    padded = np.pad(unsigned, ((0, 0), (0, 6))).reshape(24, 7, 10)
    lows = np.arange(10, dtype=np.uint32) * 3
    old = np.bitwise_or.reduce(padded << lows, axis=-1).view(np.int32)
    args = ct.args_of(spec)
    got = ct.read({**tensors, 'weight_packed': old}, spec, args, 'w')
    np.testing.assert_array_equal(got.qvalue, q.qvalue)

  def test_blocks_become_groups_with_the_same_values(self):
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.standard_normal((6, 8)), jnp.float8_e4m3fn)
    scale = rng.uniform(0.5, 1.5, (2, 2)).astype(np.float32)  # Blocks (4, 4).
    args = {
      'num_bits': 8,
      'type': 'float',
      'strategy': 'block',
      'block_structure': [4, 4],
    }
    tensors = {'weight': np.asarray(codes), 'weight_scale': scale}
    spec = ct.weight_spec(args, 'w')
    q = ct.read(tensors, spec, args, 'w')
    whole = np.repeat(np.repeat(scale, 4, 0)[:6], 4, 1)
    expected = np.asarray(codes, np.float32) * whole
    np.testing.assert_array_equal(qarray.dequantize(q), expected.T)

  def test_format_follows_weights_and_inputs(self):
    fp8 = QuantSpec(dtype='fp8_e4m3', granularity='token')
    for name, inputs, expected in (
      ('int4', None, 'pack-quantized'),
      ('int4', TOKEN, 'int-quantized'),
      ('fp8_channel', fp8, 'float-quantized'),
      ('fp8_channel', None, 'naive-quantized'),
      ('mxfp4', None, 'mxfp4-pack-quantized'),
      ('mxfp8', None, 'mxfp8-quantized'),
      ('nvfp4', None, 'nvfp4-pack-quantized'),
    ):
      self.assertEqual(ct.format_of(SPECS[name], inputs), expected)

  @parameterized.parameters(
    ('weight_scale', 'weight_scale is missing.*weight_packed'),
    ('weight_shape', 'weight_shape is missing'),
  )
  def test_missing_tensors_are_named(self, name, message):
    spec = SPECS['int4_g16']
    tensors = ct.write(kernel(spec), ct.PACKED)
    del tensors[name]
    with self.assertRaisesRegex(ValueError, message):
      ct.read(tensors, spec, ct.args_of(spec), 'model.x')

  def test_wrong_scale_shape(self):
    spec = SPECS['int4_g16']
    tensors = ct.write(kernel(spec), ct.PACKED)
    tensors['weight_scale'] = tensors['weight_scale'][:, :2]
    with self.assertRaisesRegex(
      ValueError, r'model.x: weight_scale has shape \(24, 2\).*\(24, 4\) is'
    ):
      ct.read(tensors, spec, ct.args_of(spec), 'model.x')

  def test_float_weights_with_scales_are_not_compressed(self):
    spec = SPECS['int8']
    tensors = ct.write(kernel(spec), 'int-quantized')
    tensors['weight'] = tensors['weight'].astype(np.float32)
    with self.assertRaisesRegex(ValueError, 'weight is float32; int8 is need'):
      ct.read(tensors, spec, ct.args_of(spec), 'model.x')

  def test_rows_out_of_order(self):
    spec = SPECS['int4_g16']
    tensors = ct.write(kernel(spec), ct.PACKED)
    tensors['weight_g_idx'] = np.zeros(64, np.int32)
    with self.assertRaisesRegex(NotImplementedError, 'out of order.*without'):
      ct.read(tensors, spec, ct.args_of(spec), 'model.x')


class ArgumentsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'num_bits': 4, 'group_size': 32}, 'int4', 'group', 32),
    ({'num_bits': 8, 'group_size': -1}, 'int8', 'channel', -1),
    ({'num_bits': 8, 'type': 'float'}, 'fp8_e4m3', 'tensor', -1),
  )
  def test_strategy_is_inferred(self, args, dtype, granularity, group_size):
    spec = ct.weight_spec(args, 'w')
    self.assertEqual(spec.dtype, dtype)
    self.assertEqual(spec.granularity, granularity)
    self.assertEqual(spec.group_size, group_size)

  @parameterized.parameters(
    ({'num_bits': 16}, '16-bit int.*allowed are int2 to int8'),
    ({'num_bits': 4, 'type': 'float', 'group_size': 64}, '4-bit float'),
    ({'num_bits': 8, 'strategy': 'attn_head'}, "strategy 'attn_head'"),
    ({'num_bits': 8, 'strategy': 'token'}, "weights with strategy 'token'"),
    ({'num_bits': 8, 'dynamic': True}, 'dynamic=True weights'),
    ({'num_bits': 4, 'group_size': 8, 'actorder': 'group'}, 'actorder'),
  )
  def test_unreadable_weights(self, args, message):
    with self.assertRaisesRegex(NotImplementedError, f'group_0: .*{message}'):
      ct.weight_spec(args, 'group_0')

  @parameterized.parameters(
    ({'num_bits': 8, 'strategy': 'channel', 'dynamic': False}, 'static inputs'),
    ({'num_bits': 8, 'strategy': 'channel', 'dynamic': True}, 'dynamic inputs'),
  )
  def test_unreadable_inputs(self, args, message):
    with self.assertRaisesRegex(NotImplementedError, message):
      ct.input_spec(args, 'group_0')

  def test_dynamic_step_is_the_formats(self):
    args = {'num_bits': 8, 'strategy': 'token', 'dynamic': True}
    spec, static = ct.input_spec(args, 'w')
    self.assertFalse(static)
    x = jnp.array([[-3.0, 0.4, 2.0, 1.0]])
    scale, _ = qarray.find_params(x, spec)
    np.testing.assert_allclose(scale, [[3.0 / 127.5]], rtol=1e-6)
    np.testing.assert_array_equal(
      qarray.encode(x, scale, None, spec), [[-128, 17, 85, 42]]
    )

  @parameterized.parameters(
    (QuantSpec(dtype='int8', granularity='tensor'), None),
    (QuantSpec(dtype='int8', granularity='tensor', symmetric=False), 7),
    (QuantSpec(dtype='fp8_e4m3', granularity='tensor'), None),
    (QuantSpec(dtype='nvfp4'), None),
  )
  def test_static_inputs_round_trip(self, spec, zero):
    zero = None if zero is None else np.full((1, 1), zero, np.uint8)
    act = linear.ActQuant(np.full((1, 1), 0.25, np.float32), zero, spec)
    self.assertEqual(ct.why_not_input(act), '')
    got = ct.read_input(ct.write_input(act), ct.input_args(act), 'w')
    self.assertEqual(got.spec, spec)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(act), strict=True):
      np.testing.assert_array_equal(a, b)

  @parameterized.parameters(
    (QuantSpec(dtype='nf4'), 'weights are nf4'),
    (QuantSpec(dtype='binary'), 'weights are binary'),
    (QuantSpec(dtype='fp8_e5m2'), 'weights are fp8_e5m2; .* has int2 to int8'),
    (QuantSpec(dtype='int8', granularity='token'), 'one scale per input chan'),
    (
      QuantSpec(dtype='int8', granularity='tensor', symmetric=False),
      'zero point for the whole tensor',
    ),
  )
  def test_weights_the_format_has_not(self, spec, message):
    self.assertRegex(ct.why_not(spec), message)

  @parameterized.parameters(
    (None, QuantSpec(dtype='nvfp4'), 'no calibrated scale'),
    (None, QuantSpec(dtype='mxfp4'), "scale_rule='floor'; .*scheme MXFP4"),
    (None, QuantSpec(dtype='e3m2', granularity='token'), 'inputs are e3m2'),
    (1.0, QuantSpec(dtype='int8'), 'static inputs have one scale per channel'),
    (
      None,
      QuantSpec(dtype='int4', granularity='token'),
      'clipped by 1; .* has 0.933333 there: calibrate with --input_clip=0.933',
    ),
  )
  def test_inputs_the_format_has_not(self, scale, spec, message):
    scale = None if scale is None else np.ones((1, 4), np.float32)
    act = linear.ActQuant(scale, None, spec)
    self.assertRegex(ct.why_not_input(act), message)

  def test_inputs_of_other_kinds(self):
    codes = QuantSpec(dtype='int4', granularity='tensor', narrow=True)
    self.assertRegex(
      ct.why_not_input(linear.StepInput(codes)), 'codes of -7 to 7 .*one code'
    )
    hadamard = linear.OnlineHadamard(8)
    self.assertRegex(ct.why_not_input(hadamard), 'quantized by OnlineHadamard')

  def test_steps_are_a_static_scale_of_one(self):
    spec = QuantSpec(dtype='int8', granularity='tensor')
    step = linear.StepInput(spec)
    self.assertEqual(ct.why_not_input(step), '')
    act = ct.stored_input(step)
    self.assertEqual(act.spec, spec)
    x = np.random.default_rng(0).normal(scale=80, size=(4, 8))
    x = x.astype(np.float32)
    codes = step.codes(x)
    np.testing.assert_array_equal(matmul.fake_input(x, act), codes)
    tensors = ct.write_input(act)
    back = ct.read_input(tensors, ct.input_args(act), 'here')
    self.assertEqual(back.spec, spec)
    np.testing.assert_array_equal(matmul.fake_input(x, back), codes)


if __name__ == '__main__':
  absltest.main()
