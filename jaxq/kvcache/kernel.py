"""The parts of a cache's attention by kernels, where there are some.

  attend      what is stored: decoding is bound by the bytes of the cache, which
              a kernel reads as they are stored (decode_attention)
  attend_own  the new tokens among themselves, a prompt or a chunk of one, tile
              by tile (prefill_attention)
  received    what those tokens get of it, from the log-sum-exps alone, for
              caches that choose by attention

On a TPU; elsewhere, and for a layout that no kernel reads, the caller's own
path in plain JAX serves. Both give the same part of the softmax.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.kvcache import interface, layers, softmax, stores
from pallas_kernels import stored
from pallas_kernels.decode_attention import api
from pallas_kernels.prefill_attention import api as prefill


def attend(
  q: jax.Array,
  positions: jax.Array,
  k: Any,
  v: Any,
  length: jax.Array,
  scoring: interface.Scoring,
  otherwise: Callable[[], softmax.Partial],
  *,
  ring: bool = False,
  table: jax.Array | None = None,
  implementation: str | None = None,
  **options: Any,
) -> softmax.Partial:
  """The part of all tokens that are stored.

  Args:
    q: (B, T, H, D), rotated as the keys are, not scaled.
    positions: (B, T) int32 of q.
    k, v: stores, or pools of pages as FloatStores; of a layer, in a stack too.
    length: (B,) tokens stored; of a ring, seen.
    scoring: scale, window and softcap.
    otherwise: the plain path.
    ring, table: as decode_attention has them.
    implementation: None: a kernel where it serves; 'xla': otherwise().
    **options: of decode_attention.
  """
  keys, values = as_stored(k), as_stored(v)
  if keys is None or values is None:
    return otherwise()
  pooled = table is not None
  name = implementation or api.choose(
    q, keys, values, pooled=pooled, page_size=options.get('page_size')
  )
  if name == 'xla':
    return otherwise()
  out, lse = api.decode_attention(
    q,
    keys,
    values,
    length,
    positions=positions,
    **dataclasses.asdict(scoring),
    ring=ring,
    table=table,
    first=layers.first_row(k),
    implementation=name,
    **options,
  )
  return from_log_sum_exp(out, lse, keys.heads)


def attend_own(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  positions: jax.Array,
  scoring: interface.Scoring,
  *,
  implementation: str | None = None,
  **options: Any,
) -> softmax.Partial:
  """The part of the new tokens themselves, causally.

  Args:
    q: (B, T, H, D), rotated as the keys are, not scaled.
    k, v: (B, T, Hkv, D).
    positions: (B, T) int32; negative: padding behind a row's tokens, whose
      outputs are anything.
    scoring: scale, window and softcap.
    implementation: None: the kernel where it serves; 'xla': softmax's.
    **options: of prefill_attention.
  """
  name = implementation or prefill.choose(q, k, v)
  if name == 'xla':
    queries = softmax.group(q, k.shape[2], scoring.scale)
    return softmax.attend_own(queries, k, v, scoring)
  out, lse = prefill.prefill_attention(
    q,
    k,
    v,
    lengths=jnp.sum(positions >= 0, axis=1, dtype=jnp.int32),
    **dataclasses.asdict(scoring),
    implementation=name,
    **options,
  )
  return from_log_sum_exp(out.astype(jnp.float32), lse, k.shape[2])


def received(
  q: jax.Array,
  lse: jax.Array,
  k: jax.Array,
  positions: jax.Array,
  scoring: interface.Scoring,
  *,
  index: jax.Array | None = None,
  chosen: jax.Array | None = None,
  implementation: str | None = None,
  **options: Any,
) -> jax.Array | None:
  """Attention that the new tokens receive from their own queries.

  Args:
    q, k, positions, scoring: as attend_own has them.
    lse: (B, Hkv, G, P), of the whole softmax of the queries that count.
    index, chosen: (B, P) int32 and bool: which of the T queries count, any
      number of times; None: all of them.
    implementation: None: the kernel where it serves.
    **options: of prefill_attention.received.

  Returns:
    (B, Hkv, T) float32, sums over these queries and the G heads of each; None
    where no kernel serves.
  """
  name = implementation or prefill.choose(q, k, k)
  if name == 'xla':
    return None
  valid = positions >= 0
  if index is None or chosen is None:
    index, chosen = jnp.arange(q.shape[1], dtype=jnp.int32)[None], valid
  else:
    q = jnp.take_along_axis(q, index[..., None, None], axis=1)
  B, P, H, _ = q.shape
  sums = prefill.received(
    q,
    k,
    lse.transpose(0, 3, 1, 2).reshape(B, P, H),
    positions=jnp.where(chosen, index, -1),
    lengths=jnp.sum(valid, axis=1, dtype=jnp.int32),
    **dataclasses.asdict(scoring),
    implementation=name,
    **options,
  )
  return jnp.sum(sums.reshape(B, k.shape[2], -1, k.shape[1]), axis=2)


def as_stored(store: Any) -> stored.Stored | None:
  """What kernels read, of a store; None for those that they do not.

  Of a layer of a stack, the stack with its layers as rows.
  """
  store = layers.rows(store)
  if isinstance(store, stores.FloatStore):
    return stored.Stored(codes=store.x)
  if isinstance(store, stores.NormedStore):
    inner = as_stored(store.store)
    return inner and dataclasses.replace(inner, norm=store.norm)
  if not isinstance(store, stores.IntStore):
    return None
  grid = store.grid
  if grid.bits not in stored.BITS:
    return None
  return stored.Stored(
    codes=store.codes,
    scale=store.scale,
    offset=store.offset,
    bits=grid.bits,
    center=grid.qmax if grid.mode == 'symmetric' else 0,
  )


def from_log_sum_exp(
  out: jax.Array, lse: jax.Array, kv_heads: int
) -> softmax.Partial:
  """Normalized out (B, T, H, D) and lse (B, T, H) as a part."""
  B, T, H, D = out.shape
  split = (B, T, kv_heads, H // kv_heads)
  out = out.reshape(*split, D).transpose(0, 2, 3, 1, 4)
  lse = lse.reshape(split).transpose(0, 2, 3, 1)[..., None]
  nothing = jnp.isneginf(lse)
  return softmax.Partial(
    out=out,
    largest=jnp.where(nothing, softmax.MASKED, lse),
    total=jnp.where(nothing, 0.0, 1.0),
  )
