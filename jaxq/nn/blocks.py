"""What a calibrated block tells the methods about itself.

A model hands the calibration one `BlockSpec` for its repeated block: which
linears it has and where their inputs are tapped, and its equivalence sites.

A site is a pair of neighbours between which a scale can move without changing
the function: dividing channel j of the producer's output by s_j and multiplying
row j of every consumer's kernel by s_j is the identity. Scale-migrating methods
(SmoothQuant, AWQ, ...) are written once, over sites, for all models.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxq.nn import taps

Params = Mapping[str, Any]

# What flows from block to block: the residual stream x (B, T, C), or a dict
# with 'x' and what else the blocks read (an attention mask, the encoder's
# output), every array with the batch as its first axis.
Carry = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
  """A linear of the block.

  path: its path in the block's params ('attention/q_proj').
  tap: path of the tap its input passes. Linears that read the same tensor name
    the same tap, so the statistics are taken once.
  """

  path: str
  tap: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
  """An equivalence site.

  producer: path of the norm or linear whose output channels are divided.
  consumers: paths of the linears that read it.
  method: name of the block module's method that maps the consumers' input to
    the output that a search compares ('attention_output'); '' is the consumer
    itself.
  heads: (kv_heads, repeats, head_dim) where grouped-query attention repeats
    each of the producer's heads for `repeats` of the consumer's; None: one to
    one.
  """

  producer: str
  consumers: tuple[str, ...]
  method: str = ''
  heads: tuple[int, int, int] | None = None

  def reduce(self, x: jax.Array) -> jax.Array:
    """Consumer channels (K,) -> producer channels, by mean over repeats."""
    if self.heads is None:
      return x
    return jnp.mean(x.reshape(self.heads), axis=1).reshape(-1)

  def expand(self, s: jax.Array) -> jax.Array:
    """Producer channels -> consumer channels (K,)."""
    if self.heads is None:
      return s
    kv_heads, repeats, head_dim = self.heads
    s = s.reshape(kv_heads, 1, head_dim)
    return jnp.broadcast_to(s, (kv_heads, repeats, head_dim)).reshape(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSpec:
  """The block of a model, as the methods see it. Static and hashable.

  module: the linen module; `module.apply(variables, x, **entries)` returns a
    tuple whose first element is the new residual stream.
  linears: the linears that may be quantized.
  sites: its equivalence sites.
  residual_in, residual_out: paths of the linears that read the residual stream
    (through a norm) and that write to it.
  norms: for each norm on the residual stream, the linears it feeds.
  rotated: linears whose input an online Hadamard may rotate (o and down).
  entries: names of the carry's entries that the module takes by keyword.
  """

  module: nn.Module
  linears: tuple[Linear, ...]
  sites: tuple[Site, ...] = ()
  residual_out: tuple[str, ...] = ()
  norms: tuple[tuple[str, tuple[str, ...]], ...] = ()
  rotated: tuple[str, ...] = ()
  entries: tuple[str, ...] = ()

  def apply(self, variables: Params, carry: Carry) -> Carry:
    """The carry behind the block; positions are 0..T-1."""
    x, entries = self._arguments(carry)
    return with_stream(carry, self.module.apply(variables, x, **entries)[0])

  def observe(self, variables: Params, carry: Carry) -> tuple[Carry, Params]:
    """Like apply; also returns the updated `taps` collection."""
    x, entries = self._arguments(carry)
    out, updated = self.module.apply(variables, x, mutable=['taps'], **entries)
    return with_stream(carry, out[0]), updated['taps']

  def tapped(self, variables: Params, carry: Carry) -> Params:
    """What passes every tap, {module path: {tap: array}}."""
    x, entries = self._arguments(carry)
    _, updated = self.module.apply(variables, x, mutable=['tapped'], **entries)
    return updated['tapped']

  def _arguments(self, carry: Carry) -> tuple[jax.Array, dict[str, Any]]:
    return stream(carry), {name: carry[name] for name in self.entries}

  def output(self, site: Site, variables: Params, x: jax.Array) -> jax.Array:
    """The output that a search at `site` compares, from the consumers' input.

    Args:
      site: one of this block's sites.
      variables: {'params', 'quant'} of the block.
      x: (B, T, K), what the site's tap sees.
    """
    if site.method:
      y: Any = self.module.apply(variables, x, method=site.method)
      return y
    kernels = [kernel_of(variables['params'], path) for path in site.consumers]
    return jnp.concatenate([x @ kernel for kernel in kernels], axis=-1)

  def linear(self, path: str) -> Linear | None:
    """The linear at `path`, or None where it is ignored."""
    return next((lin for lin in self.linears if lin.path == path), None)

  def without(self, patterns: tuple[str, ...], index: int) -> 'BlockSpec':
    """This spec less the linears of block `index` that a pattern names.

    Args:
      patterns: names ('down_proj', 'blocks.0.mlp.down_proj') or regular
        expressions after 're:' searched in 'blocks.<index>.<path>'.
      index: which block.
    """
    kept = tuple(
      lin
      for lin in self.linears
      if not any(matches(p, name_of(index, lin.path)) for p in patterns)
    )
    return dataclasses.replace(self, linears=kept)


def stream(carry: Carry) -> jax.Array:
  """The residual stream (B, T, C) of a carry."""
  return carry['x'] if isinstance(carry, Mapping) else carry


def with_stream(carry: Carry, x: jax.Array) -> Carry:
  """A carry whose residual stream is x."""
  return {**carry, 'x': x} if isinstance(carry, Mapping) else x


def kernel_of(params: Params, path: str) -> jax.Array:
  """The kernel (K, N) of the linear at `path`."""
  return taps.get_path(params, f'{path}/kernel')


def name_of(index: int, path: str) -> str:
  """The public name of a linear: 'blocks.3.mlp.down_proj'."""
  return f'blocks.{index}.' + path.replace('/', '.')


def matches(pattern: str, name: str) -> bool:
  """Whether an --ignore pattern names this linear."""
  if pattern.startswith('re:'):
    return re.search(pattern[3:], name) is not None
  return name == pattern or name.endswith('.' + pattern)
