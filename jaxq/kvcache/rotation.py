"""Rotations of heads: q R and k R have the products of q and k.

  canalized   R = H / sqrt(D), no signs (OScaR)
  random      R = diag(signs) H / sqrt(D) (TurboQuant)

A rotation spreads what stands out in a channel over all of them. Of values it
is undone behind the attention, or folded into the weights around it. Heads of
D = 80 or 96 have Hadamard matrices as well (12 * 8, 40 * 2); these are not
symmetric, so `undo` is not `apply`.
"""

import dataclasses

import jax

from jaxq.numerics import hadamard


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotation:
  """seed: of the random signs; None: no signs."""

  seed: int | None = None

  def apply(self, x: jax.Array) -> jax.Array:
    """x (..., D) -> x R, computed in float32, in x.dtype."""
    if self.seed is not None:
      x = x * self._signs(x)
    return hadamard.transform(x)

  def undo(self, x: jax.Array) -> jax.Array:
    """x R -> x."""
    x = hadamard.transform(x, inverse=True)
    return x if self.seed is None else x * self._signs(x)

  def _signs(self, x: jax.Array) -> jax.Array:
    assert self.seed is not None
    signs = hadamard.signs(x.shape[-1], jax.random.key(self.seed))
    return signs.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def check(head_dim: int) -> None:
  """Raises ValueError unless heads of this size can be rotated."""
  if not hadamard.supported(head_dim):
    raise ValueError(
      f'kvcache: head_dim={head_dim} with a rotation; there is no Hadamard '
      'matrix of that size here (powers of two, and these times '
      f'{list(hadamard.ORDERS)}). Turn the rotation off.'
    )


def turn(rotation: Rotation | None, x: jax.Array) -> jax.Array:
  """x R; None leaves x."""
  return x if rotation is None else rotation.apply(x)


def turn_back(rotation: Rotation | None, x: jax.Array) -> jax.Array:
  """x from x R; None leaves x."""
  return x if rotation is None else rotation.undo(x)
