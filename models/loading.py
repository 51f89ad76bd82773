"""`models.load(source)`: any checkpoint to a runnable model.

`open_model` reads nothing but the configuration and gives blocks one by one:
what the calibration needs. `load` reads them all and stacks them: what
evaluation and generation need. Both take a packaged name, a GGUF file, a
Hugging Face directory or a jaxq directory.

On a mesh leaves are lazy where the source can (safetensors, jaxq directories):
each process reads the shards of its own devices, and no host holds a block.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxq.io import checkpoint, sources
from jaxq.io import lazy as lazy_lib
from jaxq.nn import blocks, kernel_packing, taps
from jaxq.parallel import mesh as mesh_lib
from models import decoder, encoder, vit, whisper
from models import family as family_lib

Params = Mapping[str, Any]
DTYPES = ('bfloat16', 'float32')


def _embed_tokens(
  config: decoder.DecoderConfig, outside: Params, tokens: jax.Array
) -> Any:
  module = decoder.Decoder(config)
  return module.apply({'params': outside}, tokens, method='embed_tokens')


# What a manifest and a weight source call a family. A new one is one line here.
FAMILIES: dict[str, family_lib.Family] = {
  'decoder': family_lib.Family(
    config=decoder.DecoderConfig.from_hf,
    build=lambda config, runs, dtype: decoder.Decoder(config, runs, dtype),
    block_spec=decoder.block_spec,
    embed=_embed_tokens,
    rules=decoder.sharding_rules,
    config_of=lambda config, outside: dataclasses.replace(
      config, tie_embeddings='head' not in outside
    ),
  ),
  'encoder': encoder.FAMILY,
  'vit': vit.FAMILY,
  'whisper': whisper.FAMILY,
}


@dataclasses.dataclass
class Model:
  """A model in memory.

  module.apply(variables, tokens (B, T)) -> (logits (B, T, V) float32, None) of
  a decoder; the other families say in their own files what they take and give.

  Attributes:
    config: its shape.
    module: the linen module over stacked blocks.
    variables: {'params', 'quant'}.
    tokenizer: of the checkpoint; None where the family has none (vit).
    name: the source it was loaded from.
    quantization: how it was quantized (a jaxq directory); None for float.
    family: of FAMILIES.
  """

  config: Any
  module: Any
  variables: Params
  tokenizer: Any
  name: str
  quantization: dict[str, Any] | None = None
  family: str = 'decoder'


@dataclasses.dataclass
class OpenModel:
  """A model on disk, read block by block.

  Attributes:
    config: its shape.
    source: where its weights are (io.sources.WeightSource or a Checkpoint).
    name: the source as it was given.
    quantization, family: as in Model.
    lazy: leaves are read where they are indexed, if the source can do that.
  """

  config: Any
  source: Any
  name: str
  quantization: dict[str, Any] | None = None
  family: str = 'decoder'
  lazy: bool = False

  @property
  def num_blocks(self) -> int:
    """L."""
    return self.config.num_layers

  @property
  def bridges(self) -> tuple[int, ...]:
    """The blocks in front of which `bridge` changes the carry; mostly ()."""
    return FAMILIES[self.family].bridges(self.config)

  def bridge(
    self, i: int, outside: Params, carry: blocks.Carry
  ) -> blocks.Carry:
    """The carry in front of block i, one of `bridges`."""
    return FAMILIES[self.family].bridge(self.config, i, outside, carry)

  def block_at(self, i: int) -> blocks.BlockSpec:
    """The spec of block i."""
    return FAMILIES[self.family].block_spec(self.config, i)

  def outside(self) -> Params:
    """Parameters outside the blocks, on the host."""
    if self.lazy and hasattr(self.source, 'lazy_outside'):
      return self.source.lazy_outside()
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
    block = self._block(i)
    return block.get('params', block)  # A float jaxq directory has both.

  def block_variables(self, i: int) -> Params:
    """{'params', 'quant'} of block i, on the host, quantized or not."""
    if self.quantization is None:
      return {'params': self.block_params(i), 'quant': {}}
    return self._block(i)

  def embed(self, outside: Params, batch: Any) -> blocks.Carry:
    """A batch, tokens (B, T) of a decoder -> the first block's input."""
    config = self.config_of(outside)
    return FAMILIES[self.family].embed(config, outside, batch)

  def config_of(self, outside: Params) -> Any:
    """The config of a model with these parameters outside its blocks."""
    return FAMILIES[self.family].config_of(self.config, outside)

  def rules(self, mesh: Mesh) -> mesh_lib.Rules:
    """How its parameters are sharded."""
    return FAMILIES[self.family].rules(self.config, mesh.shape['model'])

  def description(self) -> dict[str, Any]:
    """What a manifest says of the model."""
    return {'family': self.family, 'config': dict(self.source.config)}

  def fingerprint(self) -> str:
    """Names the weights."""
    return self.source.fingerprint()

  def tokenizer(self) -> Any:
    """The checkpoint's tokenizer; None where the family has none."""
    return self.source.tokenizer()

  def _block(self, i: int) -> Params:
    if self.lazy and hasattr(self.source, 'lazy_block'):
      return self.source.lazy_block(i)
    return self.source.block(i)


def open_model(source: str, lazy: bool = False) -> OpenModel:
  """Opens a checkpoint without reading its weights.

  Args:
    source: a packaged name, .gguf file, Hugging Face or jaxq directory.
    lazy: leaves are read where they are indexed, if the source can do that.

  Raises:
    FileNotFoundError, ValueError, NotImplementedError: nothing there, damaged,
      or of a kind that is not supported; the message says which.
  """
  opened: Any
  if sources.kind(source) == 'jaxq':
    opened = checkpoint.open_checkpoint(source)
    quantization = opened.quantization
  else:
    opened = sources.open_source(source)
    quantization = getattr(opened, 'quantization', None)
  family = getattr(opened, 'family', 'decoder')
  if family not in FAMILIES:
    raise NotImplementedError(
      f'{source}: a model of the family {family!r}; this jaxq has '
      f'{sorted(FAMILIES)}. Upgrade jaxq to read it.'
    )
  config = FAMILIES[family].config(opened.config)
  return OpenModel(config, opened, source, quantization, family, lazy)


def load(
  source: str, dtype: str = 'float32', mesh: Mesh | None = None
) -> Model:
  """Loads a whole model; on a Hopper GPU, packed for its kernels.

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
  opened = open_model(source, lazy=mesh is not None)
  outside = opened.outside()
  parts = [opened.block_variables(i) for i in range(opened.num_blocks)]
  kinds = [opened.block_at(i) for i in range(opened.num_blocks)]
  stack: Any = jnp.stack
  if mesh is None:  # On a mesh XLA's products serve, of weights as stored.
    outside = _packed({'params': outside})['params']
    parts = [_packed(part) for part in parts]
  else:  # Nothing is stacked but the shards of each device.
    outside, stack = jax.tree.map(lazy_lib.of, outside), lazy_lib.stack
  variables, runs = decoder.stack(outside, parts, kinds, stack)
  variables = {
    'params': cast(variables['params'], dtype),
    'quant': variables['quant'],
  }
  if mesh is not None:
    variables = mesh_lib.place(variables, opened.rules(mesh), mesh)
  config = opened.config_of(outside)
  return Model(
    config=config,
    module=FAMILIES[opened.family].build(config, runs, jnp.dtype(dtype)),
    variables=variables,
    tokenizer=opened.tokenizer(),
    name=source,
    quantization=opened.quantization,
    family=opened.family,
  )


def _packed(variables: Params) -> Params:
  """For the kernels of a Hopper GPU, if it is one; then on the host."""
  if kernel_packing.why_not():
    return variables
  return jax.device_get(kernel_packing.pack(variables))


def cast(params: Params, dtype: str) -> Params:
  """Casts the plain float arrays of a parameter tree; QArrays are left."""
  out: dict[str, Any] = {}
  for path, leaf in taps.leaves(params):
    if isinstance(leaf, jax.Array | np.ndarray):
      floating = jnp.issubdtype(leaf.dtype, jnp.floating)
      leaf = jnp.asarray(leaf, dtype if floating else leaf.dtype)
    elif isinstance(leaf, lazy_lib.LazyArray) and jnp.issubdtype(
      leaf.dtype, jnp.floating
    ):
      leaf = lazy_lib.astype(leaf, jnp.dtype(dtype))
    out = taps.set_path(out, path, leaf)
  return out
