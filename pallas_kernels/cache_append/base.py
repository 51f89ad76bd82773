"""A token into a cache in plain JAX: a definition, and XLA's path."""

import jax
import jax.numpy as jnp


def cache_append(
  cache: jax.Array, new: jax.Array, slots: jax.Array
) -> jax.Array:
  """cache (B, S, Hkv, W), new (B, Hkv, W), slots (B,) -> cache.

  Short floats are written as bits: CPUs would convert the whole array.
  """
  rows, dtype = jnp.arange(cache.shape[0]), cache.dtype
  short = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
  if short:
    bits = jnp.uint8 if dtype.itemsize == 1 else jnp.uint16
    cache, new = (jax.lax.bitcast_convert_type(x, bits) for x in (cache, new))
  cache = cache.at[rows, slots].set(new, mode='drop')
  return jax.lax.bitcast_convert_type(cache, dtype) if short else cache
