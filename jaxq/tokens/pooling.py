"""Pooling: every frame of a grid becomes a smaller grid.

  average   means of stride x stride patches; rows and columns that fill no
            window are dropped
  adaptive  row i of h averages [floor(i H / h), ceil((i + 1) H / h))
  bilinear  interpolation between patch centres, edges repeated, no smoothing
            (LLaVA-Video: 27 x 27 to 14 x 14)

What torch.nn.functional's avg_pool2d, adaptive_avg_pool2d and interpolate give.
The sizes of the last two follow the budget: the largest grid of about the
frame's proportions that fits, found with traced numbers, so that one compile
serves every k. Masked patches are left out; a slot that would have
nothing else is not in use. Special tokens are dropped.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.tokens import interface, primitives

METHODS = ('adaptive', 'average', 'bilinear')
_KINDS = {'adaptive': 'adaptive_avg', 'bilinear': 'bilinear'}
_EPS = 1e-5  # A centre that is a whole number but for float error is one.


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolingConfig(interface.Config):
  """method: of METHODS. stride: of the windows of 'average'.

  budget: as of interface.Config; 'average' has its stride instead.
  """

  method: str = 'average'
  stride: int = 2

  def __post_init__(self):
    super().__post_init__()
    if self.method not in METHODS:
      raise ValueError(
        f'PoolingConfig: method={self.method!r}; allowed {sorted(METHODS)}.'
      )
    if self.stride < 1:
      raise ValueError(
        f'PoolingConfig: stride={self.stride}; it must be at least 1, which '
        'pools nothing.'
      )

  @property
  def traits(self) -> interface.Traits:
    """A resampler; of windows that do not overlap, means."""
    average = self.method == 'average'
    return interface.Traits(kind='resampler', grid=True, conserves_mass=average)

  def example(self) -> interface.Example:
    """A budget that fits any method's grid."""
    return interface.Example(reducer=self, grid=(2, 4, 6), k_max=14)

  def budget_for(self, ts: interface.TokenSet) -> interface.Budget:
    """The slots of the smaller grid."""
    T, H, W = interface.square_grid(ts)
    if self.method == 'average':
      return interface.Budget(k_max=T * math.prod(self._strided(H, W)))
    asked = interface.budget_from_ratio(T * H * W, self.budget).k_max
    h, w = fitting(max(asked // T, 1), H, W)
    return interface.Budget(k_max=T * int(h) * int(w))

  def _strided(self, H: int, W: int) -> tuple[int, int]:
    h, w = H // self.stride, W // self.stride
    if not h * w:
      raise ValueError(
        f'PoolingConfig: stride={self.stride} on a grid of {H} x {W}; a window '
        f'must fit. Use at most {min(H, W)}.'
      )
    return h, w

  def _reduce(
    self,
    ts: interface.TokenSet,
    budget: interface.Budget,
    given: interface.Given,
  ) -> interface.Reduced:
    del given
    B, _ = ts.mask.shape
    T, H, W = interface.square_grid(ts)
    if self.method == 'average':
      h_max, w_max = self._strided(H, W)
      inside = [
        primitives.resample_matrix(s * n, n, n, 'adaptive_avg')
        for n, s in ((h_max, self.stride), (w_max, self.stride))
      ]
      rows, columns = (
        jnp.broadcast_to(
          jnp.pad(m, ((0, 0), (0, size - m.shape[1]))), (B, m.shape[0], size)
        )
        for m, size in zip(inside, (H, W), strict=True)
      )
      k: jax.Array | None = budget.k
    else:
      if budget.k_max < T:
        raise ValueError(
          f'PoolingConfig: k_max={budget.k_max} for {T} frames; each keeps a '
          'slot at least. Drop frames first, or raise the budget.'
        )
      h_max, w_max = (int(n) for n in fitting(budget.k_max // T, H, W))
      h, w = fitting(budget.counts(B) // T, H, W)
      kind = _KINDS[self.method]
      rows = _matrices(H, jnp.minimum(h, h_max), h_max, kind)
      columns = _matrices(W, jnp.minimum(w, w_max), w_max, kind)
      k = None
    if T * h_max * w_max > budget.k_max:
      raise ValueError(
        f'PoolingConfig: k_max={budget.k_max} for a grid of {T} x {h_max} x '
        f'{w_max}; there must be a slot for each. Use budget_for(ts).'
      )
    return resampled(ts, rows, columns, budget.k_max, k)


def fitting(k: Any, H: int, W: int) -> tuple[Any, Any]:
  """The largest h, w with h w <= k of a row of grids like H x W.

  The longer side runs through 1, 2, ... and the shorter one is what is nearest
  to their proportions; so fitting(h w) is (h, w) again. 0 where k is 0.

  Args:
    k: int or int32 array.
    H, W: the largest grid.
  """
  xp: Any = jnp if isinstance(k, jax.Array) else np
  long = np.arange(max(H, W) + 1)
  # Rounded half up, in whole numbers.
  short = (2 * long * min(H, W) + max(H, W)) // (2 * max(H, W))
  short = np.where(long > 0, np.maximum(short, 1), 0)
  sizes = xp.asarray(long * short, np.int32)
  at = xp.searchsorted(sizes, xp.asarray(k, np.int32), side='right') - 1
  sides = [xp.asarray(side, np.int32)[at] for side in (long, short)]
  return (sides[0], sides[1]) if H >= W else (sides[1], sides[0])


def resampled(
  ts: interface.TokenSet,
  rows: jax.Array,
  columns: jax.Array,
  k_max: int,
  k: jax.Array | None = None,
) -> interface.Reduced:
  """Every frame through rows (B, h, H) and columns (B, w, W).

  Slot (t, i, j) is the mean of the valid patches of its window, weighted by the
  matrices. A patch belongs to the slot that weighs it most; positions are those
  of the patch at the centre of the window.

  Args:
    ts: tokens on a grid.
    rows, columns: non-negative; rows of 0 make slots that are not in use.
    k_max: slots of the answer.
    k: (B,) slots to use at most, the first ones; None: all.
  """
  B, _ = ts.mask.shape
  T, H, W = interface.square_grid(ts)
  D = ts.tokens.shape[-1]
  h, w = rows.shape[1], columns.shape[1]
  mask = ts.mask[:, ts.special :].reshape(B, T, H, W, 1)
  x = ts.tokens[:, ts.special :].reshape(B, T, H, W, D)
  size = ts.size[:, ts.special :].reshape(B, T, H, W, 1)
  weight = jnp.where(mask, size, 0.0)
  x = jnp.where(mask, x.astype(jnp.float32), 0.0) * weight

  def resample(values):
    frame = lambda x: primitives.resample_grid(x, rows, columns)
    return jax.vmap(frame, in_axes=1, out_axes=1)(values)  # (B, T, h, w, ...)

  total = resample(weight)
  tokens = resample(x) / jnp.where(total > 0, total, 1.0)
  owner = _owners(rows)[:, None, :, None], _owners(columns)[:, None, None]
  frame = jnp.arange(T, dtype=jnp.int32)[None, :, None, None]
  slot = (frame * h + owner[0]) * w + owner[1]
  slot = jnp.where((owner[0] < 0) | (owner[1] < 0) | ~mask[..., 0], -1, slot)
  slot = slot.reshape(B, T * H * W)
  assignment = jnp.pad(slot, ((0, 0), (ts.special, 0)), constant_values=-1)
  K = T * h * w
  weights = jnp.where(assignment < 0, 0.0, ts.size)
  _, sizes = primitives.merge(weights[..., None], weights, assignment, K)
  at = _centres(rows)[:, None, :, None] * W + _centres(columns)[:, None, None]
  at = ts.special + frame * (H * W) + at  # (B, T, h, w)
  reduced = interface.Reduced(
    tokens=tokens.astype(ts.tokens.dtype).reshape(B, K, D),
    mask=(total > 0).reshape(B, K),
    positions=primitives.gather(ts.positions, at.reshape(B, K)),
    size=sizes,
    index=jnp.full((B, K), -1, jnp.int32),
    assignment=assignment,
    count=jnp.zeros((B,), jnp.int32),
  )
  return primitives.packed(reduced, k_max, k)


def _matrices(size: int, n: jax.Array, most: int, kind: str) -> jax.Array:
  """A matrix (B, most, size) per row that resamples `size` to n (B,)."""
  return jax.vmap(lambda n: primitives.resample_matrix(size, n, most, kind))(n)


def _owners(matrix: jax.Array) -> jax.Array:
  """matrix (B, n, m) -> for each column the row that weighs it most; -1."""
  best = jnp.argmax(matrix, axis=1).astype(jnp.int32)
  return jnp.where(jnp.max(matrix, axis=1) > 0, best, -1)


def _centres(matrix: jax.Array) -> jax.Array:
  """matrix (B, n, m) -> the column at the middle of each row's weights."""
  column = jnp.arange(matrix.shape[2], dtype=jnp.float32)
  total = jnp.sum(matrix, axis=2)
  centre = jnp.sum(matrix * column[None, None], axis=2) / jnp.where(
    total > 0, total, 1.0
  )
  return jnp.floor(centre + _EPS).astype(jnp.int32)
