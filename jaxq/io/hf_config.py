"""config.json of a decoder, checked key by key and brought to one form.

`read` gives a plain dict in Hugging Face's own key names, with the defaults of
the model type filled in and the spellings of different versions made one:

  rope_theta, rope_scaling      from rope_parameters, nested or not
  layer_types                   a list wherever blocks differ in their window
  intermediate_size, hidden_act from OPT's ffn_dim, activation_function
  num_local_experts             from num_experts

Reading what was read changes nothing. A key is computed with, refused, or one
of HARMLESS, which do not change what a trained model computes: none is ignored
in silence.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from jaxq.nn import mlp

Config = dict[str, Any]

SIZES = (
  'vocab_size',
  'hidden_size',
  'intermediate_size',
  'num_hidden_layers',
  'num_attention_heads',
)
_COMMON: Config = {
  'model_type': None,
  **dict.fromkeys(SIZES),
  'num_key_value_heads': None,
  'head_dim': None,
  'hidden_act': 'silu',
  'rms_norm_eps': 1e-6,
  'max_position_embeddings': 2048,
  'tie_word_embeddings': False,
  'bos_token_id': None,
  'eos_token_id': None,
  'rope_theta': 10000.0,
  'rope_scaling': None,
}
_QWEN = {
  'max_position_embeddings': 32768,
  'use_sliding_window': False,
  'sliding_window': 4096,
}
_GEMMA = {
  'hidden_act': 'gelu_pytorch_tanh',
  'tie_word_embeddings': True,
  'head_dim': 256,
  'attention_bias': False,
  'query_pre_attn_scalar': 256,
  'sliding_window': 4096,
  'layer_types': None,
  'final_logit_softcapping': None,
}
# model_type -> the keys that are computed with, and their values where the file
# has none.
DEFAULTS: dict[str, Config] = {
  'llama': _COMMON | {'attention_bias': False, 'mlp_bias': False},
  'mistral': _COMMON
  | {'max_position_embeddings': 131072, 'sliding_window': 4096},
  'qwen2': _COMMON | _QWEN | {'max_window_layers': 28, 'layer_types': None},
  'qwen3': _COMMON
  | _QWEN
  | {
    'attention_bias': False,
    'head_dim': 128,
    'max_window_layers': 28,
    'layer_types': None,
  },
  'gemma2': _COMMON
  | _GEMMA
  | {
    'max_position_embeddings': 8192,
    'attn_logit_softcapping': 50.0,
    'final_logit_softcapping': 30.0,
  },
  'gemma3_text': _COMMON
  | _GEMMA
  | {
    'max_position_embeddings': 131072,
    'rope_theta': 1e6,
    'rope_local_base_freq': 10000.0,
    'sliding_window_pattern': 6,
  },
  'phi3': _COMMON
  | {
    'rms_norm_eps': 1e-5,
    'max_position_embeddings': 4096,
    'original_max_position_embeddings': None,
    'partial_rotary_factor': 1.0,
    'sliding_window': None,
  },
  'opt': {k: v for k, v in _COMMON.items() if 'rope' not in k}
  | {
    'hidden_act': 'relu',
    'rms_norm_eps': 1e-5,  # Of the LayerNorms.
    'tie_word_embeddings': True,
    'enable_bias': True,
  },
  'mixtral': _COMMON
  | {
    'rms_norm_eps': 1e-5,
    'max_position_embeddings': 131072,
    'rope_theta': 1e6,
    'sliding_window': None,
    'num_local_experts': 8,
    'num_experts_per_tok': 2,
  },
  'qwen3_moe': _COMMON
  | _QWEN
  | {
    'attention_bias': False,
    'num_local_experts': 128,
    'num_experts_per_tok': 8,
    'moe_intermediate_size': 768,
    'norm_topk_prob': False,
    'decoder_sparse_step': 1,
    'mlp_only_layers': [],
  },
}
# Other spellings of a key -> the one that is kept.
ALIASES: dict[str, dict[str, str]] = {
  'opt': {'ffn_dim': 'intermediate_size', 'activation_function': 'hidden_act'},
  'gemma2': {'hidden_activation': 'hidden_act'},
  'gemma3_text': {
    'hidden_activation': 'hidden_act',
    '_sliding_window_pattern': 'sliding_window_pattern',
  },
  'qwen3_moe': {'num_experts': 'num_local_experts'},
}

# Keys that would change the maths -> the values under which they do not.
_FIXED: dict[str, tuple[Any, ...]] = {
  '_remove_final_layer_norm': (False,),
  'add_cross_attention': (False,),
  'attention_bias': (False,),
  'attention_multiplier': (),
  'attn_logit_softcapping': (),
  'do_layer_norm_before': (True,),
  'embedding_multiplier': (1.0,),
  'final_logit_softcapping': (),
  'is_encoder_decoder': (False,),
  'layer_norm_elementwise_affine': (True,),
  'logit_scale': (1.0,),
  'logits_scaling': (1.0,),
  'mlp_bias': (False,),
  'no_rope_layers': (),
  'num_local_experts': (0,),
  'partial_rotary_factor': (1.0,),
  'quantization_config': (),
  'residual_multiplier': (1.0,),
  'rope_interleaved': (False,),
  'sliding_window': (),
  'use_bidirectional_attention': (False,),
  'use_qk_norm': (False,),
  'use_sliding_window': (False,),
}
# Where a file comes from, how it was trained, what a tokenizer or a generation
# loop does with it: nothing of the function from tokens to logits.
HARMLESS = frozenset(
  (
    *('_name_or_path', 'architectures', 'auto_map', 'transformers_version'),
    *('dtype', 'torch_dtype', 'use_cache', 'cache_implementation'),
    *('_attn_implementation', '_attn_implementation_autoset'),
    *('attention_dropout', 'activation_dropout', 'dropout', 'hidden_dropout'),
    *('embd_pdrop', 'resid_pdrop', 'layerdrop', 'initializer_range'),
    *('init_std', 'pretraining_tp', 'output_router_logits'),
    *('router_aux_loss_coef', 'router_jitter_noise', 'gradient_checkpointing'),
    *('pad_token_id', 'sep_token_id', 'unk_token_id', 'prefix'),
    *('output_attentions', 'output_hidden_states', 'return_dict'),
    *('id2label', 'label2id', 'problem_type', 'chunk_size_feed_forward'),
    *('decoder_start_token_id', 'forced_eos_token_id', 'task_specific_params'),
    *('suppress_tokens', 'finetuning_task', 'tokenizer_class', '_commit_hash'),
  )
)
_SCALING_KEYS = {  # Beside rope_type.
  'default': (),
  'linear': ('factor',),
  'dynamic': ('factor', 'original_max_position_embeddings'),
  'llama3': (
    *('factor', 'original_max_position_embeddings'),
    *('low_freq_factor', 'high_freq_factor'),
  ),
  'yarn': (
    *('factor', 'original_max_position_embeddings', 'attention_factor'),
    *('truncate', 'beta_fast', 'beta_slow', 'mscale', 'mscale_all_dim'),
  ),
  'longrope': (
    *('factor', 'original_max_position_embeddings', 'attention_factor'),
    *('short_factor', 'long_factor'),
  ),
}
_NEEDED = {
  'linear': ('factor',),
  'dynamic': ('factor',),
  'llama3': ('factor', 'low_freq_factor', 'high_freq_factor'),
  'longrope': ('short_factor', 'long_factor'),
}
_PROJECTION = 'word_embed_proj_dim'


def read(raw: Mapping[str, Any], where: str) -> Config:
  """The checked configuration; see the module docstring.

  Args:
    raw: the keys of a config.json, or what `read` returned.
    where: for messages, the path of the file.

  Raises:
    NotImplementedError: a model type or a value outside ours.
    ValueError: keys we do not know, or sizes that make no model.
  """
  model_type = raw.get('model_type')
  if model_type not in DEFAULTS:
    raise NotImplementedError(
      f'{where}: model_type {model_type!r}; allowed are {sorted(DEFAULTS)}. '
      'Use a model of one of these.'
    )
  known = DEFAULTS[model_type]
  given = _one_spelling(raw, model_type)
  given = _flat_rope(given, model_type, where)
  checked = {*known, _PROJECTION} if model_type == 'opt' else known
  refuse_keys(given, checked, _FIXED, HARMLESS, model_type, where)
  config = known | {
    k: v for k, v in given.items() if k in known and not _absent(k, v, known)
  }
  _check_opt(given, config, where)
  _check_sizes(config, where)
  if config['hidden_act'] not in mlp.ACTIVATIONS:
    raise NotImplementedError(
      f'{where}: hidden_act={config["hidden_act"]!r} changes the maths; '
      f'allowed are {sorted(mlp.ACTIVATIONS)}. Use a model with one of these.'
    )
  if 'rope_theta' in known:
    _check_scaling(config, where)
  if config.get('layer_types', ()) is None:
    config['layer_types'] = _layer_types(config)
  return config


def rope_temperature(config: Mapping[str, Any]) -> float:
  """What cos and sin are multiplied by, of a config that `read` gave.

  attention_factor where it is given. Else yarn's 1 + ln(factor) / 10, with
  mscale and mscale_all_dim the ratio of two such, and longrope's
  sqrt(1 + ln(factor) / ln(original)); the other kinds have 1.
  """
  scaling = config.get('rope_scaling') or {}
  if scaling.get('attention_factor') is not None:
    return float(scaling['attention_factor'])
  kind, longest = scaling.get('rope_type'), config['max_position_embeddings']
  original = scaling.get('original_max_position_embeddings') or longest
  factor = float(scaling.get('factor') or longest / original)
  if kind == 'yarn':
    whole, part = scaling.get('mscale'), scaling.get('mscale_all_dim')
    if whole and part:
      return yarn_temperature(factor, whole) / yarn_temperature(factor, part)
    return yarn_temperature(factor)
  if kind == 'longrope' and factor > 1:
    return math.sqrt(1 + math.log(factor) / math.log(original))
  return 1.0


def yarn_temperature(factor: float, scale: float = 1.0) -> float:
  """YaRN's own multiplier of cos and sin (arXiv 2309.00071, section 3.4)."""
  return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _one_spelling(raw: Mapping[str, Any], model_type: str) -> Config:
  """The keys under one name each; a canonical one in the file wins."""
  aliases = ALIASES.get(model_type, {})
  given = {k: v for k, v in raw.items() if k not in aliases}
  for other, name in aliases.items():
    if raw.get(other) is not None:
      # Gemma files have both; the newer spelling counts.
      given[name] = raw[other]
  return given


def _flat_rope(given: Config, model_type: str, where: str) -> Config:
  """rope_parameters, where they are, as rope_theta, rope_scaling and so on."""
  given = dict(given)
  rope = given.pop('rope_parameters', None) or {}
  local: Config = {}
  if 'full_attention' in rope or 'sliding_attention' in rope:
    local = rope.get('sliding_attention') or {}
    if model_type != 'gemma3_text' or (
      set(local) - {'rope_type', 'rope_theta'}
      or local.get('rope_type', 'default') != 'default'
    ):
      raise NotImplementedError(
        f'{where}: rope_parameters give sliding blocks {local}; allowed are '
        'unscaled ones with a base of their own, in gemma3_text. Use a model '
        'without it.'
      )
    rope = rope.get('full_attention') or {}
  rope = dict(rope) or dict(given.get('rope_scaling') or {})
  kind = rope.pop('rope_type', None) or rope.pop('type', None) or 'default'
  rope.pop('type', None)
  if model_type == 'phi3' and kind in ('su', 'yarn'):
    kind = 'longrope'
  for key in ('rope_theta', 'partial_rotary_factor'):
    value = rope.pop(key, None)
    if value is not None:
      given[key] = value
  if 'rope_theta' in local:
    given['rope_local_base_freq'] = local['rope_theta']
  given.pop('rope_scaling', None)
  if kind != 'default' or rope:
    original = given.get('original_max_position_embeddings')
    if original is not None and kind != 'default':
      rope['original_max_position_embeddings'] = original
    given['rope_scaling'] = {'rope_type': kind, **rope}
  return given


def _absent(key: str, value: Any, known: Config) -> bool:
  """Whether null stands for the default, where null means nothing itself."""
  return value is None and key not in (
    *('sliding_window', 'attn_logit_softcapping', 'final_logit_softcapping'),
    *('bos_token_id', 'eos_token_id'),
    'head_dim',
  )


def refuse_keys(
  given: Mapping[str, Any],
  known: Collection[str],
  fixed: Mapping[str, tuple[Any, ...]],
  harmless: Collection[str],
  model_type: str,
  where: str,
) -> None:
  """Raises for keys that would change the maths, or might; null never does.

  Args:
    given: of a config.json.
    known: keys that are computed with.
    fixed: other keys -> the values that are what we compute.
    harmless: keys that do not count.
    model_type, where: for messages.

  Raises:
    NotImplementedError: another value of a fixed key.
    ValueError: keys that are in none of these.
  """
  unknown = []
  for key, value in given.items():
    if key in known or value is None:
      continue
    if key in fixed:
      if value not in fixed[key]:
        raise NotImplementedError(
          f'{where}: {key}={value!r} changes the maths; allowed are '
          f'{[*fixed[key], None]}. Use a model without it.'
        )
    elif key not in harmless:
      unknown.append(key)
  if unknown:
    raise ValueError(
      f'{where}: keys {sorted(unknown)} are not known for model_type '
      f'{model_type!r} and may change the maths; allowed are {sorted(known)} '
      'and harmless ones. Remove them if they do not matter.'
    )


def _check_opt(given: Config, config: Config, where: str) -> None:
  width = given.get(_PROJECTION)
  if width not in (None, config['hidden_size']):
    raise NotImplementedError(
      f'{where}: word_embed_proj_dim={width}, hidden_size='
      f'{config["hidden_size"]}; allowed is the same number. Use a model '
      'without projected embeddings.'
    )


def _check_sizes(config: Config, where: str) -> None:
  """Raises unless sizes are positive and heads divide; completes the heads."""
  if config['num_key_value_heads'] is None:
    config['num_key_value_heads'] = config['num_attention_heads']
  sizes = [*SIZES, 'num_key_value_heads', 'max_position_embeddings']
  experts = ('num_experts_per_tok', 'num_local_experts')
  sizes += [k for k in (*experts, 'moe_intermediate_size') if k in config]
  for key in sizes:
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise ValueError(
        f'{where}: {key}={value!r}; it must be a positive integer. Check that '
        'the file is a complete model.'
      )
  for large, small in (
    ('num_attention_heads', 'num_key_value_heads'),
    ('hidden_size', 'num_attention_heads'),
  ):
    if large == 'hidden_size' and config['head_dim'] is not None:
      continue
    if config[large] % config[small]:
      raise ValueError(
        f'{where}: {large}={config[large]}, {small}={config[small]}; the '
        'second must divide the first. Check the configuration.'
      )
  if config['head_dim'] is None:
    config['head_dim'] = config['hidden_size'] // config['num_attention_heads']
  if config['head_dim'] < 2 or config['head_dim'] % 2:
    raise ValueError(
      f'{where}: head_dim={config["head_dim"]}; rotary embeddings need an '
      'even head_dim. Check the configuration.'
    )
  chosen, count = (config.get(k, 1) for k in experts)
  if chosen > count:
    raise ValueError(
      f'{where}: num_experts_per_tok={chosen}, num_local_experts={count}; '
      'the first cannot be larger. Check the configuration.'
    )
  types = config.get('layer_types')
  if types is not None and (
    len(types) != config['num_hidden_layers']
    or set(types) - {'full_attention', 'sliding_attention'}
  ):
    raise ValueError(
      f'{where}: layer_types={types}; there must be one of full_attention and '
      f'sliding_attention for each of {config["num_hidden_layers"]} blocks. '
      'Check the configuration.'
    )


def _check_scaling(config: Config, where: str) -> None:
  """Raises unless every key of rope_scaling is one that we compute with."""
  config['rope_theta'] = float(config['rope_theta'])
  scaling = config['rope_scaling']
  if scaling is None:
    return
  kind = scaling['rope_type']
  if kind not in _SCALING_KEYS:
    raise NotImplementedError(
      f'{where}: rope_parameters have rope_type {kind!r}; allowed are '
      f'{sorted(_SCALING_KEYS)}. Use a model with one of these.'
    )
  allowed = ('rope_type', *_SCALING_KEYS[kind])
  unknown = sorted(
    k for k, v in scaling.items() if k not in allowed and v is not None
  )
  if unknown:
    raise ValueError(
      f'{where}: rope_parameters have keys {unknown}, not known for rope_type '
      f'{kind!r}; allowed are {sorted(allowed)}. Remove them if they do not '
      'matter.'
    )
  needed = _NEEDED.get(kind, ())
  missing = [k for k in needed if scaling.get(k) is None]
  if missing:
    raise ValueError(
      f'{where}: rope_parameters of rope_type {kind!r} lack {missing}; it '
      f'needs {list(needed)}. Check the configuration.'
    )


def _layer_types(config: Config) -> list[str]:
  """Which blocks have a window, by the rule of the model type."""
  L = config['num_hidden_layers']
  if config['model_type'] == 'gemma2':
    sliding = [i % 2 == 0 for i in range(L)]
  elif config['model_type'] == 'gemma3_text':
    pattern = config['sliding_window_pattern']
    sliding = [(i + 1) % pattern != 0 for i in range(L)]
  else:
    on = config['use_sliding_window'] and config['sliding_window'] is not None
    sliding = [on and i >= config['max_window_layers'] for i in range(L)]
  return [f'{"sliding" if s else "full"}_attention' for s in sliding]
