"""Tests of jaxq.io.ctranslate2: the format, parts, and damaged files."""

import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from jaxq.io import ctranslate2, hf_whisper
from jaxq.nn import taps
from tests.io import whisper_files

HALF = np.float16


class CTranslate2Test(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def write(self, **arguments):
    return whisper_files.write_ctranslate2(self.folder / 'ct2', **arguments)

  def test_a_file_written_by_hand(self):
    variables = {
      'a': np.arange(6, dtype=HALF).reshape(2, 3),
      'b/flag': np.array(7, np.int8),
      'decoder/embeddings/weight': np.ones((1, 2), np.float32),
    }
    reader = ctranslate2.Reader(self.write(variables=variables))
    self.assertEqual(reader.name, 'WhisperSpec')
    self.assertEqual(reader.revision, 3)
    for name, array in variables.items():
      got = reader.read(name)
      self.assertEqual(got.dtype, array.dtype)
      np.testing.assert_array_equal(got, array)
    alias = reader.read('decoder/projection/weight')
    np.testing.assert_array_equal(alias, np.ones((1, 2)))

  @parameterized.parameters(2, 3, 1000)
  def test_parts_are_one_file(self, parts):
    variables = whisper_files.ctranslate2_variables()
    reader = ctranslate2.Reader(self.write(parts=parts))
    for name, array in variables.items():
      np.testing.assert_array_equal(reader.read(name), array)

  @parameterized.parameters((np.float32, 0.0), (HALF, 1e-3))
  def test_same_parameters_as_hugging_face(self, dtype, atol):
    # float16 has 11 bits: a weight of about 1 is off by 2^-11 at most.
    variables = whisper_files.ctranslate2_variables(dtype=dtype)
    got = ctranslate2.CTranslate2Source(self.write(variables=variables))
    hf = whisper_files.write_hf(self.folder / 'hf')
    want = hf_whisper.HfWhisperSource(hf)
    self.assertEqual(
      {k: v for k, v in got.config.items() if k in want.config}, want.config
    )
    pairs = [(got.outside(), want.outside())]
    pairs += [(got.block(i), want.block(i)) for i in range(5)]
    for ours, theirs in pairs:
      ours, theirs = dict(taps.leaves(ours)), dict(taps.leaves(theirs))
      self.assertEqual(set(ours), set(theirs))
      for path, leaf in ours.items():
        self.assertEqual(leaf.dtype, np.float32)
        np.testing.assert_allclose(leaf, theirs[path], atol=2 * atol, rtol=atol)

  def test_fingerprint_is_of_content(self):
    a = ctranslate2.CTranslate2Source(self.write())
    b = whisper_files.write_ctranslate2(self.folder / 'other')
    b = ctranslate2.CTranslate2Source(b)
    self.assertEqual(a.fingerprint(), b.fingerprint())
    variables = whisper_files.ctranslate2_variables()
    variables['decoder/layer_norm/beta'] += HALF(1)
    c = ctranslate2.CTranslate2Source(self.write(variables=variables))
    self.assertNotEqual(c.fingerprint(), b.fingerprint())

  def test_absent(self):
    with self.assertRaisesRegex(FileNotFoundError, 'no model.bin and no'):
      ctranslate2.Reader(self.folder)

  def test_truncated(self):
    path = self.write() / 'model.bin'
    path.write_bytes(path.read_bytes()[:-5000])
    with self.assertRaisesRegex(ValueError, r'ends within .*Fetch it again'):
      ctranslate2.CTranslate2Source(path.parent)

  def test_missing_part(self):
    folder = self.write(parts=3)
    (folder / 'model.bin.part3').unlink()
    with self.assertRaisesRegex(ValueError, 'in 2 files.*Fetch it again'):
      ctranslate2.CTranslate2Source(folder)

  def test_garbage(self):
    path = self.write() / 'model.bin'
    path.write_bytes(b'\6\0\0\0' + b'\xff' * 100)
    with self.assertRaisesRegex(ValueError, 'damaged or no CTranslate2 model'):
      ctranslate2.CTranslate2Source(path.parent)

  @parameterized.parameters(
    ({'version': 2}, r'version 2 .*allowed are \[5, 6\]'),
    ({'name': 'TransformerSpec'}, 'is a TransformerSpec .*allowed is Whisper'),
  )
  def test_other_files(self, arguments, message):
    with self.assertRaisesRegex(NotImplementedError, message):
      ctranslate2.CTranslate2Source(self.write(**arguments))

  def test_quantized_file(self):
    variables = whisper_files.ctranslate2_variables()
    name = 'encoder/layer_0/ffn/linear_0/weight'
    variables[name] = np.ones(variables[name].shape, np.int8)
    with self.assertRaisesRegex(NotImplementedError, 'is int8; .*quantization'):
      ctranslate2.CTranslate2Source(self.write(variables=variables))

  def test_flag_that_changes_the_maths(self):
    variables = whisper_files.ctranslate2_variables()
    variables['decoder/scale_embeddings'] = np.array(1, np.int8)
    with self.assertRaisesRegex(NotImplementedError, 'scale_embeddings=1 chan'):
      ctranslate2.CTranslate2Source(self.write(variables=variables))

  def test_missing_tensor_is_named(self):
    variables = whisper_files.ctranslate2_variables()
    del variables['decoder/layer_1/attention/linear_1/bias']
    with self.assertRaisesRegex(
      ValueError, r"1 tensors are missing, first \['decoder/layer_1/attention"
    ):
      ctranslate2.CTranslate2Source(self.write(variables=variables))

  def test_block_out_of_range(self):
    source = ctranslate2.CTranslate2Source(self.write())
    with self.assertRaisesRegex(ValueError, r'block 5 .*allowed are 0\.\.4'):
      source.block(5)


if __name__ == '__main__':
  absltest.main()
