"""Tiny Whisper files for the tests: Hugging Face, CTranslate2, tokenizer.

The tensors are random and have Hugging Face's names. A CTranslate2 file is
written here from the format's description, independently of the reader.
"""

import json
import pathlib
import struct

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

SPECIAL = (
  '<|endoftext|>',
  '<|startoftranscript|>',
  '<|en|>',
  '<|de|>',
  '<|transcribe|>',
  '<|notimestamps|>',
)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
# One more than an English-only vocabulary: the config then names languages.
VOCAB = len(ALPHABET) + len(SPECIAL)
END, START = len(ALPHABET), len(ALPHABET) + 1

CONFIG = {
  'model_type': 'whisper',
  'vocab_size': VOCAB,
  'd_model': 32,
  'num_mel_bins': 8,
  'encoder_layers': 2,
  'encoder_attention_heads': 4,
  'encoder_ffn_dim': 64,
  'decoder_layers': 3,
  'decoder_attention_heads': 2,
  'decoder_ffn_dim': 48,
  'max_source_positions': 12,
  'max_target_positions': 32,
  'decoder_start_token_id': START,
  'eos_token_id': END,
  'suppress_tokens': [3, 5],
  'begin_suppress_tokens': [END],
}


def tokenizer() -> tokenizers.Tokenizer:
  """Bytes, and Whisper's special tokens behind them."""
  vocab = {token: i for i, token in enumerate(ALPHABET)}
  made = tokenizers.Tokenizer(models.BPE(vocab, []))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens(
    [tokenizers.AddedToken(token, special=True) for token in SPECIAL]
  )
  return made


def tensors(config=CONFIG, seed=0) -> dict[str, np.ndarray]:
  """Random float32 tensors in Hugging Face's names and shapes."""
  rng = np.random.default_rng(seed)
  C, V = config['d_model'], config['vocab_size']
  made = {}

  def linear(name, N, K, bias=True):
    made[f'{name}.weight'] = rng.normal(0, K**-0.5, (N, K))
    if bias:
      made[f'{name}.bias'] = rng.normal(0, 0.1, N)

  def norm(name):
    made[f'{name}.weight'] = rng.uniform(0.5, 1.5, C)
    made[f'{name}.bias'] = rng.normal(0, 0.1, C)

  for half in ('encoder', 'decoder'):
    positions = 'source' if half == 'encoder' else 'target'
    T = config[f'max_{positions}_positions']
    made[f'model.{half}.embed_positions.weight'] = rng.normal(0, 0.1, (T, C))
    norm(f'model.{half}.layer_norm')
    attentions = ('self_attn', 'encoder_attn')[: 1 + (half == 'decoder')]
    for i in range(config[f'{half}_layers']):
      layer = f'model.{half}.layers.{i}'
      for attention in attentions:
        for name in ('q_proj', 'k_proj', 'v_proj', 'out_proj'):
          linear(f'{layer}.{attention}.{name}', C, C, name != 'k_proj')
        norm(f'{layer}.{attention}_layer_norm')
      F = config[f'{half}_ffn_dim']
      linear(f'{layer}.fc1', F, C)
      linear(f'{layer}.fc2', C, F)
      norm(f'{layer}.final_layer_norm')
  for name, K in (('conv1', config['num_mel_bins']), ('conv2', C)):
    shape = (C, K, 3)
    made[f'model.encoder.{name}.weight'] = rng.normal(0, K**-0.5, shape)
    made[f'model.encoder.{name}.bias'] = rng.normal(0, 0.1, C)
  made['model.decoder.embed_tokens.weight'] = rng.normal(0, 1, (V, C))
  return {name: a.astype(np.float32) for name, a in made.items()}


def write_hf(
  folder: pathlib.Path, config=CONFIG, made=None, **changes
) -> pathlib.Path:
  """A Hugging Face directory; `changes` are made to config.json only."""
  folder.mkdir(parents=True, exist_ok=True)
  made = tensors(config) if made is None else made
  (folder / 'config.json').write_text(json.dumps({**config, **changes}))
  safetensors.numpy.save_file(made, folder / 'model.safetensors')
  tokenizer().save(str(folder / 'tokenizer.json'))
  return folder


def ctranslate2_variables(
  config=CONFIG, made=None, dtype=np.float16
) -> dict[str, np.ndarray]:
  """The variables of a CTranslate2 file of the same model."""
  hf = tensors(config) if made is None else made
  C = config['d_model']
  out = {}

  def norm(ours, name):
    out[f'{ours}/gamma'], out[f'{ours}/beta'] = (
      hf[f'{name}.weight'],
      hf[f'{name}.bias'],
    )

  def linear(ours, *names):
    """Linears of one input, fused; a missing bias is zero."""
    out[f'{ours}/weight'] = np.concatenate([hf[f'{n}.weight'] for n in names])
    zeros = np.zeros(C, np.float32)
    out[f'{ours}/bias'] = np.concatenate(
      [hf.get(f'{n}.bias', zeros) for n in names]
    )

  for half in ('encoder', 'decoder'):
    name = f'model.{half}'
    positions = hf[f'{name}.embed_positions.weight']
    out[f'{half}/position_encodings/encodings'] = positions
    norm(f'{half}/layer_norm', f'{name}.layer_norm')
    for i in range(config[f'{half}_layers']):
      layer, ours = f'{name}.layers.{i}', f'{half}/layer_{i}'
      norm(f'{ours}/self_attention/layer_norm', f'{layer}.self_attn_layer_norm')
      attention = f'{layer}.self_attn'
      linear(
        f'{ours}/self_attention/linear_0',
        *(f'{attention}.{n}_proj' for n in 'qkv'),
      )
      linear(f'{ours}/self_attention/linear_1', f'{attention}.out_proj')
      if half == 'decoder':
        cross = f'{layer}.encoder_attn'
        norm(f'{ours}/attention/layer_norm', f'{cross}_layer_norm')
        linear(f'{ours}/attention/linear_0', f'{cross}.q_proj')
        linear(
          f'{ours}/attention/linear_1', f'{cross}.k_proj', f'{cross}.v_proj'
        )
        linear(f'{ours}/attention/linear_2', f'{cross}.out_proj')
      norm(f'{ours}/ffn/layer_norm', f'{layer}.final_layer_norm')
      linear(f'{ours}/ffn/linear_0', f'{layer}.fc1')
      linear(f'{ours}/ffn/linear_1', f'{layer}.fc2')
  for name in ('conv1', 'conv2'):
    out[f'encoder/{name}/weight'] = hf[f'model.encoder.{name}.weight']
    out[f'encoder/{name}/bias'] = hf[f'model.encoder.{name}.bias']
  out['decoder/embeddings/weight'] = hf['model.decoder.embed_tokens.weight']
  found = {name: array.astype(dtype) for name, array in out.items()}
  for half in ('encoder', 'decoder'):
    heads = config[f'{half}_attention_heads']
    found[f'{half}/num_heads'] = np.array(heads, np.int16)
  found['decoder/scale_embeddings'] = np.array(0, np.int8)
  return found


def write_ctranslate2(
  folder: pathlib.Path, variables=None, parts=1, version=6, name='WhisperSpec'
) -> pathlib.Path:
  """A CTranslate2 directory, its model.bin cut into `parts`."""
  variables = ctranslate2_variables() if variables is None else variables
  dtypes = ('float32', 'int8', 'int16', 'int32', 'float16')

  def string(text):
    return struct.pack('<H', len(text) + 1) + text.encode() + b'\0'

  data = struct.pack('<I', version) + string(name)
  data += struct.pack('<II', 3, len(variables))
  for key, array in sorted(variables.items()):
    data += string(key) + struct.pack('<B', array.ndim)
    data += struct.pack(f'<{array.ndim}I', *array.shape)
    data += struct.pack('<BI', dtypes.index(array.dtype.name), array.nbytes)
    data += array.tobytes()
  data += struct.pack('<I', 1) + string('decoder/projection/weight')
  data += string('decoder/embeddings/weight')
  folder.mkdir(parents=True, exist_ok=True)
  size = -(-len(data) // parts)
  for i in range(parts):
    suffix = f'.part{i + 1}' if parts > 1 else ''
    part = data[i * size : (i + 1) * size]
    (folder / f'model.bin{suffix}').write_bytes(part)
  (folder / 'config.json').write_text(
    json.dumps({'suppress_ids': [3, 5], 'suppress_ids_begin': [END]})
  )
  tokenizer().save(str(folder / 'tokenizer.json'))
  return folder
