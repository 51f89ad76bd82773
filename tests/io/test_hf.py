"""Hugging Face directories: the tensors, and every refusal."""

import pathlib
import tempfile

import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.io import hf
from tests.io import model_files

UP = 'model.layers.1.mlp.up_proj.weight'


class HfTestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = (
      pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / 'tiny'
    )

  def write(self, **kwargs):
    return model_files.write_hf(self.folder, **kwargs)


class ReadTest(HfTestCase):
  @parameterized.product(
    shards=(1, 3), dtype=(np.float32, np.float16, ml_dtypes.bfloat16)
  )
  def test_kernels_are_transposed_float32(self, shards, dtype):
    source = hf.HfSource(self.write(shards=shards, dtype=dtype))
    tensors = model_files.hf_tensors()
    kernel = source.block(1)['mlp']['up_proj']['kernel']
    self.assertEqual(kernel.dtype, np.float32)
    expected = tensors[UP].astype(dtype).astype(np.float32).T
    np.testing.assert_array_equal(kernel, expected)
    outside = source.outside()
    self.assertEqual(set(outside), {'embed', 'final_norm'})
    self.assertEqual(outside['embed']['embedding'].shape, (265 - 1, 32))

  def test_untied_head(self):
    config = model_files.CONFIG | {'tie_word_embeddings': False}
    tensors = model_files.hf_tensors(config)
    source = hf.HfSource(self.write(config=config, tensors=tensors))
    np.testing.assert_array_equal(
      source.outside()['head']['kernel'], tensors['lm_head.weight'].T
    )

  def test_a_tied_head_and_old_buffers_are_left_unread(self):
    extra = {
      'lm_head.weight': np.zeros((2, 2), np.float32),
      'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(4, np.float32),
    }
    source = hf.HfSource(self.write(tensors=extra))
    self.assertNotIn('head', source.outside())

  def test_nested_rope_parameters(self):
    rope = {'rope_type': 'default', 'rope_theta': 7.0}
    config = {'rope_parameters': rope, 'rope_theta': None, 'head_dim': None}
    source = hf.HfSource(self.write(config=config))
    self.assertEqual(source.config['rope_theta'], 7.0)
    self.assertEqual(source.config['head_dim'], 8)

  def test_fingerprint_follows_the_content_not_the_folder(self):
    first = hf.HfSource(self.write()).fingerprint()
    other = self.folder.parent / 'other'
    model_files.write_hf(other)
    self.assertEqual(hf.HfSource(other).fingerprint(), first)
    model_files.write_hf(other, config={'rope_theta': 1.0})
    self.assertNotEqual(hf.HfSource(other).fingerprint(), first)

  def test_tokenizer(self):
    tokenizer = hf.HfSource(self.write()).tokenizer()
    self.assertEqual(tokenizer.encode('hello').tokens, ['hello'])


class RefusalTest(HfTestCase):
  def test_the_configuration_is_checked(self):
    with self.assertRaisesRegex(
      NotImplementedError, "config.json: model_type 'gemma'; allowed are"
    ):
      hf.HfSource(self.write(config={'model_type': 'gemma'}))
    with self.assertRaisesRegex(
      ValueError, r"config.json: keys \['moe_layers'\] are not known"
    ):
      hf.HfSource(self.write(config={'moe_layers': 2}))

  @parameterized.parameters(
    ({'vocab_size': None}, 'vocab_size=None; it must be a positive integer'),
    ({'hidden_size': '32'}, "hidden_size='32'"),
    ({'num_key_value_heads': 3}, 'num_key_value_heads=3'),
    ({'num_attention_heads': 0}, 'num_attention_heads=0'),
  )
  def test_sizes(self, config, message):
    with self.assertRaisesRegex(ValueError, message):
      hf.HfSource(self.write(config=config))

  def test_config_file(self):
    with self.assertRaisesRegex(FileNotFoundError, 'config.json: no such'):
      hf.HfSource(self.folder)
    self.write()
    (self.folder / 'config.json').write_text('{"a":')
    with self.assertRaisesRegex(ValueError, 'config.json: is not JSON'):
      hf.HfSource(self.folder)
    (self.folder / 'config.json').write_text('[]')
    with self.assertRaisesRegex(ValueError, 'holds a list; a JSON object'):
      hf.HfSource(self.folder)

  def test_no_weights(self):
    (self.write() / 'model.safetensors').unlink()
    with self.assertRaisesRegex(FileNotFoundError, 'has neither model.safe'):
      hf.HfSource(self.folder)

  def test_truncated_file(self):
    path = self.write() / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-100])
    with self.assertRaisesRegex(
      ValueError, 'model.safetensors: is truncated or damaged'
    ):
      hf.HfSource(self.folder)

  def test_truncated_shard_is_named(self):
    path = self.write(shards=3) / 'model-00002-of-00003.safetensors'
    path.write_bytes(path.read_bytes()[:50])
    with self.assertRaisesRegex(ValueError, '00002-of-00003.*is truncated'):
      hf.HfSource(self.folder)

  def test_missing_shard_is_named(self):
    (self.write(shards=3) / 'model-00003-of-00003.safetensors').unlink()
    with self.assertRaisesRegex(
      FileNotFoundError, '1 of 3 shards are missing, first model-00003'
    ):
      hf.HfSource(self.folder)

  def test_index_without_map(self):
    self.write(shards=2)
    (self.folder / 'model.safetensors.index.json').write_text('{}')
    with self.assertRaisesRegex(ValueError, 'has no weight_map'):
      hf.HfSource(self.folder)

  def test_index_names_a_tensor_its_shard_lacks(self):
    self.write(shards=2)
    index = self.folder / 'model.safetensors.index.json'
    one, two = (f'model-0000{i}-of-00002.safetensors' for i in (1, 2))
    index.write_text(index.read_text().replace(one, two))
    with self.assertRaisesRegex(ValueError, 'is missing, though model.safe'):
      hf.HfSource(self.folder)

  def test_missing_extra_and_misshapen_tensors(self):
    with self.assertRaisesRegex(ValueError, rf"missing, first \['{UP}'\]"):
      hf.HfSource(self.write(tensors={UP: None}))
    extra = {'model.layers.0.self_attn.q_norm.weight': np.ones(8, np.float32)}
    with self.assertRaisesRegex(ValueError, 'not expected in a llama.*q_norm'):
      hf.HfSource(self.write(tensors=extra))
    with self.assertRaisesRegex(
      ValueError, r'up_proj.weight has shape \(2, 3\).*asks for \(64, 32\)'
    ):
      hf.HfSource(self.write(tensors={UP: np.ones((2, 3), np.float32)}))

  def test_integers_and_nan(self):
    source = hf.HfSource(self.write(tensors={UP: np.ones((64, 32), np.int8)}))
    with self.assertRaisesRegex(NotImplementedError, 'has dtype int8'):
      source.block(1)
    bad = np.full((64, 32), np.nan, np.float32)
    source = hf.HfSource(self.write(tensors={UP: bad}))
    with self.assertRaisesRegex(ValueError, f'{UP}: 2048 of 2048 values are'):
      source.block(1)

  def test_block_out_of_range(self):
    with self.assertRaisesRegex(ValueError, 'block -1 was asked'):
      hf.HfSource(self.write()).block(-1)


if __name__ == '__main__':
  absltest.main()
