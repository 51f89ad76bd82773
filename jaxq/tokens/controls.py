"""What every comparison includes: random, evenly spaced, and fewer frames.

A method that does not beat these at the same number of tokens chooses nothing.
Special tokens are always kept.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxq.tokens import interface, primitives, schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Control(interface.Config):
  """budget: as of interface.Config.

  r: tokens that each layer of an encoder drops.
  """

  r: int = 13

  proportional = False

  def __post_init__(self):
    super().__post_init__()
    if self.r < 0:
      raise ValueError(
        f'{type(self).__name__}: r={self.r}; it must be at least 0, which '
        'drops nothing.'
      )

  def schedule(self, num_layers: int, n: int, special: int) -> tuple[int, ...]:
    """Slots behind each layer: r fewer each time."""
    return schedule.by_count(self.r, num_layers, n, special)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomConfig(_Control):
  """A uniform draw without replacement; needs rng."""

  @property
  def traits(self) -> interface.Traits:
    """A selector that draws."""
    return interface.Traits(kind='selector', rng=True)

  def _reduce(
    self,
    ts: interface.TokenSet,
    budget: interface.Budget,
    given: interface.Given,
  ) -> interface.Reduced:
    assert given.rng is not None
    B, N = ts.mask.shape
    draws = jax.random.uniform(given.rng, (B, N))
    index, mask = primitives.select_topk(
      primitives.protect(ts, draws), ts.mask, budget.k_max, budget.counts(B)
    )
    return primitives.selected(ts, index, mask)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformConfig(_Control):
  """Tokens at even distances of their raster order."""

  @property
  def traits(self) -> interface.Traits:
    """A selector that looks at nothing."""
    return interface.Traits(kind='selector')

  def _reduce(
    self,
    ts: interface.TokenSet,
    budget: interface.Budget,
    given: interface.Given,
  ) -> interface.Reduced:
    del given
    return _spaced(ts, ts.mask, budget)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FramesConfig(interface.Config):
  """Whole frames at even distances; needs a grid.

  The fewest frames that hold the budget are kept, and of their tokens as many
  as the budget allows, at even distances.
  """

  @property
  def traits(self) -> interface.Traits:
    """A selector on a grid."""
    return interface.Traits(kind='selector', grid=True)

  def _reduce(
    self,
    ts: interface.TokenSet,
    budget: interface.Budget,
    given: interface.Given,
  ) -> interface.Reduced:
    del given
    B, N = ts.mask.shape
    T, H, W = interface.square_grid(ts)
    per_frame = ts.mask[:, ts.special :].reshape(B, T, H * W)
    alive = jnp.any(per_frame, axis=2)  # (B, T)
    patches = jnp.maximum(budget.counts(B) - ts.special, 0)
    frames = primitives.spaced(alive, -(-patches // (H * W)))
    kept = jnp.repeat(frames, H * W, axis=1, total_repeat_length=T * H * W)
    special = jnp.ones((B, ts.special), bool)
    mask = ts.mask & jnp.concatenate([special, kept], axis=1)
    return _spaced(ts, mask, budget)


def _spaced(
  ts: interface.TokenSet, mask: jax.Array, budget: interface.Budget
) -> interface.Reduced:
  """Keeps evenly spaced ones of the tokens of mask, and the special ones."""
  B, N = ts.mask.shape
  special = (jnp.arange(N)[None] < ts.special) & mask
  k = budget.counts(B)
  left = k - jnp.sum(special, axis=1, dtype=jnp.int32)
  chosen = special | primitives.spaced(mask & ~special, jnp.maximum(left, 0))
  index, used = primitives.compact(chosen, budget.k_max, k)
  return primitives.selected(ts, index, used)
