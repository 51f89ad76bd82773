"""Rotary positions with several axes: frame, row and column.

Every frequency of a head turns by one axis of the position (M-RoPE, Wang et
al., 2024, arXiv 2409.12191): channel i of the first half and of the second by
the angle position[axes[i]] * theta^(-2i/D). Where a token has the same
position on all axes, as text has, this is `jaxq.nn.rope` exactly.

Which frequencies an axis gets is a choice: `sections` gives each axis a run of
them, fast ones first, as the paper does; `interleaved` deals them in turn, so
that no axis has slow ones only.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxq.nn import rope as rope_lib


def interleaved(head_dim: int, num_axes: int) -> tuple[int, ...]:
  """The axis of each of head_dim / 2 frequencies, dealt in turn."""
  return tuple(i % num_axes for i in range(head_dim // 2))


def sections(lengths: Sequence[int]) -> tuple[int, ...]:
  """The axis of each frequency: lengths[0] of axis 0, then of axis 1, ..."""
  return tuple(
    axis for axis, length in enumerate(lengths) for _ in range(length)
  )


def rotate(
  x: jax.Array,
  positions: jax.Array,
  rope: rope_lib.Rope,
  axes: tuple[int, ...],
) -> jax.Array:
  """Turns x by its positions.

  Args:
    x: (B, T, H, D), D even.
    positions: (B, T, P) int32.
    rope: static; without scaling, over all of D.
    axes: of each of the D / 2 frequencies, 0..P-1; static.

  Returns:
    (B, T, H, D) in x.dtype; angles in float32.

  Raises:
    ValueError: axes that do not fit D and P.
    NotImplementedError: a stretched rope, or one of part of the channels.
  """
  D, P = x.shape[-1], positions.shape[-1]
  if len(axes) != D // 2 or D % 2:
    raise ValueError(
      f'multi_axis_rope: {len(axes)} axes for heads of {D} channels; there '
      f'must be one per pair of channels. Give sections that sum to {D // 2}.'
    )
  if min(axes) < 0 or max(axes) >= P:
    raise ValueError(
      f'multi_axis_rope: axes 0..{max(axes)} for positions with {P} axes; '
      f'positions must have at least {max(axes) + 1}. Pass (frame, row, '
      'column) of every token.'
    )
  if rope.scaling is not None or rope.dim not in (None, D):
    raise NotImplementedError(
      f'multi_axis_rope: {rope}; only a rope of all channels without scaling '
      'has several axes. Use rope.Rope(theta=...).'
    )
  frequencies = jnp.asarray(rope.frequencies(D), jnp.float32)  # (D/2,)
  chosen = jnp.take(positions, jnp.asarray(axes), axis=-1)  # (B, T, D/2)
  angles = chosen.astype(jnp.float32) * frequencies[None, None]
  cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
  x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
  return turned.astype(x.dtype)
