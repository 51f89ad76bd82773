"""Random small models of every decoder architecture, against transformers.

Each is saved by transformers and loaded by models.load: every logit of two
sequences and every token of greedy generation, with our cache, agree.
"""

import os
import tempfile

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import models
from experiments import adapters
from jaxq.decode import autoregressive
from tests.decode import testing
from tests.parity import oracle

V = testing.VOCAB_SIZE
NEW_TOKENS = 20
WINDOW = 6
BASE = {
  'vocab_size': V,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 16,
  'max_position_embeddings': 160,
  'bos_token_id': 0,
  'eos_token_id': None,
  'pad_token_id': None,
}
MOE = {'num_experts_per_tok': 2}
OPT = {
  **{k: v for k, v in BASE.items() if 'key_value' not in k},
  'ffn_dim': 48,
  'word_embed_proj_dim': 32,
}
OPT.pop('intermediate_size')
OPT.pop('head_dim')


def scaled(kind, **fields):
  return {'rope_parameters': {'rope_type': kind, 'rope_theta': 500.0, **fields}}


# name, transformers' class without ForCausalLM, its config's class, fields.
CASES = (
  ('llama_biases', 'Llama', {'attention_bias': True, 'mlp_bias': True}),
  ('llama_linear', 'Llama', scaled('linear', factor=4.0)),
  (
    'llama_dynamic',
    'Llama',
    {**scaled('dynamic', factor=4.0), 'max_position_embeddings': 40},
  ),
  (
    'llama_llama3',
    'Llama',
    scaled(
      'llama3',
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=32,
    ),
  ),
  (
    'llama_yarn',
    'Llama',
    scaled('yarn', factor=4.0, original_max_position_embeddings=32),
  ),
  ('mistral', 'Mistral', {'sliding_window': WINDOW}),
  ('mistral_whole', 'Mistral', {'sliding_window': None}),
  ('qwen2', 'Qwen2', {'head_dim': 8}),
  (
    'qwen2_windows',
    'Qwen2',
    {
      'head_dim': 8,
      'use_sliding_window': True,
      'sliding_window': WINDOW,
      'max_window_layers': 1,
    },
  ),
  ('qwen3', 'Qwen3', {'tie_word_embeddings': True}),
  (
    'gemma2',
    'Gemma2',
    {
      'sliding_window': WINDOW,
      'query_pre_attn_scalar': 24,
      'attn_logit_softcapping': 2.0,
      'final_logit_softcapping': 5.0,
    },
  ),
  (
    'gemma3',
    'Gemma3',
    {
      'sliding_window': WINDOW,
      'query_pre_attn_scalar': 24,
      'layer_types': [*['sliding_attention'] * 2, 'full_attention'] * 2,
      'num_hidden_layers': 6,
      'rope_parameters': {
        'full_attention': {
          'rope_type': 'linear',
          'rope_theta': 1e6,
          'factor': 8.0,
        },
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
      },
    },
  ),
  ('opt', 'OPT', OPT),
  ('phi3', 'Phi3', {'sliding_window': WINDOW, 'head_dim': 8}),
  (
    'phi3_longrope',
    'Phi3',
    {
      'head_dim': 8,
      'original_max_position_embeddings': 40,
      **scaled(
        'longrope',
        short_factor=[1.0, 1.1, 1.3],
        long_factor=[1.0, 2.0, 4.0],
        partial_rotary_factor=0.75,
      ),
    },
  ),
  ('mixtral', 'Mixtral', {**MOE, 'num_local_experts': 4}),
  (
    'qwen3_moe',
    'Qwen3Moe',
    {
      **MOE,
      'num_experts': 5,
      'moe_intermediate_size': 16,
      'mlp_only_layers': [1],
      'norm_topk_prob': True,
    },
  ),
)
# The last is longer than every window and what dynamic and longrope start at.
PROMPTS = ([3, 141, 59], [26, 5, 35, 89, 79, 32, 38], [1], [*range(7, 52)])


def setUpModule():
  oracle.require()


def random_model(name, fields, seed=0):
  """A float32 model in which no two norms are alike and no bias is zero."""
  import torch
  import transformers

  torch.manual_seed(seed)
  config_name = 'Gemma3TextConfig' if name == 'Gemma3' else f'{name}Config'
  make = getattr(transformers, config_name)
  if name != 'OPT':
    fields = BASE | fields
  config = make(attn_implementation='eager', **fields)
  model = getattr(transformers, f'{name}ForCausalLM')(config)
  one = 0.0 if name.startswith('Gemma') else 1.0  # Gemma stores scale - 1.
  with torch.no_grad():
    for path, p in model.named_parameters():
      if 'norm' in path and path.endswith('weight'):
        p.uniform_(one - 0.5, one + 0.5)
      elif path.endswith('bias'):
        p.normal_(0.0, 0.2)
      elif 'embed_tokens' in path and model.config.tie_word_embeddings:
        p.normal_(0.0, 0.1)  # Large tied rows only repeat their last token.
      elif 'embed' in path or 'lm_head' in path:
        p.normal_(0.0, 1.0)
      else:
        p.normal_(0.0, p.shape[-1] ** -0.5)
  return model.eval()


class ArchitecturesTest(parameterized.TestCase):
  def save(self, reference):
    folder = self.enter_context(tempfile.TemporaryDirectory())
    reference.save_pretrained(folder)
    testing.tokenizer().save(os.path.join(folder, 'tokenizer.json'))
    return folder

  @parameterized.named_parameters(*CASES)
  def test_logits_and_greedy_tokens(self, name, fields):
    reference = random_model(name, fields)
    model = models.load(self.save(reference))
    tokens = np.random.default_rng(0).integers(0, V, (2, 60))
    got, _ = model.module.apply(model.variables, jnp.asarray(tokens, jnp.int32))
    expected = oracle.logits(reference, tokens)
    self.assertLess(oracle.relative_error(np.asarray(got), expected), 1e-3)
    out = autoregressive.generate(
      adapters.language_model(model.module),
      model.variables,
      PROMPTS,
      max_new_tokens=NEW_TOKENS,
    )
    for prompt, row in zip(PROMPTS, out.tokens, strict=True):
      expected = oracle.greedy(reference, prompt, NEW_TOKENS, ())
      self.assertEqual(row.tolist(), expected)
    self.assertGreater(len(np.unique(out.tokens)), 10)


if __name__ == '__main__':
  absltest.main()
