"""Slots that the key heads of a layer share (AdaKV).

Feng et al., 2024, https://arxiv.org/abs/2407.11550. Heads differ in how many
tokens they look at; with one pool for all, the scores say how many each gets.
The published code hides keys from a full cache; here the pool is what there is.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxq.kvcache import topk


@flax.struct.dataclass
class Together:
  """A store of one head, read by all heads; what is whose is masked outside."""

  store: Any
  heads: int = flax.struct.field(pytree_node=False)

  @property
  def slots(self) -> int:
    """S."""
    return self.store.slots

  def values(self, first: Any, size: int) -> jax.Array:
    """(B, size, Hkv, D) float32."""
    x = self.store.values(first, size)
    return jnp.broadcast_to(x, (*x.shape[:2], self.heads, x.shape[3]))

  def scores(self, q: jax.Array, first: Any, size: int) -> jax.Array:
    """q (B, Hkv, G, T, D) -> (B, Hkv, G, T, size)."""
    B, Hkv, G, T, D = q.shape
    out = self.store.scores(q.reshape(B, 1, Hkv * G, T, D), first, size)
    return out.reshape(B, Hkv, G, T, size)

  def combine(self, p: jax.Array, first: Any, size: int) -> jax.Array:
    """p (B, Hkv, G, T, size) -> (B, Hkv, G, T, D)."""
    B, Hkv, G, T, _ = p.shape
    out = self.store.combine(p.reshape(B, 1, Hkv * G, T, size), first, size)
    return out.reshape(B, Hkv, G, T, -1)


def safeguarded(
  rank: jax.Array, head: jax.Array, heads: int, sure: int
) -> jax.Array:
  """Ranks under which every head keeps its best tokens.

  Args:
    rank: (B, N), -inf where there is nothing.
    head: (B, N), whose a token is.
    heads: how many there are.
    sure: tokens each is sure of; those rank first.
  """
  if not sure:
    return rank
  rows = jnp.arange(rank.shape[0])[:, None]
  best = jnp.zeros(rank.shape, bool)
  for h in range(heads):
    own = jnp.where(head == h, rank, -jnp.inf)
    index, _ = topk.largest(own, min(sure, rank.shape[-1]))
    best |= jnp.zeros_like(best).at[rows, index].set(True) & (head == h)
  return jnp.where(best & (rank > -jnp.inf), jnp.inf, rank)
