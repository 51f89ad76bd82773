"""Other positions for keys and queries that are rotated already.

Rotations add up, R(m) = R(m - p) R(p): what was made at position p is turned on
by m - p, back to no position by -p. So a cache may keep keys without positions,
or number the tokens it kept anew, and no model is changed for it.

A temperature (yarn) was multiplied in when the token was made and stays.
"""

import dataclasses
from typing import Any

import jax

from jaxq.nn import rope as rope_lib


def check(who: str, rope: Any) -> None:
  """Raises unless positions can be changed behind this rope.

  Raises:
    ValueError: no rotary positions.
    NotImplementedError: frequencies that follow the length of the sequence.
  """
  if rope is None:
    raise ValueError(
      f'{who}: the keys have no rotary positions (CacheShape.rope is None); '
      'tokens cannot be numbered anew. Use reposition=false.'
    )
  if rope.scaling is not None and rope.scaling.kind in ('dynamic', 'longrope'):
    raise NotImplementedError(
      f'{who}: {rope.scaling.kind} positions change with the length; what was '
      'turned by one length is not turned back by another. Use '
      'reposition=false.'
    )


def turn(x: jax.Array, by: jax.Array, rope: rope_lib.Rope) -> jax.Array:
  """x (B, T, H, D) turned on by (B, T) positions, which may be negative."""
  if rope.scaling is not None:
    scaling = dataclasses.replace(rope.scaling, temperature=1.0)
    rope = dataclasses.replace(rope, scaling=scaling)
  return rope_lib.rotate(x, by, rope)
