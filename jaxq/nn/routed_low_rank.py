"""Low-rank terms of which each token takes the shared one and a few others.

  u = x, or |x| * weight
  g = the top_k largest of (u / |u|) @ router          1, or their softmax
  y = sum over the shared columns and those of the chosen experts of (x a) b

All experts' columns lie side by side in `a` and `b`: z = x @ a, the columns of
experts not chosen are set to zero, y = z @ b. There is no dispatch, and for up
to 128 columns none would be cheaper on a matrix unit. Routing is float32 and by
the token alone, so that prefill, decode and padding agree on it.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxq.nn import linear

_TINY = 1e-30


@flax.struct.dataclass
class RoutedLowRank:
  """Takes the place of a linear.LowRank beside a kernel (K, N).

  a (K, R), b (R, N): floats, or QArrays of int8; R = shared + E * rank, the
    shared columns first, then expert by expert.
  router (K, E).
  weight: (K,), for routing by |x| * weight; None routes by x.
  shared: how many columns every token takes.
  top_k: experts of a token.
  """

  a: Any
  b: Any
  router: jax.Array
  weight: jax.Array | None
  shared: int = flax.struct.field(pytree_node=False)
  top_k: int = flax.struct.field(pytree_node=False, default=1)

  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., K) -> (..., N) in x.dtype; in a's dtype, accumulated in float32."""
    a, b = linear.dense(self.a), linear.dense(self.b)
    rank = (a.shape[-1] - self.shared) // self.router.shape[-1]
    chosen = gates(x, self.router, self.weight, self.top_k)  # (..., E)
    all_tokens = jnp.ones((*x.shape[:-1], self.shared), jnp.float32)
    mask = jnp.concatenate(
      [all_tokens, jnp.repeat(chosen, rank, axis=-1)], axis=-1
    )  # (..., R)
    z = jnp.matmul(x.astype(a.dtype), a, preferred_element_type=jnp.float32)
    z = (z * mask).astype(a.dtype)
    y = jnp.matmul(z, b, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)

  @property
  def product(self) -> jax.Array:
    """(K, N) float32: what all tokens take."""
    a = linear.dense(self.a)[:, : self.shared]
    return linear.LowRank(a, linear.dense(self.b)[: self.shared]).product

  @property
  def active(self) -> int:
    """Columns that one token takes."""
    stored = self.a.shape[-1] - self.shared
    return self.shared + self.top_k * (stored // self.router.shape[-1])


def gates(
  x: jax.Array, router: jax.Array, weight: jax.Array | None, top_k: int
) -> jax.Array:
  """How much of each expert a token takes.

  Args:
    x: (..., K).
    router: (K, E).
    weight: (K,) or None, as in RoutedLowRank.
    top_k: static.

  Returns:
    (..., E) float32: zero but for top_k of them, which sum to one.
  """
  u = x.astype(jnp.float32)
  if weight is not None:
    weight = weight.astype(jnp.float32)
    u = jnp.abs(u) * weight.reshape((1,) * (u.ndim - 1) + (-1,))
  squared = jnp.sum(jnp.square(u), axis=-1, keepdims=True)
  logits = jnp.matmul(
    u / jnp.sqrt(jnp.maximum(squared, _TINY)),
    router.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )  # (..., E)
  experts = router.shape[-1]
  if top_k == 1:
    best = jnp.argmax(logits, axis=-1)
    return jax.nn.one_hot(best, experts, dtype=jnp.float32)
  values, index = jax.lax.top_k(logits, top_k)  # (..., top_k)
  share = jax.nn.softmax(values, axis=-1)
  one_hot = jax.nn.one_hot(index, experts, dtype=jnp.float32)
  return jnp.sum(one_hot * share[..., None], axis=-2)
