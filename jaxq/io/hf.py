"""Weights, configuration and tokenizer of a Hugging Face directory.

config.json, one `model.safetensors` or shards with an index, tokenizer.json.
Each read opens the file, takes its tensors and closes it, so that memory is
O(one block). A configuration key that changes the maths and that our decoder
does not compute is refused, never ignored.
"""

import json
import pathlib
from typing import Any

import ml_dtypes  # noqa: F401  NumPy learns bfloat16 from it.
import numpy as np
import safetensors
import tokenizers

from jaxq.io import files, llama
from jaxq.io import tokenizer as tokenizer_lib

MODEL_TYPES = ('llama',)

# Keys that change the maths -> the values our decoder computes.
_ALLOWED: dict[str, tuple[Any, ...]] = {
  'attention_bias': (False, None),
  'mlp_bias': (False, None),
  'hidden_act': ('silu', None),
  'rope_scaling': (None,),
  'rope_interleaved': (False, None),
  'partial_rotary_factor': (1.0, None),
  'quantization_config': (None,),
  'sliding_window': (None,),
  'attention_multiplier': (None,),
  'embedding_multiplier': (None, 1.0),
  'residual_multiplier': (None, 1.0),
  'logits_scaling': (None, 1.0),
  'logit_scale': (None, 1.0),
  'attn_logit_softcapping': (None,),
  'final_logit_softcapping': (None,),
  'num_local_experts': (None, 0),
  'no_rope_layers': (None,),
  'use_qk_norm': (None, False),
}
_SINGLE = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'


class HfSource:
  """A `WeightSource` over a Hugging Face directory.

  Raises:
    FileNotFoundError: config.json, weights or a shard is missing.
    ValueError: files that are damaged or contradict the configuration.
    NotImplementedError: a model type or an option outside ours.
  """

  def __init__(self, path: str | pathlib.Path):
    self.path = pathlib.Path(path)
    self.config = _config(self.path)
    self._shard_of = _tensor_files(self.path)
    found = {n for n in self._shard_of if not n.endswith('rotary_emb.inv_freq')}
    if self.config['tie_word_embeddings']:
      found.discard('lm_head.weight')
    llama.check_names(found, self.config, 'hf', str(self.path))
    self._check_shapes()

  def outside(self) -> dict:
    """Embedding, final norm and untied head, float32; read on each call."""
    return self._read(llama.outside(self.config), None)

  def block(self, i: int) -> dict:
    """Parameters of block i, float32; read on each call."""
    llama.check_block(i, self.config, str(self.path))
    return self._read(llama.BLOCK, i)

  def tokenizer(self) -> tokenizers.Tokenizer:
    """The tokenizer of tokenizer.json, without truncation and padding."""
    return tokenizer_lib.from_file(
      self.path / 'tokenizer.json', self.config['vocab_size']
    )

  def fingerprint(self) -> str:
    """Identity of the directory's content, independent of where it lies."""
    names = sorted(set(self._shard_of.values()))
    names += [
      name
      for name in ('config.json', 'tokenizer.json')
      if (self.path / name).is_file()
    ]
    entries = []
    for name in names:
      path = self.path / name
      header = path.stat().st_size if path.suffix == '.json' else _header(path)
      entries.append((name, path, header))
    return files.fingerprint(entries, self.config)

  def _check_shapes(self) -> None:
    expected = llama.every_name(self.config, 'hf')
    for shard in sorted(set(self._shard_of.values())):
      with _open(self.path / shard) as file:
        present = set(file.keys())
        for name, entry in expected.items():
          if self._shard_of[name] != shard:
            continue
          if name not in present:
            raise ValueError(
              f'{self.path / shard}: tensor {name} is missing, though '
              f'{_INDEX} says it is here. Fetch the shard again.'
            )
          shape = file.get_slice(name).get_shape()
          where = str(self.path / shard)
          llama.check_shape(name, shape, entry, self.config, where)

  def _read(self, entries, i: int | None) -> dict:
    names = {entry.hf.format(i=i): entry for entry in entries}
    params: dict = {}
    for shard in sorted({self._shard_of[name] for name in names}):
      with _open(self.path / shard) as file:
        for name, entry in names.items():
          if self._shard_of[name] == shard:
            where = f'{self.path / shard}: tensor {name}'
            array = _floating(file.get_tensor(name), where)
            llama.place(params, entry, array, where)
    return params


def _floating(array: np.ndarray, where: str) -> np.ndarray:
  allowed = ('float64', 'float32', 'float16', 'bfloat16')
  if array.dtype.name not in allowed:
    raise NotImplementedError(
      f'{where} has dtype {array.dtype.name}; allowed are {sorted(allowed)}. '
      'Use the unquantized model.'
    )
  return array.astype(np.float32)


def _config(folder: pathlib.Path) -> dict:
  """Reads and checks config.json; returns the keys we use."""
  path = folder / 'config.json'
  raw = _json(path)
  model_type = raw.get('model_type')
  if model_type not in MODEL_TYPES:
    raise NotImplementedError(
      f'{path}: model_type {model_type!r}; allowed are {sorted(MODEL_TYPES)}. '
      'Use a model of one of these.'
    )
  raw = _without_rope_parameters(raw, path)
  for key, allowed in _ALLOWED.items():
    if raw.get(key) not in allowed:
      raise NotImplementedError(
        f'{path}: {key}={raw[key]!r} changes the maths; allowed are '
        f'{list(allowed)}. Use a model without it.'
      )
  heads = raw.get('num_attention_heads')
  config = {key: raw.get(key) for key in llama.REQUIRED}
  config |= {
    'model_type': model_type,
    'num_key_value_heads': raw.get('num_key_value_heads') or heads,
    'rope_theta': float(raw.get('rope_theta') or 10000.0),
    'rms_norm_eps': float(raw.get('rms_norm_eps') or 1e-6),
    'max_position_embeddings': raw.get('max_position_embeddings') or 2048,
    'tie_word_embeddings': bool(raw.get('tie_word_embeddings', False)),
    'hidden_act': 'silu',
    'bos_token_id': raw.get('bos_token_id'),
    'eos_token_id': raw.get('eos_token_id'),
    'head_dim': raw.get('head_dim'),
  }
  llama.check_config(config, str(path))
  return config


def _without_rope_parameters(raw: dict, path: pathlib.Path) -> dict:
  """Newer files nest rope_theta in rope_parameters; older have it flat."""
  rope = raw.get('rope_parameters') or {}
  if rope.get('rope_type', 'default') != 'default':
    raise NotImplementedError(
      f'{path}: rope_parameters has rope_type {rope["rope_type"]!r}, which '
      'changes the maths; allowed is default. Use a model without rope scaling.'
    )
  flat = {
    k: rope[k] for k in ('rope_theta', 'partial_rotary_factor') if k in rope
  }
  return {**raw, **flat}


def _tensor_files(folder: pathlib.Path) -> dict[str, str]:
  """Tensor name -> file name, from the index or the single file."""
  if (folder / _INDEX).is_file():
    shard_of = _json(folder / _INDEX).get('weight_map')
    if not isinstance(shard_of, dict) or not shard_of:
      raise ValueError(
        f'{folder / _INDEX}: has no weight_map; an index maps tensor names to '
        'shards. Fetch it again.'
      )
    shards = sorted(set(shard_of.values()))
    missing = [s for s in shards if not (folder / s).is_file()]
    if missing:
      raise FileNotFoundError(
        f'{folder}: {len(missing)} of {len(shards)} shards are missing, first '
        f'{missing[0]}; all must lie beside {_INDEX}. Fetch them.'
      )
    return shard_of
  if not (folder / _SINGLE).is_file():
    raise FileNotFoundError(
      f'{folder}: has neither {_SINGLE} nor {_INDEX}; weights must be '
      'safetensors. Convert other formats first.'
    )
  with _open(folder / _SINGLE) as file:
    return dict.fromkeys(file.keys(), _SINGLE)


def _open(path: pathlib.Path):
  try:
    return safetensors.safe_open(str(path), framework='numpy')
  except (safetensors.SafetensorError, OSError) as e:
    raise ValueError(
      f'{path}: is truncated or damaged ({path.stat().st_size} bytes; the '
      f'reader says: {e}); a whole safetensors file is needed. Fetch it again.'
    ) from e


def _header(path: pathlib.Path) -> int:
  with path.open('rb') as file:
    return 8 + int.from_bytes(file.read(8), 'little')


def _json(path: pathlib.Path) -> dict:
  if not path.is_file():
    raise FileNotFoundError(
      f'{path}: no such file; a Hugging Face directory needs it. Give the '
      'directory that holds it.'
    )
  try:
    value = json.loads(path.read_text('utf-8'))
  except ValueError as e:
    raise ValueError(f'{path}: is not JSON ({e}). Fetch it again.') from e
  if not isinstance(value, dict):
    raise ValueError(
      f'{path}: holds a {type(value).__name__}; a JSON object is needed. '
      'Fetch it again.'
    )
  return value
