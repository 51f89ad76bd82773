"""Models by their shapes alone: configurations of well-known decoders.

  ShapeModel   what the calibration, the evaluation and the decoding need to be
               traced and compiled: shapes and dtypes of all parameters

No weights are read or made, so the largest models are as quick as the smallest.
The configurations are what the models' published config.json files say, by the
keys that count; a model of that name may carry other tokens and licences.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.nn import blocks, taps
from jaxq.parallel import mesh as mesh_lib
from models import decoder, loading

Params = Mapping[str, Any]

_LLAMA3 = {
  'model_type': 'llama',
  'vocab_size': 128256,
  'num_key_value_heads': 8,
  'max_position_embeddings': 8192,
  'rms_norm_eps': 1e-5,
  'rope_theta': 500000.0,
  'bos_token_id': 128000,
  'eos_token_id': 128001,
}
# name -> the keys of its config.json.
CONFIGS: dict[str, dict[str, Any]] = {
  'llama3-8b': _LLAMA3
  | {
    'hidden_size': 4096,
    'intermediate_size': 14336,
    'num_hidden_layers': 32,
    'num_attention_heads': 32,
  },
  'llama3-70b': _LLAMA3
  | {
    'hidden_size': 8192,
    'intermediate_size': 28672,
    'num_hidden_layers': 80,
    'num_attention_heads': 64,
  },
  'llama3-405b': _LLAMA3
  | {
    'hidden_size': 16384,
    'intermediate_size': 53248,
    'num_hidden_layers': 126,
    'num_attention_heads': 128,
    'max_position_embeddings': 131072,
  },
  'mixtral-8x7b': {
    'model_type': 'mixtral',
    'vocab_size': 32000,
    'hidden_size': 4096,
    'intermediate_size': 14336,
    'num_hidden_layers': 32,
    'num_attention_heads': 32,
    'num_key_value_heads': 8,
    'num_local_experts': 8,
    'num_experts_per_tok': 2,
    'max_position_embeddings': 32768,
    'rope_theta': 1e6,
    'bos_token_id': 1,
    'eos_token_id': 2,
  },
  'qwen3-32b': {
    'model_type': 'qwen3',
    'vocab_size': 151936,
    'hidden_size': 5120,
    'intermediate_size': 25600,
    'num_hidden_layers': 64,
    'num_attention_heads': 64,
    'num_key_value_heads': 8,
    'head_dim': 128,
    'max_position_embeddings': 40960,
    'rope_theta': 1e6,
    'bos_token_id': 151643,
    'eos_token_id': 151645,
  },
  'smollm2-135m': {
    'model_type': 'llama',
    'vocab_size': 49152,
    'hidden_size': 576,
    'intermediate_size': 1536,
    'num_hidden_layers': 30,
    'num_attention_heads': 9,
    'num_key_value_heads': 3,
    'max_position_embeddings': 8192,
    'rms_norm_eps': 1e-5,
    'rope_theta': 100000.0,
    'tie_word_embeddings': True,
    'bos_token_id': 1,
    'eos_token_id': 2,
  },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeModel:
  """A decoder whose parameters are shapes, as the calibration sees it.

  config: its shape. name: for messages.
  """

  config: decoder.DecoderConfig
  name: str

  @property
  def num_blocks(self) -> int:
    """L."""
    return self.config.num_layers

  @property
  def bridges(self) -> tuple[int, ...]:
    """A decoder has none."""
    return ()

  def bridge(
    self, i: int, outside: Params, carry: blocks.Carry
  ) -> blocks.Carry:
    """Never called."""
    raise NotImplementedError(f'{self.name}: there is no bridge at block {i}.')

  def block_at(self, i: int) -> blocks.BlockSpec:
    """The spec of block i."""
    return decoder.block_spec(self.config, i)

  def outside(self) -> Params:
    """Shapes of the parameters outside the blocks, float32."""
    params = _parameters(self.config)
    return {k: v for k, v in params.items() if not k.startswith('blocks_')}

  def block_params(self, i: int) -> Params:
    """Shapes of the parameters of block i, float32."""
    start = 0
    for run, length in enumerate(self.config.kind_runs()):
      if i < start + length:
        stacked = _parameters(self.config)[f'blocks_{run}']
        return jax.tree.map(
          lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), stacked
        )
      start += length
    raise ValueError(
      f'{self.name}: there is no block {i}; allowed are 0 to {start - 1}.'
    )

  def embed(self, outside: Params, batch: Any) -> blocks.Carry:
    """Tokens (B, T) -> the first block's input."""
    family = loading.FAMILIES['decoder']
    return family.embed(self.config, outside, batch)

  def rules(self, mesh: Any) -> mesh_lib.Rules:
    """How its parameters are sharded."""
    return decoder.sharding_rules(self.config, mesh.shape['model'])

  def module(
    self, outside: Params, runs: Sequence[tuple[int, Params]], dtype: str
  ) -> decoder.Decoder:
    """The whole model over stacked blocks; the arguments are `variables`'."""
    config = dataclasses.replace(
      self.config, tie_embeddings='head' not in outside
    )
    lengths = tuple(length for length, _ in runs)
    return decoder.Decoder(config, lengths, jnp.dtype(dtype))

  def variables(
    self, outside: Params, runs: Sequence[tuple[int, Params]], dtype: str
  ) -> dict[str, Any]:
    """Shapes of the whole model's {'params', 'quant'}.

    Args:
      outside: shapes of the parameters outside the blocks.
      runs: for each run of equal blocks their number and {'params', 'quant'} of
        one, float or quantized.
      dtype: of float parameters; quantized ones keep their own.
    """
    params: dict[str, Any] = dict(outside)
    quant: dict[str, Any] = {}
    for i, (length, part) in enumerate(runs):
      stacked = jax.tree.map(
        lambda a, L=length: jax.ShapeDtypeStruct((L, *a.shape), a.dtype), part
      )
      params[f'blocks_{i}'] = stacked['params']
      quant[f'blocks_{i}'] = stacked['quant']
    return {'params': _cast(params, dtype), 'quant': quant}

  def float_runs(self) -> list[tuple[int, Params]]:
    """The `runs` of the float model."""
    runs: list[tuple[int, Params]] = []
    start = 0
    for length in self.config.kind_runs():
      part = {'params': self.block_params(start), 'quant': {}}
      runs.append((length, part))
      start += length
    return runs


def open_shapes(source: str) -> ShapeModel:
  """The shapes of a model.

  Args:
    source: a name of CONFIGS, or what models.open_model takes, of which the
      configuration alone is read.

  Raises:
    As models.open_model; NotImplementedError: it is no decoder.
  """
  if source in CONFIGS:
    config = decoder.DecoderConfig.from_hf(CONFIGS[source])
    return ShapeModel(config=config, name=source)
  try:
    opened = loading.open_model(source)
  except (FileNotFoundError, ValueError) as e:
    raise type(e)(
      f'{e} Or plan for a shape by name: {", ".join(sorted(CONFIGS))}.'
    ) from e
  if opened.family != 'decoder':
    raise NotImplementedError(
      f'{source}: a model of the family {opened.family}; only decoders can be '
      'planned for yet. Run it on a small part of the data instead.'
    )
  return ShapeModel(config=opened.config, name=source)


@functools.cache
def _parameters(config: decoder.DecoderConfig) -> Params:
  """Shapes of all parameters, blocks stacked by runs, float32."""
  module = decoder.Decoder(config, config.kind_runs())
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  params: Any = jax.eval_shape(module.init, jax.random.key(0), tokens)
  return params['params']


def _cast(params: Params, dtype: str) -> dict[str, Any]:
  """As models.loading.cast, of shapes."""
  out: dict[str, Any] = {}
  for path, leaf in taps.leaves(params):
    if isinstance(leaf, jax.ShapeDtypeStruct):
      floating = jnp.issubdtype(leaf.dtype, jnp.floating)
      to = jnp.dtype(dtype) if floating else leaf.dtype
      leaf = jax.ShapeDtypeStruct(leaf.shape, to)
    out = taps.set_path(out, path, leaf)
  return out
