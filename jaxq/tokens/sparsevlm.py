"""SparseVLM: keep what the question looks at, recycle a part of the rest.

Zhang et al., 2024, arXiv 2410.04417 (v1.5). Some text tokens are raters: those
that the visual tokens of the input are most like, p_j > mean p, where p is the
mean over visual tokens of softmax_text(V T^T). After layers 2, 6 and 15 of the
decoder a visual token's score is the attention that the raters pay it, mean
over heads and raters. The best stay; of the others the best 30 % (and one) are
clustered, and the means of the n // 10 + 1 clusters follow the kept tokens:

  density_i = exp(-mean of the squared distances to the c nearest)
  centre score_i = density_i * distance to the nearest token that is denser

(DPC-kNN; distances over sqrt(D)). Of two equally dense tokens the first counts
as the denser, where the paper's code adds noise. recycle=false is the selector
of SparseVLM+. Positions are kept; the first version's code numbers them anew.

`rate` and `scores_of` make the scores; models.pruned_decoder runs the stages.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxq.tokens import density_peaks, interface, primitives

# Kept after each layer, of 576, by the number of tokens they amount to.
KEEP = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}
_SHARE = 0.3  # Of the tokens that are not kept; these are recycled.
_PER_CLUSTER = 10
_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseVlmConfig(interface.Config):
  """One stage is a reducer; `stages` are the layers and what they keep.

  budget: all slots as a share of N. layers: after which layers of the decoder.
  keep: visual tokens kept there, clusters not counted; () is `budget` at the
  first layer only. recycle: whether others are clustered. heads: the number of
  heads, those that look at the visual tokens most, that rate; None: all.
  """

  layers: tuple[int, ...] = (2, 6, 15)
  keep: tuple[int, ...] = KEEP[192]
  recycle: bool = True
  heads: int | None = None

  def __post_init__(self):
    super().__post_init__()
    layers = self.layers
    if not layers or min(layers) < 1 or sorted({*layers}) != [*layers]:
      raise ValueError(
        f'SparseVlmConfig: layers={layers}; they must be at least 1 and '
        'increase, as in layers=2/6/15.'
      )
    if self.keep and (
      len(self.keep) != len(layers)
      or min(self.keep) < 1
      or sorted(self.keep, reverse=True) != [*self.keep]
    ):
      raise ValueError(
        f'SparseVlmConfig: keep={self.keep} for layers={layers}; a number of '
        'tokens per layer is needed, none above the one before it, as in '
        'keep=300/200/110.'
      )
    if self.heads is not None and self.heads < 1:
      raise ValueError(
        f'SparseVlmConfig: heads={self.heads}; at least 1 must rate. Leave it '
        'out for all.'
      )

  @property
  def traits(self) -> interface.Traits:
    """A selector that may also merge."""
    kind = 'merger' if self.recycle else 'selector'
    return interface.Traits(kind=kind, scores=True, ordered=not self.recycle)

  def example(self) -> interface.Example:
    """With clusters of more than one token."""
    return interface.Example(reducer=self, grid=(1, 6, 8), k_max=10)

  def stages(self, n: int) -> tuple[tuple[int, interface.Budget], ...]:
    """(layer, budget) of each stage, for n visual tokens."""
    if not self.keep:
      budget = interface.budget_from_ratio(n, self.budget)
      return ((self.layers[0], budget),)
    stages = []
    for layer, kept in zip(self.layers, self.keep, strict=True):
      n = min(n, kept + self._clusters(n, min(kept, n)))
      stages.append((layer, interface.Budget(k_max=n)))
    return tuple(stages)

  def _recycled(self, n: int, kept: int) -> int:
    """Tokens that are clustered where `kept` of n stay."""
    return min(int((n - kept) * _SHARE) + 1, n - kept) if self.recycle else 0

  def _clusters(self, n: int, kept: int) -> int:
    recycled = self._recycled(n, kept)
    return recycled // _PER_CLUSTER + 1 if recycled else 0

  def _reduce(
    self,
    ts: interface.TokenSet,
    budget: interface.Budget,
    given: interface.Given,
  ) -> interface.Reduced:
    assert given.scores is not None
    B, N = ts.mask.shape
    K, k = min(budget.k_max, N), budget.counts(B)
    # The most that can stay so that they and the clusters fill K slots.
    R = max(r for r in range(K + 1) if r + self._clusters(N, r) <= max(K, 1))
    c = self._clusters(N, R)
    scores = primitives.protect(ts, given.scores)
    index, mask = primitives.select_topk(
      scores,
      ts.mask,
      max(R, 1),
      jnp.minimum(k, R) if c == 0 else (jnp.clip(k - c, 0, R)),
    )
    slot = primitives.scatter_slots(index, N)
    if c == 0:
      if not self.recycle:
        index, mask = index[:, :K], mask[:, :K]
        reduced = primitives.selected(ts, index, mask)
        return primitives.packed(reduced, budget.k_max)
      return primitives.merged(ts, slot, budget.k_max)
    count = jnp.sum(mask, axis=1, dtype=jnp.int32)
    n = self._recycled(N, R)
    others, used = primitives.select_topk(
      scores, ts.mask & (slot < 0), n, jnp.full((B,), n, jnp.int32)
    )
    cluster = density_peaks.clusters(
      primitives.gather(ts.tokens, others), used, c, jnp.minimum(k, c)
    )
    at = jnp.where(cluster < 0, -1, count[:, None] + cluster)
    rows = jnp.arange(B)[:, None]
    slot = slot.at[rows, jnp.where(used, others, N)].set(at, mode='drop')
    kept = primitives.scatter_slots(index, N) >= 0
    own = primitives.representatives(jnp.where(kept, slot, -1), budget.k_max)
    first = primitives.representatives(slot, budget.k_max)
    return primitives.merged(
      ts,
      slot,
      budget.k_max,
      index=own,
      positions=primitives.gather(ts.positions, first),
    )


def rate(
  visual: jax.Array,
  text: jax.Array,
  visual_mask: jax.Array,
  text_mask: jax.Array,
) -> jax.Array:
  """Which text tokens rate, of input embeddings.

  Args:
    visual: (B, V, D). text: (B, L, D). visual_mask: (B, V) bool. text_mask:
      (B, L) bool.

  Returns:
    (B, L) bool: p_j above the mean p. The best one rates in any case.
  """
  dots = jnp.einsum(
    'bvd,bld->bvl',
    jnp.where(visual_mask[..., None], visual, 0).astype(jnp.float32),
    jnp.where(text_mask[..., None], text, 0).astype(jnp.float32),
    precision=_HIGHEST,
  )
  low = jnp.finfo(jnp.float32).min
  p = jax.nn.softmax(jnp.where(text_mask[:, None], dots, low), axis=-1)
  p = primitives.masked_mean(p, visual_mask[..., None], axis=1)
  p = jnp.where(text_mask, p, 0.0)
  mean = primitives.masked_mean(p, text_mask, axis=1, keepdims=True)
  return text_mask & ((p > mean) | (p == jnp.max(p, axis=1, keepdims=True)))


def scores_of(
  weights: jax.Array, raters: jax.Array, heads: int | None = None
) -> jax.Array:
  """The scores (B, V) of visual tokens.

  Args:
    weights: (B, H, L, V) attention of text rows to visual columns.
    raters: (B, L) bool.
    heads: of how many heads, those with the largest sums; None: all.
  """
  per_head = primitives.masked_mean(
    weights, raters[:, None, :, None], axis=2
  )  # (B, H, V)
  if heads is not None and heads < per_head.shape[1]:
    best = jax.lax.top_k(jnp.sum(per_head, axis=-1), heads)[1]  # (B, heads)
    per_head = jnp.take_along_axis(per_head, best[..., None], axis=1)
  return jnp.mean(per_head, axis=1)
