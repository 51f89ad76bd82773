"""DyCoke: drop what a video's frames repeat, then look at little of the cache.

Tao et al., 2024, arXiv 2411.15024. Two stages:

  merging (this reducer, before the decoder): frames in groups of 4; frame 1 is
    compared with 0, 3 with 2 and 2 with 0, patch by patch, and keeps the share
    p of its tokens with the lowest cosine to the same place. Frame 0 stays
    whole. (1 + 3 p) / 4 of the tokens are kept.
  pruning (models.dynamic_decoder.dynamic_step, while decoding): behind a layer,
    a new token sees only the visual tokens of the cache that it pays the most
    attention in that layer; they are chosen again at every step.

The paper's code drops an odd last frame and spares one of the last group; here
every frame counts, and the last group may be short.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.tokens import interface, primitives

_GROUP = 4
_WHOLE = 3.0  # Above the priority of any other token: 1 - cosine is at most 2.


@dataclasses.dataclass(frozen=True, kw_only=True)
class DycokeConfig(interface.Config):
  """budget: (1 + 3 p) / 4, so above 0.25; 0.475 is the paper's K = 0.7.

  layer: whose attention chooses, from 1 on. prune: share P of the visual tokens
  that the layers behind it do not see. similar: at a cosine above it between
  the scores of two steps, the tokens that were chosen before are used again.
  """

  budget: float = 0.475
  layer: int = 3
  prune: float = 0.7
  similar: float = 0.9

  def __post_init__(self):
    super().__post_init__()
    if self.layer < 1 or not 0 <= self.prune < 1:
      raise ValueError(
        f'DycokeConfig: layer={self.layer}, prune={self.prune}; allowed are '
        'layer >= 1 and prune in [0, 1). The paper uses 3 and 0.7.'
      )

  @property
  def traits(self) -> interface.Traits:
    """A selector on frames."""
    return interface.Traits(kind='selector', grid=True)

  def example(self) -> interface.Example:
    """A full group of frames and a short one."""
    return interface.Example(reducer=self, grid=(6, 2, 3), k_max=20)

  def budget_for(self, ts: interface.TokenSet) -> interface.Budget:
    """Whole frames, and int(p n) tokens of each other one."""
    T, H, W = interface.square_grid(ts)
    p = (4 * self.budget - 1) / 3
    if p < 0:
      raise ValueError(
        f'DycokeConfig: budget={self.budget}; one frame of {_GROUP} stays '
        'whole, so at least 0.25 is needed. Reduce further with another method '
        'behind this one.'
      )
    whole = -(-T // _GROUP)
    of_each = int(round(p * H * W, 6))
    return interface.Budget(
      k_max=ts.special + whole * H * W + (T - whole) * of_each
    )

  def _reduce(
    self,
    ts: interface.TokenSet,
    budget: interface.Budget,
    given: interface.Given,
  ) -> interface.Reduced:
    del given
    B, _ = ts.mask.shape
    T, H, W = interface.square_grid(ts)
    n, whole = H * W, -(-T // _GROUP)
    room = budget.k_max - ts.special - whole * n
    if room < 0:
      raise ValueError(
        f'DycokeConfig: k_max={budget.k_max} for {T} frames of {n} tokens; the '
        f'first of every {_GROUP} frames stays whole, so at least '
        f'{ts.special + whole * n} slots are needed. Raise the budget.'
      )
    of_each = min(room // max(T - whole, 1), n)
    mask = ts.mask[:, ts.special :].reshape(B, T, n)
    x = jnp.where(mask[..., None], _frames(ts, T, n), 0)
    frame = np.arange(T)
    before = np.where(frame % 2, frame - 1, frame - frame % _GROUP)
    unit = primitives.normalize(x)
    cosine = jnp.sum(unit * unit[:, before], axis=-1)  # (B, T, n)
    distance = 1 - jnp.where(mask[:, before], cosine, -1.0)
    first = jnp.asarray(frame % _GROUP == 0)[None, :, None]
    index, _ = primitives.select_topk(
      distance.reshape(B * T, n),
      mask.reshape(B * T, n),
      max(of_each, 1),
      jnp.full((B * T,), of_each, jnp.int32),
    )
    kept = primitives.scatter_slots(index, n).reshape(B, T, n) >= 0
    priority = jnp.where(first, _WHOLE, jnp.where(kept, distance, -jnp.inf))
    special = jnp.full((B, ts.special), jnp.inf)
    priority = jnp.concatenate([special, priority.reshape(B, T * n)], axis=1)
    index, used = primitives.select_topk(
      priority, ts.mask, budget.k_max, budget.counts(B)
    )
    return primitives.selected(ts, index, used)


def _frames(ts: interface.TokenSet, T: int, n: int) -> jax.Array:
  """The tokens on the grid (B, T, n, D) float32."""
  x = ts.tokens[:, ts.special :].astype(jnp.float32)
  return x.reshape(x.shape[0], T, n, -1)
