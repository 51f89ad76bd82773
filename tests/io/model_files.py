"""Tiny Llama files for the tests: GGUF, Hugging Face, and their tokenizer."""

import json
import pathlib

import gguf
import numpy as np
import safetensors.numpy
from tokenizers import pre_tokenizers

SPECIAL = ('<|end|>', '<|start|>')
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ('h e', 'l l', 'he ll', 'hell o', 'Ġ w')
TOKENS = (*SPECIAL, *ALPHABET, 'he', 'll', 'hell', 'hello', 'Ġw', '<user>')
TYPES = (3, 3, *([1] * (len(TOKENS) - 3)), 4)

CONFIG = {
  'model_type': 'llama',
  'vocab_size': len(TOKENS),
  'hidden_size': 32,
  'intermediate_size': 64,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 8,
  'rope_theta': 5000.0,
  'rms_norm_eps': 1e-5,
  'max_position_embeddings': 128,
  'tie_word_embeddings': True,
  'hidden_act': 'silu',
  'bos_token_id': 1,
  'eos_token_id': 0,
}


def hf_tensors(config=CONFIG, seed=0) -> dict[str, np.ndarray]:
  """Random float32 tensors in Hugging Face names and shapes."""
  rng = np.random.default_rng(seed)
  C, F = config['hidden_size'], config['intermediate_size']
  q = config['num_attention_heads'] * config['head_dim']
  k = config['num_key_value_heads'] * config['head_dim']
  shapes = {
    'model.embed_tokens': (config['vocab_size'], C),
    'model.norm': (C,),
  }
  if not config['tie_word_embeddings']:
    shapes['lm_head'] = (config['vocab_size'], C)
  for i in range(config['num_hidden_layers']):
    block = {
      'input_layernorm': (C,),
      'self_attn.q_proj': (q, C),
      'self_attn.k_proj': (k, C),
      'self_attn.v_proj': (k, C),
      'self_attn.o_proj': (C, q),
      'post_attention_layernorm': (C,),
      'mlp.gate_proj': (F, C),
      'mlp.up_proj': (F, C),
      'mlp.down_proj': (C, F),
    }
    shapes |= {f'model.layers.{i}.{name}': s for name, s in block.items()}
  return {
    f'{name}.weight': rng.standard_normal(shape).astype(np.float32)
    for name, shape in shapes.items()
  }


_GGUF_NAMES = {
  'model.embed_tokens': 'token_embd',
  'model.norm': 'output_norm',
  'lm_head': 'output',
  'input_layernorm': 'attn_norm',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'post_attention_layernorm': 'ffn_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
}


def gguf_name(name: str) -> str:
  """A Hugging Face tensor name in GGUF."""
  name = name.removesuffix('.weight')
  if not name.startswith('model.layers.'):
    return f'{_GGUF_NAMES[name]}.weight'
  _, _, i, rest = name.split('.', 3)
  return f'blk.{i}.{_GGUF_NAMES[rest]}.weight'


def interleave(w: np.ndarray, head_dim: int) -> np.ndarray:
  """Half-split rows to GGUF's pairs, one row at a time."""
  out = np.empty_like(w)
  for row in range(w.shape[0]):
    head, d = divmod(row, head_dim)
    half, pair = divmod(d, head_dim // 2)
    out[head * head_dim + 2 * pair + half] = w[row]
  return out


def gguf_tensors(config=CONFIG, seed=0) -> dict[str, np.ndarray]:
  """`hf_tensors` in GGUF names and GGUF's rotary order."""
  tensors = {}
  for name, array in hf_tensors(config, seed).items():
    if 'q_proj' in name or 'k_proj' in name:
      array = interleave(array, config['head_dim'])
    tensors[gguf_name(name)] = array
  return tensors


def gguf_metadata(config=CONFIG) -> dict:
  """Key-value pairs, tokenizer included."""
  return {
    'llama.block_count': config['num_hidden_layers'],
    'llama.context_length': config['max_position_embeddings'],
    'llama.embedding_length': config['hidden_size'],
    'llama.feed_forward_length': config['intermediate_size'],
    'llama.attention.head_count': config['num_attention_heads'],
    'llama.attention.head_count_kv': config['num_key_value_heads'],
    'llama.attention.layer_norm_rms_epsilon': config['rms_norm_eps'],
    'llama.rope.freq_base': config['rope_theta'],
    'llama.rope.dimension_count': config['head_dim'],
    'llama.vocab_size': config['vocab_size'],
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'smollm',
    'tokenizer.ggml.tokens': list(TOKENS),
    'tokenizer.ggml.token_type': list(TYPES),
    'tokenizer.ggml.merges': list(MERGES),
    'tokenizer.ggml.bos_token_id': config['bos_token_id'],
    'tokenizer.ggml.eos_token_id': config['eos_token_id'],
  }


def write_gguf(
  path: pathlib.Path,
  *,
  config=CONFIG,
  metadata=None,
  tensors=None,
  kinds=None,
  arch='llama',
) -> pathlib.Path:
  """Writes a GGUF file.

  Args:
    path: of the file.
    config: sizes of the model.
    metadata: key -> value to set; None removes a key.
    tensors: name -> array to set; None removes a tensor.
    kinds: tensor name -> ggml type; raw bytes (uint8 arrays) are written as
      they are, floats are quantized.
    arch: general.architecture.
  """
  writer = gguf.GGUFWriter(str(path), arch)
  pairs = gguf_metadata(config) | (metadata or {})
  for key, value in pairs.items():
    match value:
      case None:
        pass
      case bool():
        writer.add_bool(key, value)
      case int():
        writer.add_uint32(key, value)
      case float():
        writer.add_float32(key, value)
      case str():
        writer.add_string(key, value)
      case list():
        writer.add_array(key, value)
  for name, array in (gguf_tensors(config) | (tensors or {})).items():
    kind = (kinds or {}).get(name)
    if array is None:
      continue
    if kind is None:
      writer.add_tensor(name, array)
      continue
    kind = gguf.GGMLQuantizationType[kind]
    if array.dtype != np.uint8:
      array = gguf.quants.quantize(array, kind)
    writer.add_tensor(name, array, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def write_tokenizer_json(path: pathlib.Path) -> None:
  """Saves the tiny tokenizer in the fast format."""
  from jaxq.io import tokenizer

  tokenizer.from_gguf(gguf_metadata(), len(TOKENS), 'test').save(str(path))


def write_hf(
  folder: pathlib.Path, *, config=None, tensors=None, shards=1, dtype=None
) -> pathlib.Path:
  """Writes a Hugging Face directory.

  Args:
    folder: is made.
    config: keys to set in CONFIG; None removes a key.
    tensors: name -> array to set; None removes a tensor.
    shards: number of safetensors files; more than one adds an index.
    dtype: of all tensors.
  """
  folder.mkdir(parents=True, exist_ok=True)
  merged = {k: v for k, v in (CONFIG | (config or {})).items() if v is not None}
  (folder / 'config.json').write_text(json.dumps(merged))
  write_tokenizer_json(folder / 'tokenizer.json')
  arrays = hf_tensors(CONFIG) | (tensors or {})
  arrays = {k: v for k, v in arrays.items() if v is not None}
  if dtype is not None:
    arrays = {k: v.astype(dtype) for k, v in arrays.items()}
  if shards == 1:
    safetensors.numpy.save_file(arrays, str(folder / 'model.safetensors'))
    return folder
  weight_map = {}
  for s in range(shards):
    name = f'model-{s + 1:05d}-of-{shards:05d}.safetensors'
    part = dict(list(arrays.items())[s::shards])
    safetensors.numpy.save_file(part, str(folder / name))
    weight_map |= dict.fromkeys(part, name)
  index = {'metadata': {}, 'weight_map': weight_map}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  return folder
