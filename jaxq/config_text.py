"""Configs as text: `name:field=value,field=value` and back.

A table maps names to frozen dataclasses with their defaults; the text names one
and replaces fields of it. Values are whole numbers, numbers, true or false,
words, none, and whole numbers between slashes (`keep=300/200/110`).
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar('T')


def parse(
  text: str, table: Mapping[str, T], *, flag: str, noun: str, example: str
) -> T:
  """'name' or 'name:field=value,field=value' -> a config of the table.

  Args:
    text: as above.
    table: configs by name.
    flag: the messages' name of where the text came from ('kv_cache').
    noun: what an entry of the table is ('cache').
    example: a text that is right, for the messages.

  Raises:
    ValueError: unknown name, field or value; the message lists the known.
  """
  name, colon, rest = text.partition(':')
  if name not in table:
    raise ValueError(
      f'--{flag}={text}: {name!r} is no {noun}; allowed {sorted(table)}, as '
      f'in --{flag}={example}.'
    )
  config: Any = table[name]
  hints = typing.get_type_hints(type(config))
  kinds = {f.name: hints[f.name] for f in dataclasses.fields(config)}
  values = {}
  for part in rest.split(',') if colon else ():
    field, equals, value = part.partition('=')
    if not equals or field not in kinds:
      known = f'the fields {sorted(kinds)}' if kinds else 'no fields'
      raise ValueError(
        f'--{flag}={text}: cannot read {part!r}; {name} has {known}. Write '
        f'name:field=value,field=value, as in {example}.'
      )
    values[field] = _value(f'--{flag}={text}: {field}', kinds[field], value)
  return dataclasses.replace(config, **values)


def text_of(config: Any, table: Mapping[str, Any]) -> str:
  """The shortest text that `parse` makes this config of."""
  texts = []
  for name, default in table.items():
    if type(default) is type(config):
      other = [
        f'{field}={_text(value)}'
        for field, value in vars(config).items()
        if value != getattr(default, field)
      ]
      texts.append((len(other), name + ':' * bool(other) + ','.join(other)))
  return min(texts)[1]


def describe(config: Any) -> dict[str, Any]:
  """A config as JSON data, with the name of its type."""
  return {'type': type(config).__name__, **dataclasses.asdict(config)}


def _text(value: Any) -> str:
  if isinstance(value, tuple):
    return '/'.join(str(v) for v in value)
  return str(value)


def _value(owner: str, kind: Any, value: str) -> Any:
  options = [kind]
  if isinstance(kind, types.UnionType):
    options = list(typing.get_args(kind))
  if type(None) in options and value.lower() == 'none':
    return None
  kind = next(k for k in options if k is not type(None))
  try:
    if kind is bool:
      return {'true': True, 'false': False}[value.lower()]
    if typing.get_origin(kind) is tuple:
      item = typing.get_args(kind)[0]
      return tuple(item(part) for part in value.split('/'))
    return kind(value)
  except (KeyError, ValueError) as e:
    needed = {bool: 'true or false', int: 'a whole number'}
    raise ValueError(
      f'{owner}={value}; {needed.get(kind, "a number")} is needed.'
    ) from e
