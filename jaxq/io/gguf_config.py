"""A decoder's configuration in GGUF metadata, both ways.

`read` makes the keys of a config.json, checked by jaxq.io.hf_config, from the
metadata; `write` makes the metadata from them. What GGUF does not say is what
llama.cpp computes, so `write` refuses a model that differs from it:

  llama     also Mistral (no window) and Mixtral; q and k rows interleaved
  qwen3moe  the chosen experts' weights sum to one, all blocks are sparse
  gemma2    windows in even blocks; scores by 1 / sqrt(head_dim), in the
            largest model (46 blocks) by 1 / sqrt(hidden_size / heads)
  gemma3    windows in five of six blocks, theirs with rotary base 1e4; scores
            as gemma2's (62 blocks)

Llama 3's rotary scaling is a tensor of divisors in GGUF: it is recognised by
trying the parameters its releases have, and refused if none gives the divisors.

llama.cpp multiplies cos and sin by rope.scaling.attn_factor, and under yarn by
1 + ln(factor) / 10 as well; config.json's attention_factor is the product.

Keys under the architecture's name that `read` never asks for are refused, but
for those that change nothing.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxq.io import architectures, hf_config

Config = dict[str, Any]
Metadata = dict[str, Any]

ARCHITECTURES = tuple(sorted(set(architectures.GGUF_ARCHITECTURES.values())))
ROPE_FREQS = 'rope_freqs.weight'
LONG_FACTORS = 'rope_factors_long.weight'
SHORT_FACTORS = 'rope_factors_short.weight'
ROPE_TENSORS = (ROPE_FREQS, LONG_FACTORS, SHORT_FACTORS)

# config.json's key: the metadata's, after the architecture.
_KEYS = {
  'hidden_size': 'embedding_length',
  'intermediate_size': 'feed_forward_length',
  'num_hidden_layers': 'block_count',
  'num_attention_heads': 'attention.head_count',
  'rms_norm_eps': 'attention.layer_norm_rms_epsilon',
  'max_position_embeddings': 'context_length',
}
_LARGEST = {'gemma2': 46, 'gemma3': 62}
_WINDOWED = ('gemma2', 'gemma3', 'phi3')
_LLAMA_3 = {'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
_ATTN_FACTOR = 'rope.scaling.attn_factor'
# Keys that would change the maths -> the values under which they do not.
_FIXED: dict[str, tuple[Any, ...]] = {
  'attention.causal': (True,),
  'attention.sliding_window_pattern': (6,),  # Gemma 3's.
  'expert_gating_func': (1,),  # Softmax.
  'expert_shared_count': (0,),
  'expert_used_count': (0,),
  'expert_weights_norm': (True,),
  'expert_weights_scale': (0.0, 1.0),
  'pooling_type': (0,),
  'rope.scale_linear': (1.0,),
  'rope.scaling.factor': (0.0, 1.0),
  'rope.scaling.yarn_attn_factor': (1.0,),
  'rope.scaling.yarn_ext_factor': (1.0,),
  'rope.scaling.yarn_log_multiplier': (0.0,),
}
_HARMLESS = frozenset(
  (
    *('tensor_data_layout', 'rope.scaling.finetuned'),
    'attention.layer_norm_epsilon',  # No architecture here has LayerNorms.
  )
)


def read(
  metadata: Mapping[str, Any],
  shapes: Mapping[str, tuple[int, ...]],
  tensor: Callable[[str], np.ndarray],
  where: str,
) -> Config:
  """The metadata of a GGUF file as hf_config.read gives a config.json.

  Args:
    metadata: the file's key-value pairs.
    shapes: of its tensors, by name.
    tensor: reads one of ROPE_TENSORS.
    where: the file, for messages.

  Raises:
    NotImplementedError: an architecture or an option outside ours.
    ValueError: keys that are missing or make no model.
  """
  arch = metadata.get('general.architecture')
  if arch not in ARCHITECTURES:
    raise NotImplementedError(
      f'{where}: architecture {arch!r}; allowed are {list(ARCHITECTURES)}. '
      'Use a model of one of these.'
    )

  asked: set[str] = set()

  def get(key: str, default: Any = None) -> Any:
    asked.add(key)
    return metadata.get(f'{arch}.{key}', default)

  config = {name: get(key) for name, key in _KEYS.items()}
  embedding = shapes.get('token_embd.weight')
  config['vocab_size'] = get('vocab_size', embedding and embedding[0])
  config |= {key: get(key) for key in _needed(arch, get)}
  missing = sorted(key for key, value in config.items() if value is None)
  if missing:
    raise ValueError(
      f'{where}: the metadata lacks {missing}; a {arch} file must give them. '
      'Convert the model again.'
    )
  config = {k: v for k, v in config.items() if k not in _needed(arch, get)}
  config |= {
    'model_type': _model_type(arch, get('expert_count', 0)),
    'num_key_value_heads': get('attention.head_count_kv'),
    'head_dim': get('attention.key_length'),
    'rope_theta': float(get('rope.freq_base', 10000.0)),
    'tie_word_embeddings': 'output.weight' not in shapes,
    'bos_token_id': metadata.get('tokenizer.ggml.bos_token_id'),
    'eos_token_id': metadata.get('tokenizer.ggml.eos_token_id'),
    'rope_scaling': _scaling(get, shapes, tensor, where),
  }
  config |= _particular(arch, config, get, shapes, where)
  config = hf_config.read(config, where)
  _check_lengths(arch, config, get, where)
  _check_keys(arch, metadata, asked, config, where)
  if ROPE_FREQS in shapes:
    config['rope_scaling'] = _llama3(config, tensor(ROPE_FREQS), where)
  return config


def write(config: Config) -> Metadata:
  """The metadata of a model, without `general` and the tokenizer.

  Raises:
    NotImplementedError: a model that GGUF does not define.
  """
  kind = config['model_type']
  arch = architectures.GGUF_ARCHITECTURES.get(kind)
  if arch is None:
    raise NotImplementedError(
      f'export: GGUF does not define {kind} as jaxq reads it; allowed are '
      f'{sorted(architectures.GGUF_ARCHITECTURES)}. Export to another format.'
    )
  _check_fits(config, arch)
  D = config['head_dim']
  found = {key: config[name] for name, key in _KEYS.items()} | {
    'vocab_size': config['vocab_size'],
    'attention.head_count_kv': config['num_key_value_heads'],
    'attention.key_length': D,
    'attention.value_length': D,
    'rope.dimension_count': int(D * config.get('partial_rotary_factor', 1.0)),
    'rope.freq_base': float(config['rope_theta']),
  }
  found['attention.layer_norm_rms_epsilon'] = float(config['rms_norm_eps'])
  if arch in _WINDOWED:
    found['attention.sliding_window'] = config['sliding_window'] or 0
  for key, name in (
    ('attn_logit_softcapping', 'attn_logit_softcapping'),
    ('final_logit_softcapping', 'final_logit_softcapping'),
    ('expert_count', 'num_local_experts'),
    ('expert_used_count', 'num_experts_per_tok'),
    ('expert_feed_forward_length', 'moe_intermediate_size'),
  ):
    if config.get(name) is not None:
      found[key] = config[name]
  found |= _scaling_keys(config)
  return {f'{arch}.{key}': value for key, value in found.items()}


def rope_tensors(config: Config) -> dict[str, np.ndarray]:
  """Tensors of divisors of the rotary frequencies, float32 (D/2,)."""
  scaling = config['rope_scaling'] or {}
  if scaling.get('rope_type') == 'llama3':
    return {ROPE_FREQS: _divisors(config, scaling)}
  if scaling.get('rope_type') == 'longrope':
    return {
      LONG_FACTORS: np.asarray(scaling['long_factor'], np.float32),
      SHORT_FACTORS: np.asarray(scaling['short_factor'], np.float32),
    }
  return {}


def _needed(arch: str, get) -> tuple[str, ...]:
  """Keys without a default, beside those of every architecture."""
  found: tuple[str, ...] = ()
  if get('expert_count', 0) or arch == 'qwen3moe':
    found += ('expert_count', 'expert_used_count')
  if arch == 'qwen3moe':
    found += ('expert_feed_forward_length',)
  if arch == 'gemma3':
    found += ('attention.sliding_window',)
  if get('rope.scaling.type', 'none') in ('linear', 'yarn'):
    found += ('rope.scaling.factor',)
  return found


def _model_type(arch: str, experts: int) -> str:
  if arch == 'llama':
    return 'mixtral' if experts else 'llama'
  return {'qwen3moe': 'qwen3_moe', 'gemma3': 'gemma3_text'}.get(arch, arch)


def _particular(arch, config, get, shapes, where) -> Config:
  """Keys that only some architectures have."""
  found: Config = {}
  if config['model_type'] == 'llama':
    found['attention_bias'] = 'blk.0.attn_q.bias' in shapes
    found['mlp_bias'] = 'blk.0.ffn_gate.bias' in shapes
  elif arch in ('llama', 'qwen3moe'):
    found['num_local_experts'] = get('expert_count')
    found['num_experts_per_tok'] = get('expert_used_count')
    if arch == 'qwen3moe':
      found['moe_intermediate_size'] = get('expert_feed_forward_length')
      found['norm_topk_prob'] = True
  elif get('expert_count', 0):
    raise NotImplementedError(
      f'{where}: has {get("expert_count")} experts; allowed in {arch} are '
      'dense models only. Use a model without mixture of experts.'
    )
  if arch in _WINDOWED:
    found['sliding_window'] = get('attention.sliding_window') or None
  if arch == 'phi3' and config['head_dim'] is None:
    config['head_dim'] = config['hidden_size'] // config['num_attention_heads']
  if arch == 'phi3' and get('rope.dimension_count'):
    found['partial_rotary_factor'] = (
      get('rope.dimension_count') / config['head_dim']
    )
  if arch in _LARGEST:
    found['query_pre_attn_scalar'] = _scalar(arch, config)
    found['final_logit_softcapping'] = get('final_logit_softcapping')
  if arch == 'gemma2':  # Early files lack both.
    found['attn_logit_softcapping'] = get('attn_logit_softcapping', 50.0)
    found['final_logit_softcapping'] = get('final_logit_softcapping', 30.0)
  if arch == 'gemma3':
    found['rope_local_base_freq'] = float(get('rope.freq_base_swa', 10000.0))
    found['rope_theta'] = float(get('rope.freq_base', 1e6))
  return {k: v for k, v in found.items() if v is not None or 'soft' in k}


def _scalar(arch: str, config: Config) -> int:
  """query_pre_attn_scalar as llama.cpp has it."""
  if config['num_hidden_layers'] == _LARGEST[arch]:
    return config['hidden_size'] // config['num_attention_heads']
  heads = config['num_attention_heads']
  return config['head_dim'] or config['hidden_size'] // heads


def _check_lengths(arch, config, get, where) -> None:
  """Raises where parts of a head are not used, or not all of one size."""
  turned = int(config['head_dim'] * config.get('partial_rotary_factor', 1.0))
  for key, size in (
    ('rope.dimension_count', turned),
    ('attention.value_length', config['head_dim']),
  ):
    if get(key, size) != size:
      raise NotImplementedError(
        f'{where}: {arch}.{key}={get(key)}, head size {config["head_dim"]}; '
        'allowed is the same number. Use a model that rotates whole heads.'
      )


def _check_keys(arch, metadata, asked, config, where) -> None:
  """Refuses what the file says of the model and was not asked for."""
  given = {
    key.removeprefix(f'{arch}.'): value
    for key, value in metadata.items()
    if key.startswith(f'{arch}.')
  }
  # What the sizes imply.
  implied = {
    'attention.sliding_window': (0, config['max_position_embeddings']),
    'expert_feed_forward_length': (0, config['intermediate_size']),
  }
  hf_config.refuse_keys(given, asked, _FIXED | implied, _HARMLESS, arch, where)


def _scaling(get, shapes, tensor, where) -> Config | None:
  """rope_scaling of the metadata; Llama 3's comes from its tensor."""
  kind = get('rope.scaling.type', 'none')
  original = get('rope.scaling.original_context_length')
  if LONG_FACTORS in shapes:
    return {
      'rope_type': 'longrope',
      'long_factor': tensor(LONG_FACTORS).tolist(),
      'short_factor': tensor(SHORT_FACTORS).tolist(),
      'original_max_position_embeddings': original,
      'attention_factor': get(_ATTN_FACTOR),
    }
  if kind == 'none':
    return None
  if kind not in ('linear', 'yarn'):
    raise NotImplementedError(
      f'{where}: rope.scaling.type={kind!r} without tensors of factors; '
      "allowed are ['linear', 'none', 'yarn']. Use a model with one of these."
    )
  found = {'rope_type': kind, 'factor': get('rope.scaling.factor')}
  if kind == 'yarn':
    temperature = get(_ATTN_FACTOR)
    if temperature is not None and found['factor']:
      temperature *= hf_config.yarn_temperature(found['factor'])
    found |= {
      'attention_factor': temperature,
      'original_max_position_embeddings': original,
      'beta_fast': get('rope.scaling.yarn_beta_fast'),
      'beta_slow': get('rope.scaling.yarn_beta_slow'),
    }
  return {k: v for k, v in found.items() if v is not None}


def _llama3(config: Config, divisors: np.ndarray, where: str) -> Config | None:
  """The rope_scaling that has these divisors; None where all are one."""
  if np.all(divisors == 1):
    return None
  for factor in sorted({float(divisors.max()), 8.0, 32.0}):
    scaling = {
      'rope_type': 'llama3',
      'factor': factor,
      'original_max_position_embeddings': 8192,
      **_LLAMA_3,
    }
    expected = _divisors(config, scaling)
    if expected.shape == divisors.shape and np.allclose(
      expected, divisors, rtol=1e-4
    ):
      return scaling
  raise NotImplementedError(
    f'{where}: {ROPE_FREQS} divides the rotary frequencies by up to '
    f'{divisors.max():g}, in a way that is not that of Llama 3 (8192 tokens, '
    'factors 1 and 4). Load the Hugging Face directory, whose config says how.'
  )


def _divisors(config: Config, scaling: Config) -> np.ndarray:
  """(D/2,) float32: what Llama 3 divides each frequency by."""
  D = config['head_dim']
  frequencies = config['rope_theta'] ** -(np.arange(0, D, 2) / D)
  low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
  original = scaling['original_max_position_embeddings']
  turns = original * frequencies / (2 * np.pi)
  kept = np.clip((turns - low) / (high - low), 0, 1)
  divisors = 1 / (kept + (1 - kept) / scaling['factor'])
  return divisors.astype(np.float32)


def _scaling_keys(config: Config) -> Metadata:
  """rope_scaling as metadata; Llama 3's is all in its tensor."""
  scaling = config['rope_scaling'] or {}
  kind = scaling.get('rope_type', 'none')
  original = scaling.get('original_max_position_embeddings')
  found: Metadata = {}
  if kind in ('linear', 'yarn'):
    found = {'type': kind, 'factor': float(scaling['factor'])}
    for key in ('beta_fast', 'beta_slow'):
      if scaling.get(key) is not None:
        found[f'yarn_{key}'] = float(scaling[key])
  if kind in ('yarn', 'longrope'):
    found['original_context_length'] = original
    temperature = hf_config.rope_temperature(config)
    if kind == 'yarn':  # Of which llama.cpp knows a part.
      temperature /= hf_config.yarn_temperature(scaling['factor'])
    if not math.isclose(temperature, 1.0, rel_tol=1e-6):
      found['attn_factor'] = temperature
  return {f'rope.scaling.{k}': v for k, v in found.items() if v is not None}


def _check_fits(config: Config, arch: str) -> None:
  """Raises where llama.cpp would compute something else."""
  kind, window = config['model_type'], config.get('sliding_window')
  scaling = (config['rope_scaling'] or {}).get('rope_type', 'none')
  reason = ''
  if arch not in _WINDOWED and window is not None:
    on = config.get('use_sliding_window', True)
    if on and window < config['max_position_embeddings']:
      reason = f'a sliding window of {window} tokens'
  if kind == 'qwen3_moe' and not config['norm_topk_prob']:
    reason = 'expert weights that do not sum to one (norm_topk_prob=False)'
  if kind == 'qwen3_moe' and not all(
    architectures.is_sparse(config, i)
    for i in range(config['num_hidden_layers'])
  ):
    reason = 'dense blocks among its sparse ones'
  if config.get('attention_bias') and arch != 'llama':
    reason = 'biases of its attention (attention_bias)'
  if arch in _LARGEST:
    if config['query_pre_attn_scalar'] != _scalar(arch, config):
      reason = f'query_pre_attn_scalar={config["query_pre_attn_scalar"]}'
    given = ('layer_types', 'sliding_window_pattern')
    plain = {k: v for k, v in config.items() if k not in given}
    if hf_config.read(plain, 'export')['layer_types'] != config['layer_types']:
      reason = 'sliding windows in other blocks than its architecture has'
    if config.get('rope_local_base_freq', 1e4) != 1e4:
      reason = f'rope_local_base_freq={config["rope_local_base_freq"]}'
  if config['hidden_act'] != (
    'gelu_pytorch_tanh' if arch in _LARGEST else 'silu'
  ):
    reason = f'hidden_act={config["hidden_act"]}'
  if (
    scaling == 'dynamic'
    or (scaling == 'longrope' and arch != 'phi3')
    or (scaling == 'llama3' and arch != 'llama')
  ):
    reason = f'rotary scaling {scaling}'
  if not (config['rope_scaling'] or {}).get('truncate', True):
    reason = 'a yarn ramp that ends between channels (truncate=False)'
  if reason:
    raise NotImplementedError(
      f'export: the model has {reason}, which {arch} files of GGUF cannot '
      'say. Export to another format.'
    )
