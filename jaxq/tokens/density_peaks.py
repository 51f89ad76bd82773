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

_HIGHEST = jax.lax.Precision.HIGHEST


def scores(x: jax.Array, mask: jax.Array, neighbours: int = 4) -> jax.Array:
  """The score of each token: (..., n) float32, 0 where masked.

  Args:
    x: (..., n, D).
    mask: (..., n) bool.
    neighbours: c, static.
  """
  n, D = x.shape[-2:]
  x = jnp.where(mask[..., None], x.astype(jnp.float32), 0.0)
  length = jnp.sum(x * x, axis=-1)
  cross = jnp.einsum('...nd,...md->...nm', x, x, precision=_HIGHEST)
  squared = length[..., :, None] + length[..., None, :] - 2 * cross
  index = jnp.arange(n)
  square = (1,) * (mask.ndim - 1) + (n, n)
  own = (index[:, None] == index[None]).reshape(square)
  squared = jnp.where(own, 0.0, jnp.maximum(squared, 0.0)) / D
  pair = mask[..., :, None] & mask[..., None, :]
  near = jnp.where(pair, -squared, -jnp.inf)
  near = jax.lax.top_k(near, min(neighbours, n))[0]
  found = near > -jnp.inf
  number = jnp.maximum(jnp.sum(found, axis=-1, dtype=jnp.float32), 1.0)
  density = jnp.exp(jnp.sum(jnp.where(found, near, 0.0), axis=-1) / number)
  mine, others = density[..., :, None], density[..., None, :]
  earlier = (index[None] < index[:, None]).reshape(square)
  denser = pair & ((others > mine) | ((others == mine) & earlier))
  distance = jnp.sqrt(squared)
  far = jnp.max(jnp.where(pair, distance, 0.0), axis=(-2, -1))
  nearest = jnp.min(jnp.where(denser, distance, jnp.inf), axis=-1)
  nearest = jnp.minimum(nearest, far[..., None])
  return jnp.where(mask, density * nearest, 0.0)
