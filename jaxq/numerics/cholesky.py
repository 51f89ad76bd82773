"""Cholesky factorization that compiles at any size.

XLA's own expansion for TPUs unrolls a matrix into one piece of program per 128
rows, so that compiling one for K = 14336 takes many minutes. Here it is a loop
over panels of `block` columns, in this order (left-looking):

  P = A[:, p] - L L[p, :]^T              one matmul; columns of L still to come
  L[p, p] = cholesky(P[p, :])            are zero
  L[:, p] = P L[p, p]^-T, rows below p

It does 2 K^3 multiply-adds where K^3 / 6 would do, for the sake of fixed
shapes; K = 14336 is 6e12, a fraction of a second. CPU and GPU have LAPACK's; a
CPU computes in float64: half of the codes that GPTQ rounds otherwise on another
mesh came of a float32 factor (docs/notes.md).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_HIGHEST = lax.Precision.HIGHEST


def cholesky(a: jax.Array) -> jax.Array:
  """a (K, K) float32, symmetric positive definite -> lower L with a = L L^T.

  NaN where `a` is not positive definite; some of it or all.
  """
  return lax.platform_dependent(
    a,
    cpu=_in_float64,
    tpu=blocked,
    default=jnp.linalg.cholesky,
  )


def _in_float64(a: jax.Array) -> jax.Array:
  with jax.enable_x64(True):
    lower = jnp.linalg.cholesky(lax.convert_element_type(a, np.float64))
    return lax.convert_element_type(lower, a.dtype)


@functools.partial(jax.jit, static_argnames='block')
def blocked(a: jax.Array, *, block: int = 128) -> jax.Array:
  """As `cholesky`, by the loop of the module docstring."""
  K = a.shape[0]
  num = -(-K // block)
  pad = num * block - K
  ones = jnp.diag((jnp.arange(K + pad) >= K).astype(a.dtype))
  a = jnp.pad(a, ((0, pad), (0, pad))) + ones
  index = jnp.arange(K + pad)

  def panel(i, lower):
    start = i * block
    cut = functools.partial(
      lax.dynamic_slice_in_dim, start_index=start, slice_size=block
    )
    known = jnp.matmul(lower, cut(lower).T, precision=_HIGHEST)
    p = cut(a, axis=1) - known  # (K, block)
    corner = jnp.linalg.cholesky(cut(p))  # (block, block)
    below = lax.linalg.triangular_solve(
      corner, p, left_side=False, lower=True, transpose_a=True
    )  # p @ corner^-T
    p = jnp.where(index[:, None] < start + block, 0.0, below)
    p = lax.dynamic_update_slice_in_dim(p, corner, start, axis=0)
    return lax.dynamic_update_slice_in_dim(lower, p, start, axis=1)

  lower = lax.fori_loop(0, num, panel, jnp.zeros_like(a))
  return lower[:K, :K]
