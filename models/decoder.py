"""Decoder-only language models (Llama family) as one flat file.

  x = embed(tokens)
  for block: x = x + attention(rms(x)); x = x + down(silu(gate(h)) * up(h))
  logits = head(rms(x))

Blocks of equal structure are stacked along a leading axis and scanned, so a
deep model compiles as fast as a shallow one. Blocks whose leaves differ (one
keeps float kernels, say) form separate runs: 'blocks_0' holds the first run
stacked, 'blocks_1' the next, in 'params', 'quant' and the tuple of caches.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from jaxq.kvcache import contiguous
from jaxq.nn import attention, blocks, embed, linear, norms
from jaxq.parallel import mesh as mesh_lib

Params = Mapping[str, Any]
Caches = tuple[contiguous.ContiguousCache, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """The shape of a Llama-style decoder.

  vocab_size (V), hidden_size (C), intermediate_size (F), num_layers (L).
  num_heads (H) query heads share num_kv_heads (Hkv) of head_dim (D) channels.
  rope_theta, norm_eps: bases of the rotary frequencies and of the norms.
  tie_embeddings: the head is the embedding table.
  max_position: longest sequence the model was trained for.
  bos_token_id, eos_token_ids: as the checkpoint says.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 10000.0
  norm_eps: float = 1e-5
  tie_embeddings: bool = True
  max_position: int = 2048
  bos_token_id: int | None = None
  eos_token_ids: tuple[int, ...] = ()

  def __post_init__(self):
    for name in (
      'vocab_size',
      'hidden_size',
      'intermediate_size',
      'num_layers',
      'num_heads',
      'num_kv_heads',
      'head_dim',
    ):
      if getattr(self, name) < 1:
        raise ValueError(
          f'DecoderConfig: {name}={getattr(self, name)}; it must be at least '
          "1. Check the checkpoint's config."
        )
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'DecoderConfig: num_heads={self.num_heads}, num_kv_heads='
        f'{self.num_kv_heads}; query heads must be a multiple of key/value '
        "heads. Check the checkpoint's config."
      )
    if self.head_dim % 2:
      raise ValueError(
        f'DecoderConfig: head_dim={self.head_dim}; rotary positions need an '
        'even head_dim.'
      )

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> 'DecoderConfig':
    """From the keys of a Hugging Face config.json."""
    heads = config['num_attention_heads']
    rope = config.get('rope_parameters') or {}
    eos = config.get('eos_token_id')
    return cls(
      vocab_size=config['vocab_size'],
      hidden_size=config['hidden_size'],
      intermediate_size=config['intermediate_size'],
      num_layers=config['num_hidden_layers'],
      num_heads=heads,
      num_kv_heads=config.get('num_key_value_heads') or heads,
      head_dim=config.get('head_dim') or config['hidden_size'] // heads,
      rope_theta=float(
        config.get('rope_theta') or rope.get('rope_theta') or 10000.0
      ),
      norm_eps=float(config.get('rms_norm_eps', 1e-6)),
      tie_embeddings=bool(config.get('tie_word_embeddings', False)),
      max_position=config.get('max_position_embeddings', 2048),
      bos_token_id=config.get('bos_token_id'),
      eos_token_ids=(
        () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
      ),
    )


class MLP(nn.Module):
  """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, 2020, arXiv 2002.05202)."""

  intermediate_size: int
  implementation: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, T, C) -> (B, T, C)."""

    def dense(features, name):
      return linear.QuantDense(
        features, implementation=self.implementation, name=name
      )

    gate = dense(self.intermediate_size, 'gate_proj')(x)
    up = dense(self.intermediate_size, 'up_proj')(x)
    return dense(x.shape[-1], 'down_proj')(jax.nn.silu(gate) * up)


class Block(nn.Module):
  """One decoder block; everything the calibration works on."""

  config: DecoderConfig
  implementation: str | None = None

  def setup(self):
    c = self.config
    self.input_norm = norms.RMSNorm(c.norm_eps)
    self.attention = attention.Attention(
      c.num_heads,
      c.num_kv_heads,
      c.head_dim,
      c.rope_theta,
      self.implementation,
    )
    self.post_norm = norms.RMSNorm(c.norm_eps)
    self.mlp = MLP(c.intermediate_size, self.implementation)

  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array | None = None,
    cache: contiguous.ContiguousCache | None = None,
  ) -> tuple[jax.Array, contiguous.ContiguousCache | None]:
    """(B, T, C) -> (B, T, C), cache. positions None: 0..T-1."""
    positions = _positions(x) if positions is None else positions
    out, cache = self.attention(self.input_norm(x), positions, cache)
    x = x + out
    return x + self.mlp(self.post_norm(x)), cache

  def attention_output(self, x: jax.Array) -> jax.Array:
    """The attention's output from its normalised input (B, T, C)."""
    return self.attention(x, _positions(x))[0]

  def mlp_output(self, x: jax.Array) -> jax.Array:
    """The MLP's output from its normalised input (B, T, C)."""
    return self.mlp(x)


class Decoder(nn.Module):
  """A whole model over stacked blocks.

  Attributes:
    config: the model's shape.
    runs: lengths of the runs of equally structured blocks, summing to L; ()
      is one run.
    dtype: of the activations; logits are always float32.
    implementation: matmul of the linears; None picks.
  """

  config: DecoderConfig
  runs: tuple[int, ...] = ()
  dtype: Any = jnp.float32
  implementation: str | None = None

  def setup(self):
    c = self.config
    self.embed = embed.Embed(c.vocab_size, c.hidden_size)
    self.blocks = [
      nn.scan(
        Block,
        variable_axes={'params': 0, 'quant': 0},
        split_rngs={'params': True},
        in_axes=(nn.broadcast, 0),
        out_axes=0,
        length=length,
      )(c, self.implementation)
      for length in self.runs or (c.num_layers,)
    ]
    self.final_norm = norms.RMSNorm(c.norm_eps)
    if not c.tie_embeddings:
      self.head = linear.QuantDense(c.vocab_size)

  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    caches: Caches | None = None,
  ) -> tuple[jax.Array, Caches | None]:
    """tokens (B, T) int32 -> logits (B, T, V) float32, caches."""
    x, caches = self.hidden(tokens, positions, caches)
    return self.logits(x), caches

  def hidden(
    self,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    caches: Caches | None = None,
  ) -> tuple[jax.Array, Caches | None]:
    """tokens (B, T) -> last block's output (B, T, C), caches."""
    x = self.embed_tokens(tokens)
    positions = _positions(x) if positions is None else positions
    out: list[Any] = []
    for i, run in enumerate(self.blocks):
      x, cache = run(x, positions, None if caches is None else caches[i])
      out.append(cache)
    return x, None if caches is None else tuple(out)

  def embed_tokens(self, tokens: jax.Array) -> jax.Array:
    """tokens (B, T) -> the first block's input (B, T, C)."""
    return self.embed(tokens).astype(self.dtype)

  def logits(self, x: jax.Array) -> jax.Array:
    """Last block's output (..., C) -> logits (..., V) float32."""
    x = self.final_norm(x)
    if self.config.tie_embeddings:
      return self.embed.attend(x)
    return self.head(x).astype(jnp.float32)


def block_spec(
  config: DecoderConfig, implementation: str | None = None
) -> blocks.BlockSpec:
  """What a block of this model tells the calibration."""
  qkv = tuple(f'attention/{n}_proj' for n in 'qkv')
  gate_up = ('mlp/gate_proj', 'mlp/up_proj')
  o, down = 'attention/o_proj', 'mlp/down_proj'
  repeats = config.num_heads // config.num_kv_heads
  return blocks.BlockSpec(
    module=Block(config, implementation),
    linears=tuple(
      blocks.Linear(path=path, tap=f'{group[0]}/in')
      for group in (qkv, (o,), gate_up, (down,))
      for path in group
    ),
    sites=(
      blocks.Site(
        producer='input_norm', consumers=qkv, method='attention_output'
      ),
      blocks.Site(
        producer='attention/v_proj',
        consumers=(o,),
        heads=(config.num_kv_heads, repeats, config.head_dim),
      ),
      blocks.Site(producer='post_norm', consumers=gate_up, method='mlp_output'),
      blocks.Site(producer='mlp/up_proj', consumers=(down,)),
    ),
    residual_out=(o, down),
    norms=(('input_norm', qkv), ('post_norm', gate_up)),
    rotated=(o, down),
  )


def sharding_rules(config: DecoderConfig, shards: int) -> mesh_lib.Rules:
  """How the parameters lie on `shards` devices of the `model` axis.

  Megatron's layout: columns of q, k, v, gate, up and head, rows of o and down,
  one all-reduce behind each pair. Attention is replicated where the heads do
  not divide, so that no head is split.

  Raises:
    ValueError: intermediate_size does not divide.
  """
  if config.intermediate_size % shards:
    raise ValueError(
      f'mesh model:{shards}: intermediate_size={config.intermediate_size} is '
      f'not a multiple of {shards}; choose a model size that divides it.'
    )
  columns, rows = PartitionSpec(None, 'model'), PartitionSpec('model', None)
  heads = config.num_kv_heads % shards == 0
  return (
    (r'attention/[qkv]_proj/kernel', columns if heads else PartitionSpec()),
    (r'attention/o_proj/kernel', rows if heads else PartitionSpec()),
    (r'mlp/(gate|up)_proj/kernel', columns),
    (r'mlp/down_proj/kernel', rows),
    (r'embed/embedding', rows),
    (r'head/kernel', columns),
  )


def init_caches(
  config: DecoderConfig,
  runs: tuple[int, ...],
  batch: int,
  capacity: int,
  dtype: Any = jnp.float32,
) -> Caches:
  """Empty caches, one stacked (layers first) per run."""

  def stacked(length):
    cache = contiguous.init(
      batch, capacity, config.num_kv_heads, config.head_dim, dtype
    )
    return jax.tree.map(lambda a: jnp.stack([a] * length), cache)

  return tuple(stacked(length) for length in runs or (config.num_layers,))


def stack(
  outside: Params, block_variables: Sequence[Params]
) -> tuple[Params, tuple[int, ...]]:
  """One variables tree of a Decoder from its parts.

  Args:
    outside: params outside the blocks.
    block_variables: {'params', 'quant'} of each block, in order.

  Returns:
    {'params', 'quant'} with equal neighbours stacked, and the runs' lengths.
  """
  runs: list[list[Params]] = []
  for variables in block_variables:
    variables = {
      'params': variables['params'],
      'quant': variables.get('quant', {}),
    }
    if runs and _structure(runs[-1][0]) == _structure(variables):
      runs[-1].append(variables)
    else:
      runs.append([variables])
  params: dict[str, Any] = dict(outside)
  quant: dict[str, Any] = {}
  for i, run in enumerate(runs):
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *run)
    params[f'blocks_{i}'] = stacked['params']
    quant[f'blocks_{i}'] = stacked['quant']
  return {'params': params, 'quant': quant}, tuple(len(run) for run in runs)


def _structure(tree: Params) -> Any:
  leaves, structure = jax.tree.flatten(tree)
  return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _positions(x: jax.Array) -> jax.Array:
  """(B, T, C) -> positions 0..T-1 (B, T) int32."""
  return jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
