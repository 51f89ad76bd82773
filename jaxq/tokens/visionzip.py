"""VisionZip: the tokens the class token looks at, and means of the rest.

Yang et al., 2024, arXiv 2412.04467. Dominant tokens are the class token and the
patches with the largest attention from it, summed over heads. Of the R patches
that are left, C at even distances become contextual tokens; each other one
joins the contextual token whose key is the most similar:

  contextual = target + mean(members)      merge='add', as the paper's code
  contextual = mean(target and members)    merge='mean', conserves mass

Slots are the special tokens and the dominant patches in raster order, then the
contextual ones in theirs. Encoders without a class token give as scores the
attention that a token receives on average.
"""

import dataclasses

import jax.numpy as jnp

from jaxq.tokens import interface, primitives

MERGES = ('add', 'mean')


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionZipConfig(interface.Config):
  """contextual: C, of the budget. merge: of MERGES.

  The paper's settings are 64, 128 and 192 tokens of 576 with C of 10, 20, 30.
  """

  contextual: int = 10
  merge: str = 'add'

  def __post_init__(self):
    super().__post_init__()
    if self.contextual < 0:
      raise ValueError(
        f'VisionZipConfig: contextual={self.contextual}; it must be at least '
        '0, which keeps dominant tokens only.'
      )
    if self.merge not in MERGES:
      raise ValueError(
        f'VisionZipConfig: merge={self.merge!r}; allowed {sorted(MERGES)}.'
      )

  @property
  def traits(self) -> interface.Traits:
    """A merger by attention and keys."""
    return interface.Traits(
      kind='merger',
      scores=True,
      ordered=False,
      conserves_mass=self.merge == 'mean',
    )

  def example(self) -> interface.Example:
    """With a class token."""
    reducer = dataclasses.replace(self, contextual=4)
    return interface.Example(reducer=reducer, special=1)

  def _reduce(
    self,
    ts: interface.TokenSet,
    budget: interface.Budget,
    given: interface.Given,
  ) -> interface.Reduced:
    assert given.scores is not None
    B, N = ts.mask.shape
    K, k = budget.k_max, budget.counts(B)
    C = min(self.contextual, max(K - ts.special, 0))
    few = jnp.clip(k - ts.special, 0, C)  # (B,): special tokens go first.
    dominant, _ = primitives.select_topk(
      primitives.protect(ts, given.scores), ts.mask, min(K, N), k - few
    )
    slot = primitives.scatter_slots(dominant, N)
    rest = ts.mask & (slot < 0)
    kept = jnp.sum(dominant >= 0, axis=1, dtype=jnp.int32)[:, None]
    rank = jnp.cumsum(rest, axis=1, dtype=jnp.int32) - 1
    left = jnp.sum(rest, axis=1, dtype=jnp.int32)
    stride = jnp.maximum(1, left // jnp.maximum(few, 1))[:, None]
    target = rest & (rank % stride == 0) & (rank // stride < few[:, None])
    slot = jnp.where(target, kept + rank // stride, slot)
    joins = rest & ~target
    if C:
      keys = primitives.keys_of(ts)
      targets, valid = primitives.compact(target, C)
      _, best = primitives.nearest(
        keys, primitives.gather(keys, targets), allowed=valid[:, None]
      )
      joins &= jnp.any(valid, axis=1)[:, None]
      slot = jnp.where(joins, kept + best[..., 0], slot)
    index = primitives.representatives(jnp.where(joins, -1, slot), K)
    reduced = primitives.merged(ts, slot, K, index=index)
    if self.merge == 'mean':
      return reduced
    members, _ = primitives.merge(
      ts.tokens, ts.size, jnp.where(joins, slot, -1), K
    )
    return dataclasses.replace(
      reduced, tokens=primitives.gather(ts.tokens, index) + members
    )
