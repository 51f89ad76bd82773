"""BERT and Dinov2 directories: what is read, and what is refused."""

import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from jaxq.io import bert, dinov2, sources
from tests.io import encoder_files


class EncoderSourceTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def write(self, config, tensors):
    return encoder_files.write(self.folder / 'model', config, tensors)

  def test_norms_are_dealt_out_to_blocks(self):
    path = encoder_files.write_bert(self.folder)
    tensors = encoder_files.bert_tensors(encoder_files.BERT)
    source = sources.open_source(str(path))
    self.assertIsInstance(source, bert.BertSource)
    first, last = source.block(0), source.block(1)
    for params, name in (
      (first['input_norm'], 'embeddings.LayerNorm'),
      (first['post_norm'], 'encoder.layer.0.attention.output.LayerNorm'),
      (last['input_norm'], 'encoder.layer.0.output.LayerNorm'),
      (source.outside()['final_norm'], 'encoder.layer.1.output.LayerNorm'),
    ):
      np.testing.assert_array_equal(params['scale'], tensors[f'{name}.weight'])
      np.testing.assert_array_equal(params['bias'], tensors[f'{name}.bias'])
    kernel = tensors['encoder.layer.1.intermediate.dense.weight'].T
    np.testing.assert_array_equal(last['mlp']['up_proj']['kernel'], kernel)
    np.testing.assert_array_equal(first['mlp_shortcut']['scale'], np.ones(16))
    self.assertEqual(source.tokenizer().get_vocab_size(), 14)

  def test_prefix_pooler_and_half_precision(self):
    config = encoder_files.BERT
    tensors = encoder_files.bert_tensors(config)
    path = encoder_files.write(self.folder / 'a', config, tensors)
    plain = bert.BertSource(path).block(0)
    named = {f'bert.{k}': v.astype(np.float16) for k, v in tensors.items()}
    named['bert.pooler.dense.weight'] = np.zeros((16, 16), np.float32)
    named['cls.predictions.bias'] = np.zeros(32, np.float32)
    other = bert.BertSource(self.write(config, named)).block(0)
    got = other['attention']['q_proj']['kernel']
    self.assertEqual(got.dtype, np.float32)
    # Half precision keeps 11 bits.
    np.testing.assert_allclose(
      got, plain['attention']['q_proj']['kernel'], rtol=1e-3
    )

  def test_patches_and_positions(self):
    path = encoder_files.write_dinov2(self.folder)
    source = sources.open_source(str(path))
    self.assertIsInstance(source, dinov2.Dinov2Source)
    self.assertIsNone(source.tokenizer())
    outside = source.outside()
    self.assertEqual(outside['positions']['embedding'].shape, (26, 16))
    self.assertEqual(outside['class_token']['embedding'].shape, (1, 16))
    kernel = outside['patches']['kernel']  # (P * P * 3, C)
    tensors = encoder_files.dinov2_tensors(encoder_files.DINOV2)
    weight = tensors['embeddings.patch_embeddings.projection.weight']
    row = (2 * 4 + 1) * 3 + 2  # Pixel (2, 1), channel 2.
    np.testing.assert_array_equal(kernel[row], weight[:, 2, 2, 1])

  def test_fingerprint_is_of_the_content(self):
    a = bert.BertSource(encoder_files.write_bert(self.folder / 'a'))
    b = bert.BertSource(encoder_files.write_bert(self.folder / 'b'))
    self.assertEqual(a.fingerprint(), b.fingerprint())
    c = encoder_files.write_bert(self.folder / 'c', layer_norm_eps=1e-6)
    self.assertNotEqual(a.fingerprint(), bert.BertSource(c).fingerprint())

  @parameterized.parameters(
    ({'position_embedding_type': 'relative_key'}, NotImplementedError, 'maths'),
    (
      {'is_decoder': True},
      NotImplementedError,
      r'is_decoder=True.*\[False, None\]',
    ),
    ({'new_gate': 3}, ValueError, r"keys \['new_gate'\] are not known"),
    ({'hidden_size': 0}, ValueError, 'hidden_size=0; it must be a positive'),
    ({'num_hidden_layers': 3}, ValueError, '16 tensors are missing, first'),
    ({'num_hidden_layers': 1}, ValueError, '16 tensors are not expected'),
    ({'intermediate_size': 64}, ValueError, r'\(32, 16\);.*for \(64, 16\)'),
  )
  def test_refused_configurations(self, overrides, error, message):
    tensors = encoder_files.bert_tensors(encoder_files.BERT)
    path = self.write({**encoder_files.BERT, **overrides}, tensors)
    with self.assertRaisesRegex(error, message):
      bert.BertSource(path)

  def test_refused_files(self):
    path = encoder_files.write_bert(self.folder)
    source = bert.BertSource(path)
    with self.assertRaisesRegex(ValueError, r'block 2 was.*0\.\.1'):
      source.block(2)
    tensors = encoder_files.bert_tensors(encoder_files.BERT)
    name = 'encoder.layer.0.output.dense.weight'
    tensors[name] = tensors[name].astype(np.int8)
    with self.assertRaisesRegex(NotImplementedError, f'{name} has dtype I8'):
      bert.BertSource(self.write(encoder_files.BERT, tensors))
    weights = path / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:100])
    with self.assertRaisesRegex(ValueError, 'truncated or damaged'):
      bert.BertSource(path)
    weights.unlink()
    with self.assertRaisesRegex(FileNotFoundError, 'one safetensors file'):
      bert.BertSource(path)
    (path / 'config.json').write_text('{')
    with self.assertRaisesRegex(ValueError, 'is not JSON'):
      bert.BertSource(path)
    (path / 'config.json').unlink()
    with self.assertRaisesRegex(FileNotFoundError, 'no such file'):
      bert.BertSource(path)

  def test_swiglu_is_refused(self):
    config = {**encoder_files.DINOV2, 'use_swiglu_ffn': True}
    tensors = encoder_files.dinov2_tensors(config)
    with self.assertRaisesRegex(NotImplementedError, 'use_swiglu_ffn=True'):
      dinov2.Dinov2Source(self.write(config, tensors))


if __name__ == '__main__':
  absltest.main()
