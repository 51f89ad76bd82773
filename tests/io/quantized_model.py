"""A tiny quantized model in memory, for the tests of other libraries' formats.

It looks like what models.open_model(...).source is for a jaxq directory.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers

from jaxq.io import architectures, hf
from jaxq.nn import linear
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib

QuantSpec = spec_lib.QuantSpec
ATTENTION = tuple(f'attention/{n}_proj' for n in 'qkvo')
MLP = tuple(f'mlp/{n}_proj' for n in ('gate', 'up', 'down'))
LINEARS = ATTENTION + MLP


@dataclasses.dataclass
class QuantizedModel:
  """A quantized source: what the exporters take."""

  config: dict[str, Any]
  outside_params: dict[str, Any]
  blocks: list[dict[str, Any]]
  made: tokenizers.Tokenizer
  quantization: dict[str, Any] | None

  @property
  def num_blocks(self) -> int:
    return len(self.blocks)

  def outside(self) -> dict[str, Any]:
    return self.outside_params

  def block(self, i: int) -> dict[str, Any]:
    return self.blocks[i]

  def tokenizer(self) -> tokenizers.Tokenizer:
    return self.made


def quantized(
  folder: str,
  weights: dict[str, QuantSpec] | QuantSpec,
  act: linear.ActQuant | None = None,
) -> QuantizedModel:
  """The model of model_files with its linears quantized.

  Args:
    folder: where model_files.write_hf put it.
    weights: of every linear, or of those named by path.
    act: input quantizer of each quantized linear.
  """
  source = hf.HfSource(folder)
  if isinstance(weights, QuantSpec):
    weights = dict.fromkeys(LINEARS, weights)
  blocks = []
  for i in range(source.config['num_hidden_layers']):
    params, quant = source.block(i), {}
    for path, spec in weights.items():
      group, name = path.split('/')
      kernel = jnp.asarray(params[group][name]['kernel'])
      params[group][name]['kernel'] = qarray.quantize(kernel, spec)
      if act is not None:
        quant.setdefault(group, {})[name] = {'input': act}
    blocks.append({'params': params, 'quant': quant})
  return QuantizedModel(
    config=source.config,
    outside_params=source.outside(),
    blocks=blocks,
    made=source.tokenizer(),
    quantization={'scheme': 'of this test'},
  )


def linear_names(config: dict[str, Any]) -> dict[str, tuple[int, str]]:
  """Hugging Face module name -> (block, path) of every linear."""
  out = {}
  for i in range(config['num_hidden_layers']):
    for entry in architectures.block(config, i):
      path = '/'.join(entry.path[:-1])
      if path in LINEARS:
        out[entry.hf.name.removesuffix('.weight')] = (i, path)
  return out


def scalar(value: float) -> np.ndarray:
  """A stored scale (1, 1)."""
  return np.full((1, 1), value, np.float32)
