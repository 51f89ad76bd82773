"""What `models.loading` needs of a family of models, as functions.

One `Family` per model file: with it, loading, calibration and evaluation run on
the family's models. `loading.FAMILIES` lists them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

from jaxq.nn import bidirectional, blocks
from jaxq.parallel import mesh as mesh_lib

Params = Mapping[str, Any]


def _no_bridge(
  config: Any, i: int, outside: Params, carry: blocks.Carry
) -> blocks.Carry:
  raise NotImplementedError(f'{config}: there is no bridge at block {i}.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """The functions of a family; `config` below is the family's own class.

  config: keys of a Hugging Face config.json -> config, which has num_layers.
  build: (config, runs, dtype) -> the whole model over stacked blocks.
  block_spec: (config, i) -> the spec of block i.
  embed: (config, outside params, batch) -> the first block's input.
  rules: (config, shards) -> how parameters lie on the `model` axis.
  config_of: (config, outside params) -> the config of a model with these.
  bridges: config -> the blocks in front of which `bridge` changes the carry.
  bridge: (config, i, outside params, carry) -> carry.
  """

  config: Callable[[Mapping[str, Any]], Any]
  build: Callable[[Any, tuple[int, ...], Any], nn.Module]
  block_spec: Callable[[Any, int], blocks.BlockSpec]
  embed: Callable[[Any, Params, Any], blocks.Carry]
  rules: Callable[[Any, int], mesh_lib.Rules]
  config_of: Callable[[Any, Params], Any] = lambda config, outside: config
  bridges: Callable[[Any], tuple[int, ...]] = lambda config: ()
  bridge: Callable[[Any, int, Params, blocks.Carry], blocks.Carry] = _no_bridge


def check_config(config: Any) -> None:
  """Checks the config of an encoder: whole numbers, heads, activation.

  Raises:
    ValueError: a size below 1, heads that do not divide, or an activation that
      is not known.
  """
  name = type(config).__name__
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if isinstance(value, int) and value < 1 and field.name != 'pad_token_id':
      raise ValueError(
        f'{name}: {field.name}={value}; it must be at least 1. Check the '
        'configuration.'
      )
  if config.hidden_size % config.num_heads:
    raise ValueError(
      f'{name}: hidden_size={config.hidden_size}, num_heads='
      f'{config.num_heads}; the second must divide the first. Check the '
      'configuration.'
    )
  if config.activation not in bidirectional.ACTIVATIONS:
    raise ValueError(
      f'{name}: activation={config.activation!r}; allowed '
      f'{sorted(bidirectional.ACTIVATIONS)}. Use a model with one of these.'
    )


def encoder_rules(config: Any, shards: int) -> mesh_lib.Rules:
  """How blocks of nn.bidirectional lie on `shards` devices of the `model` axis.

  Raises:
    ValueError: intermediate_size does not divide.
  """
  return bidirectional.sharding_rules(
    config.num_heads, config.intermediate_size, shards
  )
