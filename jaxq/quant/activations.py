"""Quantized inputs of the linears, statically or per token.

  dynamic  one scale per token, from the token itself: costs a reduction over
           x at run time, needs no data.
  static   one scale per tensor or channel, from calibration: costs nothing at
           run time and clips what calibration did not see.

Formats with groups of channels (mxfp4, mxfp8) take a scale per token and group,
dynamically; nvfp4 does too, under a tensor scale that is calibrated if static.

A static scale per channel cannot leave the sum over channels, so the integer
matmul has no use for it and the float one serves. Weights are untouched; chain
this with a weight method.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.calibrate import observers
from jaxq.nn import blocks, linear, taps
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import transform

Params = Mapping[str, Any]
OBSERVERS = ('absmax', 'average', 'ema', 'minmax', 'percentile')
# Granularities that each mode can serve.
MODES = {'dynamic': ('group', 'token'), 'static': ('channel', 'tensor')}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationsConfig:
  """How the inputs of the linears are quantized.

  Attributes:
    inputs: what inputs (T, K) become; one scale per 'token', or per 'group' of
      its channels, if dynamic, per 'tensor' or 'channel' if static.
    mode: 'dynamic' or 'static'.
    observer: static only: 'minmax' the extremes of all batches; 'average' and
      'ema' their mean and exponential average over batches; 'percentile' the
      mean of each batch's quantiles (per tensor); 'absmax' the largest |x|.
    decay: of 'ema', weight of the past.
    quantile: of 'percentile', in (0.5, 1].
  """

  inputs: spec_lib.QuantSpec
  mode: str = 'dynamic'
  observer: str = 'minmax'
  decay: float = 0.9
  quantile: float = 0.9999

  def __post_init__(self):
    for name, known in (('mode', tuple(MODES)), ('observer', OBSERVERS)):
      if getattr(self, name) not in known:
        raise ValueError(
          f'ActivationsConfig: {name}={getattr(self, name)!r}; allowed '
          f'{sorted(known)}. Use one of them.'
        )
    allowed: tuple[str, ...] = MODES[self.mode]
    if self.inputs.dtype == 'nvfp4':
      allowed = ('group',)  # Static: its tensor scale is calibrated.
    if self.inputs.granularity not in allowed:
      raise ValueError(
        f'ActivationsConfig: granularity={self.inputs.granularity!r} with mode='
        f'{self.mode!r}; allowed {list(allowed)}. Change the one or the other.'
      )
    if self.observer == 'percentile' and self.inputs.granularity == 'channel':
      raise ValueError(
        "ActivationsConfig: observer='percentile' with granularity='channel'; "
        "its quantiles are of the whole tensor. Use granularity='tensor'."
      )
    if not 0 <= self.decay < 1:
      raise ValueError(
        f'ActivationsConfig: decay={self.decay}; it must lie in [0, 1). Use '
        '0.9.'
      )
    if not 0.5 < self.quantile <= 1:
      raise ValueError(
        f'ActivationsConfig: quantile={self.quantile}; it must lie in (0.5, 1].'
        ' Use 0.9999.'
      )


def static_params(
  low: jax.Array, high: jax.Array, spec: spec_lib.QuantSpec
) -> tuple[jax.Array, jax.Array | None]:
  """Scale and zero point of an observed range.

  Args:
    low, high: (K,), or (1,) for granularity 'tensor'.
    spec: static.

  Returns:
    scale, zero_point or None: (1, 1) per tensor, (1, K) per channel; nvfp4: the
      tensor scale (1, 1).
  """
  if spec.dtype == 'nvfp4':
    return qarray.tensor_scale(jnp.stack([low, high]), spec), None
  # A slice's parameters depend on its extremes only.
  return qarray.find_params(jnp.stack([low, high]), spec)


def activations(config: ActivationsConfig) -> transform.Transform:
  """The method: every linear in block.linears gets a quantized input."""

  def observe(block: blocks.BlockSpec) -> transform.Requests:
    if config.mode == 'dynamic':
      return {}
    return {lin.tap: {'range': _request(config)} for lin in block.linears}

  def apply(
    block: blocks.BlockSpec,
    params: Params,
    quant: Params,
    stats: transform.Stats,
  ) -> tuple[Params, Params]:
    for lin in block.linears:
      scale, zero_point = None, None
      if config.mode == 'static':
        low, high = _range(stats, lin)
        scale, zero_point = static_params(low, high, config.inputs)
      act = linear.ActQuant(scale, zero_point, config.inputs)
      quant = taps.set_path(quant, f'{lin.path}/input', act)
    return params, quant

  return transform.Transform(name='activations', apply=apply, observe=observe)


def _request(config: ActivationsConfig) -> observers.Request:
  if config.observer == 'absmax':
    return observers.absmax
  if config.observer == 'percentile':
    return observers.percentile(config.quantile)
  kind = 'all' if config.observer == 'minmax' else config.observer
  return observers.minmax(kind, config.decay)


def _range(stats: transform.Stats, lin: blocks.Linear) -> tuple[Any, Any]:
  if 'range' not in stats.get(lin.tap, {}):
    raise ValueError(
      f'activations: no range was observed for the input of {lin.path} (tap '
      f'{lin.tap!r}; observed {sorted(stats)}); static scales need one. '
      "Calibrate with the same block.linears, or use mode='dynamic'."
    )
  state = stats[lin.tap]['range']
  if isinstance(state, observers.AbsMax):
    return -state.absmax, state.absmax
  return state.low, state.high
