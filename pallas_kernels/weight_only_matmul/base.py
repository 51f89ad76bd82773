"""x @ dequantize(w) in plain JAX: what the kernels must equal, and XLA's path.

The weight is dequantized in float32, rounded to x's dtype and multiplied with
float32 sums, as jaxq.nn.matmul does. XLA may or may not fuse the two: where it
does not, a weight-sized array is written and read again.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import planar, weights


def weight_only_matmul(
  x: jax.Array,
  qvalue: jax.Array,
  scale: jax.Array,
  zero_point: jax.Array | None,
  layout: planar.Planar,
  out_dtype: Any,
) -> jax.Array:
  """x (M, K), qvalue (rows, N), scale (1 or K/G, N) -> (M, N) of out_dtype."""
  w = weights.dequantize(qvalue, scale, zero_point, layout).astype(x.dtype)
  return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(out_dtype)


def vjp_x(
  g: jax.Array,
  qvalue: jax.Array,
  scale: jax.Array,
  zero_point: jax.Array | None,
  layout: planar.Planar,
  dtype: Any,
) -> jax.Array:
  """g (M, N) @ dequantize(w)^T -> (M, K) of `dtype`, float32 sums.

  Packed along K, a weight cannot serve its own transpose: it is dequantized.
  """
  w = weights.dequantize(qvalue, scale, zero_point, layout).astype(dtype)
  dx = jax.lax.dot_general(
    g.astype(dtype),
    w,
    (((1,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  return dx.astype(dtype)
