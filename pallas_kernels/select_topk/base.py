"""The largest scores of a row in plain JAX: a definition, and XLA's path."""

import jax
import jax.numpy as jnp


def select_topk(scores: jax.Array, k: int, lengths: jax.Array) -> jax.Array:
  """scores (R, S) float32, lengths (R,) -> places (R, k) int32, rising; -1."""
  slots = jnp.arange(scores.shape[1], dtype=jnp.int32)[None]
  held = slots < lengths[:, None]
  scores = jnp.where(held, scores, -jnp.inf)
  _, places = jax.lax.top_k(scores, k)  # Of equal scores the first.
  there = jnp.take_along_axis(held, places, axis=1)
  places = jnp.sort(jnp.where(there, places, scores.shape[1]), axis=1)
  return jnp.where(places < scores.shape[1], places, -1).astype(jnp.int32)
