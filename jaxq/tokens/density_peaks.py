"""Density peaks (Rodriguez and Laio, 2014): tokens that stand for others.

  density_i = exp(-mean of the squared distances to the c nearest, i included)
  score_i   = density_i * distance to the nearest token that is denser

Distances are |x_i - x_j| / sqrt(D). The densest token takes the largest
distance there is. A token with a high score has many like it, and none of them
stands for them better. Of equally dense tokens the first counts as denser (the
reference codes add noise instead).
"""

import jax
import jax.numpy as jnp

from jaxq.tokens import primitives

_HIGHEST = jax.lax.Precision.HIGHEST


def scores(x: jax.Array, mask: jax.Array, neighbours: int = 4) -> jax.Array:
  """The score of each token: (..., n) float32, 0 where masked.

  Args:
    x: (..., n, D).
    mask: (..., n) bool.
    neighbours: c, static.
  """
  return _scores(squared_distances(x, mask), mask, neighbours)


def clusters(
  x: jax.Array, mask: jax.Array, c_max: int, c: jax.Array
) -> jax.Array:
  """Each token to the nearest of the c with the highest scores (DPC-KNN).

  Du et al., 2016; the scores take as many neighbours as there are clusters.

  Args:
    x: (B, n, D).
    mask: (B, n) bool.
    c_max: clusters, static.
    c: (B,) int32 of them to make at most.

  Returns:
    (B, n) int32 in [-1, c_max), clusters in order of their first member; -1 at
    masked tokens.
  """
  n = x.shape[1]
  squared = squared_distances(x, mask)
  peak = _scores(squared, mask, c_max)
  centres, is_centre = primitives.select_topk(peak, mask, min(c_max, n), c)
  to_centre = primitives.gather(squared, centres)  # (B, c, n): symmetric.
  to_centre = jnp.where(is_centre[..., None], to_centre, jnp.inf)
  cluster = jnp.argmin(to_centre, axis=1).astype(jnp.int32)
  as_centre = primitives.scatter_slots(centres, n)  # Theirs is their own.
  cluster = jnp.where(as_centre >= 0, as_centre, cluster)
  cluster = jnp.where(mask & jnp.any(is_centre, 1)[:, None], cluster, -1)
  return primitives.order_slots(cluster, c_max)


def squared_distances(x: jax.Array, mask: jax.Array) -> jax.Array:
  """|x_i - x_j|^2 / D of (..., n, D): (..., n, n), masked tokens at 0."""
  n, D = x.shape[-2:]
  x = jnp.where(mask[..., None], x.astype(jnp.float32), 0.0)
  length = jnp.sum(x * x, axis=-1)
  cross = jnp.einsum('...nd,...md->...nm', x, x, precision=_HIGHEST)
  squared = length[..., :, None] + length[..., None, :] - 2 * cross
  own = jnp.eye(n, dtype=bool).reshape((1,) * (mask.ndim - 1) + (n, n))
  return jnp.where(own, 0.0, jnp.maximum(squared, 0.0)) / D


def _scores(squared: jax.Array, mask: jax.Array, neighbours: int) -> jax.Array:
  """`scores` of squared distances (..., n, n)."""
  n = squared.shape[-1]
  pair = mask[..., :, None] & mask[..., None, :]
  near = jnp.where(pair, -squared, -jnp.inf)
  near = jax.lax.top_k(near, min(neighbours, n))[0]
  density = jnp.exp(primitives.masked_mean(near, jnp.isfinite(near), axis=-1))
  mine, others = density[..., :, None], density[..., None, :]
  earlier = jnp.tri(n, k=-1, dtype=bool).reshape(
    (1,) * (mask.ndim - 1) + (n, n)
  )
  denser = pair & ((others > mine) | ((others == mine) & earlier))
  distance = jnp.sqrt(squared)
  far = jnp.max(jnp.where(pair, distance, 0.0), axis=(-2, -1))
  nearest = jnp.min(jnp.where(denser, distance, jnp.inf), axis=-1)
  nearest = jnp.minimum(nearest, far[..., None])
  return jnp.where(mask, density * nearest, 0.0)
