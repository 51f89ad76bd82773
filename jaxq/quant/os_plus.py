"""Outlier Suppression+: channels are shifted, and the outliers scaled down.

Wei et al., 2023, https://arxiv.org/abs/2304.09145.

  z_j = (max x_j + min x_j) / 2,  x <- x - z
  s_j(t) = max(1, max x_j / t, min x_j / -t)
  t* = argmin_t mean_tokens |f(Q(x / s), Q(s W)) - f(x, W)|^2,
       t in {u, u - step, .., lower_bound},  u = max |x|

Outliers sit in a few channels, and each has its own sign: the range of the
whole is then far wider than any channel's. z centres the channels, and s brings
those beyond t, and only those, down to t: one number is searched for, by the
error of what the site computes with inputs and weights quantized as they will
be. The norm takes on bias - z and 1 / s, the consumers z @ W (a bias, made
where there is none) and the rows s W, a residual branch that reads the norm
(post-norm models) the inverse. Nothing is left to do at run time.

Then every linear's input gets its range on all calibration data, and weights
are rounded to nearest. f is the attention up to the input of o, act(gate) * up
or relu(up), or the linear itself. Cost: n_grid passes of f over
sample_sequences sequences per site, one at a time.

Departures. The number of candidates is fixed at n_grid up to n_max; the
reference takes max(100, max(x) / 0.5), which n_max=200 allows. Rows of zeros,
which is what padding is here, count neither in ranges nor in the loss; the
reference masks the loss only. Everything is float32; the reference migrates in
float16. A scale passes ReLU, so that OPT's fc2 has a site, and fc1 is compared
behind the ReLU; the reference compares fc1 itself and leaves fc2 alone. Kernels
per tensor are rounded each by itself, as they are stored; the reference rounds
q, k and v as one. Symmetric codes may go to -2^(b-1), one beyond the
reference's, which only a value beyond the calibrated range reaches. In the
static setting the outputs of q, k and v are quantized, as in the paper, but the
softmax's probabilities stay float. The paper sweeps token_quantile by the
model's loss; here that is a sweep of runs.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxq.calibrate import observers
from jaxq.nn import blocks, linear, taps
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import (
  activations,
  equivalence,
  preconditions,
  round_to_nearest,
  transform,
)

Params = Mapping[str, Any]
_CHOICES = {
  'clip': ('avgminmax', 'token_quantile'),
  'shift': ('always', 'auto', 'never'),
  'site_loss': ('block', 'linear'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OsPlusConfig:
  """What is migrated, and how it is quantized.

  Attributes:
    weights, inputs: integers. Inputs per 'tensor' are static; per 'token' or
      'group' they are taken as they come.
    shift: 'auto' shifts what norms with a bias put out; 'always' that of all
      norms; 'never'.
    allow_new_bias: lets 'always' give a norm a bias that has none (RMSNorm).
    n_grid: steps of the search; n_max: of them when max(x) / 0.5 is more.
    lower_bound: the least threshold; None is the paper's, 1 where the norm has
      a bias and 0.1 elsewhere.
    site_loss: 'block' compares what the site's branch makes of its inputs up to
      its last linear, 'linear' the consumers' outputs.
    clip: static inputs: 'avgminmax' the mean of the batches' extremes;
      'token_quantile' of those of the tokens that are not among the share
      1 - token_quantile with the largest extremes.
    token_quantile: in (0.5, 1].
    bmm: last parts of the names of the linears whose outputs are quantized as
      well when inputs are static.
    sample_sequences: calibration sequences that shift and search see.
    quantize: False leaves the migrated kernels float, for a method that follows
      in the chain.
  """

  weights: spec_lib.QuantSpec
  inputs: spec_lib.QuantSpec
  shift: str = 'auto'
  allow_new_bias: bool = False
  n_grid: int = 100
  n_max: int = 100
  lower_bound: float | None = None
  site_loss: str = 'block'
  clip: str = 'avgminmax'
  token_quantile: float = 0.985
  bmm: tuple[str, ...] = ('q_proj', 'k_proj', 'v_proj')
  sample_sequences: int = 16
  quantize: bool = True

  def __post_init__(self):
    for name, allowed in _CHOICES.items():
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'OsPlusConfig: {name}={getattr(self, name)!r}; allowed '
          f'{list(allowed)}. Use one of them.'
        )
    for name in ('weights', 'inputs'):
      if not getattr(self, name).is_integer:
        raise ValueError(
          f'OsPlusConfig: {name}.dtype={getattr(self, name).dtype!r}; allowed '
          'int2..int8. Choose a scheme such as W8A8.'
        )
    if self.inputs.granularity == 'channel':
      raise ValueError(
        "OsPlusConfig: inputs.granularity='channel'; allowed ['group', "
        "'tensor', 'token']. For one scale per channel use outliertune."
      )
    for name in ('n_grid', 'sample_sequences'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'OsPlusConfig: {name}={getattr(self, name)}; allowed 1 or more. Use '
          f'{OsPlusConfig.__dataclass_fields__[name].default}.'
        )
    if self.n_max < self.n_grid:
      raise ValueError(
        f'OsPlusConfig: n_max={self.n_max} below n_grid={self.n_grid}; it must '
        'be at least that. Raise n_max.'
      )
    if self.lower_bound is not None and self.lower_bound <= 0:
      raise ValueError(
        f'OsPlusConfig: lower_bound={self.lower_bound}; it must be above 0. '
        'Use 1.0 for LayerNorm models, 0.1 for Llama.'
      )
    if not 0.5 < self.token_quantile <= 1:
      raise ValueError(
        f'OsPlusConfig: token_quantile={self.token_quantile}; it must lie in '
        '(0.5, 1]. Use 0.985.'
      )

  @property
  def is_static(self) -> bool:
    """Whether input scales come from calibration."""
    return self.inputs.granularity == 'tensor'


@flax.struct.dataclass
class TokenRange:
  """low, high (1,): mean over batches of a batch's range, less outlier tokens.

  Tokens whose largest value lies above the `quantile` of all tokens' |largest
  value| do not count for high; the smallest likewise. quantile=1: all count.
  Rows of zeros are no tokens.
  """

  low: jax.Array
  high: jax.Array
  batches: jax.Array
  quantile: float = flax.struct.field(pytree_node=False, default=1.0)

  def update(self, x: jax.Array) -> 'TokenRange':
    """x (..., K)."""
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    real = jnp.any(flat != 0, axis=-1)  # (tokens,)

    def highest(values):  # (tokens,) -> (1,)
      if self.quantile < 1:
        size = jnp.where(real, jnp.abs(values), jnp.nan)
        bound = jnp.nanquantile(size, jnp.float32(self.quantile))
        values = jnp.where(values <= bound, values, -jnp.inf)
      values = jnp.where(real, values, -jnp.inf)
      return jnp.maximum(jnp.max(values), 0.0).reshape(1)

    high = highest(jnp.max(flat, axis=-1))
    low = -highest(jnp.max(-flat, axis=-1))
    weight = 1.0 / (self.batches + 1.0)
    return dataclasses.replace(
      self,
      low=self.low + (low - self.low) * weight,
      high=self.high + (high - self.high) * weight,
      batches=self.batches + 1.0,
    )


def token_range(quantile: float = 1.0) -> observers.Request:
  """Request: TokenRange."""

  def start(shape):
    del shape  # Two arrays: states are donated, and one buffer cannot be twice.
    low, high = jnp.zeros((1,), jnp.float32), jnp.zeros((1,), jnp.float32)
    return TokenRange(low, high, jnp.zeros(()), quantile)

  return start


def real_tokens(x: jax.Array) -> jax.Array:
  """x (B, T, K) -> (B, T) bool; padding is rows of zeros."""
  return jnp.any(x != 0, axis=-1)


def channel_range(
  x: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Smallest and largest value of each channel.

  Args:
    x: (B, T, K).
    mask: (B, T) bool, False for tokens that do not count; None: all count.

  Returns:
    low, high: (K,) float32. Under jit infinite where no token counts.

  Raises:
    ValueError: no token counts.
  """
  x = x.astype(jnp.float32)
  if mask is None:
    return jnp.min(x, axis=(0, 1)), jnp.max(x, axis=(0, 1))
  if not isinstance(mask, jax.core.Tracer) and not bool(jnp.any(mask)):
    raise ValueError(
      f'os_plus: none of the {mask.size} tokens of the calibration batch '
      'counts, all are padding; at least one must. Calibrate with real text.'
    )
  mask = mask[..., None]
  low = jnp.min(jnp.where(mask, x, jnp.inf), axis=(0, 1))
  return low, jnp.max(jnp.where(mask, x, -jnp.inf), axis=(0, 1))


def channel_shift(low: jax.Array, high: jax.Array) -> jax.Array:
  """z (K,), the middle of each channel's range."""
  return (low + high) / 2


def threshold_scale(low: jax.Array, high: jax.Array, t: jax.Array) -> jax.Array:
  """s (K,) >= 1 that brings channels beyond [-t, t] to it, others untouched."""
  return jnp.maximum(jnp.maximum(high / t, low / -t), 1.0)


def search_threshold(
  loss: Callable[[jax.Array, jax.Array], jax.Array],
  low: jax.Array,
  high: jax.Array,
  config: OsPlusConfig,
  lower_bound: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The threshold of least loss; of equals the largest.

  Args:
    loss: (s (K,), t ()) -> (); taken one candidate at a time.
    low, high: (K,), range of each channel, shifted.
    config: n_grid and n_max.
    lower_bound: the least threshold.

  Returns:
    t (), s (K,), losses (n_max + 1,). The first is that of s = 1; those beyond
    the number of candidates are inf. s is NaN if no loss is finite.
  """
  largest = jnp.maximum(jnp.max(high), 0.0)
  u = jnp.maximum(largest, -jnp.minimum(jnp.min(low), 0.0))
  u = jnp.maximum(u, lower_bound)
  n = jnp.clip(jnp.floor(largest / 0.5), config.n_grid, config.n_max)

  def threshold(i):
    return u - i * (u - lower_bound) / n

  def candidate(i):
    t = threshold(i)
    return jax.lax.cond(
      i <= n,
      lambda: loss(threshold_scale(low, high, t), t).astype(jnp.float32),
      lambda: jnp.float32(jnp.inf),
    )

  steps = jnp.arange(config.n_max + 1, dtype=jnp.float32)
  losses = jax.lax.map(candidate, steps)
  losses = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
  t = threshold(steps[jnp.argmin(losses)])
  s = threshold_scale(low, high, t)
  return t, jnp.where(jnp.any(losses < jnp.inf), s, jnp.nan), losses


def migrate(
  block: blocks.BlockSpec,
  site: blocks.Site,
  params: Params,
  x: jax.Array,
  config: OsPlusConfig,
) -> tuple[Params, jax.Array]:
  """Shifts and scales one site; the float block computes the same.

  Args:
    block: only its linears are quantized in the search.
    site: a norm, or a linear whose channels reach the consumers one to one.
    params: of the block, kernels float32.
    x: (B, T, K) sample of the consumers' input.
    config: static.

  Returns:
    params, and the losses of the search.

  Raises:
    ValueError: a shift is asked for and the norm has no bias.
  """
  mask = real_tokens(x)
  has_bias = taps.get_path(params, f'{site.producer}/bias') is not None
  if _shifts(params, site, config):
    z = channel_shift(*channel_range(x, mask))
    params = equivalence.shift_producer(params, site, z)
    x = jnp.where(mask[..., None], x - z[None, None], 0)
  low, high = channel_range(x, mask)
  bound = config.lower_bound
  if bound is None:
    bound = 1.0 if has_bias and _is_norm(params, site) else 0.1
  loss = _site_loss(block, site, params, x, mask, config)
  _, s, losses = search_threshold(loss, low, high, config, bound)
  # An expert that no token reached is left alone; a norm sees all tokens.
  s = jnp.where(jnp.any(mask), s, jnp.nan if _is_norm(params, site) else 1.0)
  return equivalence.divide_producer(params, site, s), losses


def os_plus(config: OsPlusConfig) -> transform.Transform:
  """The method: a chain of migration, input ranges and rounding."""
  stages = [
    transform.Transform(
      name='os_plus_migrate',
      apply=functools.partial(_migrate, config),
      observe=functools.partial(_observe_samples, config),
      failure=failure,
    ),
    transform.Transform(
      name='os_plus_inputs',
      apply=functools.partial(_quantize_inputs, config),
      observe=functools.partial(_observe_ranges, config),
      failure=failure,
    ),
  ]
  if config.quantize:
    rounding = round_to_nearest.RoundToNearestConfig(weights=config.weights)
    stages.append(round_to_nearest.round_to_nearest(rounding))
  return transform.chain(*stages)


def failure(name: str) -> str:
  """The error message where a migrated parameter is NaN."""
  return (
    f'os_plus: no threshold gives a finite error at {name}; its inputs must be '
    'finite and not all padding. Look for NaN or Inf in the calibration data '
    'and the weights, or calibrate with real text.'
  )


def _site_loss(block, site, params, x, mask, config):
  """The loss of search_threshold at one site."""
  if config.site_loss == 'linear':
    site = dataclasses.replace(site, method='')
  target = block.inner_output(site, {'params': params, 'quant': {}}, x)
  tokens = jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)

  def loss(s, t):
    scaled: Any = params
    quant: dict[str, Any] = {}
    for path in site.consumers:
      kernel = blocks.kernel_of(params, path) * s[:, None]
      if block.linear(path) is not None:
        kernel = qarray.fake_quant(kernel, config.weights)
        act = _act(config, -t.reshape(1), t.reshape(1))
        quant = taps.set_path(quant, f'{path}/input', act)
      scaled = taps.set_path(scaled, f'{path}/kernel', kernel)
    y = block.inner_output(
      site, {'params': scaled, 'quant': quant}, x / s[None, None]
    )
    per_token = jnp.sum(jnp.square(y - target), axis=-1)  # (B, T)
    return jnp.sum(jnp.where(mask, per_token, 0)) / tokens

  return loss


def _act(config, low, high) -> linear.ActQuant:
  """The input quantizer; of the range low, high (1,) if it is static."""
  if not config.is_static:
    return linear.ActQuant(None, None, config.inputs)
  params = activations.static_params(low, high, config.inputs)
  return linear.ActQuant(*params, config.inputs)


def _sites(block: blocks.BlockSpec) -> list[tuple[blocks.Site, str]]:
  """Sites to migrate, with their taps: norms, and linears without heads.

  Raises:
    ValueError: there is none.
  """
  chosen = []
  for site in block.sites:
    tap = block.tap_of(site)
    if tap and site.heads is None:
      chosen.append((site, tap))
  if block.linears and not any(site.heads is None for site in block.sites):
    raise ValueError(
      f'os_plus: the block {type(block.module).__name__} declares no site '
      'whose producer is a norm; scales have nowhere to go. Use rtn or gptq '
      'with this model.'
    )
  return chosen


def _observe_samples(config, block) -> transform.Requests:
  sample = observers.sample(config.sample_sequences)
  return {tap: {'sample': sample} for _, tap in _sites(block)}


def _migrate(config, block, params, quant, stats):
  """Every site in the order of the model, on statistics taken once.

  A site's migration preserves the function, so later sites' inputs are as they
  were observed.
  """
  for site, tap in _sites(block):
    touched = (site.producer, *site.consumers)  # A norm has no kernel.
    preconditions.require_float(params, touched, 'os_plus')
    preconditions.require_dynamic_inputs(quant, site.consumers, 'os_plus')
    if any(taps.get_path(quant, f'{p}/hadamard') for p in site.consumers):
      continue  # Scales do not pass a rotation.
    x = stats[tap]['sample'].x
    params, _ = migrate(block, site, params, x, config)
  return params, quant


def _observe_ranges(config, block) -> transform.Requests:
  if not config.is_static:
    return {}
  quantile = config.token_quantile if config.clip == 'token_quantile' else 1.0
  request = {'range': token_range(quantile)}
  outputs = {f'{path}/out': request for path in _bmm(config, block)}
  return {**{lin.tap: request for lin in block.linears}, **outputs}


def _quantize_inputs(config, block, params, quant, stats):
  for lin in block.linears:
    found = stats[lin.tap]['range'] if config.is_static else None
    act = _act(config, *((found.low, found.high) if found else (None, None)))
    quant = taps.set_path(quant, f'{lin.path}/input', act)
  for path in _bmm(config, block):
    found = stats[f'{path}/out']['range']
    act = _act(config, found.low, found.high)
    quant = taps.set_path(quant, f'{path}/output', act)
  return params, quant


def _bmm(config, block) -> list[str]:
  """Linears whose outputs are quantized."""
  if not config.is_static:
    return []
  return [
    lin.path
    for lin in block.linears
    if lin.path.rpartition('/')[2] in config.bmm
  ]


def _is_norm(params: Params, site: blocks.Site) -> bool:
  return blocks.kernel_of(params, site.producer) is None


def _shifts(params, site, config) -> bool:
  """Whether a site is shifted."""
  if config.shift == 'never' or not _is_norm(params, site):
    return False
  if taps.get_path(params, f'{site.producer}/bias') is not None:
    return True
  if config.shift == 'auto':
    return False
  if not config.allow_new_bias:
    raise ValueError(
      f"os_plus: shift='always' and {site.producer} has no bias to shift; "
      "allowed with allow_new_bias=True. Set it, or shift='auto'."
    )
  return True
