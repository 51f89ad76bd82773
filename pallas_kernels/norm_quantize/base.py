"""A norm and its quantization in plain JAX: what the kernel must equal.

  rms    y = x / sqrt(mean(x^2) + eps) * weight + bias
  layer  the same of x - mean(x)

in float32, then either codes in steps of the row (rows.py), or, with static
steps, code = clip(round(x / sqrt(..) * (weight / step) + bias / step)): the
step costs nothing, be it one per channel or one in all. There copies of some
channels may follow, each with an offset of its own in `bias` (MergeQuant).
Unlike a norm that is stored, y is not rounded to x's dtype in between.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import rows

KINDS = ('layer', 'rms')


def normalize(x: jax.Array, kind: str, eps: float) -> jax.Array:
  """x (M, K) -> float32, of mean square 1."""
  x = x.astype(jnp.float32)
  if kind == 'layer':
    x = x - jnp.mean(x, axis=1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + eps)


def norm_quantize(
  x: jax.Array,
  weight: jax.Array,
  bias: jax.Array,
  kind: str,
  eps: float,
  x_format: str,
  dynamic: bool,
  gather: jax.Array | None = None,
  narrow: bool = True,
) -> tuple[jax.Array, jax.Array | None]:
  """x (M, K); weight, bias (1, K') float32 -> codes (M, K'), scale (M, 1).

  K' = K + S with gather (S,), the channels that the last S columns copy.
  """
  y = normalize(x, kind, eps)
  if gather is not None:
    tail = jnp.take(y, gather, axis=1, mode='fill', fill_value=0)
    y = jnp.concatenate([y, tail], axis=1)
  y = y * weight + bias
  if dynamic:
    return rows.quantize(y, x_format)
  return rows.encode(y, x_format, narrow), None
