"""Quantized Hugging Face directories: compressed-tensors, GPTQ and AWQ.

A `QuantizedSource` gives blocks as a jaxq directory does, {'params', 'quant'}
with QArrays for kernels, read one block at a time and without requantizing: the
integers, scales and zero points are those of the file. Which linears are
quantized is told by their tensors; what these mean, by `quantization_config` in
config.json (or quantize_config.json, quant_config.json of older GPTQ and AWQ
checkpoints). What the file holds and we would not compute is refused.

METHODS has one line per format.
"""

import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import tokenizers

from jaxq.io import architectures, files, gptq_awq, hf, hf_config
from jaxq.io import compressed_tensors as ct
from jaxq.io import tokenizer as tokenizer_lib
from jaxq.nn import linear
from jaxq.numerics import qarray

Config = Mapping[str, Any]
Tensors = Mapping[str, np.ndarray]

# What older checkpoints call their quantization_config, and whose it is.
_OLD_CONFIGS = {'quantize_config.json': 'gptq', 'quant_config.json': 'awq'}
_KV_NAMES = {  # Our name: where its scale may stand, newest first.
  'k_cache': ('k_scale', 'k_proj.output_scale'),
  'v_cache': ('v_scale', 'v_proj.output_scale'),
}
_KV_ZEROS = ('k_zero_point', 'v_zero_point')


class Read(NamedTuple):
  """One linear: its kernel, and its part of the quant collection."""

  kernel: qarray.QArray
  quant: dict[str, Any]


class Reader(Protocol):
  """How one format stores linears.

  suffixes: names of a quantized linear's tensors, its bias left out.
  mark: a linear is quantized where it has one of these.
  scheme: for people, what the model was quantized to.
  kv_cache: arguments of the key and value scales, or None.
  """

  suffixes: tuple[str, ...]
  mark: tuple[str, ...]
  scheme: str
  kv_cache: Config | None

  def read(self, module: str, tensors: Tensors, where: str) -> Read: ...


class QuantizedSource:
  """A quantized model in a Hugging Face directory.

  Attributes:
    path: the directory.
    config: as hf_config.read gives it.
    quantization: {'scheme', 'format', 'config'}, as Model.quantization.

  Raises:
    FileNotFoundError: config.json, weights or a shard is missing.
    ValueError: files that are damaged or contradict each other.
    NotImplementedError: a model, a format or an option outside ours.
  """

  def __init__(self, path: str | pathlib.Path):
    self.path = pathlib.Path(path)
    raw, quantization = _configs(self.path)
    where = str(self.path / 'config.json')
    self.config = hf_config.read(raw, where)
    method = quantization.get('quant_method')
    if method not in METHODS:
      raise NotImplementedError(
        f'{where}: quant_method {method!r}; allowed are {sorted(METHODS)}. Use '
        'a model of one of these, or its float original.'
      )
    self._reader: Reader = METHODS[method](quantization, where)
    self._shard_of = hf.tensor_files(self.path)
    self._check_names()
    self.quantization = {
      'scheme': f'{method}: {self._reader.scheme}',
      'format': quantization.get('format', method),
      'config': quantization,
    }

  @property
  def num_blocks(self) -> int:
    return self.config['num_hidden_layers']

  def outside(self) -> dict:
    """Parameters outside the blocks; a quantized head is a QArray."""
    params, quant = self._read(architectures.outside(self.config))
    if quant:
      raise NotImplementedError(
        f'{self.path}: the head quantizes its inputs; jaxq keeps them float '
        'outside the blocks. Use a model that ignores lm_head.'
      )
    return params

  def block(self, i: int) -> dict:
    """{'params', 'quant'} of block i, read on each call."""
    architectures.check_block(i, self.config, str(self.path))
    entries = architectures.block(self.config, i)
    params, quant = self._read(entries)
    if self._reader.kv_cache is not None:
      quant.setdefault('attention', {}).update(self._kv_cache(entries))
    return {'params': params, 'quant': quant}

  def tokenizer(self) -> tokenizers.Tokenizer:
    """The tokenizer of tokenizer.json, without truncation and padding."""
    return tokenizer_lib.from_file(
      self.path / 'tokenizer.json', self.config['vocab_size']
    )

  def fingerprint(self) -> str:
    """Identity of the directory's content, independent of where it lies."""
    entries = []
    for name in sorted(set(self._shard_of.values())):
      path = self.path / name
      entries.append((name, path, hf.header_nbytes(path)))
    for name in ('config.json', 'tokenizer.json', *_OLD_CONFIGS):
      path = self.path / name
      if path.is_file():
        entries.append((name, path, path.stat().st_size))
    return files.fingerprint(entries, self.config)

  def _check_names(self) -> None:
    """Every tensor we need is there, and no other but known extras."""
    found = {n for n in self._shard_of if not n.endswith('rotary_emb.inv_freq')}
    if self.config['tie_word_embeddings']:
      found = {n for n in found if not n.startswith('lm_head.')}
    expected = architectures.every_tensor(self.config, 'hf')
    missing, used = [], set()
    for name in expected:
      module = name.removesuffix('.weight')
      if self._is_quantized(module):
        suffixes = (*self._reader.suffixes, 'bias')
        used |= {f'{module}.{suffix}' for suffix in suffixes}
      elif name in found:
        used.add(name)
      else:
        missing.append(name)
    if missing:
      raise ValueError(
        f'{self.path}: {len(missing)} tensors are missing, first {missing[:3]};'
        f' a {self.config["model_type"]} model of {self.num_blocks} blocks '
        'needs them, quantized or not. Fetch the directory again.'
      )
    extra = sorted(n for n in found - used if not self._is_kv_scale(n))
    if extra:
      raise ValueError(
        f'{self.path}: {len(extra)} tensors are not expected in a '
        f'{self.config["model_type"]} model, first {extra[:3]}; allowed are '
        f'its weights and, of quantized linears, {self._reader.suffixes}. This '
        'is another architecture or format.'
      )

  def _is_kv_scale(self, name: str) -> bool:
    if self._reader.kv_cache is None:
      return False
    names = sum(_KV_NAMES.values(), _KV_ZEROS)
    return any(name.endswith(f'.{n}') for n in names)

  def _is_quantized(self, module: str) -> bool:
    return any(f'{module}.{m}' in self._shard_of for m in self._reader.mark)

  def _read(self, entries) -> tuple[dict, dict]:
    """Leaves of the tree: kernels as QArrays where they are quantized."""
    params: dict = {}
    quant: dict = {}
    last: tuple[str, Any] = ('', None)  # Fused leaves are neighbours.
    for entry in entries:
      name = entry.hf.name
      module = name.removesuffix('.weight')
      if name.endswith('.weight') and self._is_quantized(module):
        if last[0] != module:
          last = (module, self._linear(module, entry.hf))
        read = last[1]
        path = entry.path[:-1]
        _set(params, entry.path, _columns(read.kernel, entry))
        for key, value in read.quant.items():
          _set(quant, (*path, key), value)
        if 'bias' not in _at(params, path):
          bias = self._extra_bias(module)
          if bias is not None:
            rows = slice(entry.hf.start, entry.hf.start + entry.shape[0])
            _set(params, (*path, 'bias'), bias[rows])
      else:
        where = f'{self.path / self._shard_of[name]}: tensor {name}'
        array = hf.floating(self._tensor(name), where)
        architectures.check_shape(array.shape, entry.hf, where)
        leaf = entry.hf.leaf(array, entry.shape)
        architectures.place(params, entry, leaf, where)
    return params, quant

  def _linear(self, module: str, tensor: architectures.Tensor) -> Read:
    names = [
      s for s in self._reader.suffixes if f'{module}.{s}' in self._shard_of
    ]
    tensors = {s: self._tensor(f'{module}.{s}') for s in names}
    where = f'{self.path}: {module}'
    read = self._reader.read(module, tensors, where)
    if read.kernel.shape != tensor.shape[::-1]:
      raise ValueError(
        f'{where} holds weights of shape {read.kernel.shape[::-1]}; the '
        f'configuration asks for {tensor.shape}. File and configuration do not '
        'belong together.'
      )
    if not np.all(np.isfinite(np.asarray(read.kernel.scale, np.float32))):
      raise ValueError(
        f'{where} has scales that are NaN or infinite; they must be finite. '
        'Fetch or export the file again.'
      )
    return read

  def _extra_bias(self, module: str) -> np.ndarray | None:
    """A bias that the architecture has not; one of zeros does not count."""
    name = f'{module}.bias'
    expected = architectures.every_tensor(self.config, 'hf')
    if name not in self._shard_of or name in expected:
      return None
    bias = self._tensor(name).astype(np.float32)
    return bias if np.any(bias) else None

  def _kv_cache(self, entries) -> dict[str, linear.ActQuant]:
    """{'k_cache', 'v_cache'} of the block whose tensors these are."""
    names = (
      e.hf.name for e in entries if e.path[:2] == ('attention', 'k_proj')
    )
    prefix = next(names).rsplit('.', 2)[0]  # 'model.layers.0.self_attn'
    out = {}
    for ours, candidates in _KV_NAMES.items():
      found = [n for n in candidates if f'{prefix}.{n}' in self._shard_of]
      if not found:
        raise ValueError(
          f'{self.path}: tensor {prefix}.{candidates[0]} is missing; '
          'kv_cache_scheme asks for it. Fetch the directory again.'
        )
      scale = self._tensor(f'{prefix}.{found[0]}')
      where = f'{self.path}: {prefix}'
      tensors = {'input_scale': scale}
      zero = f'{prefix}.{ours[0]}_zero_point'
      if zero in self._shard_of:
        tensors['input_zero_point'] = self._tensor(zero)
      if scale.size != 1:
        raise NotImplementedError(
          f'{where}: {found[0]} has {scale.size} scales; allowed is one per '
          'tensor. Use a model with kv_cache_scheme strategy tensor.'
        )
      out[ours] = ct.read_input(tensors, self._reader.kv_cache or {}, where)
    return out

  def _tensor(self, name: str) -> np.ndarray:
    path = self.path / self._shard_of[name]
    with hf.open_file(path) as file:
      if file.get_slice(name).get_dtype() == 'F8_E4M3':
        return _float8(path, name)
      return file.get_tensor(name)


class _CompressedTensors:
  """quant_method 'compressed-tensors'."""

  mark = ('weight_packed', 'weight_scale')
  suffixes = (
    *('weight', 'weight_packed', 'weight_scale', 'weight_shape'),
    *('weight_zero_point', 'weight_global_scale', 'weight_g_idx'),
    *('input_scale', 'input_zero_point', 'input_global_scale'),
  )

  def __init__(self, config: Config, where: str):
    where = f'{where}: quantization_config'
    for key in ('sparsity_config', 'transform_config'):
      if config.get(key) and any(_plain(config[key])):
        raise NotImplementedError(
          f'{where} has a {key}; jaxq cannot compute it. Use a model without.'
        )
    allowed = (*ct.FORMATS, 'mixed-precision')
    if config.get('format') not in allowed:
      raise NotImplementedError(
        f'{where}: format {config.get("format")!r}; allowed are '
        f'{sorted(allowed)}. Use a model in one of these.'
      )
    self._groups = []
    for name, group in (config.get('config_groups') or {}).items():
      self._check_group(group, f'{where}: {name}')
      self._groups.append(group)
    self._ignore = tuple(config.get('ignore') or ())
    self.kv_cache = config.get('kv_cache_scheme')
    if self.kv_cache and self.kv_cache.get('dynamic'):
      raise NotImplementedError(
        f'{where}: kv_cache_scheme is dynamic; allowed are stored scales. Use '
        'a model with them.'
      )
    self.scheme = config['format']

  def _check_group(self, group: Any, where: str) -> None:
    if not isinstance(group, Mapping) or 'targets' not in group:
      raise NotImplementedError(
        f'{where} is {type(group).__name__}; a group must spell out targets, '
        'weights and input_activations. Save the model with a newer '
        'compressed-tensors.'
      )
    if group.get('output_activations'):
      raise NotImplementedError(
        f'{where} quantizes output_activations; jaxq quantizes weights and '
        'inputs. Use a model without.'
      )
    if not group.get('weights'):
      raise NotImplementedError(
        f'{where} has no weights arguments; jaxq quantizes inputs only where '
        'it quantizes weights. Use a model that does.'
      )
    ct.weight_spec(group['weights'], where)
    if group.get('input_activations'):
      ct.input_spec(group['input_activations'], where)

  def read(self, module: str, tensors: Tensors, where: str) -> Read:
    group = self._group(module)
    if group is None:
      raise ValueError(
        f'{where} has quantized tensors {sorted(tensors)} and no group of '
        'quantization_config names it; each quantized linear needs one. Save '
        'the model again.'
      )
    args = group['weights']
    kernel = ct.read(tensors, ct.weight_spec(args, where), args, where)
    quant = {}
    if group.get('input_activations'):
      quant['input'] = ct.read_input(tensors, group['input_activations'], where)
    return Read(kernel, quant)

  def _group(self, module: str) -> Config | None:
    """The most specific group: by name, by expression, by class."""
    if any(_names(pattern, module) for pattern in self._ignore):
      return None
    by_rank: dict[int, Config] = {}
    for group in self._groups:
      for target in group['targets']:
        rank = 2 if target == 'Linear' else 1 if target[:3] == 're:' else 0
        if target == 'Linear' or _names(target, module):
          by_rank.setdefault(rank, group)
    return by_rank[min(by_rank)] if by_rank else None


class _Gptq:
  """quant_method 'gptq'."""

  mark = ('qweight',)
  suffixes = ('qweight', 'qzeros', 'scales', 'g_idx')
  kv_cache = None

  def __init__(self, config: Config, where: str):
    gptq_awq.check_gptq(config, f'{where}: quantization_config')
    self._config = config
    self.scheme = f'W{config["bits"]}A16'

  def read(self, module: str, tensors: Tensors, where: str) -> Read:
    del module  # All linears are alike.
    kernel, permute = gptq_awq.read_gptq(tensors, self._config, where)
    return Read(kernel, {} if permute is None else {'permute': permute})


class _Awq:
  """quant_method 'awq'."""

  mark = ('qweight',)
  suffixes = ('qweight', 'qzeros', 'scales')
  kv_cache = None
  scheme = 'W4A16'

  def __init__(self, config: Config, where: str):
    gptq_awq.check_awq(config, f'{where}: quantization_config')
    self._config = config

  def read(self, module: str, tensors: Tensors, where: str) -> Read:
    del module  # All linears are alike.
    kernel, _ = gptq_awq.read_awq(tensors, self._config, where)
    return Read(kernel, {})


# quant_method: (quantization_config, where) -> Reader.
METHODS: dict[str, Callable[[Config, str], Any]] = {
  'awq': _Awq,
  'compressed-tensors': _CompressedTensors,
  'gptq': _Gptq,
}


def open_directory(path: pathlib.Path) -> hf.HfSource | QuantizedSource:
  """A float or a quantized Hugging Face directory, as config.json says."""
  if is_quantized(path):
    return QuantizedSource(path)
  return hf.HfSource(path)


def is_quantized(path: pathlib.Path) -> bool:
  """Whether the directory says how its weights were quantized."""
  config = path / 'config.json'
  if not config.is_file():
    return False
  return bool(_configs(path)[1])


def _configs(path: pathlib.Path) -> tuple[dict, dict]:
  """config.json without its quantization_config, and that."""
  raw = hf.read_json(path / 'config.json')
  quantization = raw.pop('quantization_config', None)
  quantization = raw.pop('compression_config', None) or quantization
  for name, method in _OLD_CONFIGS.items():
    if not quantization and (path / name).is_file():
      quantization = {'quant_method': method, **hf.read_json(path / name)}
  return raw, dict(quantization or {})


def _float8(path: pathlib.Path, name: str) -> np.ndarray:
  """An F8_E4M3 tensor, which safetensors does not give to NumPy."""
  with path.open('rb') as file:
    size = int.from_bytes(file.read(8), 'little')
    entry = json.loads(file.read(size))[name]
    start, end = entry['data_offsets']
    file.seek(8 + size + start)
    data = np.frombuffer(file.read(end - start), ml_dtypes.float8_e4m3fn)
  return data.reshape(entry['shape'])


def _names(pattern: str, module: str) -> bool:
  """Whether a target or ignore pattern names a module, as the format has it."""
  if pattern.startswith('re:'):
    return re.match(pattern[3:], module) is not None
  return pattern == module


def _columns(q: qarray.QArray, entry: architectures.Entry) -> qarray.QArray:
  """The leaf's output channels of a kernel that several leaves share."""
  start, size = entry.hf.start, entry.shape[0]
  K, N = q.shape
  if size == N:
    return q

  def cut(leaf):
    if leaf is None or leaf.shape[-1] == 1:
      return leaf
    return np.ascontiguousarray(leaf[:, start : start + size])

  return qarray.QArray(
    qvalue=cut(q.qvalue),
    scale=cut(q.scale),
    zero_point=cut(q.zero_point),
    tensor_scale=q.tensor_scale,
    spec=q.spec,
    shape=(K, size),
  )


def _set(tree: dict, path: tuple[str, ...], value: Any) -> None:
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = value


def _at(tree: dict, path: tuple[str, ...]) -> dict:
  for key in path:
    tree = tree.get(key, {})
  return tree


def _plain(config: Any) -> list:
  """What a section of a config says; empty sections say nothing."""
  if isinstance(config, Mapping):
    return [v for v in config.values() if v and v != 'dense']
  return [config]
