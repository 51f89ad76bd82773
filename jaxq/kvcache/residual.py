"""The newest tokens in full precision, until a block of them is complete.

A cache whose grids span tokens can only quantize whole blocks. The block that
is being filled lies in a residual window of R slots, the token at position p in
slot p mod R. With n tokens held, floor(n / R) * R are committed: quantized, in
the step that completed their block, once. The step's own queries still see that
block in full precision, as its tokens came.

Rows of a batch fill their blocks at different steps. All are encoded together
when any row needs it, and rows that do not write nowhere.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxq.kvcache import stores


def blocks_ending(T: int, R: int) -> int:
  """The most blocks that T new tokens can complete; static."""
  return (R - 1 + T) // R


def block_positions(length: jax.Array, T: int, R: int) -> jax.Array:
  """Positions (B, blocks_ending * R) of the blocks that may be completed."""
  first = length // R * R
  offsets = jnp.arange(blocks_ending(T, R) * R, dtype=jnp.int32)
  return first[:, None] + offsets[None]


def contents(
  residual: jax.Array,
  new: jax.Array,
  length: jax.Array,
  *,
  axis: int = 1,
) -> jax.Array:
  """What lies at `block_positions`; garbage where there is no token yet.

  Args:
    residual: (B, ..., R, ...) slots along `axis`.
    new: the same with T tokens.
    length: (B,) tokens held before the new ones.
    axis: of the tokens.
  """
  R, T = residual.shape[axis], new.shape[axis]
  positions = block_positions(length, T, R)
  index = positions - length[:, None]  # Into the new tokens.
  shape = [1] * new.ndim
  shape[0], shape[axis] = positions.shape
  index = index.reshape(shape)
  fresh = jnp.take_along_axis(new, jnp.clip(index, 0, T - 1), axis=axis)
  widths = [(0, 0)] * new.ndim
  widths[axis] = (0, positions.shape[1] - R)
  old = jnp.pad(residual, widths).astype(new.dtype)
  return jnp.where(index >= 0, fresh, old)


def keep(
  residual: jax.Array, new: jax.Array, length: jax.Array, counts: jax.Array
) -> jax.Array:
  """The residual (B, R, Hkv, D) behind new (B, T, Hkv, D)."""
  R, T = residual.shape[1], new.shape[1]
  committed = (length + counts) // R * R
  offsets = jnp.arange(T, dtype=jnp.int32)[None]
  positions = length[:, None] + offsets
  kept = (offsets < counts[:, None]) & (positions >= committed[:, None])
  slots = jnp.where(kept, positions % R, R)
  return stores.scatter(residual, new, slots)


def held(slots: jax.Array, length: jax.Array, R: int) -> jax.Array:
  """Positions (B, size, 1) of residual slots (size,); -1: empty."""
  length = length[:, None, None]
  positions = length // R * R + slots[None, :, None]
  return jnp.where(positions < length, positions, -1)


def committed(slots: jax.Array, length: jax.Array, R: int) -> jax.Array:
  """Positions (B, size, 1) of slots that hold a row's committed tokens."""
  slots = slots[None, :, None]
  return jnp.where(slots < (length // R * R)[:, None, None], slots, -1)


def slots_of(R: int, capacity: int) -> int:
  """Slots that committed tokens can take: whole blocks, at least one."""
  return max(1, capacity // R) * R


def encode_if(complete: jax.Array, encode: Any) -> Any:
  """encode() where any block is complete, else zeros of the same shapes."""

  def nothing():
    return jax.tree.map(
      lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(encode)
    )

  return jax.lax.cond(jnp.any(complete), encode, nothing)
