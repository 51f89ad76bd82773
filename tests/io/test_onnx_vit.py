"""Tests of jaxq.io.onnx_vit: the same weights as from a directory."""

import pathlib
import tempfile

import jax
import numpy as np
from absl.testing import absltest

from jaxq.io import dinov2, onnx_vit, sources
from tests.io import encoder_files, onnx_files


class OnnxVitTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.path = self.folder / 'model.onnx'

  def test_equals_the_directory(self):
    self.path.write_bytes(onnx_files.vit(encoder_files.DINOV2))
    expected = dinov2.Dinov2Source(
      encoder_files.write_dinov2(self.folder / 'hf')
    )
    self.assertEqual(sources.kind(str(self.path)), 'onnx')
    source = sources.open_source(str(self.path))
    self.assertEqual(source.config, expected.config)
    jax.tree.map(
      np.testing.assert_array_equal, source.outside(), expected.outside()
    )
    for i in range(2):
      jax.tree.map(
        np.testing.assert_array_equal, source.block(i), expected.block(i)
      )
    self.assertEqual(source.output_name(), 'features')
    self.assertIsNone(source.tokenizer())
    self.assertLen(source.fingerprint(), 64)

  def test_other_graphs_are_refused(self):
    whole = onnx_files.vit(encoder_files.DINOV2)
    for old, new, message in (
      (b'layernorm.weight', b'layernorm.weighs', r'no tensor \.\.\.layernorm'),
      (b'cls_token', b'cls_tokem', 'has no tensor backbone.embeddings.cls'),
      (b'Erf', b'Erg', 'has no exact GELU'),
      (b'Reshape', b'Reshaqe', 'into how many heads'),
      (b'LayerNormalization', b'LayerNormalizatiom', 'the epsilon of its norm'),
      (b'fc1.bias', b'fc1.biat', 'has no tensor.*fc1.bias'),
    ):
      self.path.write_bytes(whole.replace(old, new))
      with self.assertRaisesRegex(ValueError, message):
        onnx_vit.OnnxVitSource(self.path)
    config = encoder_files.DINOV2 | {'image_size': 4}
    self.path.write_bytes(onnx_files.vit(config))
    with self.assertRaisesRegex(
      ValueError, r"tables of positions \['onnx::Concat_1', 'onnx::Res"
    ):
      onnx_vit.OnnxVitSource(self.path)
    self.path.write_bytes(onnx_files.model([], {}))
    with self.assertRaisesRegex(ValueError, 'allowed are exports of vision'):
      onnx_vit.OnnxVitSource(self.path)
    self.path.write_bytes(whole)
    with self.assertRaisesRegex(ValueError, r'block 2 .*0\.\.1'):
      onnx_vit.OnnxVitSource(self.path).block(2)


if __name__ == '__main__':
  absltest.main()
