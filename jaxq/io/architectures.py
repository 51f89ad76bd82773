"""Where a decoder's tensors stand in each file format.

`block(config, i)` and `outside(config)` give one `Entry` per leaf of our
parameter tree: its path, its shape, and the tensor that holds it in Hugging
Face and in GGUF files. Both formats store a linear layer as (out, in); our
kernels are (K, N) = (in, out), so `place` transposes them. What a format packs
together or stores shifted is undone here, so that methods see one form:

  fused   Phi-3's qkv_proj and gate_up_proj are split by rows
  stacked GGUF's experts are split along the leading axis
  shifted Gemma's norms hold scale - 1 in Hugging Face files; OPT's positions
          have two unused rows in front

`config` is what hf_config.read returns. A GGUF reader makes the same keys from
its metadata; rows of q and k that it interleaves are its own to reorder.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

Config = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
  """A leaf's place in a file.

  name: of the file's tensor. shape: of all of that tensor.
  start: the leaf's first row in it, after `index`.
  index: which of its leading axis; None: there is no such axis.
  plus: added to its values.
  """

  name: str
  shape: tuple[int, ...]
  start: int = 0
  index: int | None = None
  plus: float = 0.0

  def leaf(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The leaf's own values, as the file has them: (out, in) for linears."""
    if self.index is not None:
      array = array[self.index]
    array = array[self.start : self.start + shape[0]]
    return array + np.asarray(self.plus, array.dtype) if self.plus else array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """A leaf: its path in the tree, its shape in files, its place in each.

  gguf is None where that format does not define the architecture.
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  hf: Tensor
  gguf: Tensor | None


# model_type -> general.architecture of GGUF files that hold it.
GGUF_ARCHITECTURES = {
  'llama': 'llama',
  'mistral': 'llama',
  'mixtral': 'llama',
  'qwen2': 'qwen2',
  'qwen3': 'qwen3',
  'qwen3_moe': 'qwen3moe',
  'gemma2': 'gemma2',
  'gemma3_text': 'gemma3',
  'phi3': 'phi3',
}


def block(config: Config, i: int) -> tuple[Entry, ...]:
  """The tensors of block i."""
  if config['model_type'] == 'opt':
    return _opt_block(config, i)
  C = config['hidden_size']
  gemma = config['model_type'] in ('gemma2', 'gemma3_text')
  make = _Maker(f'model.layers.{i}.', f'blk.{i}.', float(gemma))
  make.norm('input_norm', 'input_layernorm', 'attn_norm', C)
  _attention(make, config)
  if gemma:
    post = 'post_attention_norm'
    make.norm('attention_out_norm', 'post_attention_layernorm', post, C)
    make.norm('post_norm', 'pre_feedforward_layernorm', 'ffn_norm', C)
    post = 'post_ffw_norm'
    make.norm('mlp_out_norm', 'post_feedforward_layernorm', post, C)
  else:
    make.norm('post_norm', 'post_attention_layernorm', 'ffn_norm', C)
  if is_sparse(config, i):
    _experts(make, config)
  else:
    _mlp(make, config)
  return tuple(make.entries)


def outside(config: Config) -> tuple[Entry, ...]:
  """The tensors outside the blocks; no head where it is tied."""
  V, C = config['vocab_size'], config['hidden_size']
  opt = config['model_type'] == 'opt'
  gemma = config['model_type'] in ('gemma2', 'gemma3_text')
  make = _Maker('model.decoder.' if opt else 'model.', '', float(gemma))
  make.add(
    'embed/embedding', (V, C), 'embed_tokens.weight', 'token_embd.weight'
  )
  if opt:
    P = config['max_position_embeddings']
    name = 'embed_positions.weight'
    make.add('embed/positions', (P, C), name, '', rows=P + 2, start=2)
    make.norm('final_norm', 'final_layer_norm', '', C, bias=True)
  else:
    make.norm('final_norm', 'norm', 'output_norm', C)
  make.prefix = ''
  if not config['tie_word_embeddings']:
    make.add('head/kernel', (V, C), 'lm_head.weight', 'output.weight')
  return tuple(_without_gguf(make.entries) if opt else make.entries)


def is_sparse(config: Config, i: int) -> bool:
  """Whether block i has experts in place of one MLP."""
  if 'num_local_experts' not in config:
    return False
  step = config.get('decoder_sparse_step', 1)
  return i not in config.get('mlp_only_layers', ()) and (i + 1) % step == 0


def every_tensor(config: Config, style: str) -> dict[str, Tensor]:
  """All tensors a file of `style` ('hf' or 'gguf') must hold, by name."""
  entries = [*outside(config)]
  for i in range(config['num_hidden_layers']):
    entries += block(config, i)
  found = (getattr(entry, style) for entry in entries)
  return {tensor.name: tensor for tensor in found}


def check_block(i: int, config: Config, where: str) -> None:
  """Raises ValueError unless i is a block of the model."""
  num_blocks = config['num_hidden_layers']
  if not 0 <= i < num_blocks:
    raise ValueError(
      f'{where}: block {i} was asked for; allowed are 0..{num_blocks - 1}.'
    )


def check_names(
  found: Iterable[str], config: Config, style: str, where: str
) -> None:
  """Raises ValueError naming tensors that are missing or not expected."""
  expected = every_tensor(config, style)
  found = set(found)
  missing = [name for name in expected if name not in found]
  if missing:
    raise ValueError(
      f'{where}: {len(missing)} tensors are missing, first {missing[:3]}; a '
      f'{config["model_type"]} model of {config["num_hidden_layers"]} blocks '
      f'needs {len(expected)}. Fetch the file again.'
    )
  extra = sorted(found - set(expected))
  if extra:
    raise ValueError(
      f'{where}: {len(extra)} tensors are not expected in a '
      f'{config["model_type"]} model, first {extra[:3]}; allowed are those of '
      f'{sorted(expected)[:3]} and so on. This is another architecture.'
    )


def check_shape(shape: Iterable[int], tensor: Tensor, where: str) -> None:
  """Raises ValueError when a tensor's shape contradicts the configuration."""
  if tuple(shape) != tensor.shape:
    raise ValueError(
      f'{where}: tensor {tensor.name} has shape {tuple(shape)}; the '
      f'configuration asks for {tensor.shape}. File and configuration do not '
      'belong together.'
    )


def check_finite(leaf: np.ndarray, where: str) -> None:
  """Raises ValueError if weights, or a part of them, are NaN or infinite."""
  bad = leaf.size - np.count_nonzero(np.isfinite(leaf))
  if bad:
    raise ValueError(
      f'{where}: {bad} of {leaf.size} values are NaN or infinite; weights '
      'must be finite. Fetch or export the file again.'
    )


def place(params: dict, entry: Entry, leaf: np.ndarray, where: str) -> None:
  """Writes a leaf as its file has it into the tree, float32, kernels (K, N)."""
  leaf = np.asarray(leaf, np.float32)
  check_finite(leaf, where)
  if entry.path[-1] == 'kernel':
    leaf = np.ascontiguousarray(leaf.T)  # (out, in) -> (K, N)
  *folders, name = entry.path
  for folder in folders:
    params = params.setdefault(folder, {})
  params[name] = leaf


class _Maker:
  """Collects entries under one prefix per format."""

  def __init__(self, prefix: str, gguf: str, norm_plus: float = 0.0):
    self.entries: list[Entry] = []
    self.prefix, self._gguf, self._plus = prefix, gguf, norm_plus

  def add(
    self,
    path: str,
    shape: tuple[int, ...],
    hf: str,
    gguf: str,
    *,
    rows: int | None = None,
    start: int = 0,
    gguf_rows: int | None = None,
    gguf_stack: tuple[int, int] | None = None,
    plus: float = 0.0,
  ) -> None:
    """A leaf; rows: of the tensors it shares, from its row `start`.

    gguf_stack: (index, count) of the leading axis it has in GGUF only.
    """
    whole = (rows or shape[0], *shape[1:])
    index, count = gguf_stack or (None, 0)
    self.entries.append(
      Entry(
        path=tuple(path.split('/')),
        shape=shape,
        hf=Tensor(name=self.prefix + hf, shape=whole, start=start, plus=plus),
        gguf=Tensor(
          name=self._gguf + gguf,
          shape=(count, *shape) if gguf_stack else whole,
          start=start,
          index=index,
        ),
      )
    )

  def norm(
    self, path: str, hf: str, gguf: str, size: int, bias: bool = False
  ) -> None:
    weight = (f'{hf}.weight', f'{gguf}.weight')
    self.add(f'{path}/scale', (size,), *weight, plus=self._plus)
    if bias:
      self.add(f'{path}/bias', (size,), f'{hf}.bias', f'{gguf}.bias')

  def linear(
    self,
    path: str,
    hf: str,
    gguf: str,
    out: int,
    size: int,
    bias: bool = False,
    **shared,
  ) -> None:
    weight = (f'{hf}.weight', f'{gguf}.weight')
    self.add(f'{path}/kernel', (out, size), *weight, **shared)
    if bias:
      self.add(f'{path}/bias', (out,), f'{hf}.bias', f'{gguf}.bias', **shared)


def _attention(make: _Maker, config: Config) -> None:
  C, D = config['hidden_size'], config['head_dim']
  q, kv = (
    D * config[f'num_{name}_heads'] for name in ('attention', 'key_value')
  )
  bias = bool(config.get('attention_bias'))
  qkv_bias = bias or config['model_type'] == 'qwen2'
  sizes, start = {'q': q, 'k': kv, 'v': kv}, 0
  for name, size in sizes.items():
    hf, gguf = f'self_attn.{name}_proj', f'attn_{name}'
    shared: dict[str, Any] = {}
    if config['model_type'] == 'phi3':
      hf, gguf = 'self_attn.qkv_proj', 'attn_qkv'
      shared = {'rows': q + 2 * kv, 'start': start}
    path = f'attention/{name}_proj'
    make.linear(path, hf, gguf, size, C, qkv_bias, **shared)
    start += size
  path = 'attention/o_proj'
  make.linear(path, 'self_attn.o_proj', 'attn_output', C, q, bias)
  if has_qk_norm(config):
    for name in 'qk':
      hf, gguf = f'self_attn.{name}_norm', f'attn_{name}_norm'
      make.norm(f'attention/{name}_norm', hf, gguf, D)


def has_qk_norm(config: Config) -> bool:
  """Whether the heads of q and k pass an RMSNorm."""
  return config['model_type'] in ('qwen3', 'qwen3_moe', 'gemma3_text')


def _mlp(make: _Maker, config: Config) -> None:
  C, F = config['hidden_size'], config['intermediate_size']
  bias = bool(config.get('mlp_bias'))
  for i, name in enumerate(('gate', 'up')):
    hf, gguf = f'mlp.{name}_proj', f'ffn_{name}'
    shared: dict[str, Any] = {}
    if config['model_type'] == 'phi3':
      hf, gguf = 'mlp.gate_up_proj', 'ffn_up'
      shared = {'rows': 2 * F, 'start': i * F}
    make.linear(f'mlp/{name}_proj', hf, gguf, F, C, bias, **shared)
  make.linear('mlp/down_proj', 'mlp.down_proj', 'ffn_down', C, F, bias)


def _experts(make: _Maker, config: Config) -> None:
  C, E = config['hidden_size'], config['num_local_experts']
  F: int = config.get('moe_intermediate_size') or config['intermediate_size']
  if config['model_type'] == 'mixtral':
    folder, names = 'block_sparse_moe', {'gate': 'w1', 'up': 'w3', 'down': 'w2'}
  else:
    folder = 'mlp'
    names = {name: f'{name}_proj' for name in ('gate', 'up', 'down')}
  make.linear('mlp/router', f'{folder}.gate', 'ffn_gate_inp', E, C)
  for e in range(E):
    for name, hf in names.items():
      out, size = (C, F) if name == 'down' else (F, C)
      make.linear(
        f'mlp/expert_{e}/{name}_proj',
        f'{folder}.experts.{e}.{hf}',
        f'ffn_{name}_exps',
        out,
        size,
        gguf_stack=(e, E),
      )


def _opt_block(config: Config, i: int) -> tuple[Entry, ...]:
  """LayerNorms, biases, one up and one down; not defined in GGUF."""
  C, F = config['hidden_size'], config['intermediate_size']
  bias = config['enable_bias']
  make = _Maker(f'model.decoder.layers.{i}.', '')
  make.norm('input_norm', 'self_attn_layer_norm', '', C, bias=True)
  for name in 'qkvo':
    hf = f'self_attn.{"out" if name == "o" else name}_proj'
    make.linear(f'attention/{name}_proj', hf, '', C, C, bias)
  make.norm('post_norm', 'final_layer_norm', '', C, bias=True)
  make.linear('mlp/up_proj', 'fc1', '', F, C, bias)
  make.linear('mlp/down_proj', 'fc2', '', C, F, bias)
  return tuple(_without_gguf(make.entries))


def _without_gguf(entries: Iterable[Entry]) -> Iterable[Entry]:
  return (dataclasses.replace(entry, gguf=None) for entry in entries)
