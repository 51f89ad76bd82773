"""`models.load(source)`: any checkpoint to a runnable model.

`open_model` reads nothing but the configuration and gives blocks one by one:
what the calibration needs. `load` reads them all and stacks them: what
evaluation and generation need. Both take a packaged name, a GGUF file, a
Hugging Face directory or a jaxq directory.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.sharding import Mesh

from jaxq.io import checkpoint, sources
from jaxq.nn import blocks, taps
from jaxq.parallel import mesh as mesh_lib
from models import decoder

Params = Mapping[str, Any]
DTYPES = ('bfloat16', 'float32')


@dataclasses.dataclass
class Model:
  """A model in memory.

  module.apply(variables, tokens (B, T)) -> (logits (B, T, V) float32, None).

  Attributes:
    config: its shape.
    module: the linen module over stacked blocks.
    variables: {'params', 'quant'}.
    tokenizer: of the checkpoint.
    name: the source it was loaded from.
    quantization: how it was quantized (a jaxq directory); None for float.
  """

  config: decoder.DecoderConfig
  module: decoder.Decoder
  variables: Params
  tokenizer: tokenizers.Tokenizer
  name: str
  quantization: dict[str, Any] | None = None


@dataclasses.dataclass
class OpenModel:
  """A model on disk, read block by block.

  Attributes:
    config: its shape.
    source: where its weights are (io.sources.WeightSource or a Checkpoint).
    name: the source as it was given.
    quantization: as in Model.
  """

  config: decoder.DecoderConfig
  source: Any
  name: str
  quantization: dict[str, Any] | None = None

  @property
  def num_blocks(self) -> int:
    """L."""
    return self.config.num_layers

  @property
  def bridges(self) -> tuple[int, ...]:
    """None: the same stream goes through all blocks."""
    return ()

  def bridge(
    self, i: int, outside: Params, carry: blocks.Carry
  ) -> blocks.Carry:
    """Not called."""
    raise NotImplementedError(f'{self.name} has no bridge at block {i}.')

  def block_at(self, i: int) -> blocks.BlockSpec:
    """The spec of block i."""
    del i  # All blocks are alike.
    return decoder.block_spec(self.config)

  def outside(self) -> Params:
    """Parameters outside the blocks, on the host."""
    return self.source.outside()

  def block_params(self, i: int) -> Params:
    """Float parameters of block i, on the host.

    Raises:
      ValueError: the model is quantized already.
    """
    if self.quantization is not None:
      scheme = self.quantization.get('scheme', 'a jaxq directory')
      raise ValueError(
        f'{self.name} is quantized already ({scheme}); calibration starts '
        'from a float model. Give the original source.'
      )
    return self.source.block(i)

  def embed(self, outside: Params, tokens: jax.Array) -> jax.Array:
    """tokens (B, T) -> the first block's input (B, T, C)."""
    module = decoder.Decoder(self.config_of(outside))
    x: Any = module.apply({'params': outside}, tokens, method='embed_tokens')
    return x

  def config_of(self, outside: Params) -> decoder.DecoderConfig:
    """The config of a model with these parameters outside its blocks."""
    return dataclasses.replace(
      self.config, tie_embeddings='head' not in outside
    )

  def rules(self, mesh: Mesh) -> mesh_lib.Rules:
    """How its parameters are sharded."""
    return decoder.sharding_rules(self.config, mesh.shape['model'])

  def description(self) -> dict[str, Any]:
    """What a manifest says of the model."""
    return {'family': 'decoder', 'config': dict(self.source.config)}

  def fingerprint(self) -> str:
    """Names the weights."""
    return self.source.fingerprint()

  def tokenizer(self) -> tokenizers.Tokenizer:
    """The checkpoint's tokenizer."""
    return self.source.tokenizer()


def open_model(source: str) -> OpenModel:
  """Opens a checkpoint without reading its weights.

  Raises:
    FileNotFoundError, ValueError, NotImplementedError: nothing there, damaged,
      or of a kind that is not supported; the message says which.
  """
  opened: Any
  if sources.kind(source) == 'jaxq':
    opened = checkpoint.open_checkpoint(source)
    quantization = opened.quantization
  else:
    opened, quantization = sources.open_source(source), None
  config = decoder.DecoderConfig.from_hf(opened.config)
  return OpenModel(config, opened, source, quantization)


def load(
  source: str, dtype: str = 'float32', mesh: Mesh | None = None
) -> Model:
  """Loads a whole model.

  Args:
    source: a packaged name, .gguf file, Hugging Face or jaxq directory.
    dtype: of float parameters and activations; scales keep their own.
    mesh: where to put it; None is the default device.

  Raises:
    As open_model; ValueError: a dtype that is not floating.
  """
  if dtype not in DTYPES:
    raise ValueError(
      f'models.load: dtype={dtype!r}; allowed are {sorted(DTYPES)}. Quantized '
      'kernels keep their own.'
    )
  opened = open_model(source)
  outside = opened.outside()
  parts = []
  for i in range(opened.num_blocks):
    if opened.quantization is None:
      parts.append({'params': opened.block_params(i), 'quant': {}})
    else:
      parts.append(opened.source.block(i))
  variables, runs = decoder.stack(outside, parts)
  variables = {
    'params': cast(variables['params'], dtype),
    'quant': variables['quant'],
  }
  if mesh is not None:
    variables = mesh_lib.place(variables, opened.rules(mesh), mesh)
  config = opened.config_of(outside)
  return Model(
    config=config,
    module=decoder.Decoder(config, runs, jnp.dtype(dtype)),
    variables=variables,
    tokenizer=opened.tokenizer(),
    name=source,
    quantization=opened.quantization,
  )


def cast(params: Params, dtype: str) -> Params:
  """Casts the plain float arrays of a parameter tree; QArrays are left."""
  out: dict[str, Any] = {}
  for path, leaf in taps.leaves(params):
    if isinstance(leaf, jax.Array | np.ndarray):
      floating = jnp.issubdtype(leaf.dtype, jnp.floating)
      leaf = jnp.asarray(leaf, dtype if floating else leaf.dtype)
    out = taps.set_path(out, path, leaf)
  return out
