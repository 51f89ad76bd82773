"""Sharing a budget among frames: probabilities with a cap, whole numbers.

Both are solved in closed form over a sorted or a small table, where reference
codes loop (recursively, or one token at a time): fixed shapes, no loop whose
length depends on data.
"""

import jax
import jax.numpy as jnp


def capped(p: jax.Array, cap: jax.Array | float) -> jax.Array:
  """p scaled to sum 1 with no entry above a cap: min(cap, factor * p).

  The largest entries are set to the cap, the others keep their ratios. The
  factor is found among the n possible numbers of capped entries (sorted water
  filling).

  Args:
    p: (..., n), not negative.
    cap: a number, or broadcastable to (..., 1).

  Returns:
    (..., n) float32. Its sum is below 1 where the cap forbids more: n * cap <
    1, or too many zeros, which stay 0.
  """
  p = p.astype(jnp.float32)
  n = p.shape[-1]
  cap = jnp.broadcast_to(jnp.asarray(cap, jnp.float32), (*p.shape[:-1], 1))
  falling = -jnp.sort(-p, axis=-1)
  # The sum of entries j..n-1, added from the small end.
  tail = jnp.flip(jnp.cumsum(jnp.flip(falling, -1), axis=-1), -1)
  j = jnp.arange(n, dtype=jnp.float32).reshape((1,) * (p.ndim - 1) + (n,))
  left = 1.0 - j * cap
  factor = jnp.maximum(left, 0.0) / jnp.where(tail > 0, tail, 1.0)
  # With j capped entries, entry j is the largest of the others.
  fits = factor * falling <= cap
  first = jnp.argmax(fits, axis=-1, keepdims=True)
  factor = jnp.take_along_axis(factor, first, axis=-1)
  # Entries before `first` are at the cap whatever the factor says: a tie in
  # float32 must not leave one of them a rounding error below.
  threshold = jnp.take_along_axis(falling, first, axis=-1)
  some = jnp.any(fits, axis=-1, keepdims=True)
  scaled = jnp.where((p > threshold) | ~some, cap, jnp.minimum(cap, factor * p))
  return jnp.where(p > 0, scaled, 0.0)


def fit_total(
  n: jax.Array, total: jax.Array, upper: jax.Array, most: int
) -> jax.Array:
  """Whole numbers moved to a total, one by one from the extremes.

  While the sum is too large the largest number loses 1, while it is too small
  the smallest gains 1, of equal ones the first. The end of that loop is known
  without it: numbers are cut at a level, or raised to one, and the first few
  at the level are a step further.

  Args:
    n: (T,) int32, none negative.
    total: () int32.
    upper: (T,) int32; no number is raised past its bound, so the total is not
      reached where the bounds forbid it.
    most: the largest number there can be, static.

  Returns:
    (T,) int32.
  """
  levels = jnp.arange(most + 1, dtype=jnp.int32)[:, None]  # (L, 1)
  upper = jnp.maximum(upper, n)[None]
  down = jnp.minimum(n[None], levels)  # (L, T)
  up = jnp.minimum(jnp.maximum(n[None], levels), upper)
  # The lowest level with at least the total, and the highest with at most.
  level_down = jnp.argmax(jnp.sum(down, axis=1) >= total)
  below = jnp.sum(up, axis=1) <= total
  level_up = jnp.maximum(jnp.sum(below, dtype=jnp.int32) - 1, 0)
  cut, raised = down[level_down], up[level_up]

  def first(candidates, number):
    rank = jnp.cumsum(candidates, dtype=jnp.int32) - 1
    return (candidates & (rank < number)).astype(jnp.int32)

  cut = cut - first(cut == level_down, jnp.sum(cut) - total)
  raised = raised + first(
    (raised == level_up) & (raised < upper[0]), total - jnp.sum(raised)
  )
  return jnp.where(jnp.sum(n) > total, cut, raised)
