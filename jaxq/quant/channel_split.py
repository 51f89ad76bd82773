"""Splitting and pruning the channels of inputs that arrive in steps.

MergeQuant's "dimensional reconstruction" (arXiv 2503.07654). Where the steps s
of an input are in the rows of W' = s W, a few large ones take the range of all
its columns. A channel above theta becomes n = ceil(s_j / theta) copies:

  rows       s_j / n W[j] each: none is larger than theta W[j]
  codes      q_i = round(y + o_i),  y = x_j / s_j,  o_i = (2 i + 1 - n) / 2 n

By Hermite's identity sum_i q_i = round(n y): the copies sum to the activation
in steps of s_j / n, rounded once, and each is within the range of y's codes. At
run time it is a gather and a sum (nn.linear.SplitInput).

The places for copies are a number that depends on K alone, so that all blocks
are alike; theta rises where they are too few. They are added, K' > K, or at
constant width taken from the least important channels, whose part the others
take on as best they can (LeCun's optimal brain surgeon):

  M = H_kk^-1 H_kr,  W_k += M W_r,  error of losing j alone |W_j|^2 / [H^-1]_jj
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.numerics import cholesky

_CHOICES = {
  'prune': ('absmax', 'obs'),
  'split': ('copy', 'hermite'),
  'width': ('constant', 'grow'),
}
# field: (least, largest), both allowed.
_RANGES = {
  'theta': (1.0, 1e6),
  'max_share': (0.0, 0.1),
  'max_extra': (0.0, 1.0),
  'max_growth': (1.0, 1e6),
  'multiple': (1, 1 << 20),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitConfig:
  """Attributes.

  theta: in medians of s, above which a channel is split.
  max_share: of K: how many channels at most.
  max_extra: of K: how many copies at most.
  split: 'hermite', or 'copy': n equal codes, no finer than one.
  width: 'grow', K' a multiple of `multiple`; or 'constant'.
  multiple, max_growth: of K'; K' / K above max_growth is refused.
  prune: what goes at constant width: by 'obs' the channels of least error, by
    'absmax' those of least max |x_j|^2 |W[j]|^2, without making up for them.
  """

  theta: float = 4.0
  max_share: float = 0.02
  max_extra: float = 0.1
  split: str = 'hermite'
  width: str = 'grow'
  multiple: int = 128
  max_growth: float = 1.5
  prune: str = 'obs'

  def __post_init__(self):
    for name, allowed in _CHOICES.items():
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'SplitConfig: {name}={getattr(self, name)!r}; allowed '
          f'{list(allowed)}. Use one of them.'
        )
    for name, (least, largest) in _RANGES.items():
      if not least <= getattr(self, name) <= largest:
        raise ValueError(
          f'SplitConfig: {name}={getattr(self, name)}; allowed {least} '
          f'to {largest}. The default is '
          f'{SplitConfig.__dataclass_fields__[name].default}.'
        )
    if self.width == 'constant' and self.max_extra > 0.1:
      raise ValueError(
        f"SplitConfig: width='constant' with max_extra={self.max_extra}; "
        'at most 0.1 of the channels may be given up for copies. Lower it, or '
        "use width='grow'."
      )


class Plan(NamedTuple):
  """Which channel is in each of the K' places.

  src: (K',) int32; K is a place that holds 0.
  n: (K',) int32, copies of that channel; i: which of them, from 0.
  theta: () float32, as used.
  """

  src: jax.Array
  n: jax.Array
  i: jax.Array
  theta: jax.Array


def grown_width(K: int, config: SplitConfig) -> int:
  """K': places for max_extra copies, to the next multiple.

  Raises:
    ValueError: K' is above max_growth K.
  """
  if config.width == 'constant':
    return K
  wanted = K + int(config.max_extra * K)
  grown = -(-wanted // config.multiple) * config.multiple
  if grown > config.max_growth * K:
    raise ValueError(
      f"mergequant: K={K} channels would grow to K'={grown}, more than "
      f'max_growth={config.max_growth:g} times. Lower max_extra or multiple '
      f"({config.max_extra:g}, {config.multiple}), or use width='constant'."
    )
  return grown


def plan_split(
  s: jax.Array, config: SplitConfig, importance: jax.Array | None = None
) -> Plan:
  """Splits channels whose s exceeds theta, as far as there are places.

  theta is the least of those from config.theta * median(s) up at which at most
  max_share * K channels are split, and into at most as many as fit.

  Args:
    s: (K,), positive.
    config: static.
    importance: (K,), at constant width: the least ones make place.

  Raises:
    ValueError: s, outside jit, is not positive and finite; K' is too large.
  """
  if not isinstance(s, jax.core.Tracer):
    _check_scale(s)
  K = s.shape[0]
  extra = _places(K, config)
  n, theta = copies(s, config)
  ends = jnp.cumsum(n - 1)
  places = jnp.arange(extra, dtype=jnp.int32)
  j = jnp.searchsorted(ends, places, side='right').astype(jnp.int32)
  used = j < K
  at = jnp.minimum(j, K - 1)
  number = jnp.where(used, places - ends[at] + n[at], 0)  # 1 .. n - 1
  src = jnp.arange(K, dtype=jnp.int32)
  i = jnp.zeros(K, jnp.int32)
  if config.width == 'constant':
    assert importance is not None
    importance = jnp.where(n > 1, jnp.inf, importance)
    order = jnp.argsort(importance)[:extra]  # Of those that make place.
    src = src.at[order].set(jnp.where(used, j, order.astype(jnp.int32)))
    i = i.at[order].set(number)
  else:
    src, i = jnp.concatenate([src, j]), jnp.concatenate([i, number])
  n = jnp.where(src < K, n[jnp.minimum(src, K - 1)], 1)
  return Plan(src, n, i, theta)


def copies(s: jax.Array, config: SplitConfig) -> tuple[jax.Array, jax.Array]:
  """n (K,) int32, in how many each channel is split, and theta ().

  Args:
    s: (K,), positive.
    config: static.
  """
  theta = _threshold(s, config, _places(s.shape[0], config))
  return jnp.maximum(jnp.ceil(s / theta), 1.0).astype(jnp.int32), theta


def offsets(plan: Plan, config: SplitConfig) -> jax.Array:
  """o (K',) of linear.SplitInput."""
  if config.split == 'copy':
    return jnp.zeros(plan.n.shape, jnp.float32)
  return (2 * plan.i + 1 - plan.n).astype(jnp.float32) / (
    2 * plan.n.astype(jnp.float32)
  )


def split_rows(w: jax.Array, plan: Plan) -> jax.Array:
  """w (K, N) -> (K', N): of n copies each has the n-th part of the row."""
  rows = jnp.take(w, plan.src, axis=0, mode='fill', fill_value=0)
  return rows / plan.n.astype(w.dtype)[:, None]


def saliency(w_squared: jax.Array, hessian: jax.Array) -> jax.Array:
  """(K,): the output's error where a channel goes and the others make up.

  Args:
    w_squared: (K,), |W[j]|^2.
    hessian: (K, K) of the inputs.
  """
  lower = cholesky.cholesky(damped(hessian))
  inverse = jax.scipy.linalg.solve_triangular(
    lower, jnp.eye(lower.shape[0], dtype=jnp.float32), lower=True
  )
  return w_squared / jnp.sum(jnp.square(inverse), axis=0)


def make_up(hessian: jax.Array, kept: jax.Array) -> jax.Array:
  """M (K, K): W + M W is the best kernel whose rows outside `kept` are unused.

  Args:
    hessian: (K, K) of the inputs.
    kept: (K,) bool.
  """
  k = kept.astype(jnp.float32)
  inner = damped(hessian) * k[:, None] * k[None] + jnp.diag(1 - k)
  lower = cholesky.cholesky(inner)
  cross = hessian * k[:, None] * (1 - k)[None]
  return jax.scipy.linalg.cho_solve((lower, True), cross)


def _places(K: int, config: SplitConfig) -> int:
  """How many copies there is room for."""
  if config.width == 'constant':
    return int(config.max_extra * K)
  return grown_width(K, config) - K


def _threshold(s: jax.Array, config: SplitConfig, extra: int) -> jax.Array:
  """theta () of plan_split."""
  K = s.shape[0]
  largest = jnp.max(s)
  least = config.theta * jnp.median(s)
  count = int(config.max_share * K)
  least = jnp.maximum(least, jnp.sort(s)[K - 1 - count])

  def fits(theta):
    return jnp.sum(jnp.maximum(jnp.ceil(s / theta), 1.0)) <= K + extra

  def halve(_, bounds):
    low, high = bounds
    middle = jnp.sqrt(low * high)
    good = fits(middle)
    return jnp.where(good, low, middle), jnp.where(good, middle, high)

  high = jnp.maximum(least, largest)  # Nothing is split.
  _, high = lax.fori_loop(0, 30, halve, (least, high))
  return jnp.where(fits(least), least, high)


def _check_scale(s: jax.Array) -> None:
  bad = ~(jnp.isfinite(s) & (s > 0))
  if bool(jnp.any(bad)):
    j = int(jnp.argmax(bad))
    raise ValueError(
      f'mergequant: the scale of channel {j} is {float(s[j])}; it must be '
      'positive and finite. Look for NaN or Inf in the calibration data, and '
      'take scales from channel_steps.fit_scale.'
    )


def damped(hessian: jax.Array) -> jax.Array:
  """hessian + 0.01 of its mean diagonal; + 1 if it is zero."""
  hessian = hessian.astype(jnp.float32)
  mean = jnp.mean(jnp.diagonal(hessian))
  damping = jnp.where(mean > 0, 0.01 * mean, 1.0)
  return hessian + damping * jnp.eye(hessian.shape[0], dtype=jnp.float32)
