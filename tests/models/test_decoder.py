"""Tests of models.decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec

from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from models import decoder

CONFIG = decoder.DecoderConfig(
  vocab_size=64,
  hidden_size=32,
  intermediate_size=64,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
)


def parts(config=CONFIG, seed=0):
  """Outside params and a list of block variables, random."""
  module = decoder.Decoder(config)
  params = module.init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))
  params = params['params']
  outside = {k: v for k, v in params.items() if not k.startswith('blocks')}
  blocks = [
    {'params': jax.tree.map(lambda a, i=i: a[i], params['blocks_0'])}
    for i in range(config.num_layers)
  ]
  return outside, blocks


class DecoderTest(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_scan_equals_block_by_block(self, tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    outside, blocks = parts(config)
    self.assertEqual('head' in outside, not tied)
    variables, runs = decoder.stack(outside, blocks)
    self.assertEqual(runs, (3,))
    module = decoder.Decoder(config, runs)
    tokens = jnp.array([[1, 5, 9, 63]])
    logits, _ = module.apply(variables, tokens)
    x = module.apply(variables, tokens, method='embed_tokens')
    spec = decoder.block_spec(config)
    for block in blocks:
      x = spec.apply({**block, 'quant': {}}, x)
    expected = module.apply(variables, x, method='logits')
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    self.assertEqual(logits.dtype, jnp.float32)

  def test_blocks_of_other_structure_form_runs(self):
    outside, blocks = parts()
    spec = spec_lib.QuantSpec(dtype='int8')
    kernel = blocks[1]['params']['mlp']['down_proj']['kernel']
    blocks[1]['params']['mlp']['down_proj']['kernel'] = qarray.quantize(
      kernel, spec
    )
    variables, runs = decoder.stack(outside, blocks)
    self.assertEqual(runs, (1, 1, 1))
    tokens = jnp.array([[1, 5, 9, 63]])
    logits, _ = decoder.Decoder(CONFIG, runs).apply(variables, tokens)
    blocks[1]['params']['mlp']['down_proj']['kernel'] = qarray.dequantize(
      qarray.quantize(kernel, spec)
    )
    float_variables, _ = decoder.stack(outside, blocks)
    expected, _ = decoder.Decoder(CONFIG).apply(float_variables, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-5)

  def test_decode_with_cache_equals_the_whole_sequence(self):
    outside, blocks = parts()
    variables, runs = decoder.stack(outside, blocks)
    module = decoder.Decoder(CONFIG, runs)
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 64)
    expected, _ = module.apply(variables, tokens)
    caches = decoder.init_caches(CONFIG, runs, 2, 16)
    positions = jnp.broadcast_to(jnp.arange(7)[None], (2, 7))
    first, caches = module.apply(
      variables, tokens[:, :4], positions[:, :4], caches
    )
    np.testing.assert_allclose(first, expected[:, :4], atol=1e-5)
    for t in range(4, 7):
      step, caches = module.apply(
        variables, tokens[:, t : t + 1], positions[:, t : t + 1], caches
      )
      np.testing.assert_allclose(step[:, 0], expected[:, t], atol=1e-5)

  def test_from_hf_reads_old_and_new_rope_keys(self):
    base = {
      'model_type': 'llama',
      'vocab_size': 64,
      'hidden_size': 32,
      'intermediate_size': 64,
      'num_hidden_layers': 2,
      'num_attention_heads': 4,
      'eos_token_id': [1, 2],
      'rms_norm_eps': 1e-5,
    }
    old = decoder.DecoderConfig.from_hf({**base, 'rope_theta': 5e5})
    new = decoder.DecoderConfig.from_hf(
      {**base, 'rope_parameters': {'rope_theta': 5e5, 'rope_type': 'default'}}
    )
    self.assertEqual(old, new)
    self.assertEqual(old.num_kv_heads, 4)
    self.assertEqual(old.head_dim, 8)
    self.assertEqual(old.eos_token_ids, (1, 2))
    self.assertFalse(old.tie_embeddings)

  def test_sharding_rules_keep_heads_whole(self):
    rules = dict(decoder.sharding_rules(CONFIG, 2))
    self.assertEqual(
      rules[r'attention/o_proj/kernel'], PartitionSpec('model', None)
    )
    rules = dict(decoder.sharding_rules(CONFIG, 4))  # Hkv = 2.
    self.assertEqual(rules[r'attention/o_proj/kernel'], PartitionSpec())
    self.assertEqual(
      rules[r'mlp/(expert_\d+/)?down_proj/kernel'], PartitionSpec('model', None)
    )

  def test_messages(self):
    replace = dataclasses.replace
    with self.assertRaisesRegex(ValueError, 'num_layers=0.*at least 1'):
      replace(CONFIG, num_layers=0)
    with self.assertRaisesRegex(ValueError, 'num_heads=4, num_kv_heads=3'):
      replace(CONFIG, num_kv_heads=3)
    with self.assertRaisesRegex(ValueError, 'head_dim=7.*even'):
      replace(CONFIG, head_dim=7)
    with self.assertRaisesRegex(ValueError, 'sparse has 1 entries for num_lay'):
      replace(CONFIG, sparse=(False,))
    with self.assertRaisesRegex(ValueError, 'model:3: intermediate_size=64'):
      decoder.sharding_rules(CONFIG, 3)


if __name__ == '__main__':
  absltest.main()
