"""The caches by name, and `--kv_cache=oscar:bits=2,residual=64`.

A new cache is one line of CACHES: its name and its config with the defaults.
"""

from collections.abc import Mapping
from typing import Any

from jaxq import config_text
from jaxq.kvcache import (
  contiguous,
  dont_waste_bits,
  double_sparsity,
  evict,
  fp8,
  interface,
  kivi,
  oscar,
  paged,
  per_token,
  qjl,
  quest,
  ring,
  tokenselect,
  turboquant,
  zipcache,
)

CACHES: dict[str, interface.CacheConfig] = {
  'contiguous': contiguous.ContiguousConfig(),
  'dont_waste_bits': dont_waste_bits.DontWasteBitsConfig(),
  'double_sparsity': double_sparsity.DoubleSparsityConfig(),
  'evict': evict.EvictConfig(),
  'fp8': fp8.Fp8Config(),
  'int2': per_token.PerTokenConfig(bits=2),
  'int4': per_token.PerTokenConfig(bits=4),
  'int8': per_token.PerTokenConfig(bits=8),
  'kivi': kivi.KiviConfig(),
  'oscar': oscar.CONFIG,
  'paged': paged.PagedConfig(),
  'qjl': qjl.QjlConfig(),
  'quest': quest.QuestConfig(),
  'ring': ring.RingConfig(),
  'tokenselect': tokenselect.TokenSelectConfig(),
  'turboquant': turboquant.TurboQuantConfig(),
  'zipcache': zipcache.ZipCacheConfig(),
}


def parse(text: str) -> interface.CacheConfig:
  """'name' or 'name:field=value,field=value' -> a config.

  Raises:
    ValueError: unknown name, field or value; the message lists the known.
  """
  return config_text.parse(
    text, CACHES, flag='kv_cache', noun='cache', example='oscar:bits=2'
  )


def text_of(config: interface.CacheConfig) -> str:
  """The shortest text that `parse` makes this config of."""
  return config_text.text_of(config, CACHES)


def describe(config: interface.CacheConfig) -> dict[str, Any]:
  """A config as JSON data, with the name of its type."""
  return config_text.describe(config)


def prepare(
  config: interface.CacheConfig,
  variables: Mapping[str, Any],
  num_kv_heads: int,
  head_dim: int,
) -> Mapping[str, Any]:
  """The variables that a model needs with this cache; mostly as they are.

  Raises:
    TypeError, ValueError: as oscar.fold_value_rotation.
  """
  if getattr(config, 'value_rotation', None) != 'folded':
    return variables
  return oscar.fold_value_rotation(variables, num_kv_heads, head_dim)
