"""From flags to a Transform: the methods, and how their configs are filled.

A recipe is a list of methods and a scheme: `--method=smoothquant,gptq
--scheme=W8A8`. The scheme gives every method its specs; all else of a method's
config is set by name, `--set=gptq.damping=0.05`. A chain without a weight
quantizer ends in round-to-nearest, and a scheme with quantized inputs adds the
input quantizers, so `--scheme=W8A8` alone is a complete recipe.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from jaxq.nn import blocks
from jaxq.numerics import ranges
from jaxq.quant import (
  activations,
  awq,
  gptq,
  llm_fp4,
  mergequant,
  mixed,
  os_plus,
  outliertune,
  ptq161,
  quant_experts,
  rotate,
  round_to_nearest,
  schemes,
  smoothquant,
)
from jaxq.quant import transform as transform_lib

# name: (config, config -> Transform). A new method is one line here.
METHODS: dict[str, tuple[type, Callable[..., transform_lib.Transform]]] = {
  'activations': (activations.ActivationsConfig, activations.activations),
  'awq': (awq.AwqConfig, awq.awq),
  'gptq': (gptq.GptqConfig, gptq.gptq),
  'llm_fp4': (llm_fp4.LlmFp4Config, llm_fp4.llm_fp4),
  'mergequant': (mergequant.MergeQuantConfig, mergequant.mergequant),
  'os_plus': (os_plus.OsPlusConfig, os_plus.os_plus),
  'outliertune': (outliertune.OutlierTuneConfig, outliertune.outliertune),
  'ptq161': (ptq161.PTQ161Config, ptq161.ptq161),
  'quant_experts': (
    quant_experts.QuantExpertsConfig,
    quant_experts.quant_experts,
  ),
  'rotate': (rotate.RotateConfig, rotate.rotate),
  'rtn': (
    round_to_nearest.RoundToNearestConfig,
    round_to_nearest.round_to_nearest,
  ),
  'smoothquant': (smoothquant.SmoothQuantConfig, smoothquant.smoothquant),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """transform: the chain. description: JSON data that says what it is."""

  transform: transform_lib.Transform
  description: dict[str, Any]


# Quantize each linear by itself: those that may take a spec per linear.
_PER_LINEAR = ('gptq', 'rtn')


def build(
  methods: Sequence[str],
  scheme: schemes.Scheme,
  settings: Sequence[str],
  allocation: mixed.Allocation | None = None,
) -> Recipe:
  """The recipe of a list of methods.

  Args:
    methods: names of METHODS, in order.
    scheme: what weights and inputs become.
    settings: 'method.field=value' texts.
    allocation: specs of single linears; the others take the scheme's.

  Raises:
    ValueError: unknown method, field or value; the message lists the known.
  """
  names = list(methods)
  for name in names:
    if name not in METHODS:
      raise ValueError(
        f'--method={name}; allowed {sorted(METHODS)}, several with commas.'
      )
  fields = {name: _specs(METHODS[name][0], scheme) for name in METHODS}
  if scheme.static_inputs:
    fields['activations']['mode'] = 'static'
  weight_methods = [n for n in METHODS if 'weights' in _names(METHODS[n][0])]
  if scheme.weights and not set(names) & set(weight_methods):
    names.append('rtn')
  input_methods = [n for n in METHODS if 'inputs' in _names(METHODS[n][0])]
  if scheme.inputs and not set(names) & set(input_methods):
    names.append('activations')
  for text in settings:
    method, field, value = _parse(text, names)
    fields[method][field] = _convert(METHODS[method][0], method, field, value)
  chain, described = [], []
  for name in names:
    config_type, make = METHODS[name]
    if 'weights' in _names(config_type) and scheme.weights is None:
      raise ValueError(
        f'--method={name} quantizes weights and --scheme={scheme.name} keeps '
        'them float; choose a scheme such as W4A16, or leave the method out.'
      )
    if 'inputs' in _required(config_type) and scheme.inputs is None:
      raise ValueError(
        f'--method={name} quantizes inputs and --scheme={scheme.name} keeps '
        'them float; choose a scheme such as W8A8, or leave the method out.'
      )
    config = config_type(**fields[name])
    if allocation is not None and 'weights' in _names(config_type):
      chain.append(_mixed(name, config, allocation))
    else:
      chain.append(make(config))
    described.append({'method': name, **describe(config)})
  if not chain:
    raise ValueError(
      f'--scheme={scheme.name} with no --method changes nothing; choose a '
      'scheme such as W4A16.'
    )
  description: dict[str, Any] = {'scheme': scheme.name, 'methods': described}
  if allocation is not None:
    description['scheme'] = f'{scheme.name}, {allocation.bits:.2f} bits mixed'
    description['allocation'] = allocation.to_dict()
  return Recipe(transform_lib.chain(*chain), description)


def check_groups(
  scheme: schemes.Scheme, block: blocks.BlockSpec, params: Any
) -> None:
  """Refuses groups that do not fit the linears of a block.

  Args:
    scheme: what weights become.
    block: its linears, those left float taken out.
    params: of the block.

  Raises:
    ValueError: K of a linear is no multiple of the scheme's group size; the
      message names the linear and the sizes that fit all.
  """
  weights = scheme.weights
  if weights is None or weights.granularity != 'group':
    return
  G = weights.group_size
  rows = {
    linear.path: blocks.kernel_of(params, linear.path).shape[-2]
    for linear in block.linears
    if not getattr(linear, 'choice', mixed.DEFAULT)  # Takes its own spec.
  }
  path = next((path for path, K in rows.items() if K % G), None)
  if path is None:
    return
  name = path.rsplit('/', 1)[-1]
  common = math.gcd(*rows.values())
  sizes = [f'--group_size={g}' for g in (128, 64, 32, 16) if common % g == 0]
  fixes = [*sizes[:1], '--group_size=-1 (one scale per channel)']
  if not weights.dtype.startswith('int'):
    fixes = ['another --scheme']  # The format fixes the size.
  raise ValueError(
    f'--scheme={scheme.name} with groups of {G}: {name} has K={rows[path]} '
    f'inputs; K must be a multiple of {G}. Give {" or ".join(fixes)}, or leave '
    f'it float with --ignore={name}.'
  )


def _mixed(
  name: str, config: Any, allocation: mixed.Allocation
) -> transform_lib.Transform:
  """A weight method whose linears each take the allocation's spec."""
  if name not in _PER_LINEAR:
    raise ValueError(
      f'--method={name} with --bits_from; it chooses scales for several '
      f'linears at once, at one spec. Use one of {sorted(_PER_LINEAR)}.'
    )
  make = METHODS[name][1]
  specs = {mixed.DEFAULT: config.weights, **allocation.specs}
  return mixed.mixed(
    {
      choice: make(dataclasses.replace(config, weights=spec))
      for choice, spec in specs.items()
    }
  )


def describe(config: Any) -> dict[str, Any]:
  """A frozen config as JSON data."""
  out = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      value = describe(value)
    out[field.name] = list(value) if isinstance(value, tuple) else value
  return out


def _specs(config_type: type, scheme: schemes.Scheme) -> dict[str, Any]:
  known = _names(config_type)
  specs = {'weights': scheme.weights, 'inputs': scheme.inputs}
  return {name: spec for name, spec in specs.items() if name in known}


def _names(config_type: type) -> list[str]:
  return [field.name for field in dataclasses.fields(config_type)]


def _required(config_type: type) -> list[str]:
  """The fields without a default."""
  return [
    field.name
    for field in dataclasses.fields(config_type)
    if field.default is dataclasses.MISSING
  ]


def _parse(text: str, names: Sequence[str]) -> tuple[str, str, str]:
  """'gptq.damping=0.05' -> its parts; one method may leave out its name."""
  path, equals, value = text.partition('=')
  method, dot, field = path.partition('.')
  if not dot and len(names) >= 1:
    method, field = names[0], path
  if not equals or method not in names:
    raise ValueError(
      f'--set={text}; it must read method.field=value with a method of this '
      f'run, one of {sorted(names)}, as in --set={names[0]}.'
      f'{_names(METHODS[names[0]][0])[-1]}=...'
    )
  return method, field, value


def _convert(config_type: type, method: str, field: str, text: str) -> Any:
  """The value of a config field from its text."""
  allowed = [n for n in _names(config_type) if n not in ('weights', 'inputs')]
  if field not in allowed:
    raise ValueError(
      f'--set={method}.{field}={text}: {method} has no such field; it has '
      f'{sorted(allowed)}.'
    )
  kind = typing.get_type_hints(config_type)[field]
  options = [kind]
  if isinstance(kind, types.UnionType) or typing.get_origin(kind) is not None:
    options = [k for k in typing.get_args(kind)] or [kind]
    if typing.get_origin(kind) is tuple:
      return tuple(part for part in text.split(',') if part)
  if type(None) in options and text.lower() in ('none', ''):
    return None
  try:
    return _scalar(options[0], text)
  except ValueError as e:
    raise ValueError(
      f'--set={method}.{field}={text}: a {options[0].__name__} is needed, as '
      f'in its default.'
    ) from e


def _scalar(kind: type, text: str) -> Any:
  if kind is bool:
    if text.lower() not in ('true', 'false'):
      raise ValueError(text)
    return text.lower() == 'true'
  if kind is ranges.RangeSearch:
    return ranges.RangeSearch(kind=text)
  return kind(text)
