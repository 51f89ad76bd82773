"""Pixel shuffle (space to depth): s x s patches become one wide token.

  (T, H, W, C) -> (T, H / s, W / s, s^2 C)

Channels are in raster order of the block: for s = 2 those of row 0 column 0,
row 0 column 1, row 1 column 0, row 1 column 1. Nothing is lost; a projector
that reads s^2 C channels follows. InternVL's `v2`; its `v1` gave the blocks
column by column, which only its old weights want.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxq.tokens import interface, primitives

VERSIONS = ('v1', 'v2')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelShuffleConfig(interface.Config):
  """stride: s. version: of VERSIONS. `budget` is 1 / s^2, whatever it says."""

  stride: int = 2
  version: str = 'v2'

  def __post_init__(self):
    super().__post_init__()
    if self.stride < 1 or self.version not in VERSIONS:
      raise ValueError(
        f'PixelShuffleConfig: stride={self.stride}, version={self.version!r}; '
        f'allowed are stride >= 1 and {sorted(VERSIONS)}.'
      )

  @property
  def traits(self) -> interface.Traits:
    """A resampler that keeps everything."""
    return interface.Traits(kind='resampler', grid=True, conserves_mass=False)

  def budget_for(self, ts: interface.TokenSet) -> interface.Budget:
    """A slot per block."""
    T, H, W = interface.square_grid(ts)
    return interface.Budget(k_max=T * (H // self.stride) * (W // self.stride))

  def _reduce(
    self,
    ts: interface.TokenSet,
    budget: interface.Budget,
    given: interface.Given,
  ) -> interface.Reduced:
    del given
    (B, N), s = ts.mask.shape, self.stride
    T, H, W = interface.square_grid(ts)
    K = T * (H // s) * (W // s)
    if H % s or W % s:
      raise ValueError(
        f'PixelShuffleConfig: stride={s} on a grid of {H} x {W}; it must '
        'divide both sides. Resize the image, or pool instead.'
      )
    if budget.k_max < K:
      raise ValueError(
        f'PixelShuffleConfig: k_max={budget.k_max} for {K} blocks; there must '
        'be a slot for each. Use budget_for(ts).'
      )

    def blocks(values):  # (B, N, ...) -> (B, K, s^2, ...)
      return to_blocks(
        values[:, ts.special :], (T, H, W), s, by_column=self.version == 'v1'
      )

    valid = blocks(ts.mask)  # (B, K, s^2)
    x = jnp.where(valid[..., None], blocks(ts.tokens), 0)
    source = jnp.broadcast_to(jnp.arange(N)[None], (B, N))
    slots = jnp.broadcast_to(jnp.arange(K)[None, :, None], valid.shape)
    member = jnp.where(valid, blocks(source), N).reshape(B, K * s * s)
    rows = jnp.arange(B)[:, None]
    assignment = jnp.full((B, N), -1, jnp.int32)
    assignment = assignment.at[rows, member].set(
      slots.reshape(B, K * s * s).astype(jnp.int32), mode='drop'
    )
    middle = (s - 1) // 2 * (s + 1)  # Of the block's patches, the centre's.
    reduced = interface.Reduced(
      tokens=x.reshape(B, K, -1),
      mask=jnp.any(valid, axis=2),
      positions=blocks(ts.positions)[:, :, middle],
      size=jnp.sum(jnp.where(valid, blocks(ts.size), 0.0), axis=2),
      index=jnp.full((B, K), -1, jnp.int32),
      assignment=assignment,
      count=jnp.zeros((B,), jnp.int32),
    )
    return primitives.packed(reduced, budget.k_max, budget.k)


def to_blocks(
  values: jax.Array,
  grid: interface.Grid,
  s: int,
  *,
  by_column: bool = False,
) -> jax.Array:
  """values (B, T H W, ...) -> (B, blocks, s^2, ...), both in raster order.

  by_column: the blocks go down the columns first, and so do their patches.
  """
  (T, H, W), trailing = grid, values.shape[2:]
  B = values.shape[0]
  out = values.reshape(B, T, H // s, s, W // s, s, *trailing)
  rest = range(6, out.ndim)
  # Of v1 the blocks only are transposed; inside, rows go first as in v2.
  order = (0, 1, 4, 2, 3, 5) if by_column else (0, 1, 2, 4, 3, 5)
  out = out.transpose(*order, *rest)
  return out.reshape(B, T * (H // s) * (W // s), s * s, *trailing)
