"""PruMerge: outliers of the class token's attention, enriched by neighbours.

Shang et al., 2024, "LLaVA-PruMerge", arXiv 2403.15388. With a the attention of
the class token in the last layer, from q and k before they are split into
heads, and the quartiles Q1 and Q3 of a over the patches:

  kept    m = #{a > Q3 + 1.5 (Q3 - Q1)} tokens with the largest a (N / 8 if
          there is no outlier), and for PruMerge+ every s-th patch as well,
          s = floor(floor(N / m) / 3): three evenly spaced ones for each
  x_i     += sum of a_j x_j over the `neighbours` nearest to i by key, kept or
          not
  extra   sum of a_j x_j over all that are not kept, one more slot

The weights are not normalised, so mass is not conserved. How many tokens are
kept depends on the image: k_max bounds it, and of more evenly spaced patches
than there is room for it takes evenly spaced ones again. With a fixed number
(`adaptive=False`) PruMerge+ keeps the paper's shares, one token in four by
attention and the others evenly spaced among the rest.

Scores are a, keys those of the last layer; the class token itself is not kept.
Percentiles are of each image; `batch_percentile` takes them, and m, over the
batch, as the paper's code does.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxq.tokens import interface, primitives

_WHISKER = 1.5  # Tukey's fence, in quartile ranges.
_SHARE = 8  # Without outliers N / 8 tokens are kept.
_SPACED = 3  # Evenly spaced patches for each outlier (PruMerge+).


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruMergeConfig(interface.Config):
  """budget: the most that is kept, the extra token counted.

  plus: keep evenly spaced patches too (PruMerge+). neighbours: added to each
  kept token. adaptive: m by outliers; False: as many as the budget allows.
  batch_percentile: quartiles and m over the batch.
  """

  plus: bool = False
  neighbours: int = 32
  adaptive: bool = True
  batch_percentile: bool = False

  def __post_init__(self):
    super().__post_init__()
    if self.neighbours < 0:
      raise ValueError(
        f'PruMergeConfig: neighbours={self.neighbours}; it must be at least 0, '
        'which enriches nothing.'
      )

  @property
  def traits(self) -> interface.Traits:
    """A merger with soft weights."""
    return interface.Traits(
      kind='merger',
      scores=True,
      class_token=True,
      ordered=False,
      conserves_mass=False,
    )

  def example(self) -> interface.Example:
    """With a class token."""
    reducer = dataclasses.replace(self, neighbours=5)
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
    patch = ts.mask & (jnp.arange(N)[None] >= ts.special)
    a = jnp.where(patch, given.scores.astype(jnp.float32), 0.0)
    n = jnp.sum(patch, axis=1, dtype=jnp.int32)
    room = jnp.maximum(k - 1, 0)  # The extra token takes a slot.
    m = room
    if self.adaptive:
      m = jnp.minimum(m, outliers(a, patch, over_batch=self.batch_percentile))
    elif self.plus:
      m = -(-room // (1 + _SPACED))
    index, _ = primitives.select_topk(a, patch, min(K, N), m)
    kept = primitives.scatter_slots(index, N) >= 0
    if self.plus:
      also = patch & ~kept
      if self.adaptive:
        rank = jnp.cumsum(patch, axis=1, dtype=jnp.int32) - 1
        stride = jnp.maximum(n // jnp.maximum(m, 1) // _SPACED, 1)[:, None]
        also &= rank % stride == 0
      kept |= primitives.spaced(also, room - m)
      index, _ = primitives.compact(kept, min(K, N))
    # The extra token, behind the kept ones, has what is not kept, if anything.
    count = jnp.sum(kept, axis=1, dtype=jnp.int32)[:, None]
    rest = patch & ~kept & (k > 0)[:, None]
    slot = jnp.where(kept, primitives.scatter_slots(index, N), -1)
    slot = jnp.where(rest, count, slot)
    own = primitives.representatives(jnp.where(kept, slot, -1), K)
    reduced = primitives.merged(ts, slot, K, index=own)
    x = jnp.where(patch[..., None], ts.tokens.astype(jnp.float32), 0.0)
    weighted = x * a[..., None]
    extra, extra_size = primitives.merge(
      weighted, jnp.ones_like(a), jnp.where(rest, slot, -1), K
    )
    tokens = primitives.gather(x, own) + extra * extra_size[..., None]
    if self.neighbours:
      tokens += self._around(ts, own, patch, weighted)
    first_rest = primitives.representatives(slot, K)
    return dataclasses.replace(
      reduced,
      tokens=tokens.astype(ts.tokens.dtype),
      positions=primitives.gather(ts.positions, first_rest),
    )

  def _around(
    self,
    ts: interface.TokenSet,
    own: jax.Array,
    patch: jax.Array,
    weighted: jax.Array,
  ) -> jax.Array:
    """Sums of `weighted` (B, N, D) over the neighbours of own (B, K)."""
    N = patch.shape[1]
    keys = primitives.keys_of(ts)
    cosine = jnp.einsum(
      'bkd,bnd->bkn',
      primitives.gather(keys, own),
      keys,
      precision=jax.lax.Precision.HIGHEST,
    )
    itself = own[..., None] == jnp.arange(N)[None, None]
    cosine = jnp.where(patch[:, None] & ~itself, cosine, -jnp.inf)
    value, near = jax.lax.top_k(cosine, min(self.neighbours, N))
    used = (value > -jnp.inf) & (own >= 0)[..., None]
    B, K, n = near.shape
    rows = primitives.gather(weighted, near.reshape(B, K * n))
    rows = jnp.where(used[..., None], rows.reshape(B, K, n, -1), 0.0)
    return jnp.sum(rows, axis=2)


def outliers(
  a: jax.Array, mask: jax.Array, *, over_batch: bool = False
) -> jax.Array:
  """How many tokens stand out, or N / 8 where none does.

  Args:
    a: (B, N) float32 attention of the class token.
    mask: (B, N) bool; what is not a patch is left out.
    over_batch: one number for all rows, from all rows.

  Returns:
    (B,) int32.
  """
  n = jnp.sum(mask, axis=1, dtype=jnp.int32)
  some = jnp.any(mask) if over_batch else jnp.any(mask, axis=1, keepdims=True)
  values = jnp.where(mask, a, jnp.nan)
  # Rows without a patch: any number instead of NaNs, there is nothing to count.
  values = jnp.where(some, values, 0.0)
  axis = None if over_batch else 1
  low, high = jnp.nanpercentile(
    values, jnp.array([25.0, 75.0]), axis=axis, keepdims=True
  )
  out = mask & (a > high + _WHISKER * (high - low))
  m = jnp.sum(out, axis=1, dtype=jnp.int32)
  if over_batch:
    # The paper's code: outliers of all rows as a share of all tokens.
    total, tokens = jnp.sum(m), jnp.maximum(jnp.sum(n), 1)
    m = total * n // tokens
  return jnp.where(m > 0, m, n // _SHARE)
