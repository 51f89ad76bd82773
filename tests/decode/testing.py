"""A tiny random decoder with a byte tokenizer, as a models.Model and on disk.

Token i < 256 is byte i; 256 is '<eos>', the only special token.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, pre_tokenizers

import models
from models import decoder

VOCAB_SIZE, EOS = 257, 256
CONFIG = decoder.DecoderConfig(
  vocab_size=VOCAB_SIZE,
  hidden_size=16,
  intermediate_size=32,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  tie_embeddings=False,  # Tied random weights only repeat their last token.
  max_position=256,
  eos_token_ids=(EOS,),
)
_NAMES = {
  'input_norm/scale': 'input_layernorm',
  'attention/q_proj/kernel': 'self_attn.q_proj',
  'attention/k_proj/kernel': 'self_attn.k_proj',
  'attention/v_proj/kernel': 'self_attn.v_proj',
  'attention/o_proj/kernel': 'self_attn.o_proj',
  'post_norm/scale': 'post_attention_layernorm',
  'mlp/gate_proj/kernel': 'mlp.gate_proj',
  'mlp/up_proj/kernel': 'mlp.up_proj',
  'mlp/down_proj/kernel': 'mlp.down_proj',
}


def tokenizer() -> tokenizers.Tokenizer:
  """One token per byte."""
  # The byte-level alphabet: printable bytes stand for themselves.
  kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in kept]
  vocab = {chr(byte): byte for byte in kept}
  vocab |= {chr(256 + i): byte for i, byte in enumerate(others)}
  made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens([tokenizers.AddedToken('<eos>', special=True)])
  return made


def model(seed: int = 0, name: str = 'tiny') -> models.Model:
  """Random weights."""
  module = decoder.Decoder(CONFIG)
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = jax.jit(module.init)(jax.random.key(seed), tokens)['params']
  # Inputs of unit size, so that the blocks do not drown them.
  params = {**params, 'embed': jax.tree.map(lambda e: e * 50, params['embed'])}
  return models.Model(
    config=CONFIG,
    module=module,
    variables={'params': params, 'quant': {'blocks_0': {}}},
    tokenizer=tokenizer(),
    name=name,
  )


def save(made: models.Model, folder: str | pathlib.Path) -> str:
  """Writes a model as a Hugging Face directory; returns its path."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  params, config = made.variables['params'], made.config
  tensors = {
    'model.embed_tokens.weight': params['embed']['embedding'],
    'model.norm.weight': params['final_norm']['scale'],
    'lm_head.weight': params['head']['kernel'].T,
  }
  for path, name in _NAMES.items():
    leaf = params['blocks_0']
    for key in path.split('/'):
      leaf = leaf[key]
    for i in range(config.num_layers):
      tensors[f'model.layers.{i}.{name}.weight'] = leaf[i].T
  safetensors.numpy.save_file(
    {k: np.ascontiguousarray(v) for k, v in tensors.items()},
    folder / 'model.safetensors',
  )
  made.tokenizer.save(str(folder / 'tokenizer.json'))
  values = {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'hidden_act': 'silu',
    'vocab_size': config.vocab_size,
    'hidden_size': config.hidden_size,
    'intermediate_size': config.intermediate_size,
    'num_hidden_layers': config.num_layers,
    'num_attention_heads': config.num_heads,
    'num_key_value_heads': config.num_kv_heads,
    'head_dim': config.head_dim,
    'rope_theta': config.rope_theta,
    'rms_norm_eps': config.norm_eps,
    'tie_word_embeddings': config.tie_embeddings,
    'max_position_embeddings': config.max_position,
    'eos_token_id': list(config.eos_token_ids),
  }
  (folder / 'config.json').write_text(json.dumps(values), 'utf-8')
  return str(folder)
