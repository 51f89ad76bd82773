"""Attention in parts: partial softmaxes that are merged.

A part is some of the keys a query sees: a block of a store, a residual window,
the new tokens. Of each the running

  largest' = max(largest, max s)      p = exp(s - largest')
  total'   = total e^(largest - largest') + sum p
  out'     = out   e^(largest - largest') + p V

is kept, so that a store is read block by block, each unpacked, used and
forgotten: no array of the size of a dequantized cache exists, and blocks behind
the longest row are not touched. One program serves all lengths. All in float32.

Queries are (B, Hkv, G, T, D): G query heads share a key head. A row that sees
nothing has total 0; `finish` gives zeros for it.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxq.kvcache import interface, layers

BLOCK = 512  # Slots of a store that are unpacked at a time.
_CHUNK = 128  # Query rows of the new tokens' own part.
_MOST_CHUNKS = 16
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


@flax.struct.dataclass
class Partial:
  """out (B, Hkv, G, T, D); largest, total (B, Hkv, G, T, 1); float32."""

  out: jax.Array
  largest: jax.Array
  total: jax.Array


def group(q: jax.Array, kv_heads: int, scale: float | None) -> jax.Array:
  """q (B, T, H, D) -> (B, Hkv, G, T, D) float32, times the scale."""
  B, T, H, D = q.shape
  scale = D**-0.5 if scale is None else scale
  q = q.astype(jnp.float32) * jnp.float32(scale)
  q = q.reshape(B, T, kv_heads, H // kv_heads, D)
  return q.transpose(0, 2, 3, 1, 4)


def empty(q: jax.Array) -> Partial:
  """The part of no keys."""
  column = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
  return Partial(
    out=jnp.zeros(q.shape, jnp.float32),
    largest=jnp.full_like(column, MASKED),
    total=column,
  )


def add(
  state: Partial,
  scores: jax.Array,
  seen: jax.Array,
  combine: Callable[[jax.Array], jax.Array],
) -> Partial:
  """Takes a part in.

  Args:
    state: what was taken in before.
    scores: (B, Hkv, G, T, S).
    seen: bool, five axes that broadcast to those of the scores.
    combine: p (B, Hkv, G, T, S) -> p V (B, Hkv, G, T, D).
  """
  scores = jnp.where(seen, scores, MASKED)
  largest = jnp.maximum(state.largest, jnp.max(scores, axis=-1, keepdims=True))
  p = jnp.where(seen, jnp.exp(scores - largest), 0.0)
  shrink = jnp.exp(state.largest - largest)
  return Partial(
    out=state.out * shrink + combine(p),
    largest=largest,
    total=state.total * shrink + jnp.sum(p, axis=-1, keepdims=True),
  )


def merge(a: Partial, b: Partial) -> Partial:
  """Of the keys of both."""
  largest = jnp.maximum(a.largest, b.largest)
  of_a, of_b = jnp.exp(a.largest - largest), jnp.exp(b.largest - largest)
  return Partial(
    out=a.out * of_a + b.out * of_b,
    largest=largest,
    total=a.total * of_a + b.total * of_b,
  )


def finish(state: Partial, dtype: Any) -> jax.Array:
  """-> (B, T, H, D)."""
  out = state.out / jnp.where(state.total > 0, state.total, 1.0)
  B, Hkv, G, T, D = out.shape
  return out.transpose(0, 3, 1, 2, 4).reshape(B, T, Hkv * G, D).astype(dtype)


def log_sum_exp(state: Partial) -> jax.Array:
  """(B, Hkv, G, T); very negative where nothing is seen."""
  total = jnp.where(state.total > 0, state.total, 1.0)
  return (state.largest + jnp.log(total))[..., 0]


def cap(scores: jax.Array, scoring: interface.Scoring) -> jax.Array:
  """Applies the softcap, if there is one."""
  if scoring.softcap is None:
    return scores
  return scoring.softcap * jnp.tanh(scores / scoring.softcap)


def attend_store(
  q: jax.Array,
  positions: jax.Array,
  k: Any,
  v: Any,
  key_positions: Callable[[jax.Array], jax.Array],
  used: jax.Array,
  scoring: interface.Scoring,
  *,
  unit: int = 1,
  block: int = BLOCK,
) -> Partial:
  """Queries over what two stores hold.

  Args:
    q: (B, Hkv, G, T, D), scaled.
    positions: (B, T) int32 of the queries.
    k, v: stores of the same slots (jaxq.kvcache.stores); of a layer of a stack,
      which is taken out.
    key_positions: slots (size,) -> (B, size, 1 or Hkv) int32, the position of
      what a slot holds, negative where it is empty.
    used: () int32; slots from here on are empty in all rows.
    scoring: window and softcap.
    unit: blocks are multiples of it.
    block: slots at a time, about.
  """
  k, v = layers.cut(k), layers.cut(v)
  S = k.slots
  size = min(S, max(block // unit, 1) * unit)

  def body(i, state):
    # The last block may overlap the one before; those slots are masked.
    first = jnp.minimum(i * size, S - size)
    slots = first + jnp.arange(size, dtype=jnp.int32)
    held = key_positions(slots).transpose(0, 2, 1)[:, :, None, None]
    seen = (held >= 0) & (slots >= i * size)[None, None, None, None]
    if scoring.window is not None:  # (B, 1 or Hkv, 1, T, size)
      oldest = positions - scoring.window
      seen = seen & (held > oldest[:, None, None, :, None])
    scores = cap(k.scores(q, first, size), scoring)
    return add(state, scores, seen, lambda p: v.combine(p, first, size))

  return jax.lax.fori_loop(0, (used + size - 1) // size, body, empty(q))


def attend_own(
  q: jax.Array, k: jax.Array, v: jax.Array, scoring: interface.Scoring
) -> Partial:
  """New tokens among themselves, causally: k, v (B, T, Hkv, D).

  Queries are taken in chunks that see no further than their own end.
  """
  T = q.shape[3]
  k, v = k.astype(jnp.float32), v.astype(jnp.float32)
  size = max(_CHUNK, -(-T // _MOST_CHUNKS))
  parts = []
  for start in range(0, T, size):
    end, first = min(start + size, T), 0
    if scoring.window is not None:
      first = max(0, start - scoring.window + 1)
    rows = jnp.arange(start, end)[:, None]
    columns = jnp.arange(first, end)[None]
    seen = columns <= rows
    if scoring.window is not None:
      seen &= columns > rows - scoring.window
    chunk = q[:, :, :, start:end]
    scores = jnp.einsum('bkgtd,bskd->bkgts', chunk, k[:, first:end])
    parts.append(
      add(
        empty(chunk),
        cap(scores, scoring),
        seen[None, None, None],
        functools.partial(_weigh, v=v[:, first:end]),
      )
    )
  if len(parts) == 1:
    return parts[0]
  return jax.tree.map(lambda *x: jnp.concatenate(x, axis=3), *parts)


def _weigh(p: jax.Array, v: jax.Array) -> jax.Array:
  """p (B, Hkv, G, T, S), v (B, S, Hkv, D) -> (B, Hkv, G, T, D)."""
  return jnp.einsum('bkgts,bskd->bkgtd', p, v)
