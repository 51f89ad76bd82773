"""Tests of jaxq.numerics.spec."""

import json

from absl.testing import absltest, parameterized

from jaxq.numerics import spec

QuantSpec = spec.QuantSpec


class QuantSpecTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(dtype='int4'), 4, -8, 7, 'int8', 'float32'),
    (dict(dtype='int8', narrow=True), 8, -127, 127, 'int8', 'float32'),
    (dict(dtype='int3', symmetric=False), 3, 0, 7, 'uint8', 'float32'),
    (dict(dtype='binary'), 1, -1, 1, 'int8', 'float32'),
    (dict(dtype='fp8_e4m3'), 8, -448, 448, 'float8_e4m3fn', 'float32'),
    (dict(dtype='fp8_e5m2'), 8, -57344, 57344, 'float8_e5m2', 'float32'),
    (dict(dtype='fp4_e2m1'), 4, -6, 6, 'uint8', 'float32'),
    (dict(dtype='e3m2'), 6, -28, 28, 'uint8', 'float32'),
    (dict(dtype='mxfp4'), 4, -6, 6, 'uint8', 'float8_e8m0fnu'),
    (dict(dtype='mxfp8'), 8, -448, 448, 'float8_e4m3fn', 'float8_e8m0fnu'),
    (dict(dtype='nvfp4'), 4, -6, 6, 'uint8', 'float8_e4m3fn'),
    (dict(dtype='nf4'), 4, -1, 1, 'uint8', 'float32'),
  )
  def test_properties(self, fields, bits, qmin, qmax, code, scale):
    s = QuantSpec(**fields)
    self.assertEqual((s.bits, s.qmin, s.qmax), (bits, qmin, qmax))
    self.assertEqual((s.code_dtype, s.stored_scale_dtype), (code, scale))

  def test_block_formats_bring_their_group_size(self):
    for dtype, size in (('mxfp4', 32), ('nvfp4', 16), ('nf4', 64)):
      s = QuantSpec(dtype=dtype)
      self.assertEqual((s.granularity, s.group_size), ('group', size))
    self.assertEqual(QuantSpec(dtype='int4').granularity, 'channel')
    self.assertEqual(QuantSpec(dtype='nf4', granularity='tensor').bits, 4)

  @parameterized.parameters(
    dict(dtype='int4', granularity='group', group_size=64, symmetric=False),
    dict(dtype='mxfp4', scale_rule='ceil'),
    dict(dtype='e2m2', clip=0.9, scale_dtype='bfloat16'),
  )
  def test_json_round_trip_equality_and_hash(self, **fields):
    s = QuantSpec(**fields)
    back = QuantSpec.from_dict(json.loads(json.dumps(s.to_dict())))
    self.assertEqual(back, s)
    self.assertEqual(hash(back), hash(s))

  @parameterized.parameters(
    (dict(dtype='int9'), r'bits=9\); allowed int2..int8.*symmetric=False'),
    (dict(dtype='int1'), r"bits=1\); allowed int2..int8. Use 'binary'"),
    (dict(dtype='uint4'), r'symmetric=False for unsigned'),
    (dict(dtype='fp3'), r"'fp3'; allowed \['binary', 'eXmY', 'fp4_e2m1'.*Use"),
    (dict(dtype='e5m10'), r'bits = 1 \+ X \+ Y <= 8'),
    (dict(dtype='int4', granularity='row'), r"\['channel', 'group', 'tensor'"),
    (dict(dtype='int4', granularity='group'), r'group_size=-1; .*such as 64'),
    (dict(dtype='int4', group_size=64), r"belongs to granularity='group'"),
    (dict(dtype='mxfp4', group_size=64), r'has groups of 32. Leave both out'),
    (dict(dtype='nvfp4', granularity='channel'), r'has groups of 16'),
    (dict(dtype='int4', clip=0.0), r'clip=0.0; allowed 0 < clip <= 1. Use'),
    (dict(dtype='int4', clip=1.5), r'clip=1.5; allowed 0 < clip <= 1'),
    (dict(dtype='fp8_e4m3', symmetric=False), r'only int2..int8 have a zero'),
    (dict(dtype='int4', symmetric=False, narrow=True), r'Use narrow=False'),
    (dict(dtype='int4', scale_dtype='int8'), r"\['bfloat16', 'float16', 'fl"),
    (dict(dtype='mxfp4', scale_rule='up'), r"'up'; allowed \['ceil', 'floor'"),
    (dict(dtype='mxfp4', scale_rule='half'), r"'half' is for symmetric int2"),
    (dict(dtype='int4', scale_rule='round'), r'it is for the mx formats'),
  )
  def test_messages(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      QuantSpec(**fields)

  def test_messages_of_kinds_and_dictionaries(self):
    with self.assertRaisesRegex(TypeError, 'dtype=4 is a int; allowed the na'):
      QuantSpec(dtype=4)
    with self.assertRaisesRegex(ValueError, r"\['bits'\]; allowed \['clip'"):
      QuantSpec.from_dict({'dtype': 'int4', 'bits': 4})
    with self.assertRaisesRegex(ValueError, 'dtype is needed. Add one of'):
      QuantSpec.from_dict({'clip': 0.9})


if __name__ == '__main__':
  absltest.main()
