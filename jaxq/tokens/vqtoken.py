"""VQToken: a video as a few codes and a map of where and when they occur.

Zhang and Fu, 2025, https://arxiv.org/abs/2503.16980. The tokens of one video
are clustered (jaxq.tokens.kmeans) on the unit sphere; the cluster means are its
codebook B (K, D), the labels its map Z (frames, rows, columns), which says what
the codes no longer do: where and when. A small attention (jaxq.tokens.
vqtoken_attention) puts the map into the codes. K is given, or chosen per video
by the elbow of the distortion.

There is no codebook that videos share; the clustering is paid at inference.
Codes come in order of first occurrence, as k-means labels have no order.

Departures: codes are means of the tokens as they are; means of unit vectors, as
in the reference, are far shorter than what a language model reads, and of use
only where it is trained on them (`codebook_of`). The reference's elbow is off
by an index (`elbow_reference`), and its silhouette ignores the labels, so that
the smallest K wins always; here it is the silhouette.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from jaxq.tokens import interface, kmeans, primitives, vqtoken_attention

MODES = ('adaptive', 'fixed')
SELECTIONS = ('elbow', 'silhouette')
CODEBOOKS = ('normalized', 'raw')
WIRINGS = ('codebook', 'none')
POSITIONS = ('centroid', 'first', 'sequence')
CONTROLS = ('none', 'shuffled')


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQTokenConfig(interface.Config):
  """k_max codes of each row's tokens, or fewer.

  Attributes:
    codes: slots where no Budget is given; 0: the share `budget` of the tokens.
    mode: 'fixed' makes k codes, 'adaptive' between k_min and k.
    k_min: of mode 'adaptive'.
    selection: 'elbow' or 'silhouette', of mode 'adaptive'.
    elbow_reference: the authors' elbow (module docstring).
    iters, tol: of k-means; the paper's code has 50, and 100 when adaptive.
    codebook_of: what is averaged, tokens as they are ('raw') or 'normalized'.
    wiring: 'codebook': the attention follows, with params; 'none': codes only.
    num_heads, ffn: of the attention.
    positions: of a code: the rounded mean of its members' ('centroid'), the
      'first' one's, or 0, 1, ... ('sequence'), as the reference's language
      model counts them. The other two tell where a code is without the map.
    control: of CONTROLS. 'shuffled': the attention sees the codes in random
      cells of the map; what it was worth is gone.
    seed: of the starts where no rng is given; the same for all rows.
  """

  codes: int = 32
  mode: str = 'fixed'
  k_min: int = 12
  selection: str = 'elbow'
  elbow_reference: bool = False
  iters: int = 50
  tol: float = 1e-4
  codebook_of: str = 'raw'
  wiring: str = 'codebook'
  num_heads: int = 8
  ffn: int = 2048
  positions: str = 'centroid'
  control: str = 'none'
  seed: int = 0

  def __post_init__(self):
    super().__post_init__()
    for name, allowed in (
      ('mode', MODES),
      ('selection', SELECTIONS),
      ('codebook_of', CODEBOOKS),
      ('wiring', WIRINGS),
      ('positions', POSITIONS),
      ('control', CONTROLS),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'VQTokenConfig: {name}={getattr(self, name)!r}; allowed '
          f'{sorted(allowed)}.'
        )
    if self.iters < 1 or self.codes < 0 or self.k_min < 1:
      raise ValueError(
        f'VQTokenConfig: iters={self.iters}, codes={self.codes}, k_min='
        f'{self.k_min}; allowed are at least 1, 0 and 1.'
      )
    if self.mode == 'adaptive' and 0 < self.codes < self.k_min:
      raise ValueError(
        f'VQTokenConfig: k_min={self.k_min} is more than codes={self.codes}; '
        'the number of codes lies between them. Lower k_min.'
      )

  @property
  def traits(self) -> interface.Traits:
    """A merger; the attention needs a grid and params, and adds to codes."""
    attends = self.wiring == 'codebook'
    return interface.Traits(
      kind='merger',
      params=attends,
      grid=attends,
      conserves_mass=not attends and self.codebook_of == 'raw',
    )

  def budget_for(self, ts: interface.TokenSet) -> interface.Budget:
    """`codes`, or the share of the tokens; no more than there are."""
    N = ts.mask.shape[1]
    if self.codes:
      return interface.Budget(k_max=min(self.codes, N))
    return interface.budget_from_ratio(N, self.budget)

  def init_params(
    self,
    rng: jax.Array,
    ts: interface.TokenSet,
    query: jax.Array | None = None,
  ) -> Any:
    """Of the attention, which at first adds nothing to the codes."""
    del query
    if self.wiring == 'none':
      return None
    D, module = ts.tokens.shape[-1], self.attention()
    vqtoken_attention.check_heads(D, self.num_heads)
    codes = jnp.zeros((1, 2, D), ts.tokens.dtype)
    mask, features = jnp.ones((1, 2), bool), jnp.zeros((1, 2, 1, 3))
    params = jax.jit(module.init)(rng, codes, features, mask)['params']
    return vqtoken_attention.zero_outputs(params)

  def attention(self) -> vqtoken_attention.VQAttention:
    """The module behind the codebook."""
    return vqtoken_attention.VQAttention(num_heads=self.num_heads, ffn=self.ffn)

  def example(self) -> interface.Example:
    """Few codes of few tokens."""
    small = dataclasses.replace(
      self, codes=8, k_min=2, iters=8, num_heads=2, ffn=8
    )
    return interface.Example(reducer=small, k_max=8)

  def _reduce(
    self,
    ts: interface.TokenSet,
    budget: interface.Budget,
    given: interface.Given,
  ) -> interface.Reduced:
    B, N = ts.mask.shape
    if budget.k_max > N:
      raise ValueError(
        f'VQTokenConfig: k_max={budget.k_max} codes of N={N} tokens; there '
        f'are at most as many codes as tokens. Use k_max={N}, or fewer.'
      )
    if self.mode == 'adaptive' and self.k_min > budget.k_max:
      raise ValueError(
        f'VQTokenConfig: k_min={self.k_min} is more than k_max='
        f'{budget.k_max}; the number of codes lies between them. Lower k_min.'
      )
    check_values(ts.tokens, ts.mask)
    x = jnp.where(ts.mask[..., None], ts.tokens, 0)
    unit = primitives.normalize(x)
    weight = jnp.where(ts.mask, ts.size, 0.0)
    number = jnp.sum(ts.mask, axis=1, dtype=jnp.int32)
    k = jnp.minimum(budget.counts(B), number)
    rng = jax.random.key(self.seed) if given.rng is None else given.rng
    found, chosen = jax.vmap(
      lambda x, w, k: self.cluster(rng, x, w, k, budget.k_max)
    )(jax.lax.stop_gradient(unit), weight, k)
    label = jnp.where(k[:, None] > 0, found.labels, -1)
    assignment = primitives.order_slots(label, budget.k_max)
    reduced = primitives.merged(
      ts,
      assignment,
      budget.k_max,
      aux={'k': chosen, 'distortion': found.distortion},
    )
    if self.positions != 'first':  # No token is where the code is.
      reduced = dataclasses.replace(
        reduced,
        index=jnp.full_like(reduced.index, -1),
        positions=self._positions(ts, reduced, weight),
      )
    codes: Any = reduced.tokens
    if self.codebook_of == 'normalized':
      means, _ = primitives.merge(unit, weight, assignment, budget.k_max)
      codes = means.astype(codes.dtype)
    if self.wiring == 'codebook':
      shown = reduced.assignment
      if self.control == 'shuffled':
        shown = shuffled(rng, shown, ts)
      features = vqtoken_attention.map_features(shown, ts, budget.k_max)
      codes = self.attention().apply(
        {'params': given.params}, codes, features, reduced.mask
      )
    used = reduced.mask[..., None]
    return dataclasses.replace(
      reduced, tokens=jnp.where(used, codes, jnp.zeros((), codes.dtype))
    )

  def _positions(
    self, ts: interface.TokenSet, reduced: interface.Reduced, weight: jax.Array
  ) -> jax.Array:
    """(B, K, P) int32 of codes that are at no token's place."""
    K, axes = reduced.mask.shape[1], ts.positions.shape[-1]
    if self.positions == 'sequence':
      return primitives.renumbered(reduced.mask, axes)
    at = ts.positions.astype(jnp.float32)
    mean, _ = primitives.merge(at, weight, reduced.assignment, K)
    return jnp.floor(mean + 0.5).astype(jnp.int32)

  def cluster(
    self,
    rng: jax.Array,
    x: jax.Array,
    weight: jax.Array,
    k: jax.Array,
    k_max: int,
  ) -> tuple[kmeans.Clusters, jax.Array]:
    """The clusters of unit vectors x (M, D), and their number () int32.

    Args:
      rng: of the starts.
      x: 0 where weight (M,) is.
      weight: of each vector.
      k: () int32, the most.
      k_max: static.
    """
    start = kmeans.starts(rng, x, weight, k_max)
    how: Any = {'iters': self.iters, 'tol': self.tol}
    if self.mode == 'fixed':
      return kmeans.fit(x, weight, start, k, **how), k
    found = kmeans.sweep(x, weight, start, self.k_min, **how)
    if self.selection == 'elbow':
      chosen = kmeans.elbow(
        found.distortion, self.k_min, k, reference=self.elbow_reference
      )
    else:
      chosen = kmeans.best_silhouette(found.silhouette, self.k_min, k)
    # Fewer tokens than k_min: the sweep has no such k; one more fit does.
    at = jnp.maximum(chosen - self.k_min, 0)
    picked = jax.tree.map(lambda field: field[at], found)
    few = kmeans.fit(x, weight, start, k, **how)
    use_few = chosen < self.k_min
    return jax.tree.map(
      lambda a, b: jnp.where(use_few, a, b), few, picked
    ), chosen


def token_hash(
  reduced: interface.Reduced, grid: interface.Grid, special: int = 0
) -> jax.Array:
  """The map Z (B, T, H, W) int32: the code of each cell, -1 where masked."""
  return reduced.assignment[:, special:].reshape(-1, *grid)


def shuffled(
  rng: jax.Array, assignment: jax.Array, ts: interface.TokenSet
) -> jax.Array:
  """assignment (B, N) with the codes of a row's patches in random order.

  The draw is the same for all rows; special and masked tokens stay.
  """
  N = assignment.shape[1]
  patch = ts.mask & (jnp.arange(N)[None] >= ts.special)
  draws = jax.random.uniform(rng, (N,))[None]
  order = jnp.argsort(jnp.where(patch, draws, 2.0), axis=1)  # Patches first.
  rank = jnp.maximum(jnp.cumsum(patch, axis=1, dtype=jnp.int32) - 1, 0)
  source = jnp.take_along_axis(order, rank, axis=1)
  moved = jnp.take_along_axis(assignment, source, axis=1)
  return jnp.where(patch, moved, assignment)


def check_values(tokens: jax.Array, mask: jax.Array) -> None:
  """Raises ValueError for tokens that are not finite; warns of zeros.

  Only of values that can be looked at: not under jit.
  """
  if isinstance(tokens, jax.core.Tracer) or isinstance(mask, jax.core.Tracer):
    return
  seen = np.asarray(tokens.astype(jnp.float32))[np.asarray(mask)]
  if not np.isfinite(seen).all():
    bad = int((~np.isfinite(seen).all(axis=1)).sum())
    raise ValueError(
      f'VQTokenConfig: {bad} tokens are not finite; they would spoil their '
      'whole cluster. Mask them, or look for the overflow before.'
    )
  zeros = int((~seen.any(axis=1)).sum())
  if zeros:
    logging.warning(
      'VQTokenConfig: %d tokens are 0 and have no direction; they go to the '
      'first code.',
      zeros,
    )
