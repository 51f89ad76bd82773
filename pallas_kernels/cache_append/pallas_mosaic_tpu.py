"""A token into a cache on TPU, in place: the output is the input's memory.

XLA lays (B, S, Hkv, W) out as written where W is a multiple of 128, and with
tokens along lanes where it is less (decode_attention has more of this).

rows   Grid (B,). The block is one token (1, 1, Hkv, W): it is written.
lanes  Grid (B,). The block is the 128 slots around the token, (1, Hkv, W, 128),
       read, changed in one lane and written back.
A token of no slot writes back the block it read; in rows, slot 0.
Traffic rows: 3 tokens a row; lanes: 256 tokens and what is broadcast to lanes.
Needs   S a multiple of 128 in lanes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compat, targets, tiles


def why_not(cache: Any, chip: str) -> str:
  """Why this kernel cannot serve; '' if it can."""
  if chip not in targets.TARGETS:
    return f'chip is {chip!r}; it runs on {sorted(targets.TARGETS)}.'
  if cache.dtype.itemsize not in (1, 2, 4):
    return f'the cache is {cache.dtype}; it takes 8 to 32 bits.'
  if cache.shape[3] % tiles.LANES and cache.shape[1] % tiles.LANES:
    return (
      f'{cache.shape[1]} slots of {cache.shape[3]} channels; it takes '
      'multiples of 128 of either. Make the cache so long.'
    )
  return ''


def cache_append(
  cache: jax.Array, new: jax.Array, slots: jax.Array, *, interpret: bool = False
) -> jax.Array:
  """As base.cache_append."""
  dtype = cache.dtype
  if dtype.itemsize < 4:  # As integers: there is nothing to compute.
    bits = jnp.int8 if dtype.itemsize == 1 else jnp.int16
    cache, new = (jax.lax.bitcast_convert_type(x, bits) for x in (cache, new))
  slots = slots.astype(jnp.int32)
  if cache.shape[3] % tiles.LANES == 0:
    out = _rows(cache, new, slots, interpret)
  elif cache.shape[3] == 1:  # A number a head: heads along sublanes.
    view = cache[..., 0].transpose(0, 2, 1)[:, None]  # (B, 1, Hkv, S)
    out = _lanes(view, new[:, None, :, 0], slots, interpret)
    out = out[:, 0].transpose(0, 2, 1)[..., None]
  else:
    out = _lanes(cache.transpose(0, 2, 3, 1), new, slots, interpret)
    out = out.transpose(0, 3, 1, 2)
  return jax.lax.bitcast_convert_type(out, dtype)


def _rows(cache, new, slots, interpret):
  B, S, Hkv, W = cache.shape

  def kernel(slots_ref, new_ref, old_ref, out_ref):
    there = slots_ref[pl.program_id(0)] < S

    @pl.when(there)
    def _():
      out_ref[0, 0] = new_ref[0]

    @pl.when(jnp.logical_not(there))
    def _():
      out_ref[...] = old_ref[...]

  def token(b, slots):
    return b, jnp.where(slots[b] < S, slots[b], 0), 0, 0

  return _call(
    kernel,
    cache,
    (new, slots),
    new_spec=pl.BlockSpec((1, Hkv, W), lambda b, *_: (b, 0, 0)),
    spec=pl.BlockSpec((1, 1, Hkv, W), token),
    grid=(B,),
    interpret=interpret,
  )


def _lanes(cache, new, slots, interpret):
  """cache (B, heads, W, S), new (B, heads, W)."""
  B, heads, W, S = cache.shape
  new = jnp.broadcast_to(new[..., None], (B, heads, W, tiles.LANES))

  def kernel(slots_ref, new_ref, old_ref, out_ref):
    slot = slots_ref[pl.program_id(0)]
    target = jnp.where(slot < S, slot & (tiles.LANES - 1), -1)
    for h in range(heads):
      lane = jax.lax.broadcasted_iota(jnp.int32, (W, tiles.LANES), 1)
      fresh = new_ref[0, h].astype(jnp.int32)
      kept = old_ref[0, h].astype(jnp.int32)
      if cache.dtype == jnp.float32:
        fresh, kept = new_ref[0, h], old_ref[0, h]
      chosen = jnp.where(lane == target, fresh, kept)
      out_ref[0, h] = chosen.astype(out_ref.dtype)

  def around(b, slots):
    return b, 0, 0, jnp.where(slots[b] < S, slots[b], 0) >> 7

  shape = (1, heads, W, tiles.LANES)
  return _call(
    kernel,
    cache,
    (new, slots),
    new_spec=pl.BlockSpec(shape, lambda b, *_: (b, 0, 0, 0)),
    spec=pl.BlockSpec(shape, around),
    grid=(B,),
    interpret=interpret,
  )


def _call(kernel, cache, new_and_slots, *, new_spec, spec, grid, interpret):
  new, slots = new_and_slots
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=grid,
      in_specs=[new_spec, spec],
      out_specs=spec,
    ),
    out_shape=compat.out_struct(cache.shape, cache.dtype, cache, new),
    input_output_aliases={2: 0},  # Scalars are counted.
    compiler_params=compat.tpu_params(('arbitrary',), 32 * 2**20),
    interpret=compat.interpret_mode(interpret),
    name='cache_append',
  )(slots, new, cache)
