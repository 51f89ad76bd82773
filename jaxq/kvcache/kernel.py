"""Attention over stored tokens by a kernel, where there is one for the layout.

Decoding is bound by the bytes of the cache. On a TPU a kernel reads them as
they are stored (pallas_kernels.decode_attention); elsewhere, and for a layout
that no kernel reads, the caller's own path in plain JAX serves. Both give the
part of the softmax that the stored tokens have.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.kvcache import interface, softmax, stores
from pallas_kernels import stored
from pallas_kernels.decode_attention import api


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
    k, v: stores, or pools of pages as FloatStores.
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
  name = implementation or api.choose(q, keys, values, pooled=pooled)
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
    implementation=name,
    **options,
  )
  return from_log_sum_exp(out, lse, keys.heads)


def as_stored(store: Any) -> stored.Stored | None:
  """What kernels read, of a store; None for those that they do not."""
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
