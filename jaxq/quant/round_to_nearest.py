"""Round to nearest (RTN): the baseline that every weight method must beat.

  q = clip(round(w / scale)),  scale from the range of each slice of w

Needs no data and one pass over the weights. Each weight's error is the least
possible and the output's is not: errors of correlated inputs add up. `search`
takes the range by least squared error instead of absmax.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jaxq.nn import blocks, taps
from jaxq.numerics import qarray, ranges
from jaxq.numerics import spec as spec_lib
from jaxq.quant import preconditions, transform

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundToNearestConfig:
  """weights: what kernels become. search: how ranges are taken; None absmax."""

  weights: spec_lib.QuantSpec
  search: ranges.RangeSearch | None = None


def quantize(w: jax.Array, config: RoundToNearestConfig) -> qarray.QArray:
  """w (..., K, N) floating -> QArray; computed in float32.

  Raises:
    ValueError: K is no multiple of the spec's group_size.
  """
  return qarray.quantize(w, config.weights, search=config.search)


def round_to_nearest(config: RoundToNearestConfig) -> transform.Transform:
  """The method: every linear in block.linears gets a QArray kernel."""

  def apply(
    block: blocks.BlockSpec, params: Params, quant: Params, stats: Any
  ) -> tuple[Params, Params]:
    del stats
    paths = [lin.path for lin in block.linears]
    preconditions.require_float(params, paths, 'round_to_nearest')
    for path in paths:
      q = quantize(blocks.kernel_of(params, path), config)
      params = taps.set_path(params, f'{path}/kernel', q)
    return params, quant

  return transform.Transform(name='round_to_nearest', apply=apply)
