"""GGUF files written from float and from quantized models."""

import dataclasses
import os
import pathlib
import tempfile
from unittest import mock

import gguf as gguf_lib
import jax
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.io import checkpoint, gguf, gguf_export, hf
from jaxq.nn import linear, taps
from jaxq.numerics import binary, qarray
from jaxq.numerics import spec as spec_lib
from tests.io import ggml, model_files
from tests.numerics import test_binary

Q4_0 = gguf_export.GgufExportConfig(type='Q4_0', rest='F32')
INT4 = spec_lib.QuantSpec(dtype='int4', granularity='group', group_size=32)
UP = 'mlp/up_proj/kernel'


def quantize(params, spec, float_paths=()):
  """Every kernel of a block's parameters as a QArray."""
  out = {}
  for path, leaf in taps.leaves(params):
    name = path if isinstance(path, str) else '/'.join(path)
    if name.endswith('kernel') and name not in float_paths:
      leaf = jax.tree.map(np.asarray, qarray.quantize(leaf, spec))
    out = taps.set_path(out, path, leaf)
  return out


def write_jaxq(source, folder, spec, *, float_paths=(), quant=None):
  """A finished jaxq directory; returns it opened."""
  with checkpoint.Writer(folder, {'run': 'test'}) as writer:
    writer.save_outside(source.outside())
    for i in range(source.config['num_hidden_layers']):
      params = quantize(source.block(i), spec, float_paths)
      writer.save_block(i, {'params': params, 'quant': quant or {}})
    writer.finish(
      {
        'model': {'family': 'decoder', 'config': source.config},
        'quantization': {'scheme': 'test'},
      },
      source.tokenizer().to_str(),
    )
  return checkpoint.open_checkpoint(folder)


class ExportTestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.path = self.folder / 'out.gguf'

  def hf(self, **kwargs):
    return hf.HfSource(model_files.write_hf(self.folder / 'hf', **kwargs))

  def jaxq(self, spec, **kwargs):
    return write_jaxq(self.hf(), self.folder / 'jaxq', spec, **kwargs)


class EncodeTest(parameterized.TestCase):
  @parameterized.parameters('Q4_0', 'Q8_0')
  def test_a_block_by_hand(self, kind):
    codes = np.arange(-8, 8, dtype=np.int8).repeat(2)[:, None]  # (32, 1)
    bits = gguf_export.TYPES[kind]
    spec = spec_lib.QuantSpec(
      dtype=f'int{bits}', granularity='group', group_size=32
    )
    q = qarray.from_codes(codes, np.full((1, 1), 0.5, np.float32), None, spec)
    data, change = gguf_export.encode(q, kind)
    self.assertEqual(data.shape, (1, ggml.TYPES[kind][1]))
    self.assertEqual(change, 0.0)
    values = ggml.dequantize(bytes(data[0]), kind)
    np.testing.assert_array_equal(values, 0.5 * codes[:, 0])

  @parameterized.product(
    fields=(
      {'granularity': 'group', 'group_size': 32},
      {'granularity': 'group', 'group_size': 64},
      {'granularity': 'channel'},
      {'granularity': 'tensor'},
    ),
    dtype=('int3', 'int8'),
  )
  def test_integers_are_kept_and_steps_rounded_to_float16(self, fields, dtype):
    w = np.random.default_rng(0).standard_normal((128, 3)).astype(np.float32)
    q = qarray.quantize(w, spec_lib.QuantSpec(dtype=dtype, **fields))
    kind = 'Q8_0' if dtype == 'int8' else 'Q4_0'
    self.assertEqual(gguf_export.misfit(q, kind), '')
    data, change = gguf_export.encode(q, kind)
    step = np.asarray(q.scale).astype(np.float16).astype(np.float32)
    step = np.repeat(step, 128 // step.shape[0], axis=0)
    enum = gguf_lib.GGMLQuantizationType[kind]
    np.testing.assert_array_equal(
      gguf_lib.quants.dequantize(data, enum).T,
      np.asarray(qarray.codes(q)) * step,
    )
    self.assertLessEqual(change, 2**-11)  # Half a step of float16.

  @parameterized.parameters(
    ({'dtype': 'int8'}, 'it has 8 bits'),
    ({'dtype': 'int4', 'symmetric': False}, 'it is asymmetric'),
    ({'dtype': 'nf4'}, 'it holds nf4, not integers'),
    ({'dtype': 'int4', 'granularity': 'token'}, 'belong to rows of K'),
    (
      {'dtype': 'int4', 'granularity': 'group', 'group_size': 16},
      'groups of 16 are no multiple of 32',
    ),
  )
  def test_misfits(self, fields, reason):
    q = qarray.quantize(
      np.ones((64, 2), np.float32), spec_lib.QuantSpec(**fields)
    )
    self.assertIn(reason, gguf_export.misfit(q, 'Q4_0'))

  def test_rows_that_make_no_blocks(self):
    spec = spec_lib.QuantSpec(dtype='int8')
    q = qarray.quantize(np.ones((48, 2), np.float32), spec)
    self.assertIn('K=48 is no multiple', gguf_export.misfit(q, 'Q8_0'))

  @parameterized.parameters(1e6, 1e-9)
  def test_steps_beyond_float16(self, step):
    spec = spec_lib.QuantSpec(dtype='int8')
    codes = np.ones((32, 1), np.int8)
    scale = np.full((1, 1), step, np.float32)
    q = qarray.from_codes(codes, scale, None, spec)
    with self.assertRaisesRegex(ValueError, 'ends at 65504 and 6e-8'):
      gguf_export.encode(q, 'Q8_0')

  def test_interleave_inverts_half_split(self):
    w = np.arange(48).reshape(16, 3)
    np.testing.assert_array_equal(gguf.half_split(gguf.interleave(w, 2), 2), w)


class FloatSourceTest(ExportTestCase):
  @parameterized.product(kind=('Q4_0', 'Q8_0'), rest=gguf_export.REST_TYPES)
  def test_reads_back_as_the_package_rounds(self, kind, rest):
    source = self.hf()
    config = gguf_export.GgufExportConfig(type=kind, rest=rest)
    summary = gguf_export.export(source, self.path, config)
    back = gguf.GgufSource(self.path)
    enum = gguf_lib.GGMLQuantizationType[kind]

    def rounded(kernel, enum=enum):
      raw = gguf_lib.quants.quantize(np.ascontiguousarray(kernel.T), enum)
      return gguf_lib.quants.dequantize(raw, enum).T

    for i in range(2):
      theirs = dict(taps.leaves(source.block(i)))
      for path, leaf in taps.leaves(back.block(i)):
        expected = theirs.pop(path)
        if expected.ndim == 2:
          expected = rounded(expected)
        np.testing.assert_array_equal(leaf, expected, str(path))
      self.assertEmpty(theirs)
    embedding = source.outside()['embed']['embedding']
    enum = gguf_lib.GGMLQuantizationType[rest]
    np.testing.assert_array_equal(
      back.outside()['embed']['embedding'], rounded(embedding.T, enum).T
    )
    self.assertEqual(summary.exact, 0)
    self.assertEqual(summary.nbytes, self.path.stat().st_size)
    self.assertEqual(summary.counts[kind], 14 + (kind == rest))

  def test_config_tokenizer_and_the_packages_reader(self):
    source = self.hf()
    gguf_export.export(source, self.path, Q4_0)
    back = gguf.GgufSource(self.path)
    for key, value in source.config.items():
      if isinstance(value, float):
        self.assertAlmostEqual(back.config[key], value, 5)
      else:
        self.assertEqual(back.config[key], value, key)
    text = 'hello world 1860<user> été'
    self.assertEqual(
      back.tokenizer().encode(text).ids, source.tokenizer().encode(text).ids
    )
    reader = gguf_lib.GGUFReader(self.path)
    self.assertEqual(reader.fields['general.file_type'].contents(), 2)
    self.assertEqual(reader.fields['general.name'].contents(), 'out')
    self.assertLen(reader.tensors, 20)

  def test_same_bytes_again(self):
    source = self.hf()
    gguf_export.export(source, self.path, Q4_0)
    first = self.path.read_bytes()
    gguf_export.export(source, self.path, Q4_0)
    self.assertEqual(self.path.read_bytes(), first)

  def test_nothing_is_left_of_a_failure(self):
    with mock.patch.object(os, 'replace', side_effect=OSError('disk')):
      with self.assertRaisesRegex(OSError, 'disk'):
        gguf_export.export(self.hf(), self.path, Q4_0)
    self.assertEqual([p.name for p in self.folder.iterdir()], ['hf'])

  def test_values_beyond_float16(self):
    big = {
      'model.embed_tokens.weight': np.full(
        (len(model_files.TOKENS), 32), 1e5, np.float32
      )
    }
    source = self.hf(tensors=big)
    with self.assertRaisesRegex(ValueError, 'reaches 100000; F16 ends.*BF16'):
      gguf_export.export(source, self.path, gguf_export.GgufExportConfig())


class QuantizedSourceTest(ExportTestCase):
  @parameterized.parameters(
    ('Q4_0', 'int4'), ('Q8_0', 'int8'), ('Q8_0', 'int4')
  )
  def test_integers_are_exact(self, kind, dtype):
    spec = spec_lib.QuantSpec(dtype=dtype, granularity='group', group_size=32)
    source = self.jaxq(spec)
    config = gguf_export.GgufExportConfig(type=kind, rest='F32')
    summary = gguf_export.export(source, self.path, config)
    self.assertEqual(summary.exact, 14)
    self.assertRegex(
      str(summary), r'14 Q._0; 14 linears with their integers unchanged'
    )
    back = gguf.GgufSource(self.path)
    for i in range(2):
      block = dict(taps.leaves(back.block(i)))
      for path, leaf in taps.leaves(source.block(i)['params']):
        if isinstance(leaf, qarray.QArray):
          step = leaf.scale.astype(np.float16).astype(np.float32)
          leaf = np.asarray(qarray.codes(leaf)) * np.repeat(step, 32, axis=0)
        np.testing.assert_array_equal(block[path], leaf, str(path))

  def test_a_step_beyond_float16_names_the_tensor(self):
    source = self.jaxq(INT4)
    block = source.block(0)
    q = block['params']['mlp']['up_proj']['kernel']
    huge = dataclasses.replace(q, scale=np.asarray(q.scale) * 1e9)
    block['params']['mlp']['up_proj']['kernel'] = huge
    with (
      mock.patch.object(source, 'block', return_value=block),
      self.assertRaisesRegex(ValueError, 'tensor blk.0.ffn_up.weight has scal'),
    ):
      gguf_export.export(source, self.path, Q4_0)

  def test_linears_left_float_stay_so(self):
    source = self.jaxq(INT4, float_paths=(UP,))
    summary = gguf_export.export(source, self.path, Q4_0)
    self.assertEqual(summary.counts['Q4_0'], 12)
    back = gguf.GgufSource(self.path)
    self.assertEqual(back.tensors['blk.0.ffn_up.weight'].type, 'F32')
    np.testing.assert_array_equal(
      back.block(0)['mlp']['up_proj']['kernel'],
      self.hf().block(0)['mlp']['up_proj']['kernel'],
    )

  @parameterized.parameters(
    ({'dtype': 'int8'}, r'it has 8 bits.*Export as Q8_0, which it fits'),
    (
      {'dtype': 'int4', 'symmetric': False},
      'it is asymmetric.*Calibrate again with symmetric int4 and group_size=32',
    ),
  )
  def test_what_does_not_fit_names_linear_reason_and_remedy(
    self, fields, message
  ):
    source = self.jaxq(spec_lib.QuantSpec(**fields))
    with self.assertRaisesRegex(
      NotImplementedError, rf'block 0: attention/\w_proj/kernel.*{message}'
    ):
      gguf_export.export(source, self.path, Q4_0)
    self.assertFalse(self.path.exists())

  def test_quantized_inputs_and_rotations(self):
    act = linear.ActQuant(
      scale=np.ones((1, 1), np.float32),
      zero_point=None,
      spec=spec_lib.QuantSpec(dtype='int8', granularity='tensor'),
    )
    source = self.jaxq(INT4, quant={'mlp': {'up_proj': {'input': act}}})
    with self.assertRaisesRegex(
      NotImplementedError, 'block 0 has ActQuant at mlp/up_proj/input.*W4A16'
    ):
      gguf_export.export(source, self.path, Q4_0)


class RefusalTest(ExportTestCase):
  def test_signs_beside_rows_in_more_bits(self):
    source = self.jaxq(INT4)
    block = source.block(0)
    packed = binary.pack(**test_binary.parts())
    block['params']['attention']['q_proj']['kernel'] = packed
    with (
      mock.patch.object(source, 'block', return_value=block),
      self.assertRaisesRegex(NotImplementedError, 'q_proj.*signs.*one type'),
    ):
      gguf_export.export(source, self.path, Q4_0)

  def test_config(self):
    with self.assertRaisesRegex(ValueError, r"type='Q4_K'; allowed \['Q4_0'"):
      gguf_export.GgufExportConfig(type='Q4_K')
    with self.assertRaisesRegex(ValueError, r"rest='Q4_0'; allowed \['BF16'"):
      gguf_export.GgufExportConfig(rest='Q4_0')

  def test_another_family(self):
    source = mock.Mock(family='vit')
    with self.assertRaisesRegex(NotImplementedError, "of the family 'vit'"):
      gguf_export.export(source, self.path, Q4_0)

  def test_rows_that_make_no_blocks(self):
    config = model_files.CONFIG | {'intermediate_size': 48}
    tensors = model_files.hf_tensors(config)
    source = self.hf(config={'intermediate_size': 48}, tensors=tensors)
    with self.assertRaisesRegex(
      ValueError, 'block 0: mlp/down_proj/kernel has K=48; Q4_0 needs a multi'
    ):
      gguf_export.export(source, self.path, Q4_0)


if __name__ == '__main__':
  absltest.main()
