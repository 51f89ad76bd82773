"""The caches by name, and `--kv_cache=oscar:bits=2,residual=64`.

A new cache is one line of CACHES: its name and its config with the defaults.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from jaxq.kvcache import (
  contiguous,
  fp8,
  interface,
  kivi,
  oscar,
  paged,
  per_token,
  ring,
  turboquant,
  zipcache,
)

CACHES: dict[str, interface.CacheConfig] = {
  'contiguous': contiguous.ContiguousConfig(),
  'fp8': fp8.Fp8Config(),
  'int2': per_token.PerTokenConfig(bits=2),
  'int4': per_token.PerTokenConfig(bits=4),
  'int8': per_token.PerTokenConfig(bits=8),
  'kivi': kivi.KiviConfig(),
  'oscar': oscar.CONFIG,
  'paged': paged.PagedConfig(),
  'ring': ring.RingConfig(),
  'turboquant': turboquant.TurboQuantConfig(),
  'zipcache': zipcache.ZipCacheConfig(),
}


def parse(text: str) -> interface.CacheConfig:
  """'name' or 'name:field=value,field=value' -> a config.

  Raises:
    ValueError: unknown name, field or value; the message lists the known.
  """
  name, colon, rest = text.partition(':')
  if name not in CACHES:
    raise ValueError(
      f'--kv_cache={text}: {name!r} is no cache; allowed {sorted(CACHES)}, as '
      'in --kv_cache=oscar:bits=2.'
    )
  config: Any = CACHES[name]
  kinds = typing.get_type_hints(type(config))
  values = {}
  for part in rest.split(',') if colon else ():
    field, equals, value = part.partition('=')
    if not equals or field not in kinds:
      known = f'the fields {sorted(kinds)}' if kinds else 'no fields'
      raise ValueError(
        f'--kv_cache={text}: cannot read {part!r}; {name} has {known}. Write '
        'name:field=value,field=value, as in oscar:bits=2,residual=64.'
      )
    values[field] = _value(text, field, kinds[field], value)
  return dataclasses.replace(config, **values)


def text_of(config: interface.CacheConfig) -> str:
  """The shortest text that `parse` makes this config of."""
  texts = []
  for name, default in CACHES.items():
    if type(default) is type(config):
      other = [
        f'{field}={value}'
        for field, value in vars(config).items()
        if value != getattr(default, field)
      ]
      texts.append((len(other), name + ':' * bool(other) + ','.join(other)))
  return min(texts)[1]


def describe(config: interface.CacheConfig) -> dict[str, Any]:
  """A config as JSON data, with the name of its type."""
  made: Any = config
  return {'type': type(made).__name__, **dataclasses.asdict(made)}


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


def _value(text: str, field: str, kind: Any, value: str) -> Any:
  options = [kind]
  if isinstance(kind, types.UnionType):
    options = list(typing.get_args(kind))
  if type(None) in options and value.lower() == 'none':
    return None
  kind = next(k for k in options if k is not type(None))
  try:
    if kind is bool:
      return {'true': True, 'false': False}[value.lower()]
    return kind(value)
  except (KeyError, ValueError) as e:
    needed = {bool: 'true or false', int: 'a whole number'}
    raise ValueError(
      f'--kv_cache={text}: {field}={value}; {needed.get(kind, "a number")} is '
      'needed.'
    ) from e
