"""Tests of jaxq.io.architectures: names, parts of tensors, and refusals."""

import numpy as np
from absl.testing import absltest, parameterized

from jaxq.io import architectures, hf_config

BASE = {
  'vocab_size': 20,
  'hidden_size': 8,
  'intermediate_size': 6,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 4,
  'max_position_embeddings': 5,
}


def config_of(model_type, **fields):
  config = {**BASE, 'model_type': model_type, **fields}
  if model_type == 'opt':
    config['num_key_value_heads'] = 4
    config['head_dim'] = 2
  return hf_config.read(config, 'here')


def entry(entries, path):
  return next(e for e in entries if '/'.join(e.path) == path)


def tensors(config, style):
  """Random tensors of a file."""
  rng = np.random.default_rng(0)
  return {
    name: rng.standard_normal(tensor.shape).astype(np.float32)
    for name, tensor in architectures.every_tensor(config, style).items()
  }


def tree(entries, files, style):
  params = {}
  for e in entries:
    tensor = getattr(e, style)
    leaf = tensor.leaf(files[tensor.name], e.shape)
    architectures.place(params, e, leaf, 'here')
  return params


class PlaceTest(parameterized.TestCase):
  def test_fused_tensors_are_split_by_rows(self):
    config = config_of('phi3')
    for style, names in (
      (
        'hf',
        (
          'model.layers.1.self_attn.qkv_proj',
          'model.layers.1.mlp.gate_up_proj',
        ),
      ),
      ('gguf', ('blk.1.attn_qkv', 'blk.1.ffn_up')),
    ):
      files = tensors(config, style)
      params = tree(architectures.block(config, 1), files, style)
      qkv, gate_up = (files[f'{name}.weight'] for name in names)
      parts = [params['attention'][f'{n}_proj']['kernel'].T for n in 'qkv']
      np.testing.assert_array_equal(np.concatenate(parts), qkv)
      self.assertEqual([len(part) for part in parts], [16, 8, 8])
      mlp = params['mlp']
      parts = [mlp[f'{n}_proj']['kernel'].T for n in ('gate', 'up')]
      np.testing.assert_array_equal(np.concatenate(parts), gate_up)

  def test_norms_of_gemma_are_shifted_in_one_format_only(self):
    for model_type in ('gemma2', 'gemma3_text'):
      config = config_of(model_type)
      names = {'hf': 'pre_feedforward_layernorm', 'gguf': 'ffn_norm'}
      prefixes = {'hf': 'model.layers.0', 'gguf': 'blk.0'}
      for style, plus in (('hf', 1), ('gguf', 0)):
        files = tensors(config, style)
        params = tree(architectures.block(config, 0), files, style)
        stored = files[f'{prefixes[style]}.{names[style]}.weight']
        np.testing.assert_array_equal(
          params['post_norm']['scale'], stored + np.float32(plus)
        )

  def test_positions_of_opt_lose_two_rows(self):
    config = config_of('opt')
    files = tensors(config, 'hf')
    params = tree(architectures.outside(config), files, 'hf')
    stored = files['model.decoder.embed_positions.weight']
    self.assertEqual(stored.shape, (7, 8))
    np.testing.assert_array_equal(params['embed']['positions'], stored[2:])
    self.assertIsNone(architectures.outside(config)[0].gguf)

  def test_experts_are_single_in_one_format_and_stacked_in_the_other(self):
    config = config_of('mixtral', num_local_experts=3)
    entries = architectures.block(config, 0)
    up = entry(entries, 'mlp/expert_2/up_proj/kernel')
    self.assertEqual(
      up.hf.name, 'model.layers.0.block_sparse_moe.experts.2.w3.weight'
    )
    self.assertEqual(up.gguf.shape, (3, 6, 8))
    files = tensors(config, 'gguf')
    params = tree(entries, files, 'gguf')
    np.testing.assert_array_equal(
      params['mlp']['expert_2']['up_proj']['kernel'],
      files['blk.0.ffn_up_exps.weight'][2].T,
    )

  def test_sparse_blocks(self):
    config = config_of('qwen3_moe', mlp_only_layers=[0])
    sparse = [architectures.is_sparse(config, i) for i in range(2)]
    self.assertEqual(sparse, [False, True])
    config = config_of('qwen3_moe', decoder_sparse_step=2)
    sparse = [architectures.is_sparse(config, i) for i in range(2)]
    self.assertEqual(sparse, [False, True])


class RefusalTest(parameterized.TestCase):
  def test_names_and_shapes(self):
    config = config_of('qwen2')
    names = list(architectures.every_tensor(config, 'hf'))
    architectures.check_names(names, config, 'hf', 'here')
    with self.assertRaisesRegex(
      ValueError, r"here: 1 tensors are missing, first \['lm_head.weight'\]"
    ):
      architectures.check_names(
        [n for n in names if n != 'lm_head.weight'], config, 'hf', 'here'
      )
    with self.assertRaisesRegex(
      ValueError, r"1 tensors are not expected in a qwen2 model, first \['z'\]"
    ):
      architectures.check_names([*names, 'z'], config, 'hf', 'here')
    tensor = architectures.every_tensor(config, 'hf')['lm_head.weight']
    with self.assertRaisesRegex(ValueError, r'has shape \(3,\); .*\(20, 8\)'):
      architectures.check_shape((3,), tensor, 'here')

  def test_blocks_and_values(self):
    config = config_of('llama')
    with self.assertRaisesRegex(ValueError, r'block 2 was asked.*0\.\.1'):
      architectures.check_block(2, config, 'here')
    e = architectures.block(config, 0)[0]
    with self.assertRaisesRegex(ValueError, '1 of 8 values are NaN'):
      architectures.place({}, e, np.array([np.nan] + [0.0] * 7), 'here')


if __name__ == '__main__':
  absltest.main()
