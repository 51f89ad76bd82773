"""A quantized model as a Hugging Face directory in compressed-tensors format.

  OUTPUT/config.json          the model's, with quantization_config
  OUTPUT/model*.safetensors   integers and scales as they are, the rest float
  OUTPUT/tokenizer.json, tokenizer_config.json

transformers (with compressed-tensors), vLLM and jaxq read it. Nothing quantized
is rounded again; other parameters are float32, or bfloat16 beside the block
formats (mxfp4, mxfp8, nvfp4), which transformers decodes to that. What the
format cannot hold is refused, in one sentence that names the linear. Linears
that differ (mixed precision, another input scheme) become config groups of
their own. Blocks are read one at a time; memory is that of one block and one
shard of weights.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  NumPy learns bfloat16 from it.
import numpy as np
import safetensors.numpy

from jaxq.io import architectures, hf_config
from jaxq.io import compressed_tensors as ct
from jaxq.nn import linear, taps
from jaxq.numerics import binary, qarray

Tree = Mapping[str, Any]

SHARD_NBYTES = 1 << 30
_KV = {'k_cache': 'k_scale', 'v_cache': 'v_scale'}
_CLASSES = {
  'gemma2': 'Gemma2ForCausalLM',
  'gemma3_text': 'Gemma3ForCausalLM',
  'llama': 'LlamaForCausalLM',
  'mistral': 'MistralForCausalLM',
  'mixtral': 'MixtralForCausalLM',
  'opt': 'OPTForCausalLM',
  'phi3': 'Phi3ForCausalLM',
  'qwen2': 'Qwen2ForCausalLM',
  'qwen3': 'Qwen3ForCausalLM',
  'qwen3_moe': 'Qwen3MoeForCausalLM',
}


def export(
  source: Any, output: str | os.PathLike, *, shard_nbytes: int = SHARD_NBYTES
) -> pathlib.Path:
  """Writes a quantized source; returns the directory.

  Args:
    source: what models.open_model(...).source is for a quantized model: it has
      config, num_blocks, quantization, outside(), block(i) and tokenizer().
    output: a directory that does not exist, or is empty.
    shard_nbytes: a new safetensors file is begun at this size.

  Raises:
    ValueError: a float source, a path that is taken, or a model that the format
      cannot hold; the message names the linear and the reason.
  """
  output = pathlib.Path(output)
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise ValueError(
      f'{output} exists and is not an empty directory; the output must be '
      'new. Choose another --output.'
    )
  if getattr(source, 'quantization', None) is None:
    raise ValueError(
      'export: the source is float; compressed-tensors holds quantized models.'
      ' Run experiments.calibrate on it first.'
    )
  config = source.config
  if config.get('model_type') not in _CLASSES:
    raise NotImplementedError(
      f'export: model_type {config.get("model_type")!r}; allowed are '
      f'{sorted(_CLASSES)}. Use a decoder of one of these.'
    )
  partial = output.with_name(output.name + '.partial')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    dtype = _float_dtype(source.block(0)['params'])
    plan = _Plan(dtype)
    shards = _Shards(partial, shard_nbytes)
    outside = source.outside()
    tied = 'head' not in outside
    config = {**config, 'tie_word_embeddings': tied}
    entries = architectures.outside(config)
    shards.add(_tensors(entries, outside, {}, plan))
    for i in range(source.num_blocks):
      block = source.block(i)
      entries = architectures.block(config, i)
      shards.add(_tensors(entries, block['params'], block['quant'], plan))
    if tied:
      plan.ignored.append('lm_head')
    shards.finish()
    _write_json(
      partial / 'config.json',
      _model_config(config)
      | {'torch_dtype': dtype, 'quantization_config': plan.config()},
    )
    tokenizer = source.tokenizer()
    (partial / 'tokenizer.json').write_text(tokenizer.to_str(), 'utf-8')
    _write_json(partial / 'tokenizer_config.json', _tokenizer_config(source))
    if output.exists():
      output.rmdir()
    os.rename(partial, output)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  return output


class _Plan:
  """What quantization_config will say; filled linear by linear."""

  def __init__(self, dtype: str):
    self.dtype = np.dtype(dtype)  # Of what is not quantized.
    self.groups: dict[str, dict] = {}  # Arguments as text -> group.
    self.ignored: list[str] = []
    self.kv_cache: dict | None = None

  def add_linear(
    self, module: str, q: qarray.QArray, act: linear.ActQuant | None
  ) -> str:
    """Notes a quantized linear; returns the format of its tensors."""
    reason = ct.why_not(q.spec)
    if act is not None:
      reason = reason or ct.why_not_input(act)
    if reason:
      raise ValueError(
        f'{module} cannot be written in compressed-tensors format: {reason}.'
      )
    format_name = ct.format_of(q.spec, None if act is None else act.spec)
    group = {
      'format': format_name,
      'input_activations': None if act is None else ct.input_args(act),
      'output_activations': None,
      'weights': ct.args_of(q.spec),
    }
    key = json.dumps(group, sort_keys=True)
    self.groups.setdefault(key, {**group, 'targets': []})
    self.groups[key]['targets'].append(module)
    return format_name

  def add_cache(self, module: str, act: linear.ActQuant) -> None:
    """Notes a key or value scale."""
    args = ct.input_args(act)
    reason = ct.why_not_input(act)
    if act.scale is None or act.zero_point is not None:
      reason = 'its cache scales must be stored and symmetric'
    if self.kv_cache not in (None, args):
      reason = 'its cache differs from that of other blocks'
    if reason:
      raise ValueError(
        f'{module} cannot be written in compressed-tensors format: {reason}.'
      )
    self.kv_cache = args

  def config(self) -> dict[str, Any]:
    """quantization_config, as compressed-tensors writes it."""
    groups = list(self.groups.values())
    formats = sorted({group['format'] for group in groups})
    if len(groups) == 1:
      groups = [{**groups[0], 'targets': ['Linear']}]
    return {
      'config_groups': {f'group_{i}': g for i, g in enumerate(groups)},
      'format': formats[0] if len(formats) == 1 else 'mixed-precision',
      'global_compression_ratio': None,
      'ignore': list(dict.fromkeys(self.ignored)),
      'kv_cache_scheme': self.kv_cache,
      'quant_method': 'compressed-tensors',
      'quantization_status': 'compressed',
      'sparsity_config': {},
      'transform_config': {},
      'version': ct.VERSION,
    }


class _Shards:
  """Safetensors files of about one size, and their index."""

  def __init__(self, folder: pathlib.Path, nbytes: int):
    self._folder, self._limit = folder, nbytes
    self._waiting: dict[str, np.ndarray] = {}
    self._written: list[tuple[pathlib.Path, list[str], int]] = []

  def add(self, tensors: Mapping[str, np.ndarray]) -> None:
    self._waiting.update(tensors)
    if sum(a.nbytes for a in self._waiting.values()) >= self._limit:
      self._flush()

  def _flush(self) -> None:
    path = self._folder / f'shard{len(self._written)}'
    safetensors.numpy.save_file(self._waiting, path, metadata={'format': 'pt'})
    nbytes = sum(a.nbytes for a in self._waiting.values())
    self._written.append((path, list(self._waiting), nbytes))
    self._waiting = {}

  def finish(self) -> None:
    if self._waiting:
      self._flush()
    count = len(self._written)
    if count == 1:
      os.rename(self._written[0][0], self._folder / 'model.safetensors')
      return
    weight_map: dict[str, str] = {}
    for i, (path, names, _) in enumerate(self._written):
      name = f'model-{i + 1:05d}-of-{count:05d}.safetensors'
      os.rename(path, self._folder / name)
      weight_map |= dict.fromkeys(names, name)
    total = sum(nbytes for _, _, nbytes in self._written)
    _write_json(
      self._folder / 'model.safetensors.index.json',
      {'metadata': {'total_size': total}, 'weight_map': weight_map},
    )


def _tensors(
  entries: tuple[architectures.Entry, ...],
  params: Tree,
  quant: Tree,
  plan: _Plan,
) -> dict[str, np.ndarray]:
  """The file's tensors of some leaves; every leaf must find its place."""
  left = dict(taps.leaves(params))
  marks = dict(taps.leaves(quant))
  by_name: dict[str, list[architectures.Entry]] = {}
  for entry in entries:
    by_name.setdefault(entry.hf.name, []).append(entry)
  out: dict[str, np.ndarray] = {}
  for name, parts in by_name.items():
    leaves = [left.pop('/'.join(entry.path)) for entry in parts]
    module = name.removesuffix('.weight')
    if any(isinstance(leaf, binary.BinaryArray) for leaf in leaves):
      raise ValueError(
        f'{module} cannot be written in compressed-tensors format: it holds '
        'signs and some rows in more bits (ptq161), and a tensor there has one '
        'type. Keep the jaxq directory, or calibrate with another --method.'
      )
    if any(isinstance(leaf, qarray.QArray) for leaf in leaves):
      q = _joined(module, leaves)
      acts = [_act(module, entry, marks) for entry in parts]
      if not all(_same(act, acts[0]) for act in acts):
        raise ValueError(
          f'{module} cannot be written in compressed-tensors format: its parts '
          'have different input quantizers.'
        )
      tensors = ct.write(q, plan.add_linear(module, q, acts[0]))
      if acts[0] is not None:
        tensors |= ct.write_input(acts[0])
      out |= {f'{module}.{key}': array for key, array in tensors.items()}
      continue
    out[name] = np.concatenate(
      [_in_file(entry, leaf) for entry, leaf in zip(parts, leaves, strict=True)]
    ).astype(plan.dtype)
    if parts[0].path[-1] == 'kernel':
      plan.ignored.append(module)
  _cache_scales(entries, marks, plan, out)
  if left or marks:
    raise ValueError(_unplaced(entries, left, marks))
  return out


def _float_dtype(params: Tree) -> str:
  """What transformers computes in with these weights."""
  specs = [
    leaf.spec for _, leaf in taps.leaves(params) if hasattr(leaf, 'spec')
  ]
  block = any(spec.is_block_format for spec in specs)
  return 'bfloat16' if block else 'float32'


def _joined(module: str, leaves: list[Any]) -> qarray.QArray:
  """Kernels that share a tensor, side by side along N."""
  if len(leaves) == 1:
    return leaves[0]
  specs = {getattr(leaf, 'spec', None) for leaf in leaves}
  spec = leaves[0].spec if len(specs) == 1 else None
  if spec is None or spec.granularity == 'tensor' or spec.dtype == 'nvfp4':
    raise ValueError(
      f'{module} cannot be written in compressed-tensors format: its parts are '
      'quantized differently, or have a scale per tensor each, and the file '
      'has one tensor for all.'
    )

  def join(name):
    if getattr(leaves[0], name) is None:
      return None
    return np.concatenate([np.asarray(getattr(q, name)) for q in leaves], -1)

  return qarray.QArray(
    qvalue=join('qvalue'),
    scale=join('scale'),
    zero_point=join('zero_point'),
    spec=spec,
    shape=(leaves[0].shape[0], sum(q.shape[1] for q in leaves)),
  )


def _act(module: str, entry: architectures.Entry, marks: dict) -> Any:
  """The input quantizer of a linear, taken from `marks`."""
  path = '/'.join(entry.path[:-1])
  if f'{path}/hadamard' in marks:
    raise ValueError(
      f'{module} cannot be written in compressed-tensors format: its input '
      'passes an online Hadamard transform. Calibrate with '
      '--set=rotate.online=false.'
    )
  if f'{path}/low_rank' in marks:
    raise ValueError(
      f'{module} cannot be written in compressed-tensors format: a low-rank '
      'term of its float input stands beside the kernel, and the format has '
      'the kernel and an input quantizer only. Keep the jaxq directory, or '
      'calibrate without quant_experts and mergequant.compensate=keep.'
    )
  if f'{path}/split' in marks:
    raise ValueError(
      f'{module} cannot be written in compressed-tensors format: channels of '
      'its input are split into several (mergequant), and the format has one '
      'row per channel. Keep the jaxq directory, or calibrate with another '
      '--method.'
    )
  return ct.stored_input(marks.pop(f'{path}/input', None))


def _same(a: Any, b: Any) -> bool:
  if a is None or b is None:
    return a is b
  if type(a) is not type(b) or a.spec != b.spec:
    return False
  return all(
    x is y or (x is not None and y is not None and np.array_equal(x, y))
    for x, y in ((a.scale, b.scale), (a.zero_point, b.zero_point))
  )


def _in_file(entry: architectures.Entry, leaf: Any) -> np.ndarray:
  """A float leaf as the file has it; rows in front of it are zeros."""
  array = np.asarray(leaf, np.float32)
  if entry.path[-1] == 'kernel':
    array = array.T
  if entry.hf.plus:
    array = array - np.float32(entry.hf.plus)
  if entry.path == ('embed', 'positions'):
    array = np.pad(array, ((entry.hf.start, 0), (0, 0)))
  return np.ascontiguousarray(array)


def _cache_scales(entries, marks: dict, plan: _Plan, out: dict) -> None:
  """Moves key and value scales from `marks` to the file's tensors."""
  for ours, theirs in _KV.items():
    act = marks.pop(f'attention/{ours}', None)
    if act is not None:
      names = (
        e.hf.name for e in entries if e.path[:2] == ('attention', 'k_proj')
      )
      prefix = next(names).rsplit('.', 2)[0]
      plan.add_cache(prefix, act)
      out[f'{prefix}.{theirs}'] = np.asarray(act.scale, np.float32).reshape(1)


def _unplaced(entries, left: dict, marks: dict) -> str:
  """The message for a leaf that the format has no place for."""
  path = next(iter([*left, *marks]))
  folder = tuple(path.split('/')[:-1])
  names = [e.hf.name for e in entries if e.path[:-1] == folder]
  module = names[0].rsplit('.', 1)[0] if names else path
  what = path.rsplit('/', 1)[-1]
  fix = {
    'bias': 'Calibrate without shifts: shift or symmetrize=never',
    'output': 'Calibrate with an empty METHOD.bmm, as in --set=os_plus.bmm=',
  }.get(what, 'Calibrate with another method')
  return (
    f'{module} cannot be written in compressed-tensors format: it has '
    f'{what!r} ({path}), for which neither the architecture nor the format has '
    f'a place. {fix}.'
  )


def _model_config(config: Mapping[str, Any]) -> dict[str, Any]:
  """config.json in the spelling of the model type."""
  model_type = config['model_type']
  aliases = hf_config.ALIASES.get(model_type, {})
  names = {ours: theirs for theirs, ours in aliases.items()}
  out = {names.get(k, k): v for k, v in config.items() if v is not None}
  return out | {'architectures': [_CLASSES[model_type]]}


def _tokenizer_config(source: Any) -> dict[str, Any]:
  """What transformers needs beside tokenizer.json."""
  tokenizer, config = source.tokenizer(), source.config
  out: dict[str, Any] = {'tokenizer_class': 'PreTrainedTokenizerFast'}
  eos = config.get('eos_token_id')
  eos = eos[0] if isinstance(eos, list | tuple) and eos else eos
  for key, index in (
    ('bos_token', config.get('bos_token_id')),
    ('eos_token', eos),
  ):
    token = tokenizer.id_to_token(index) if isinstance(index, int) else None
    if token is not None:
      out[key] = token
  return out


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n', 'utf-8')
