"""QuoTA's merging versions: a frame shrinks to its share by ToMe.

Luo et al., 2025, https://arxiv.org/abs/2503.08689. Each frame is first pooled
to half its sides (27 x 27 to 14 x 14). Then its tokens are merged by likeness,
at most half per round, to the n_t of the frame (the paper's fourth version), or
along its rows to w_t and along its columns to h_t (the fifth), which keeps a
grid. Tokens are compared by themselves. As many rounds run as the smallest
share could need: one compile.
"""

import jax
import jax.numpy as jnp

from jaxq.tokens import interface, primitives, tome


def merge_frames(
  ts: interface.TokenSet,
  n: jax.Array,
  h: jax.Array,
  w: jax.Array,
  k_max: int,
  *,
  by_axis: bool,
) -> interface.Reduced:
  """The frames of a video, merged to n, or h x w, tokens each.

  Args:
    ts: B videos on a grid, without special tokens.
    n, h, w: (B, T) int32.
    k_max: slots, static.
    by_axis: rows, then columns; else a frame at once.
  """
  T, H, W = grid = interface.square_grid(ts)
  pooled, cell = half(ts)
  rows, columns = half_sides(grid)
  B = n.shape[0]
  if by_axis:
    # Sets of one row each: (B * T * rows, columns), then of one column each.
    along = _merge(_split(pooled, B * T * rows), jnp.repeat(w, rows, axis=1))
    swap = lambda a: _swap(a, B * T, rows, columns)
    turned = interface.TokenSet(
      tokens=swap(along.tokens),
      mask=swap(along.mask),
      positions=swap(along.positions),
      size=swap(along.size),
    )
    down = _merge(turned, jnp.repeat(h, columns, axis=1))
    swap = lambda a: _swap(a, B * T, columns, rows)
    out = jax.tree.map(
      swap, (down.tokens, down.mask, down.positions, down.size)
    )
    # Cell (r, c) goes to column j of its row, then to row i of that column.
    j = along.assignment.reshape(B * T, rows, columns)
    i = down.assignment.reshape(B * T, columns, rows)
    row = jnp.arange(rows)[None, :, None]
    frame = jnp.arange(B * T)[:, None, None]
    i = i[frame, jnp.maximum(j, 0), row]
    slot = jnp.where((j < 0) | (i < 0), -1, i * columns + j)
  else:
    once = _merge(_split(pooled, B * T), n)
    out = (once.tokens, once.mask, once.positions, once.size)
    slot = once.assignment
  # All frames behind each other, without gaps.
  per_frame = rows * columns
  tokens, mask, positions, size = (
    a.reshape(B, T * per_frame, *a.shape[2:])
    for a in _frames(out, B * T, per_frame)
  )
  index, used = primitives.compact(mask, k_max)
  slot = slot.reshape(B, T, per_frame)
  start = per_frame * jnp.arange(T, dtype=jnp.int32)[None, :, None]
  slot = jnp.where(slot < 0, -1, slot + start).reshape(B, -1)
  new = primitives.scatter_slots(index, T * per_frame)
  slot = primitives.gather(new + 1, slot) - 1  # Of each cell.
  assignment = primitives.gather(slot + 1, cell) - 1  # Of each patch.
  return interface.Reduced(
    tokens=primitives.gather(tokens, index),
    mask=used,
    positions=primitives.gather(positions, index),
    size=primitives.gather(size, index),
    index=jnp.full_like(index, -1),
    assignment=jnp.where(ts.mask, assignment, -1),
    count=jnp.sum(used, axis=1, dtype=jnp.int32),
  )


def half_sides(grid: interface.Grid) -> tuple[int, int]:
  """Rows and columns of a frame pooled to half, rounded up."""
  return -(-grid[1] // 2), -(-grid[2] // 2)


def half(ts: interface.TokenSet) -> tuple[interface.TokenSet, jax.Array]:
  """Frames averaged to half their sides; and the cell (B, N) of each patch."""
  T, H, W = grid = interface.square_grid(ts)
  rows, columns = half_sides(grid)
  B = ts.mask.shape[0]
  at = lambda side, n: (
    (2 * jnp.arange(side, dtype=jnp.int32) + 1) * n // (2 * side)
  )
  frame = jnp.arange(T, dtype=jnp.int32)[:, None, None]
  cell = (frame * rows + at(H, rows)[None, :, None]) * columns
  cell = (cell + at(W, columns)[None, None]).reshape(1, -1)
  cell = jnp.broadcast_to(cell, (B, T * H * W))
  matrices = [
    primitives.resample_matrix(side, n, n)
    for side, n in ((H, rows), (W, columns))
  ]

  def pool(x):
    x = x.reshape(B, T, H, W, -1)
    return primitives.resample_grid(x, *matrices).reshape(B, -1, x.shape[-1])

  weight = jnp.where(ts.mask, ts.size, 0.0)[..., None]
  share = pool(weight)
  divisor = jnp.where(share > 0, share, 1.0)

  def mean(x):
    x = jnp.where(ts.mask[..., None], x.astype(jnp.float32), 0.0)
    return pool(x * weight) / divisor

  number = T * rows * columns
  _, size = primitives.merge(
    weight, weight[..., 0], jnp.where(ts.mask, cell, -1), number
  )
  return interface.TokenSet(
    tokens=mean(ts.tokens).astype(ts.tokens.dtype),
    mask=share[..., 0] > 0,
    positions=jnp.floor(mean(ts.positions) + 0.5).astype(jnp.int32),
    size=size,
    grid=(T, rows, columns),
  ), cell


def _merge(ts: interface.TokenSet, k: jax.Array) -> interface.Reduced:
  """ToMe of each set to its own k; as many slots as tokens."""
  N = ts.mask.shape[1]
  budget = interface.Budget(k_max=N, k=jnp.minimum(k.reshape(-1), N))
  return tome.TomeConfig().reduce(ts, budget=budget)


def _split(ts: interface.TokenSet, sets: int) -> interface.TokenSet:
  """The tokens of B videos as so many sets of equally many tokens."""
  split = lambda a, axes: a.reshape(sets, -1, *a.shape[axes:])
  return interface.TokenSet(
    tokens=split(ts.tokens, 2),
    mask=split(ts.mask, 2),
    positions=split(ts.positions, 2),
    size=split(ts.size, 2),
  )


def _swap(a: jax.Array, frames: int, rows: int, columns: int) -> jax.Array:
  """(frames * rows, columns, ...) -> (frames * columns, rows, ...)."""
  a = a.reshape(frames, rows, columns, *a.shape[2:]).swapaxes(1, 2)
  return a.reshape(frames * columns, rows, *a.shape[3:])


def _frames(out, frames, per_frame):
  """Each array as (frames, per_frame, ...)."""
  return [a.reshape(frames, per_frame, *a.shape[2:]) for a in out]
