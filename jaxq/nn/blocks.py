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

from jaxq.nn import linear as linear_lib
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
  tap: path of the tap that the consumers' input passes, where their own taps
    see part of it only (experts); '' is the tap of the first that is listed.
  shortcuts: paths of the nn.shortcut.Shortcut layers that carry the same
    tensor past the consumers (post-norm models): they undo the scale.
  """

  producer: str
  consumers: tuple[str, ...]
  method: str = ''
  heads: tuple[int, int, int] | None = None
  shortcuts: tuple[str, ...] = ()
  tap: str = ''

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
  unrotatable: why its residual stream cannot be rotated; '' if it can.
  coverage: path of a tap (B, T, E) that is 1 where a token goes to an expert;
    '' where there are no experts.
  """

  module: nn.Module
  linears: tuple[Linear, ...]
  sites: tuple[Site, ...] = ()
  residual_out: tuple[str, ...] = ()
  norms: tuple[tuple[str, tuple[str, ...]], ...] = ()
  rotated: tuple[str, ...] = ()
  entries: tuple[str, ...] = ()
  unrotatable: str = ''
  coverage: str = ''

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

  def inner_output(
    self, site: Site, variables: Params, x: jax.Array
  ) -> jax.Array:
    """Like `output`, less the linear that ends the site's branch.

    That linear is the consumer of a site which one of this site's consumers
    produces (v -> o, up -> down), and its input is what is returned. Consumers
    on a branch without such a linear give their outputs, biases included.
    Inputs are quantized as `variables` say.
    """
    if site.method:
      _, updated = self.module.apply(
        variables, x, method=site.method, mutable=['tapped']
      )
      following = [s for s in self.sites if s.producer in site.consumers]
      last = [s.consumers[0] for s in following]
      seen = {path.rpartition('/')[0] for path in last}
      names = [f'{path}/in' for path in last] + [
        f'{path}/out'
        for path in site.consumers
        if path.rpartition('/')[0] not in seen
      ]
      found = [taps.get_path(updated['tapped'], name) for name in names]
      return jnp.concatenate(found, axis=-1)
    outputs: list[Any] = []
    for path in site.consumers:
      own = {
        name: taps.get_path(tree, path) or {}
        for name, tree in variables.items()
      }
      N = kernel_of(variables['params'], path).shape[-1]
      outputs.append(linear_lib.QuantDense(N).apply(own, x))
    return jnp.concatenate(outputs, axis=-1)

  def linear(self, path: str) -> Linear | None:
    """The linear at `path`, or None where it is ignored."""
    return next((lin for lin in self.linears if lin.path == path), None)

  def tap_of(self, site: Site) -> str | None:
    """Where the consumers of a site are tapped; None if all are ignored."""
    found = (self.linear(path) for path in site.consumers)
    taps_ = [linear.tap for linear in found if linear is not None]
    return (site.tap or taps_[0]) if taps_ else None

  def with_all_experts(self) -> 'BlockSpec':
    """This spec, every token passing the taps of every expert."""
    if not self.coverage:
      return self
    return dataclasses.replace(self, module=self.module.clone(all_experts=True))

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
  """Whether an --ignore pattern names this linear.

  'blocks.3.attention.q_proj' answers to Hugging Face's name for it as well,
  'model.layers.3.self_attn.q_proj'.
  """
  parts = name.replace('blocks.', 'model.layers.', 1).split('.')
  parts = ['self_attn' if part == 'attention' else part for part in parts]
  names = (name, '.'.join(parts))
  if pattern.startswith('re:'):
    return any(re.search(pattern[3:], n) is not None for n in names)
  return any(n == pattern or n.endswith('.' + pattern) for n in names)
