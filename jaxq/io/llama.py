"""Where a Llama model's tensors stand in each file format.

One table maps a path in our parameter tree to the tensor's name in Hugging
Face and in GGUF files, with its shape in the file. Both formats store a
linear layer as (out, in); our kernels are (K, N) = (in, out), so `place`
transposes them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

Config = dict[str, Any]
REQUIRED = (
  'vocab_size',
  'hidden_size',
  'intermediate_size',
  'num_hidden_layers',
  'num_attention_heads',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """One tensor: tree path, file names ('{i}' is the block), file shape."""

  path: tuple[str, ...]
  hf: str
  gguf: str
  shape: Callable[[Config], tuple[int, ...]]


def _c(config: Config) -> tuple[int, ...]:
  return (config['hidden_size'],)


def _vc(config: Config) -> tuple[int, ...]:
  return (config['vocab_size'], config['hidden_size'])


def _qc(config: Config) -> tuple[int, ...]:
  heads, head_dim = config['num_attention_heads'], config['head_dim']
  return (heads * head_dim, config['hidden_size'])


def _kc(config: Config) -> tuple[int, ...]:
  heads, head_dim = config['num_key_value_heads'], config['head_dim']
  return (heads * head_dim, config['hidden_size'])


def _cq(config: Config) -> tuple[int, ...]:
  return _qc(config)[::-1]


def _fc(config: Config) -> tuple[int, ...]:
  return (config['intermediate_size'], config['hidden_size'])


def _cf(config: Config) -> tuple[int, ...]:
  return _fc(config)[::-1]


def _entry(path: str, hf: str, gguf: str, shape) -> Entry:
  return Entry(path=tuple(path.split('/')), hf=hf, gguf=gguf, shape=shape)


def _block(path: str, hf: str, gguf: str, shape) -> Entry:
  hf, gguf = f'model.layers.{{i}}.{hf}.weight', f'blk.{{i}}.{gguf}.weight'
  return _entry(path, hf, gguf, shape)


BLOCK = (
  _block('input_norm/scale', 'input_layernorm', 'attn_norm', _c),
  _block('attention/q_proj/kernel', 'self_attn.q_proj', 'attn_q', _qc),
  _block('attention/k_proj/kernel', 'self_attn.k_proj', 'attn_k', _kc),
  _block('attention/v_proj/kernel', 'self_attn.v_proj', 'attn_v', _kc),
  _block('attention/o_proj/kernel', 'self_attn.o_proj', 'attn_output', _cq),
  _block('post_norm/scale', 'post_attention_layernorm', 'ffn_norm', _c),
  _block('mlp/gate_proj/kernel', 'mlp.gate_proj', 'ffn_gate', _fc),
  _block('mlp/up_proj/kernel', 'mlp.up_proj', 'ffn_up', _fc),
  _block('mlp/down_proj/kernel', 'mlp.down_proj', 'ffn_down', _cf),
)

_EMBED = 'model.embed_tokens.weight'
_OUTSIDE = (
  _entry('embed/embedding', _EMBED, 'token_embd.weight', _vc),
  _entry('final_norm/scale', 'model.norm.weight', 'output_norm.weight', _c),
  _entry('head/kernel', 'lm_head.weight', 'output.weight', _vc),
)


def outside(config: Config) -> tuple[Entry, ...]:
  """The tensors outside the blocks; no head where it is tied."""
  return _OUTSIDE[:2] if config['tie_word_embeddings'] else _OUTSIDE


def every_name(config: Config, style: str) -> dict[str, Entry]:
  """All tensor names a file of `style` ('hf' or 'gguf') must hold."""
  names = {getattr(e, style): e for e in outside(config)}
  for i in range(config['num_hidden_layers']):
    names.update({getattr(e, style).format(i=i): e for e in BLOCK})
  return names


def check_config(config: Config, where: str) -> None:
  """Raises ValueError unless sizes are positive and the heads divide.

  Fills in `head_dim` where the file gives none.
  """
  for key in (*REQUIRED, 'num_key_value_heads'):
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise ValueError(
        f'{where}: {key}={value!r}; it must be a positive integer. Check that '
        'the file is a complete Llama model.'
      )
  heads, kv_heads = config['num_attention_heads'], config['num_key_value_heads']
  if heads % kv_heads:
    raise ValueError(
      f'{where}: num_attention_heads={heads}, num_key_value_heads={kv_heads}; '
      'the second must divide the first. Check the configuration.'
    )
  if config.get('head_dim') is None:
    config['head_dim'] = config['hidden_size'] // heads
  if config['head_dim'] < 2 or config['head_dim'] % 2:
    raise ValueError(
      f'{where}: head_dim={config["head_dim"]}; rotary embeddings need an '
      'even head_dim. Check the configuration.'
    )


def check_block(i: int, config: Config, where: str) -> None:
  """Raises ValueError unless i is a block of the model."""
  num_blocks = config['num_hidden_layers']
  if not 0 <= i < num_blocks:
    raise ValueError(
      f'{where}: block {i} was asked for; allowed are 0..{num_blocks - 1}.'
    )


def check_names(found, config: Config, style: str, where: str) -> None:
  """Raises ValueError naming tensors that are missing or not expected."""
  expected = every_name(config, style)
  missing = [name for name in expected if name not in found]
  if missing:
    raise ValueError(
      f'{where}: {len(missing)} tensors are missing, first {missing[:3]}; a '
      f'model of {config["num_hidden_layers"]} blocks needs {len(expected)}. '
      'Fetch the file again.'
    )
  extra = sorted(set(found) - set(expected))
  if extra:
    raise ValueError(
      f'{where}: {len(extra)} tensors are not expected in a Llama model, '
      f'first {extra[:3]}; allowed are those of {sorted(expected)[:3]} and so '
      'on. This is another architecture.'
    )


def check_shape(name: str, shape, entry: Entry, config: Config, where: str):
  """Raises ValueError when a tensor's shape contradicts the configuration."""
  expected = entry.shape(config)
  if tuple(shape) != expected:
    raise ValueError(
      f'{where}: tensor {name} has shape {tuple(shape)}; the configuration '
      f'asks for {expected}. File and configuration do not belong together.'
    )


def place(params: dict, entry: Entry, array: np.ndarray, where: str) -> None:
  """Writes a file tensor into the tree as float32, kernels as (K, N)."""
  array = np.asarray(array, np.float32)
  bad = array.size - np.count_nonzero(np.isfinite(array))
  if bad:
    raise ValueError(
      f'{where}: {bad} of {array.size} values are NaN or infinite; weights '
      'must be finite. Fetch or export the file again.'
    )
  if entry.path[-1] == 'kernel':
    array = np.ascontiguousarray(array.T)  # (out, in) -> (K, N)
  *folders, leaf = entry.path
  for folder in folders:
    params = params.setdefault(folder, {})
  params[leaf] = array
