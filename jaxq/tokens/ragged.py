"""Resampling each frame of a video to a size of its own, without padding.

K slots in all; frame t takes the next h_t * w_t of them. Slot by slot the frame
and the cell are found in the running sum of sizes, and a few source rows are
read: memory is O(K), not frames * largest height * largest width, and one
program serves all sizes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxq.tokens import interface


class Slots(NamedTuple):
  """Where each of K slots looks: (K,) int32 each, and used (K,) bool.

  frame; i, j: the cell; j == w is a newline. n, h, w: of the frame.
  """

  frame: jax.Array
  i: jax.Array
  j: jax.Array
  n: jax.Array
  h: jax.Array
  w: jax.Array
  used: jax.Array


def slots_of(
  n: jax.Array, h: jax.Array, w: jax.Array, slots: int, newline: bool = False
) -> Slots:
  """Frame by frame, row by row: where each of `slots` slots looks.

  Args:
    n, h, w: (T,) int32.
    slots: static.
    newline: whether a slot follows each row.
  """
  width = w + int(newline)
  ends = jnp.cumsum(h * width)
  slot = jnp.arange(slots, dtype=jnp.int32)
  frame = jnp.searchsorted(ends, slot, side='right').astype(jnp.int32)
  frame = jnp.minimum(frame, n.shape[0] - 1)
  local = slot - (ends - h * width)[frame]
  width = jnp.maximum(width[frame], 1)
  return Slots(
    frame=frame,
    i=local // width,
    j=local % width,
    n=n[frame],
    h=h[frame],
    w=w[frame],
    used=slot < ends[-1],
  )


def bilinear(
  x: jax.Array, weight: jax.Array, grid: interface.Grid, at: Slots
) -> tuple[jax.Array, jax.Array]:
  """The means of four patches around each slot's place.

  As torch.nn.functional.interpolate (align_corners=False, no smoothing) of the
  slot's frame to (h, w).

  Args:
    x: (T * H * W, D) float32.
    weight: (T * H * W,) float32, 0 where masked.
    grid: (T, H, W).
    at: K slots.

  Returns:
    Sums (K, D) of weight * x and (K,) of weight, to be divided.
  """
  _, H, W = grid
  rows = _pair(at.i, H, at.h)
  columns = _pair(at.j, W, at.w)
  total, mass = jnp.zeros((at.i.shape[0], x.shape[1])), jnp.zeros(at.i.shape)
  for row, row_weight in rows:
    for column, column_weight in columns:
      source = (at.frame * H + row) * W + column
      share = row_weight * column_weight * weight[source]
      total = total + share[:, None] * x[source]
      mass = mass + share
  return total, mass


def adaptive_average(
  x: jax.Array, weight: jax.Array, grid: interface.Grid, at: Slots
) -> tuple[jax.Array, jax.Array]:
  """The means of the bins of adaptive average pooling; as `bilinear`.

  Four corners of a running sum over rows and columns give any bin. A frame's
  mean is taken out first: the running sum stays small, and with it its
  rounding.
  """
  T, H, W = grid
  weight = weight.reshape(T, H, W, 1)
  x = x.reshape(T, H, W, -1)
  mass = jnp.sum(weight, axis=(1, 2), keepdims=True)
  mean = jnp.sum(x * weight, axis=(1, 2), keepdims=True)
  mean = mean / jnp.where(mass > 0, mass, 1.0)
  both = jnp.concatenate([(x - mean) * weight, weight], axis=3)
  table = jnp.cumsum(jnp.cumsum(both, axis=1), axis=2)
  table = jnp.pad(table, ((0, 0), (1, 0), (1, 0), (0, 0)))
  top, bottom = _bin(at.i, H, at.h)
  left, right = _bin(at.j, W, at.w)
  corner = lambda row, column: table[at.frame, row, column]  # (K, D + 1)
  sums = corner(bottom, right) - corner(top, right)
  sums = sums - (corner(bottom, left) - corner(top, left))
  share = sums[:, -1]
  return sums[:, :-1] + share[:, None] * mean[at.frame, 0, 0], share


def linspace(
  x: jax.Array, weight: jax.Array, grid: interface.Grid, at: Slots
) -> tuple[jax.Array, jax.Array]:
  """n evenly spaced patches of the frame's raster order; as `bilinear`.

  Here a slot's place within its frame is i: h = n and w = 1.
  """
  _, H, W = grid
  source = at.frame * H * W + at.i * (H * W - 1) // jnp.maximum(at.n - 1, 1)
  return x[source] * weight[source][:, None], weight[source]


def _pair(i, n_in, n_out):
  """The two samples around output i, with their weights."""
  n_out = jnp.maximum(n_out, 1)
  twice = jnp.maximum((2 * i + 1) * n_in - n_out, 0)  # In halves: exact floors.
  low = jnp.minimum(twice // (2 * n_out), n_in - 1)
  high = jnp.minimum(low + 1, n_in - 1)
  past = (twice - 2 * n_out * low).astype(jnp.float32)
  weight = past / (2 * n_out).astype(jnp.float32)
  return (low, 1 - weight), (high, weight)


def _bin(i, n_in, n_out):
  """Start and end of bin i of adaptive average pooling, within the axis."""
  n_out = jnp.maximum(n_out, 1)
  start, end = i * n_in // n_out, -(-(i + 1) * n_in // n_out)
  return jnp.clip(start, 0, n_in - 1), jnp.clip(end, 1, n_in)
