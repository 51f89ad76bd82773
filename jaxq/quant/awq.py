"""AWQ: scale salient input channels up before rounding, then clip.

Lin et al., 2023, https://arxiv.org/abs/2306.00978.

  a_j = mean |x_j|,  s = clip(a^r, 1e-4) / sqrt(max(s) min(s))
  r*  = argmin_r |f(x / s; fake_quant(s W)) - f(x; W)|^2,  r in {0, 1/20, ...}

A weight's rounding error reaches the output times its input, so the rows of W
that meet large inputs are worth a finer step: s_j > 1 gives it to them at the
expense of the other rows of their group. 1/s moves into the layer before, at
no cost. f is what the site names: the attention, the MLP, or the linear alone.
r = 0 is round-to-nearest and in the grid: on the sample AWQ is never worse.

Then per group and column the range that minimises the group's part of the
output error, |x_g (W_g - fake_quant(clip(W_g, c)))|^2, for c down to half of
absmax. Not for the queries and keys, whose product's error it does not see.

Cost: `grid` passes of f over the sample, one at a time, and `clip_grid`
products with the groups' Gram matrices, in chunks of at most 512 columns: live
memory is that of one pass plus about five times K x 512 floats.

Two stages: scales, then clipping and rounding on the inputs as scaled. In the
first, sites are searched in order on statistics taken once: a site's fold
preserves the function and changes only its own consumers' input. That v and up
are divided per column after their own site was searched changes nothing, since
their scales are per column too.

Departures from the reference: v -> o is searched under grouped-query attention
as well, with one s per value channel (a is averaged over the query heads that
share it); the reference skips it. With inputs that are quantized as well, the
candidates quantize theirs and the target does not.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.calibrate import observers
from jaxq.nn import blocks, taps
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import equivalence, preconditions, transform

Params = Mapping[str, Any]
_CHUNK = 512  # Columns searched at once; bounds the memory.
_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class AwqConfig:
  """Attributes, with the paper's values as defaults.

  weights: per channel or group; any number format.
  grid: exponents r = i / grid, i < grid. 1: no scaling.
  clip: whether to search clip ranges.
  clip_grid: ratios 1 - i / (2 clip_grid), i < clip_grid.
  sample_sequences: calibration sequences kept for the searches.
  clip_tokens: tokens of them that the clip search sees, evenly spread.
  skip_clip: last parts of the names of linears that are not clipped.
  quantize: False leaves the scaled kernels float and unclipped, for a method
    that follows in the chain.
  """

  weights: spec_lib.QuantSpec
  grid: int = 20
  clip: bool = True
  clip_grid: int = 10
  sample_sequences: int = 4
  clip_tokens: int = 512
  skip_clip: tuple[str, ...] = ('q_proj', 'k_proj')
  quantize: bool = True

  def __post_init__(self):
    if self.weights.granularity not in ('channel', 'group'):
      raise ValueError(
        f'AwqConfig: weights.granularity={self.weights.granularity!r}; allowed '
        "['channel', 'group']. Use one of them: scales are searched per column."
      )
    for name in ('grid', 'clip_grid', 'sample_sequences', 'clip_tokens'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'AwqConfig: {name}={getattr(self, name)}; allowed 1 or more. '
          'Use clip=False to leave the clip search out.'
        )


def awq(config: AwqConfig) -> transform.Transform:
  """The method as a Transform; see the module docstring."""
  scale = transform.Transform(
    name='awq_scale',
    apply=functools.partial(_scale, config),
    observe=functools.partial(_observe_scale, config),
  )
  if not config.quantize:
    return scale
  clip_and_round = transform.Transform(
    name='awq_round',
    apply=functools.partial(_clip_and_round, config),
    observe=functools.partial(_observe_clip, config),
  )
  return transform.chain(scale, clip_and_round)


def search_scale(
  block: blocks.BlockSpec,
  site: blocks.Site,
  variables: Params,
  mean_abs: jax.Array,
  x: jax.Array,
  config: AwqConfig,
) -> tuple[jax.Array, jax.Array]:
  """The scale of a site's channels with the least output error.

  Args:
    block: only its linears are quantized; a site's other consumers stay float.
    site: one of the block's sites.
    variables: {'params', 'quant'} of the block, kernels float32.
    mean_abs: (K,) of the consumers' input.
    x: (B, T, K) sample of it.
    config: weights and grid.

  Returns:
    s (channels of the producer,) float32, and the losses (grid,), of which the
    first is round-to-nearest's.
  """
  params, quant = variables['params'], variables['quant']
  a = site.reduce(mean_abs)
  target = block.output(
    site, {'params': params, 'quant': _without_inputs(quant)}, x
  )

  def scale(r):
    s = jnp.maximum(a**r, 1e-4)
    return s / jnp.sqrt(jnp.max(s) * jnp.min(s))

  def loss(r):
    s = site.expand(scale(r))  # (K,)
    scaled = params
    for path in site.consumers:
      kernel = blocks.kernel_of(params, path) * s[:, None]
      if block.linear(path) is not None:
        kernel = qarray.fake_quant(kernel, config.weights)
      scaled = taps.set_path(scaled, f'{path}/kernel', kernel)
    out = block.output(
      site, {'params': scaled, 'quant': quant}, x / s[None, None]
    )
    return jnp.mean(jnp.square(out - target))

  exponents = jnp.arange(config.grid, dtype=jnp.float32) / config.grid
  losses = jax.lax.map(loss, exponents)
  return scale(exponents[jnp.argmin(losses)]), losses


def clip_kernel(
  kernel: jax.Array, x: jax.Array, config: AwqConfig
) -> jax.Array:
  """Clips a kernel (K, N) per group and column to the range that serves best.

  Args:
    kernel: (K, N) float32.
    x: (tokens, K) inputs, all used.
    config: weights and clip_grid.

  Returns:
    (K, N): clip(kernel, -c, c), c (K/G, N); to be quantized by its absmax.
  """
  (K, N), tokens = kernel.shape, x.shape[0]
  G = (
    K if config.weights.granularity == 'channel' else config.weights.group_size
  )
  x_gti = x.reshape(tokens, K // G, G).swapaxes(0, 1)  # (K/G, tokens, G)
  # |x d|^2 = d' (x' x) d: the smaller of the two factors saves time and keeps
  # the products below K * N.
  if use_gram := tokens > G:
    factor = jnp.matmul(x_gti.mT, x_gti, precision=_HIGHEST)  # (K/G, G, G)
  else:
    factor = x_gti

  def search(w):  # (K, n) -> (K, n)
    w_gin = w.reshape(K // G, G, -1)
    absmax = jnp.max(jnp.abs(w_gin), axis=1, keepdims=True)  # (K/G, 1, n)

    def clipped(ratio):
      c = absmax * ratio
      return jnp.clip(w_gin, -c, c)

    def error(ratio):
      q = qarray.fake_quant(clipped(ratio).reshape(K, -1), config.weights)
      d = q.reshape(w_gin.shape) - w_gin
      y = jnp.matmul(factor, d, precision=_HIGHEST)
      return jnp.sum(y * (d if use_gram else y), axis=1, keepdims=True)

    ratios = 1 - jnp.arange(config.clip_grid, dtype=jnp.float32) / (
      2 * config.clip_grid
    )
    best = jnp.argmin(jax.lax.map(error, ratios), axis=0)  # (K/G, 1, n)
    return clipped(ratios[best]).reshape(K, -1)

  chunks = -(-N // _CHUNK)
  width = -(-N // chunks)
  padded = jnp.pad(kernel, ((0, 0), (0, chunks * width - N)))
  w_ckn = padded.reshape(K, chunks, width).swapaxes(0, 1)
  out = jax.lax.map(search, w_ckn)  # (chunks, K, width)
  return out.swapaxes(0, 1).reshape(K, chunks * width)[:, :N]


def _observe_scale(
  config: AwqConfig, block: blocks.BlockSpec
) -> transform.Requests:
  sample = observers.sample(config.sample_sequences)
  found = (_tap_of(block, site) for site in block.sites)
  return {
    tap: {'mean_abs': observers.mean_abs, 'sample': sample}
    for tap in found
    if tap is not None
  }


def _observe_clip(
  config: AwqConfig, block: blocks.BlockSpec
) -> transform.Requests:
  sample = observers.sample(config.sample_sequences)
  return {
    linear.tap: {'sample': sample}
    for linear in block.linears
    if _clips(config, linear)
  }


def _scale(
  config: AwqConfig,
  block: blocks.BlockSpec,
  params: Params,
  quant: Params,
  stats: transform.Stats,
) -> tuple[Params, Params]:
  """Searches and folds the scale of every site."""
  _check(block, params, quant)
  for site in block.sites:
    tap = _tap_of(block, site)
    if tap is None or _has_hadamard(quant, site):
      continue
    s, _ = search_scale(
      block,
      site,
      {'params': params, 'quant': quant},
      stats[tap]['mean_abs'].mean,
      stats[tap]['sample'].x,
      config,
    )
    params = equivalence.divide_producer(params, site, s)
  return params, quant


def _clip_and_round(
  config: AwqConfig,
  block: blocks.BlockSpec,
  params: Params,
  quant: Params,
  stats: transform.Stats,
) -> tuple[Params, Params]:
  """Clips where config says so, and rounds to nearest."""
  _check(block, params, quant)
  for linear in block.linears:
    kernel = blocks.kernel_of(params, linear.path)
    if _clips(config, linear):
      x = _spread(stats[linear.tap]['sample'].x, config.clip_tokens)
      kernel = clip_kernel(kernel, x, config)
    kernel = qarray.quantize(kernel, config.weights)
    params = taps.set_path(params, f'{linear.path}/kernel', kernel)
  return params, quant


def _check(block: blocks.BlockSpec, params: Params, quant: Params) -> None:
  """Raises where a chain runs this method too late."""
  consumers = [path for site in block.sites for path in site.consumers]
  producers = [
    site.producer
    for site in block.sites
    if blocks.kernel_of(params, site.producer) is not None
  ]
  linears = [linear.path for linear in block.linears]
  touched = dict.fromkeys(linears + consumers + producers)
  preconditions.require_float(params, touched, 'awq')
  preconditions.require_dynamic_inputs(quant, consumers, 'awq')


def _tap_of(block: blocks.BlockSpec, site: blocks.Site) -> str | None:
  """Where a site's consumers are tapped; None if none is quantized."""
  return block.tap_of(site)


def _clips(config: AwqConfig, linear: blocks.Linear) -> bool:
  name = linear.path.rpartition('/')[2]
  return config.clip and name not in config.skip_clip


def _has_hadamard(quant: Params, site: blocks.Site) -> bool:
  """Whether an online rotation lies between the producer and a consumer."""
  return any(
    taps.get_path(quant, f'{path}/hadamard') is not None
    for path in site.consumers
  )


def _without_inputs(quant: Params) -> Params:
  """`quant` less the input quantizers."""
  return {
    key: _without_inputs(node) if isinstance(node, Mapping) else node
    for key, node in quant.items()
    if key != 'input'
  }


def _spread(x: jax.Array, tokens: int) -> jax.Array:
  """x (B, T, K) -> (at most `tokens`, K), evenly spread."""
  flat = x.reshape(-1, x.shape[-1])
  return flat[:: -(-flat.shape[0] // tokens)]
