"""Decoder-only language models, by configuration, as one flat file.

  x = embed(tokens)
  for block: x = x + attention(norm(x)); x = x + mlp(norm(x))
  logits = head(norm(x))

`DecoderConfig` says what stands for norm, attention and mlp: Llama, Mistral,
Qwen2 and 3, Gemma 2 and 3, OPT, Phi-3, Mixtral and Qwen3-MoE.

Blocks of equal structure and kind are stacked along a leading axis and scanned,
so a deep model compiles as fast as a shallow one. Blocks that differ (one keeps
float kernels, one has a window) form separate runs: 'blocks_0' holds the first
run stacked, 'blocks_1' the next, in 'params', 'quant' and the tuple of caches.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from jaxq.kvcache import contiguous, interface
from jaxq.nn import (
  attention,
  blocks,
  embed,
  kernel_inputs,
  linear,
  mlp,
  moe,
  norms,
)
from jaxq.parallel import mesh as mesh_lib
from models import decoder_config, query_prediction

Params = Mapping[str, Any]
Caches = tuple[Any, ...]  # Of interface.Cache, stacked.
DecoderConfig = decoder_config.DecoderConfig
BlockKind = decoder_config.BlockKind


class Block(nn.Module):
  """One decoder block; everything the calibration works on.

  Attributes:
    config: the model's shape.
    implementation: matmul of the linears; None picks.
    kind: what sets it apart from other blocks.
    all_experts: statistics of every expert are taken of every token.
  """

  config: DecoderConfig
  implementation: str | None = None
  kind: BlockKind = BlockKind()
  all_experts: bool = False

  def setup(self):
    c = self.config
    norm = norms.RMSNorm if c.norm == 'rms' else norms.LayerNorm
    self.input_norm = norm(c.norm_eps)
    self.attention = attention.Attention(
      c.num_heads,
      c.num_kv_heads,
      c.head_dim,
      c.rope(self.kind),
      self.implementation,
      qkv_bias=c.qkv_bias,
      o_bias=c.o_bias,
      qk_norm=c.qk_norm,
      norm_eps=c.norm_eps,
      scale=c.attention_scale,
      window=c.window if self.kind.sliding else None,
      softcap=c.attention_softcap,
    )
    self.post_norm = norm(c.norm_eps)
    if c.out_norms:
      self.attention_out_norm = norm(c.norm_eps)
      self.mlp_out_norm = norm(c.norm_eps)
    self.mlp: nn.Module
    if self.kind.sparse:
      self.mlp = moe.SparseMLP(
        c.num_experts,
        c.experts_per_token,
        c.expert_size,
        self.implementation,
        c.activation,
        c.normalize_router,
        self.all_experts,
      )
    else:
      self.mlp = mlp.MLP(
        c.intermediate_size,
        self.implementation,
        c.activation,
        c.gated,
        c.mlp_bias,
      )

  def __call__(
    self,
    x: Any,
    positions: jax.Array | None = None,
    cache: Any = None,
    shared: Any = None,
  ) -> tuple[Any, interface.Update | None]:
    """(B, T, C) -> (B, T, C), the cache's update. positions None: 0..T-1.

    With `shared`, what the caches of a run share, x may come with the rows that
    the block before fetched for this cache, and goes with the next one's.
    """
    x, ahead = x if isinstance(x, tuple) else (x, None)
    positions = _positions(x) if positions is None else positions
    cache = cache if shared is None else cache.joined(shared, ahead)
    normed = kernel_inputs.feed(self.input_norm, x, self.attention)
    out, update = self.attention(normed, positions, cache)
    if ahead is not None:
      q = query_prediction.queries(
        self.attention, cache.next_query(), self.input_norm(x), positions
      )
      ahead = cache.fetch_ahead(q, self.config.attention_scale)
    x = x + (self.attention_out_norm(out) if self.config.out_norms else out)
    out = self.mlp(kernel_inputs.feed(self.post_norm, x, self.mlp))
    x = x + (self.mlp_out_norm(out) if self.config.out_norms else out)
    return (x if ahead is None else (x, ahead)), update

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
    runs: lengths of the runs of equally structured blocks of one kind, summing
      to L; () is one run per change of kind.
    dtype: of the activations; logits are always float32.
    implementation: matmul of the linears; None picks.
  """

  config: DecoderConfig
  runs: tuple[int, ...] = ()
  dtype: Any = jnp.float32
  implementation: str | None = None

  def setup(self):
    c = self.config
    self.embed = embed.Embed(
      c.vocab_size,
      c.hidden_size,
      c.embed_scale,
      c.max_position if c.learned_positions else 0,
    )
    self.blocks = [
      nn.scan(
        Block,
        variable_axes={'params': 0, 'quant': 0},
        split_rngs={'params': True},
        in_axes=(nn.broadcast, 0, nn.broadcast),
        out_axes=0,
        length=length,
      )(c, self.implementation, kind)
      for length, kind in _kinds_of(c, self.runs)
    ]
    norm = norms.RMSNorm if c.norm == 'rms' else norms.LayerNorm
    self.final_norm = norm(c.norm_eps)
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
    """tokens (B, T) -> last block's output (B, T, C), caches.

    With caches the positions of a row go on where its length ends; negative
    ones are padding behind its tokens, which is not stored.
    """
    x = self.embed_tokens(tokens, positions)
    positions = _positions(x) if positions is None else positions
    if caches is None:
      for run in self.blocks:
        x, _ = run(x, positions, None, None)
      return x, None
    counts = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    out: list[Any] = []
    for i, (_, cache) in enumerate(zip(self.blocks, caches, strict=True)):
      x, update = self._run(i, x, positions, cache)
      assert update is not None
      out.append(interface.append(cache, update, counts))
    return x, tuple(out)

  def run(
    self,
    i: int,
    x: jax.Array,
    positions: jax.Array,
    cache: Any = None,
  ) -> tuple[jax.Array, Any]:
    """Run i of the blocks: its input (B, T, C) -> its output, its update."""
    out: tuple[jax.Array, Any] = self._run(i, x, positions, cache)
    return out

  def _run(self, i, x, positions, cache):
    layers, shared = interface.split(cache)
    ahead = None if shared is None else shared.ahead(x.shape[1])
    if ahead is None:
      return self.blocks[i](x, positions, layers, shared)
    query = query_prediction.of_run(self.variables, i)
    shared = shared.replace(query=query)
    (x, _), update = self.blocks[i]((x, ahead), positions, layers, shared)
    return x, update

  def embed_tokens(
    self, tokens: jax.Array, positions: jax.Array | None = None
  ) -> jax.Array:
    """tokens (B, T) -> the first block's input (B, T, C)."""
    return self.embed(tokens, positions).astype(self.dtype)

  def logits(self, x: jax.Array) -> jax.Array:
    """Last block's output (..., C) -> logits (..., V) float32."""
    x = self.final_norm(x)
    if self.config.tie_embeddings:
      logits = self.embed.attend(x)
    else:
      logits = self.head(x).astype(jnp.float32)
    cap = self.config.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def block_spec(
  config: DecoderConfig, i: int = 0, implementation: str | None = None
) -> blocks.BlockSpec:
  """What block i of this model tells the calibration.

  No site goes through a norm on an output (Gemma) or, without a gate, through
  an activation other than ReLU, which a positive scale passes.
  """
  kind = config.kind(i)
  qkv = tuple(f'attention/{n}_proj' for n in 'qkv')
  o = 'attention/o_proj'
  mlps, router = ['mlp'], []
  if kind.sparse:
    mlps = [f'mlp/expert_{e}' for e in range(config.num_experts)]
    router = ['mlp/router']  # Reads the norm too; it stays float.
  names = ('gate_proj', 'up_proj') if config.gated else ('up_proj',)
  read = {path: tuple(f'{path}/{name}' for name in names) for path in mlps}
  downs = tuple(f'{path}/down_proj' for path in mlps)
  post_readers = (*router, *(path for paths in read.values() for path in paths))
  groups = [qkv, (o,)]
  for path, down in zip(mlps, downs, strict=True):
    groups += [read[path], (down,)]
  sites = [
    blocks.Site(
      producer='input_norm', consumers=qkv, method='attention_output'
    ),
    blocks.Site(
      producer='attention/v_proj',
      consumers=(o,),
      heads=(
        config.num_kv_heads,
        config.num_heads // config.num_kv_heads,
        config.head_dim,
      ),
    ),
    blocks.Site(
      producer='post_norm',
      consumers=post_readers,
      method='mlp_output',
      tap='mlp/in' if kind.sparse else '',
    ),
  ]
  if config.gated or config.activation == 'relu':
    sites += [
      blocks.Site(producer=f'{path}/up_proj', consumers=(down,))
      for path, down in zip(mlps, downs, strict=True)
    ]
  return blocks.BlockSpec(
    module=Block(config, implementation, kind),
    linears=tuple(
      blocks.Linear(path=path, tap=f'{group[0]}/in')
      for group in groups
      for path in group
    ),
    sites=tuple(sites),
    residual_out=(o, *downs),
    norms=(('input_norm', qkv), ('post_norm', post_readers)),
    rotated=(o, *downs),
    unrotatable=_why_not_rotated(config),
    coverage='mlp/routed' if kind.sparse else '',
  )


def _why_not_rotated(config: DecoderConfig) -> str:
  """Why the residual stream cannot be rotated; '' if it can."""
  if config.norm != 'rms':
    return (
      'its norms are LayerNorms, which take off a mean over channels that a '
      'rotation mixes'
    )
  if config.out_norms:
    return (
      'norms with scales stand between its linears and the residual stream, '
      'and those do not commute with a rotation'
    )
  return ''


def sharding_rules(config: DecoderConfig, shards: int) -> mesh_lib.Rules:
  """How the parameters lie on `shards` devices of the `model` axis.

  Megatron's layout: columns of q, k, v, gate, up and head with their biases,
  rows of o and down, one all-reduce behind each pair; the same inside every
  expert. Attention is replicated where the heads do not divide, so that no head
  is split. Norms, router, positions and the biases of o and down are whole.

  Raises:
    ValueError: intermediate_size or expert_size does not divide.
  """
  for name in ('intermediate_size', 'expert_size'):
    if getattr(config, name) % shards:
      raise ValueError(
        f'mesh model:{shards}: {name}={getattr(config, name)} is not a '
        f'multiple of {shards}; choose a model size that divides it.'
      )
  whole = PartitionSpec()
  columns, rows = PartitionSpec(None, 'model'), PartitionSpec('model', None)
  column_bias = PartitionSpec('model')
  heads = config.num_kv_heads % shards == 0
  return (
    (r'attention/[qkv]_proj/kernel', columns if heads else whole),
    (r'attention/[qkv]_proj/bias', column_bias if heads else whole),
    (r'attention/o_proj/kernel', rows if heads else whole),
    (r'mlp/(expert_\d+/)?(gate|up)_proj/kernel', columns),
    (r'mlp/(expert_\d+/)?(gate|up)_proj/bias', column_bias),
    (r'mlp/(expert_\d+/)?down_proj/kernel', rows),
    (r'embed/embedding', rows),
    (r'head/kernel', columns),
  )


def init_caches(
  config: DecoderConfig,
  runs: tuple[int, ...],
  batch: int,
  capacity: int,
  dtype: Any = jnp.float32,
  kv_cache: interface.CacheConfig | None = None,
) -> Caches:
  """Empty caches, one stacked (layers first) per run; None: contiguous."""
  kv_cache = contiguous.ContiguousConfig() if kv_cache is None else kv_cache

  def stacked(start, length, kind):
    shape = interface.CacheShape(
      batch=batch,
      capacity=capacity,
      kv_heads=config.num_kv_heads,
      head_dim=config.head_dim,
      dtype=dtype,
      window=config.window if kind.sliding else None,
      heads=config.num_heads,
      rope=config.rope(kind),
    )
    cache = kv_cache.init(shape)
    cache = jax.tree.map(lambda a: jnp.stack([a] * length), cache)
    # A cache that is not the same in all layers says what differs.
    of_layers = getattr(cache, 'of_layers', None)
    return of_layers(range(start, start + length)) if of_layers else cache

  start, out = 0, []
  for length, kind in _kinds_of(config, runs):
    out.append(stacked(start, length, kind))
    start += length
  return tuple(out)


def stack(
  outside: Params,
  block_variables: Sequence[Params],
  kinds: Sequence[Any] | None = None,
  stack_leaves: Callable[[Sequence[Any]], Any] = jnp.stack,
) -> tuple[Params, tuple[int, ...]]:
  """One variables tree of a Decoder from its parts.

  Args:
    outside: params outside the blocks.
    block_variables: {'params', 'quant'} of each block, in order.
    kinds: what must be equal of blocks in one run beside their structure, one
      per block (block_spec gives such a thing); None: all are alike.
    stack_leaves: the same leaf of several blocks -> one, along a new axis 0.

  Returns:
    {'params', 'quant'} with equal neighbours stacked, and the runs' lengths.
  """
  runs: list[list[Params]] = []
  kinds = [None] * len(block_variables) if kinds is None else kinds
  before: Any = None
  for variables, kind in zip(block_variables, kinds, strict=True):
    variables = {
      'params': variables['params'],
      'quant': variables.get('quant', {}),
    }
    alike = runs and _structure(runs[-1][0]) == _structure(variables)
    if alike and kind == before:
      runs[-1].append(variables)
    else:
      runs.append([variables])
    before = kind
  params: dict[str, Any] = dict(outside)
  quant: dict[str, Any] = {}
  for i, run in enumerate(runs):
    stacked = jax.tree.map(lambda *leaves: stack_leaves(leaves), *run)
    params[f'blocks_{i}'] = stacked['params']
    quant[f'blocks_{i}'] = stacked['quant']
  return {'params': params, 'quant': quant}, tuple(len(run) for run in runs)


def _kinds_of(
  config: DecoderConfig, runs: tuple[int, ...]
) -> list[tuple[int, BlockKind]]:
  """(length, kind) of every run."""
  out, start = [], 0
  for length in runs or config.kind_runs():
    kinds = {config.kind(i) for i in range(start, start + length)}
    if len(kinds) > 1:
      raise ValueError(
        f'Decoder: blocks {start}..{start + length - 1} are one run but of '
        'different kinds; pass decoder.stack the kinds of the blocks.'
      )
    out.append((length, kinds.pop()))
    start += length
  return out


def _structure(tree: Params) -> Any:
  leaves, structure = jax.tree.flatten(tree)
  return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def _positions(x: jax.Array) -> jax.Array:
  """(B, T, C) -> positions 0..T-1 (B, T) int32."""
  return jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
