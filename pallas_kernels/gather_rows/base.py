"""Rows by index in plain JAX: what the kernel must equal, and XLA's path."""

import jax
import jax.numpy as jnp


def gather_rows(
  x: jax.Array, index: jax.Array, scale: jax.Array | None
) -> jax.Array:
  """x (N, D), index (R,), scale (R,) -> (R, D) of x's dtype.

  An index outside of [0, N) gives zeros.
  """
  rows = x.at[outside_last(index, x.shape[0])].get(mode='fill', fill_value=0)
  if scale is None:
    return rows
  scaled = rows.astype(jnp.float32) * scale.astype(jnp.float32)[:, None]
  return scaled.astype(x.dtype)


def scatter_rows(g: jax.Array, index: jax.Array, N: int) -> jax.Array:
  """g (R, D) float32, index (R,) -> (N, D): the transpose of gather_rows."""
  zeros = jnp.zeros((N, g.shape[1]), g.dtype)
  return zeros.at[outside_last(index, N)].add(g, mode='drop')


def outside_last(index: jax.Array, N: int) -> jax.Array:
  """index, with N for every negative one: JAX would count it from the end."""
  return jnp.where(index < 0, N, index)
