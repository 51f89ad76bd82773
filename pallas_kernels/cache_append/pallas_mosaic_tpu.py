"""A token into a cache on TPU, in place: the output is the input's memory.

XLA lays (B, S, Hkv, W) out in one of three ways, and a kernel that asks for
another gets a copy of the cache. There is a form for each.

rows    As written, heads along sublanes: W a multiple of 128 and heads that
        fill whole words. The block is one token (1, 1, Hkv, W): it is written.
within  The block is what lies around the token, read, changed in one place and
        written back.
        W a multiple of 128, other heads: tokens along sublanes, blocks of 8 to
        32 of them (1, Hkv, 32, W).
        Other W: tokens along lanes, blocks of 128 (1, Hkv, W, 128).
Grid    (B,). A token of no slot writes back the block it read, in rows slot 0.
Traffic rows: 3 tokens a row; within: two blocks and what is broadcast to one.
        float16, which the chip has no registers for, goes in and out as
        integers, which XLA makes in two passes over the array: it is of scales.
Needs   S a multiple of 128 within.
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
  if not _in_rows(cache) and cache.shape[1] % tiles.LANES:
    return (
      f'{cache.shape[1]} slots of {cache.shape[2]} heads and {cache.shape[3]} '
      'channels; it takes multiples of 128 slots. Make the cache so long.'
    )
  return ''


def cache_append(
  cache: jax.Array, new: jax.Array, slots: jax.Array, *, interpret: bool = False
) -> jax.Array:
  """As base.cache_append."""
  dtype, slots = cache.dtype, slots.astype(jnp.int32)
  if dtype == jnp.float16:
    cache, new = (
      jax.lax.bitcast_convert_type(x, jnp.int16) for x in (cache, new)
    )
  if _in_rows(cache):
    out = _rows(cache, new, slots, interpret)
  elif cache.shape[3] % tiles.LANES == 0:
    view = cache.transpose(0, 2, 1, 3)  # (B, Hkv, S, W)
    size = 8 * 4 // dtype.itemsize  # Rows of a register.
    out = _within(view, new[:, :, None], slots, size, interpret)
    out = out.transpose(0, 2, 1, 3)
  elif cache.shape[3] == 1:  # A number a head: heads along sublanes.
    view = cache[..., 0].transpose(0, 2, 1)[:, None]  # (B, 1, Hkv, S)
    new = new[:, None]  # (B, 1, Hkv, 1)
    out = _within(view, new, slots, tiles.LANES, interpret)
    out = out[:, 0].transpose(0, 2, 1)[..., None]
  else:
    view = cache.transpose(0, 2, 3, 1)  # (B, Hkv, W, S)
    out = _within(view, new[..., None], slots, tiles.LANES, interpret)
    out = out.transpose(0, 3, 1, 2)
  return jax.lax.bitcast_convert_type(out, dtype)


def _in_rows(cache):
  """Whether heads lie along sublanes: they fill words, and no tile in part."""
  heads, words = cache.shape[2], 4 // cache.dtype.itemsize
  fill = heads % 8 == 0 or heads in (1, 2, 4) and heads % words == 0
  return cache.shape[3] % tiles.LANES == 0 and fill


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


def _within(cache, new, slots, size, interpret):
  """Blocks of `size` tokens.

  cache (B, heads, S, W), new (B, heads, 1, W); or (B, heads, W, S) and (B,
  heads, W, 1).
  """
  axis = 2 if new.shape[2] != cache.shape[2] else 3
  B, heads = cache.shape[:2]
  S = cache.shape[axis]
  shape = [1, *cache.shape[1:]]
  shape[axis] = size
  new = jnp.broadcast_to(new, (B, *shape[1:]))
  floating = jnp.issubdtype(cache.dtype, jnp.floating)
  wide = jnp.float32 if floating else jnp.int32  # What is selected in.

  def kernel(slots_ref, new_ref, old_ref, out_ref):
    slot = slots_ref[pl.program_id(0)]
    target = jnp.where(slot < S, slot & (size - 1), -1)
    for h in range(heads):
      place = jax.lax.broadcasted_iota(jnp.int32, tuple(shape[2:]), axis - 2)
      fresh, kept = new_ref[0, h].astype(wide), old_ref[0, h].astype(wide)
      chosen = jnp.where(place == target, fresh, kept)
      out_ref[0, h] = chosen.astype(out_ref.dtype)

  def around(b, slots):
    block = jax.lax.div(jnp.where(slots[b] < S, slots[b], 0), size)
    return (b, 0, block, 0) if axis == 2 else (b, 0, 0, block)

  return _call(
    kernel,
    cache,
    (new, slots),
    new_spec=pl.BlockSpec(tuple(shape), lambda b, *_: (b, 0, 0, 0)),
    spec=pl.BlockSpec(tuple(shape), around),
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
