"""Range search: which part of the values the quantizer's range should cover.

absmax   the whole range: no clipping, one outlier costs everybody precision.
percentile  the range that holds a given share of the values.
mse      the shrink ratio with the least rounding error per slice, as the
  reference code of GPTQ (arXiv 2210.17323) and QuaRot (arXiv 2404.00456):

  p_i = 1 - i / grid, i = 0 .. int(max_shrink * grid) - 1
  p*  = argmin_p sum |dequantize(quantize(x, p * range)) - x|^norm

Ties go to the larger ratio. mse costs int(max_shrink * grid) passes over x and
the memory of one.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

KINDS = ('absmax', 'mse', 'percentile')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RangeSearch:
  """How the range of a slice is taken.

  Attributes:
    kind: 'absmax' (minmax for asymmetric specs), 'mse' or 'percentile'.
    grid: mse: ratios are multiples of 1/grid; at least 1.
    max_shrink: mse: ratios stay above 1 - max_shrink; in (0, 1).
    norm: mse: power of the absolute error; above 0.
    percentile: percentile: share of the values within the range, (0.5, 1].
  """

  kind: str = 'mse'
  grid: int = 100
  max_shrink: float = 0.8
  norm: float = 2.4
  percentile: float = 0.999

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(
        f'RangeSearch: kind={self.kind!r}; allowed {list(KINDS)}. Use one of '
        'them.'
      )
    if self.grid < 1 or not 0 < self.max_shrink < 1 or self.norm <= 0:
      raise ValueError(
        f'RangeSearch: grid={self.grid}, max_shrink={self.max_shrink}, norm='
        f'{self.norm}; allowed grid >= 1, 0 < max_shrink < 1, norm > 0. The '
        'usual values are 100, 0.8 and 2.4.'
      )
    if not 0.5 < self.percentile <= 1.0:
      raise ValueError(
        f'RangeSearch: percentile={self.percentile}; allowed 0.5 < percentile '
        '<= 1. Give a share such as 0.999, not a percentage.'
      )

  @property
  def ratios(self) -> np.ndarray:
    """Shrink ratios of the mse search, float32, descending from 1."""
    count = max(1, int(self.max_shrink * self.grid))
    return (1 - np.arange(count) / self.grid).astype(np.float32)


def extent(
  x: jax.Array,
  axes: tuple[int, ...],
  symmetric: bool,
  search: RangeSearch | None = None,
) -> tuple[jax.Array, jax.Array]:
  """(lo, hi) of x over axes, dimensions kept, lo <= 0 <= hi.

  A symmetric percentile is one of |x|, so that lo = -hi.
  """
  if search is None or search.kind != 'percentile':
    lo = jnp.min(x, axis=axes, keepdims=True)
    hi = jnp.max(x, axis=axes, keepdims=True)
  elif symmetric:
    share = search.percentile
    hi = jnp.quantile(jnp.abs(x), share, axis=axes, keepdims=True)
    lo = -hi
  else:
    share = search.percentile
    lo = jnp.quantile(x, 1 - share, axis=axes, keepdims=True)
    hi = jnp.quantile(x, share, axis=axes, keepdims=True)
  return jnp.minimum(lo, 0.0), jnp.maximum(hi, 0.0)


def best_ratio(
  x: jax.Array,
  axes: tuple[int, ...],
  search: RangeSearch,
  round_trip: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """Ratio of least error for each slice of x, dimensions kept.

  Args:
    x: values; a slice runs over `axes`.
    axes: axes of a slice.
    search: of kind 'mse'.
    round_trip: ratio () -> x as the quantizer of that range returns it.
  """

  def step(carry, ratio):
    best_error, best = carry
    # Unless rounded first, y - x may be contracted to one fused operation in
    # one graph and not in another, and near ties then differ between them.
    y = lax.optimization_barrier(round_trip(ratio))
    # |e|^p as exp(p log |e|), which XLA vectorizes on a CPU and pow not: 9x.
    power = jnp.exp(search.norm * jnp.log(jnp.abs(y - x)))
    error = jnp.sum(power, axis=axes, keepdims=True)
    better = error < best_error
    best_error = jnp.where(better, error, best_error)
    return (best_error, jnp.where(better, ratio, best)), None

  slices = jnp.sum(x, axis=axes, keepdims=True)
  init = (jnp.full_like(slices, jnp.inf), jnp.ones_like(slices))
  (_, best), _ = lax.scan(step, init, jnp.asarray(search.ratios))
  return best
