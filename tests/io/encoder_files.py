"""Small random BERT and Dinov2 directories, in Hugging Face's layout."""

import json
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import normalizers, pre_tokenizers, processors

WORDS = ('the', 'a', 'cat', 'dog', 'sat', 'ran', 'on', 'mat', '.', ',')
SPECIAL = ('[PAD]', '[UNK]', '[CLS]', '[SEP]')
BERT = {
  'model_type': 'bert',
  'vocab_size': 32,
  'hidden_size': 16,
  'intermediate_size': 32,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'max_position_embeddings': 40,
  'type_vocab_size': 2,
  'layer_norm_eps': 1e-12,
  'hidden_act': 'gelu',
  'pad_token_id': 0,
}
DINOV2 = {
  'model_type': 'dinov2',
  'hidden_size': 16,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'mlp_ratio': 2,
  'patch_size': 4,
  'image_size': 20,
  'num_channels': 3,
  'layer_norm_eps': 1e-6,
  'hidden_act': 'gelu',
}


def tokenizer() -> tokenizers.Tokenizer:
  """A word tokenizer that adds [CLS] and [SEP]."""
  vocab = {word: i for i, word in enumerate(SPECIAL + WORDS)}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, '[UNK]'))
  made.normalizer = normalizers.Lowercase()
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  made.add_special_tokens(list(SPECIAL))
  made.post_processor = processors.TemplateProcessing(
    single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
  )
  return made


def bert_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Any]:
  """Random tensors under the names of BertModel."""
  C, F = config['hidden_size'], config['intermediate_size']
  make = _Maker(seed)
  make.table('embeddings.word_embeddings.weight', config['vocab_size'], C)
  positions = config['max_position_embeddings']
  make.table('embeddings.position_embeddings.weight', positions, C)
  types = config['type_vocab_size']
  make.table('embeddings.token_type_embeddings.weight', types, C)
  make.norm('embeddings.LayerNorm', C)
  for i in range(config['num_hidden_layers']):
    layer = f'encoder.layer.{i}'
    for name in ('query', 'key', 'value'):
      make.linear(f'{layer}.attention.self.{name}', C, C)
    make.linear(f'{layer}.attention.output.dense', C, C)
    make.norm(f'{layer}.attention.output.LayerNorm', C)
    make.linear(f'{layer}.intermediate.dense', F, C)
    make.linear(f'{layer}.output.dense', C, F)
    make.norm(f'{layer}.output.LayerNorm', C)
  return make.tensors


def dinov2_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Any]:
  """Random tensors under the names of Dinov2Model."""
  C, P = config['hidden_size'], config['patch_size']
  F = C * config['mlp_ratio']
  make = _Maker(seed)
  make.table('embeddings.cls_token', 1, 1, C)
  grid = (config['image_size'] // P) ** 2
  make.table('embeddings.position_embeddings', 1, 1 + grid, C)
  make.table('embeddings.patch_embeddings.projection.weight', C, 3, P, P)
  make.table('embeddings.patch_embeddings.projection.bias', C)
  for i in range(config['num_hidden_layers']):
    layer = f'encoder.layer.{i}'
    make.norm(f'{layer}.norm1', C)
    for name in ('query', 'key', 'value'):
      make.linear(f'{layer}.attention.attention.{name}', C, C)
    make.linear(f'{layer}.attention.output.dense', C, C)
    make.table(f'{layer}.layer_scale1.lambda1', C)
    make.norm(f'{layer}.norm2', C)
    make.linear(f'{layer}.mlp.fc1', F, C)
    make.linear(f'{layer}.mlp.fc2', C, F)
    make.table(f'{layer}.layer_scale2.lambda1', C)
  make.norm('layernorm', C)
  return make.tensors


def write(
  folder: pathlib.Path, config: dict[str, Any], tensors: dict[str, Any]
) -> pathlib.Path:
  """Writes a directory; a BERT's with its tokenizer."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config))
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  if config['model_type'] == 'bert':
    tokenizer().save(str(folder / 'tokenizer.json'))
  return folder


def write_bert(folder: pathlib.Path, **overrides: Any) -> pathlib.Path:
  """A BERT directory; overrides are keys of its config."""
  config = {**BERT, **overrides}
  return write(folder, config, bert_tensors(config))


def write_dinov2(folder: pathlib.Path, **overrides: Any) -> pathlib.Path:
  """A Dinov2 directory; overrides are keys of its config."""
  config = {**DINOV2, **overrides}
  return write(folder, config, dinov2_tensors(config))


class _Maker:
  """Collects random float32 tensors."""

  def __init__(self, seed: int):
    self._rng = np.random.default_rng(seed)
    self.tensors: dict[str, np.ndarray] = {}

  def table(self, name: str, *shape: int) -> None:
    values = self._rng.normal(size=shape) * 0.5
    self.tensors[name] = values.astype(np.float32)

  def linear(self, name: str, N: int, K: int) -> None:
    self.table(f'{name}.weight', N, K)
    self.table(f'{name}.bias', N)

  def norm(self, name: str, C: int) -> None:
    scale = self._rng.uniform(0.5, 1.5, C)
    self.tensors[f'{name}.weight'] = scale.astype(np.float32)
    self.table(f'{name}.bias', C)
