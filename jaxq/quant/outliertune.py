"""OutlierTune: one static scale per channel of the inputs, at no cost.

Wang et al., 2024, https://arxiv.org/abs/2406.18832.

  z_j = mean over texts of (max x_j + min x_j) / 2      symmetrization
  s_j = max |x_j - z_j| / qmax
  q   = clip(round((x - z) / s))                        run time: round and clip
  y   = (q @ W') * w_scale + b + z @ W,  W'[j] = s_j W[j]

A scale per channel fits activation outliers best, and no integer matmul can
apply it: it does not leave the sum over channels. So it is applied beforehand,
to the rows of the weights ("pre-executed dequantization"), and (x - z) / s
leaves the norm before by its own scale and bias. What remains at run time is
rounding: no reduction over the tokens, no product with a scale on the way in,
and only the weight's scale on the way out.

The price: a row that grew by an outlier's s_j takes the range of its columns.
Symmetrization makes s smaller; still this is a method for 8 and 6 bits (how bad
a site is, `imbalance`, is logged). Without symmetrization it equals SmoothQuant
with alpha = 1 and one static scale per tensor, exactly.

Only what norms feed is treated so. The inputs of o and down, and the outputs of
q, k and v, are quantized per token. Cost: one or two passes over the block.

Departures. Llama's norm gains need not be folded into the linears first: scales
per channel undo it, to the bit up to float rounding, and so they do `presmooth`
unless `clip` cuts all channels at one level. GPTQ sees the integer inputs at
the migrated sites, as in the later reference code, and float ones elsewhere.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from absl import logging

from jaxq.calibrate import observers
from jaxq.nn import blocks, linear, taps
from jaxq.numerics import codec, ranges
from jaxq.numerics import spec as spec_lib
from jaxq.quant import (
  equivalence,
  gptq,
  preconditions,
  round_to_nearest,
  smoothquant,
  transform,
)

Params = Mapping[str, Any]
SATURATION_ALARM = 1e-3  # A share of codes at the end of the range above this.
_LEAST = 1e-5
_CHOICES = {
  'scale': ('absmax', 'mse'),
  'symmetrize': ('always', 'auto', 'never'),
  'weight': ('gptq', 'none', 'rtn'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutlierTuneConfig:
  """Attributes, with the paper's values as defaults.

  weights: integers per channel.
  inputs: symmetric int4..int8; of its granularity nothing is used.
  symmetrize: 'auto' where norms have a bias; 'always' of all norms; 'never'.
  allow_new_bias: lets 'always' give a norm a bias that has none (RMSNorm).
  scale: 'absmax'; 'mse' searches each text's range of least error to the power
    2.4 and takes the largest over the texts.
  clip: in (0, 1]: x counts up to this share of the tensor's extremes.
  presmooth: SmoothQuant's alpha for a pass before the scales; None: no pass.
  weight: 'rtn', 'gptq' (ranges by least error), or 'none' for a method that
    follows in the chain.
  bmm: last parts of the names of the linears whose outputs are quantized.
  """

  weights: spec_lib.QuantSpec
  inputs: spec_lib.QuantSpec
  symmetrize: str = 'auto'
  allow_new_bias: bool = False
  scale: str = 'absmax'
  clip: float = 1.0
  presmooth: float | None = None
  weight: str = 'rtn'
  bmm: tuple[str, ...] = ('q_proj', 'k_proj', 'v_proj')

  def __post_init__(self):
    for name, allowed in _CHOICES.items():
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'OutlierTuneConfig: {name}={getattr(self, name)!r}; allowed '
          f'{list(allowed)}. Use one of them.'
        )
    preconditions.require_step_specs(
      self.weights, self.inputs, 'OutlierTuneConfig', 'W8A8'
    )
    if not 0 < self.clip <= 1:
      raise ValueError(
        f'OutlierTuneConfig: clip={self.clip}; it must lie in (0, 1]. Use 1.0, '
        'or 0.8 as for Llama 3.'
      )

  @property
  def steps(self) -> spec_lib.QuantSpec:
    """Of inputs that arrive in steps."""
    return dataclasses.replace(self.inputs, granularity='tensor')

  @property
  def per_token(self) -> spec_lib.QuantSpec:
    """Of the other inputs, and of the outputs."""
    return dataclasses.replace(self.inputs, granularity='token')


@flax.struct.dataclass
class MidRange:
  """total (K,), texts (): sum of the texts' middles, and how many there were.

  Rows of zeros are padding and do not count; nor do texts of nothing else.
  """

  total: jax.Array
  texts: jax.Array

  def update(self, x: jax.Array) -> 'MidRange':
    """x (B, T, K), a text per row."""
    x = x.astype(jnp.float32)
    real = jnp.any(x != 0, axis=-1, keepdims=True)  # (B, T, 1)
    low = jnp.min(jnp.where(real, x, jnp.inf), axis=1)  # (B, K)
    high = jnp.max(jnp.where(real, x, -jnp.inf), axis=1)
    counts = jnp.any(real, axis=1)  # (B, 1)
    middle = jnp.where(counts, (low + high) / 2, 0.0)
    return MidRange(
      self.total + jnp.sum(middle, axis=0),
      self.texts + jnp.sum(counts.astype(jnp.float32)),
    )

  @property
  def mean(self) -> jax.Array:
    """(K,)."""
    return self.total / jnp.maximum(self.texts, 1.0)


@flax.struct.dataclass
class SearchedMax:
  """absmax (K,): largest over the texts of each one's best range.

  spec: of the codes.
  """

  absmax: jax.Array
  spec: spec_lib.QuantSpec = flax.struct.field(pytree_node=False)

  def update(self, x: jax.Array) -> 'SearchedMax':
    """x (B, T, K), a text per row."""
    x = x.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(x), axis=1, keepdims=True)  # (B, 1, K)

    def round_trip(ratio):
      scale = jnp.maximum(absmax * ratio, _LEAST) / self.spec.qmax
      codes = codec.encode(x, scale, None, self.spec)
      return codec.decode(codes, scale, None, self.spec)

    search = ranges.RangeSearch(kind='mse')
    ratio = ranges.best_ratio(x, (1,), search, round_trip)
    best = jnp.max((ratio * absmax)[:, 0], axis=0)  # (K,)
    return dataclasses.replace(self, absmax=jnp.maximum(self.absmax, best))


@flax.struct.dataclass
class IntegerHessian:
  """observers.Hessian of inputs in steps, as they are rounded."""

  hessian: observers.Hessian
  spec: spec_lib.QuantSpec = flax.struct.field(pytree_node=False)

  def update(self, x: jax.Array) -> 'IntegerHessian':
    """x (..., K)."""
    codes = linear.StepInput(self.spec).codes(x).astype(jnp.float32)
    return dataclasses.replace(self, hessian=self.hessian.update(codes))

  @property
  def mean(self) -> jax.Array:
    """2 E[q q^T] (K, K)."""
    return self.hessian.mean


def channel_scale(
  low: jax.Array, high: jax.Array, spec: spec_lib.QuantSpec, clip: float = 1.0
) -> jax.Array:
  """s (K,): the step of each channel.

  Args:
    low, high: (K,), range of each channel over the calibration data.
    spec: of the codes.
    clip: share of the tensor's extremes beyond which values do not count.

  Returns:
    float32, at least 1e-5 / qmax, which is what a dead channel gets.
  """
  if clip < 1:
    low = jnp.maximum(low, clip * jnp.minimum(jnp.min(low), 0.0))
    high = jnp.minimum(high, clip * jnp.maximum(jnp.max(high), 0.0))
  absmax = jnp.maximum(jnp.abs(low), jnp.abs(high)).astype(jnp.float32)
  return jnp.maximum(absmax, _LEAST) / spec.qmax


def imbalance(s: jax.Array) -> jax.Array:
  """max s / median s: how far one row dominates the columns of W'."""
  return jnp.max(s) / jnp.median(s)


def saturation(x: jax.Array, spec: spec_lib.QuantSpec) -> jax.Array:
  """Share of an input in steps (..., K) whose code is at the end of the range.

  Beyond the calibrated range values are cut off without a word; above
  SATURATION_ALARM calibrate on data that is more like the model's.
  """
  at_end = jnp.abs(linear.StepInput(spec).codes(x).astype(jnp.int32))
  return jnp.mean((at_end >= spec.qmax).astype(jnp.float32))


def saturation_rates(
  block: blocks.BlockSpec, variables: Params, carry: blocks.Carry
) -> dict[str, jax.Array]:
  """{path: saturation} of a block's linears whose inputs arrive in steps."""
  tapped = block.tapped(variables, carry)
  rates = {}
  for lin in block.linears:
    act = taps.get_path(variables['quant'], f'{lin.path}/input')
    if isinstance(act, linear.StepInput):
      x = taps.get_path(tapped, f'{lin.path}/in')
      rates[lin.path] = saturation(x, act.spec)
  return rates


def outliertune(config: OutlierTuneConfig) -> transform.Transform:
  """The method: a chain of symmetrization, scales and rounding."""
  stages = []
  if config.symmetrize != 'never':
    stages.append(
      transform.Transform(
        name='outliertune_symmetrize',
        apply=functools.partial(_symmetrize, config),
        observe=_observe_middles,
        failure=failure,
      )
    )
  if config.presmooth is not None:
    smooth = smoothquant.SmoothQuantConfig(alpha=config.presmooth)
    stages.append(smoothquant.smoothquant(smooth))
  stages.append(
    transform.Transform(
      name='outliertune_scale',
      apply=functools.partial(_scale, config),
      observe=functools.partial(_observe_ranges, config),
      failure=failure,
      check=functools.partial(report_steps, config),
    )
  )
  if config.weight == 'rtn':
    rounding = round_to_nearest.RoundToNearestConfig(weights=config.weights)
    stages.append(round_to_nearest.round_to_nearest(rounding))
  elif config.weight == 'gptq':
    solver = gptq.GptqConfig(
      weights=config.weights, search=ranges.RangeSearch(kind='mse')
    )
    stages.append(
      transform.Transform(
        name='outliertune_gptq',
        apply=functools.partial(_round, solver),
        observe=functools.partial(_observe_hessians, config),
        failure=functools.partial(gptq.failure, config=solver),
        check=require_tokens,
      )
    )
  return transform.chain(*stages)


def report_steps(
  config: OutlierTuneConfig, where: str, stats: transform.Stats
) -> None:
  """Logs the imbalance of each site, and warns of dead channels."""
  warn_of_dead_channels(where, stats)
  for tap, named in stats.items():
    s = channel_scale(*_extremes(named['range']), config.steps, config.clip)
    logging.info(
      'outliertune: the largest step at %s/%s is %.3g times the median.',
      where,
      tap,
      float(imbalance(s)),
    )


def warn_of_dead_channels(where: str, stats: transform.Stats) -> None:
  """Logs a warning where channels were zero on all calibration data.

  They get the least step, 1e-5 / qmax, and a row of W' of about zero.
  """
  for tap, named in stats.items():
    low, high = _extremes(named['range'])
    dead = (low == 0) & (high == 0)
    if count := int(jnp.sum(dead)):
      logging.warning(
        'outliertune: %d of %d channels at %s/%s are zero on all calibration '
        'data; what they carry later is lost. Calibrate with more text.',
        count,
        dead.size,
        where,
        tap,
      )


def require_tokens(where: str, stats: transform.Stats) -> None:
  """Refuses a Hessian of fewer tokens than channels.

  Raises:
    ValueError: there is one.
  """
  preconditions.require_tokens(where, stats, 'outliertune', "use weight='rtn'")


def failure(name: str) -> str:
  """The error message where a migrated parameter is NaN."""
  return (
    f'outliertune: the shift or the scales of {name} are not finite; its '
    'calibrated ranges must be. Look for NaN or Inf in the calibration data '
    'and the weights.'
  )


def _sites(block: blocks.BlockSpec) -> list[tuple[blocks.Site, str]]:
  """The sites of norms, each with its tap.

  Raises:
    ValueError: there is none.
  """
  norms = {norm for norm, _ in block.norms}
  sites = [site for site in block.sites if site.producer in norms]
  if block.linears and not sites:
    raise ValueError(
      f'outliertune: the block {type(block.module).__name__} declares no site '
      'whose producer is a norm; scales have nowhere to go. Use rtn or gptq '
      'with this model.'
    )
  found = ((site, block.tap_of(site)) for site in sites)
  return [(site, tap) for site, tap in found if tap]


def _observe_middles(block) -> transform.Requests:
  def start(shape):
    return MidRange(jnp.zeros(shape[-1:], jnp.float32), jnp.zeros(()))

  return {tap: {'middle': start} for _, tap in _sites(block)}


def _symmetrize(config, block, params, quant, stats):
  for site, tap in _sites(block):
    has_bias = taps.get_path(params, f'{site.producer}/bias') is not None
    if config.symmetrize == 'auto' and not has_bias:
      continue
    if not (has_bias or config.allow_new_bias):
      raise ValueError(
        f"outliertune: symmetrize='always' and {site.producer} has no bias to "
        "shift; allowed with allow_new_bias=True. Set it, or 'auto'."
      )
    _check(params, quant, site)
    z = _found(stats, tap, 'middle').mean
    params = equivalence.shift_producer(params, site, z)
  return params, quant


def _observe_ranges(config, block) -> transform.Requests:
  def searched(shape):
    return SearchedMax(jnp.zeros(shape[-1:], jnp.float32), config.steps)

  mse = config.scale == 'mse'
  request = searched if mse else observers.minmax('all')
  return {tap: {'range': request} for _, tap in _sites(block)}


def _scale(config, block, params, quant, stats):
  """Folds the steps of every site, and sets all input quantizers."""
  quantizers: dict[str, Any] = {}
  for site, tap in _sites(block):
    _check(params, quant, site)
    low, high = _extremes(_found(stats, tap, 'range'))
    preconditions.require_exact_sums(
      config.weights, config.inputs, site.consumers[0], len(low), 'outliertune'
    )
    s = channel_scale(low, high, config.steps, config.clip)
    params = equivalence.divide_producer(params, site, s)
    quantizers |= dict.fromkeys(site.consumers, linear.StepInput(config.steps))
  per_token = linear.ActQuant(None, None, config.per_token)
  for lin in block.linears:
    act = quantizers.get(lin.path, per_token)
    quant = taps.set_path(quant, f'{lin.path}/input', act)
    if lin.path.rpartition('/')[2] in config.bmm:
      quant = taps.set_path(quant, f'{lin.path}/output', per_token)
  return params, quant


def _extremes(found: Any) -> tuple[jax.Array, jax.Array]:
  """low, high (K,) of an observed range."""
  if isinstance(found, SearchedMax):
    return -found.absmax, found.absmax
  return found.low, found.high


def _observe_hessians(config, block) -> transform.Requests:
  def integer(shape):
    return IntegerHessian(observers.hessian(shape), config.steps)

  in_steps = {path for site, _ in _sites(block) for path in site.consumers}
  return {
    lin.tap: {'hessian': integer if lin.path in in_steps else observers.hessian}
    for lin in block.linears
  }


def _round(solver, block, params, quant, stats):
  """GPTQ; linears of one tap share a factor."""
  by_tap: dict[str, list[str]] = {}
  for lin in block.linears:
    by_tap.setdefault(lin.tap, []).append(lin.path)
  for tap, paths in by_tap.items():
    preconditions.require_float(params, paths, 'outliertune')
    feedback = gptq.feedback(stats[tap]['hessian'].mean, solver)
    for path in paths:
      kernel = blocks.kernel_of(params, path)
      q = gptq.quantize_with(kernel, feedback, solver)
      params = taps.set_path(params, f'{path}/kernel', q)
  return params, quant


def _check(params, quant, site) -> None:
  preconditions.require_float(params, site.consumers, 'outliertune')
  preconditions.require_dynamic_inputs(quant, site.consumers, 'outliertune')


def _found(stats, tap, name):
  """A finished statistic.

  Raises:
    ValueError: it was not taken.
  """
  if name not in stats.get(tap, {}):
    raise ValueError(
      f'outliertune: no {name} was observed at {tap} (observed '
      f'{sorted(stats)}); static scales need one. Calibrate with the same '
      'block.linears.'
    )
  return stats[tap][name]
