"""Configurations as GGUF metadata, both ways."""

import math

import numpy as np
from absl.testing import absltest, parameterized

from jaxq.io import architectures, gguf_config, hf_config

_SIZES = {
  'vocab_size': 64,
  'hidden_size': 64,
  'intermediate_size': 96,
  'num_hidden_layers': 7,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 32,
  'rms_norm_eps': 1e-5,
  'rope_theta': 5000.0,
  'max_position_embeddings': 128,
  'tie_word_embeddings': True,
}
_LLAMA_3 = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}
_LONG = {
  'rope_type': 'longrope',
  'short_factor': [1.0] * 16,
  'long_factor': [4.0] * 16,
  'attention_factor': 1.25,
}
_GEMMA = {'query_pre_attn_scalar': 32, 'sliding_window': 16}
CONFIGS = {
  'llama': {},
  'llama3': {'model_type': 'llama', 'rope_scaling': _LLAMA_3},
  'linear': {
    'model_type': 'llama',
    'rope_scaling': {'rope_type': 'linear', 'factor': 2.0},
  },
  'yarn': {
    'model_type': 'qwen2',
    'rope_scaling': {
      'rope_type': 'yarn',
      'factor': 4.0,
      'original_max_position_embeddings': 32,
      'beta_fast': 16.0,
      'attention_factor': 1.5,
    },
  },
  'mixtral': {},
  'qwen2': {},
  'qwen3': {},
  'qwen3_moe': {'norm_topk_prob': True},
  'gemma2': _GEMMA,
  'gemma3_text': _GEMMA,
  'phi3': {'partial_rotary_factor': 0.5, 'sliding_window': 16},
  'longrope': {
    'model_type': 'phi3',
    'original_max_position_embeddings': 64,
    'rope_scaling': _LONG,
  },
}


def config(name, **changes):
  return hf_config.read(
    {'model_type': name} | _SIZES | CONFIGS.get(name, {}) | changes, 'test'
  )


def read(written, found, **changes):
  """Metadata and the tensors that go with a config, read back."""
  arch = architectures.GGUF_ARCHITECTURES[found['model_type']]
  metadata = {'general.architecture': arch} | written
  metadata |= {f'{arch}.{k}': v for k, v in changes.items()}
  tensors = gguf_config.rope_tensors(found)
  shapes = {
    name: tensor.shape
    for name, tensor in architectures.every_tensor(found, 'gguf').items()
  } | {name: array.shape for name, array in tensors.items()}
  return gguf_config.read(metadata, shapes, tensors.__getitem__, 'x.gguf')


class RoundTripTest(parameterized.TestCase):
  @parameterized.parameters(*CONFIGS)
  def test_what_is_written_is_read(self, name):
    found = config(name)
    back = read(gguf_config.write(found), found)
    for key in ('original_max_position_embeddings', 'sliding_window_pattern'):
      found.pop(key, None)  # In rope_scaling and layer_types.
      back.pop(key, None)
    scaling = [
      {k: v for k, v in (c.pop('rope_scaling') or {}).items() if v is not None}
      for c in (back, found)
    ]
    factors = [s.pop('attention_factor', 1.0) for s in scaling]
    self.assertAlmostEqual(*factors)  # Divided, and multiplied again.
    self.assertEqual(*scaling)
    self.assertEqual(back, found)

  def test_mistral_is_a_llama(self):
    found = config('mistral', sliding_window=None)
    back = read(gguf_config.write(found), found)
    self.assertEqual(back['model_type'], 'llama')

  def test_divisors_of_llama_3_by_hand(self):
    found = config('llama', rope_scaling=_LLAMA_3, rope_theta=5e5)
    divisors = gguf_config.rope_tensors(found)['rope_freqs.weight']
    waves = 2 * np.pi * 5e5 ** (np.arange(0, 32, 2) / 32)
    np.testing.assert_array_equal(divisors[waves < 2048], 1.0)
    np.testing.assert_array_equal(divisors[waves > 8192], 8.0)
    self.assertTrue(np.all(np.diff(divisors) >= 0))

  def test_temperatures_by_hand(self):
    yarn = {'rope_type': 'yarn', 'factor': math.e, 'truncate': True}

    def attn_factor(name, **scaling):
      written = gguf_config.write(config(name, rope_scaling=scaling))
      return written.get(f'{name}.rope.scaling.attn_factor')

    # llama.cpp's own 1 + ln(e) / 10 = 1.1 is the default of config.json too.
    self.assertIsNone(attn_factor('qwen2', **yarn))
    given = attn_factor('qwen2', **yarn, attention_factor=2.2)
    self.assertAlmostEqual(given, 2.0)
    ratio = attn_factor('qwen2', **yarn, mscale=2.0, mscale_all_dim=4.0)
    self.assertAlmostEqual(ratio, 1.2 / 1.4 / 1.1)
    # 128 tokens of a model made for 64: sqrt(1 + ln(2) / ln(64)).
    long = {k: v for k, v in _LONG.items() if k != 'attention_factor'}
    long['original_max_position_embeddings'] = 64
    found = attn_factor('phi3', **long)
    self.assertAlmostEqual(found, math.sqrt(1 + 1 / 6))

  @parameterized.parameters(('gemma2', 46, 16), ('gemma3_text', 62, 16))
  def test_the_largest_gemma_scales_scores_otherwise(self, name, depth, scalar):
    found = config(name, num_hidden_layers=depth, query_pre_attn_scalar=scalar)
    back = read(gguf_config.write(found), found)
    self.assertEqual(back['query_pre_attn_scalar'], 64 // 4)

  def test_gemma2_without_caps_has_the_usual_ones(self):
    found = config('gemma2')
    written = {
      k: v for k, v in gguf_config.write(found).items() if 'softcap' not in k
    }
    self.assertEqual(read(written, found)['attn_logit_softcapping'], 50.0)


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters(
    ('mistral', {'sliding_window': 64}, 'a sliding window of 64 tokens'),
    ('qwen3_moe', {'norm_topk_prob': False}, 'norm_topk_prob=False'),
    ('qwen3_moe', {'mlp_only_layers': [1]}, 'dense blocks among its sparse'),
    ('qwen3', {'attention_bias': True}, 'biases of its attention'),
    ('gemma2', {'query_pre_attn_scalar': 8}, 'query_pre_attn_scalar=8'),
    ('gemma3_text', {'rope_local_base_freq': 5.0}, 'rope_local_base_freq=5.0'),
    ('llama', {'hidden_act': 'gelu'}, 'hidden_act=gelu'),
    (
      'gemma2',
      {'layer_types': ['full_attention'] * 7},
      'sliding windows in other blocks',
    ),
    (
      'llama',
      {'rope_scaling': {'rope_type': 'dynamic', 'factor': 2.0}},
      'rotary scaling dynamic',
    ),
    (
      'llama',
      {'rope_scaling': {'rope_type': 'yarn', 'factor': 2.0, 'truncate': False}},
      'truncate=False',
    ),
  )
  def test_what_gguf_cannot_say(self, name, changes, message):
    with self.assertRaisesRegex(
      NotImplementedError, f'export: .*{message}.*Export to another format'
    ):
      gguf_config.write(config(name, **changes))

  def test_architectures_without_gguf(self):
    with self.assertRaisesRegex(
      NotImplementedError, r"does not define opt.*allowed are \['gemma2'"
    ):
      gguf_config.write(dict(config('llama'), model_type='opt'))

  @parameterized.parameters(
    ('mixtral', {'expert_used_count': None}, 'expert_used_count'),
    ('gemma3_text', {'attention.sliding_window': None}, 'sliding_window'),
    (
      'qwen3_moe',
      {'expert_feed_forward_length': None},
      'expert_feed_forward_length',
    ),
  )
  def test_missing_keys(self, name, changes, message):
    found = config(name)
    with self.assertRaisesRegex(
      ValueError, rf"x.gguf: the metadata lacks \['[\w.]*{message}'\]"
    ):
      read(gguf_config.write(found), found, **changes)

  def test_experts_where_the_architecture_has_none(self):
    found = config('qwen3')
    with self.assertRaisesRegex(NotImplementedError, 'has 4 experts; allowed'):
      read(gguf_config.write(found), found, expert_count=4, expert_used_count=2)

  @parameterized.parameters(
    (
      'llama',
      {'logit_scale': 2.0, 'clamp': 1},
      r"\['clamp', 'logit_scale'\] a",
    ),
    ('gemma3_text', {'attn_logit_softcapping': 5.0}, r"\['attn_logit_softc"),
    ('mixtral', {'expert_gating_func': 2}, 'expert_gating_func=2 changes the'),
    (
      'mixtral',
      {'expert_feed_forward_length': 8},
      r'allowed are \[0, 96, None',
    ),
    ('qwen2', {'attention.sliding_window': 64}, r'=64 changes.*\[0, 128, None'),
    ('llama', {'rope.scale_linear': 4.0}, 'rope.scale_linear=4.0 changes the'),
  )
  def test_keys_that_are_not_computed_with(self, name, changes, message):
    found = config(name)
    with self.assertRaisesRegex(
      (NotImplementedError, ValueError), f'x.gguf: .*{message}'
    ):
      read(gguf_config.write(found), found, **changes)

  def test_keys_that_change_nothing(self):
    found = config('llama')
    harmless = {
      'tensor_data_layout': 'Meta AI original pth',
      'attention.causal': True,
      'attention.sliding_window': 128,
      'rope.scaling.finetuned': False,
    }
    back = read(gguf_config.write(found), found, **harmless)
    self.assertEqual(back, read(gguf_config.write(found), found))

  def test_values_of_another_size(self):
    found = config('qwen3')
    with self.assertRaisesRegex(
      NotImplementedError, 'attention.value_length=16, head size 32'
    ):
      read(gguf_config.write(found), found, **{'attention.value_length': 16})


if __name__ == '__main__':
  absltest.main()
