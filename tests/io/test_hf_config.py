"""Tests of jaxq.io.hf_config: one form, and every refusal."""

from absl.testing import absltest, parameterized

from jaxq.io import hf_config

BASE = {
  'vocab_size': 64,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 4,
  'num_attention_heads': 4,
}


def read(model_type='llama', **fields):
  return hf_config.read({**BASE, 'model_type': model_type, **fields}, 'here')


class ReadTest(parameterized.TestCase):
  @parameterized.parameters(*sorted(hf_config.DEFAULTS))
  def test_reading_twice_changes_nothing(self, model_type):
    once = read(model_type)
    self.assertEqual(hf_config.read(once, 'here'), once)
    self.assertEqual(set(once), set(hf_config.DEFAULTS[model_type]))

  def test_heads_are_completed(self):
    config = read()
    self.assertEqual(config['num_key_value_heads'], 4)
    self.assertEqual(config['head_dim'], 8)
    self.assertEqual(read('qwen3')['head_dim'], 128)

  def test_rope_of_old_and_new_files(self):
    scaling = {'rope_type': 'linear', 'factor': 2.0}
    new = read(rope_parameters={**scaling, 'rope_theta': 7.0})
    old = read(rope_theta=7, rope_scaling={'type': 'linear', 'factor': 2.0})
    self.assertEqual(new, old)
    self.assertEqual(new['rope_scaling'], scaling)
    default = {'rope_type': 'default', 'rope_theta': 7.0}
    self.assertIsNone(read(rope_parameters=default)['rope_scaling'])

  def test_two_bases_of_gemma3(self):
    new = read(
      'gemma3_text',
      rope_parameters={
        'full_attention': {
          'rope_type': 'linear',
          'factor': 8.0,
          'rope_theta': 5.0,
        },
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 3.0},
      },
    )
    old = read(
      'gemma3_text',
      rope_theta=5.0,
      rope_local_base_freq=3.0,
      rope_scaling={'rope_type': 'linear', 'factor': 8.0},
    )
    self.assertEqual(new, old)

  def test_phi3_keeps_the_original_length_outside(self):
    factors = {'short_factor': [1.0], 'long_factor': [2.0]}
    config = read(
      'phi3',
      rope_scaling={'type': 'su', **factors},
      original_max_position_embeddings=16,
    )
    self.assertEqual(
      config['rope_scaling'],
      {
        'rope_type': 'longrope',
        'original_max_position_embeddings': 16,
        **factors,
      },
    )

  @parameterized.parameters(
    ('gemma2', {}, 'sfsf'),
    ('gemma3_text', {'sliding_window_pattern': 3}, 'ssfs'),
    ('gemma3_text', {'_sliding_window_pattern': 2}, 'sfsf'),
    ('qwen2', {}, 'ffff'),
    ('qwen2', {'use_sliding_window': True, 'max_window_layers': 3}, 'fffs'),
  )
  def test_layer_types(self, model_type, fields, expected):
    types = read(model_type, **fields)['layer_types']
    self.assertEqual(''.join(t[0] for t in types), expected)

  def test_spellings(self):
    opt = read('opt', ffn_dim=99, activation_function='gelu')
    self.assertEqual(opt['intermediate_size'], 99)
    self.assertEqual(opt['hidden_act'], 'gelu')
    self.assertEqual(read('qwen3_moe', num_experts=9)['num_local_experts'], 9)

  def test_harmless_and_null_keys_are_left(self):
    given = read(
      torch_dtype='bfloat16', attention_dropout=0.1, some_new_key=None
    )
    self.assertEqual(given, read())


class RefusalTest(parameterized.TestCase):
  @parameterized.parameters(
    ('llama', {'sliding_window': 9}, 'sliding_window=9 changes the maths'),
    ('mistral', {'attention_bias': True}, 'attention_bias=True changes'),
    ('llama', {'hidden_act': 'tanh'}, "hidden_act='tanh' changes.*'silu'"),
    ('llama', {'quantization_config': {}}, 'quantization_config={} changes'),
    ('llama', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
    ('gemma3_text', {'attn_logit_softcapping': 5.0}, 'attn_logit_softcapping'),
    ('gemma2', {'use_bidirectional_attention': True}, 'use_bidirectional'),
    ('opt', {'do_layer_norm_before': False}, r'allowed are \[True, None\]'),
    ('opt', {'word_embed_proj_dim': 16}, 'word_embed_proj_dim=16, hidden_size'),
    (
      'llama',
      {'rope_parameters': {'rope_type': 'axial'}},
      "rope_type 'axial'; allowed are .*'yarn'",
    ),
    (
      'qwen3',
      {'rope_parameters': {'sliding_attention': {'rope_type': 'default'}}},
      'give sliding blocks .*; allowed are unscaled ones',
    ),
  )
  def test_other_maths(self, model_type, fields, message):
    with self.assertRaisesRegex(NotImplementedError, f'here: .*{message}'):
      read(model_type, **fields)

  @parameterized.parameters(
    (
      {'moe_a': 1, 'zeta': 0},
      r"keys \['moe_a', 'zeta'\] are not known.*allowed",
    ),
    ({'num_attention_heads': 3}, 'hidden_size=32, num_attention_heads=3'),
    ({'num_key_value_heads': 3}, 'num_key_value_heads=3; the second must'),
    ({'head_dim': 7}, 'head_dim=7; rotary embeddings need'),
    ({'rope_scaling': {'factor': 8.0}}, r"keys \['factor'\], not known for"),
    (
      {'rope_scaling': {'type': 'linear', 'factor': 2.0, 'ramp': 1}},
      r"rope_parameters have keys \['ramp'\]",
    ),
    (
      {'rope_scaling': {'type': 'llama3', 'factor': 2.0}},
      r"lack \['low_freq_factor', 'high_freq_factor'\]",
    ),
  )
  def test_llamas_that_make_no_sense(self, fields, message):
    with self.assertRaisesRegex(ValueError, f'here: .*{message}'):
      read(**fields)

  def test_experts_and_layer_types(self):
    with self.assertRaisesRegex(ValueError, 'num_experts_per_tok=9, num_local'):
      read('mixtral', num_experts_per_tok=9)
    with self.assertRaisesRegex(
      ValueError, r"layer_types=\['full_attention'\]"
    ):
      read('gemma2', layer_types=['full_attention'])


if __name__ == '__main__':
  absltest.main()
