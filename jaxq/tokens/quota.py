"""QuoTA: a fixed token budget shared among frames by their relevance.

Luo et al., 2025, https://arxiv.org/abs/2503.08689. Before the language model
sees a video, each frame t gets

  n_t = floor(N_t * s_t^2 / sum s^2)    of N_t tokens in all

for its relevance s_t to the question, and its H x W grid of patches is
resampled to h_t x w_t <= n_t tokens, nearly square. Irrelevant frames vanish,
so that more frames can be looked at for the same number of tokens. It trains
nothing; where s comes from is jaxq.tokens.quota_scorer.

The number of tokens per frame is data, shapes are not: jaxq.tokens.ragged finds
slot by slot which frame and cell it is of, in O(N_t) memory.

Truncating to whole numbers and to h_t * w_t loses up to sqrt(n_t) tokens per
frame, as in the reference; `redistribute` gives them back.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from jaxq.tokens import (
  frames,
  interface,
  primitives,
  quota_scorer,
  quota_tome,
  ragged,
)

KINDS = ('adaptive_avg', 'auto', 'bilinear', 'linspace', 'tome', 'tome_grid')
_MERGING = ('tome', 'tome_grid')
_FIELDS = ('tokens', 'positions', 'size', 'mask', 'assignment')
CAPS = ('exact', 'none', 'one_pass')
NEWLINES = ('end', 'none', 'row')
SCORERS = ('given', 'light')


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuotaConfig(interface.Config):
  """A frame's relevance is the mean of its tokens' scores.

  Attributes:
    gamma: exponent of the relevance; 0 is equal shares.
    kind: 'bilinear' (the paper's first version), 'adaptive_avg' (its second),
      'linspace' (its third: evenly spaced tokens as they are), 'tome' and
      'tome_grid' (its fourth and fifth, jaxq.tokens.quota_tome), or 'auto', the
      second where a side shrinks to less than half and the first elsewhere.
    cap: 'none', or at most H * W tokens per frame: 'exact', or 'one_pass' as
      the reference, which may exceed it.
    redistribute: share what truncation loses (module docstring).
    newline: a learned token behind each 'row' of a frame, at the very 'end', or
      'none'. They come on top of k_max.
    scorer: 'given' (`scores`), or 'light': a trained one, of the query.
  """

  gamma: float = 2.0
  kind: str = 'bilinear'
  cap: str = 'none'
  redistribute: bool = False
  newline: str = 'none'
  scorer: str = 'given'

  def __post_init__(self):
    super().__post_init__()
    for name, allowed in (
      ('kind', KINDS),
      ('cap', CAPS),
      ('newline', NEWLINES),
      ('scorer', SCORERS),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'QuotaConfig: {name}={getattr(self, name)!r}; allowed '
          f'{sorted(allowed)}.'
        )
    if self.kind in ('linspace', *_MERGING) and self.newline == 'row':
      raise ValueError(
        f"QuotaConfig: newline='row' with kind={self.kind!r}; its tokens have "
        "no rows. Use newline='end'."
      )
    if self.gamma < 0:
      raise ValueError(
        f'QuotaConfig: gamma={self.gamma}; it must not be negative. 2 is the '
        "paper's, 0 gives all frames the same."
      )

  @property
  def traits(self) -> interface.Traits:
    """Needs what its scorer needs, and params for newlines."""
    light = self.scorer == 'light'
    return interface.Traits(
      kind='resampler',
      scores=not light,
      query=light,
      params=light or self.newline != 'none',
      grid=True,
      conserves_mass=False,
    )

  def init_params(
    self,
    rng: jax.Array,
    ts: interface.TokenSet,
    query: jax.Array | None = None,
  ) -> Any:
    """{'newline' (D,), 'scorer'}, what of it there is; else None."""
    params: dict[str, Any] = {}
    if self.newline != 'none':
      params['newline'] = jnp.zeros(ts.tokens.shape[-1:], ts.tokens.dtype)
    if self.scorer == 'light':
      if query is None:
        raise ValueError(
          "QuotaConfig: query=None; scorer='light' is made for the width of "
          'the query. Pass init_params(rng, ts, query).'
        )
      params['scorer'] = quota_scorer.init(rng, ts, query)
    return params or None

  def slots(self, k_max: int, num_frames: int) -> int:
    """K: k_max and the most newlines there can be."""
    if self.newline == 'end':
      return k_max + 1
    if self.newline == 'row':
      # sum (sqrt(n_t) + 1) is largest where all n_t are equal.
      return k_max + math.isqrt(k_max * num_frames) + 2 * num_frames
    return k_max

  def _relevance(
    self, ts: interface.TokenSet, given: interface.Given
  ) -> jax.Array:
    """(B, T) float32 of the frames."""
    if self.scorer == 'light':
      return quota_scorer.light(given.params['scorer'], ts, given)
    assert given.scores is not None  # Traits ask for it.
    check_scores(given.scores, ts.mask)
    T, H, W = interface.square_grid(ts)
    mask = ts.mask[:, ts.special :].reshape(-1, T, H * W)
    scores = given.scores[:, ts.special :].reshape(-1, T, H * W)
    total = jnp.sum(jnp.where(mask, scores, 0.0), axis=2)
    number = jnp.sum(mask, axis=2, dtype=jnp.float32)
    return total / jnp.maximum(number, 1.0)

  def _reduce(
    self,
    ts: interface.TokenSet,
    budget: interface.Budget,
    given: interface.Given,
  ) -> interface.Reduced:
    T, H, W = grid = interface.square_grid(ts)
    mask = ts.mask[:, ts.special :]
    B = mask.shape[0]
    seen = jnp.any(mask.reshape(B, T, H * W), axis=2)
    relevance = self._relevance(ts, given)
    weights = frame_weights(relevance, seen, self.gamma)
    merges = self.kind in _MERGING
    n, h, w = assign_tokens(
      weights,
      jnp.minimum(budget.counts(B), budget.k_max),
      budget.k_max,
      area=math.prod(quota_tome.half_sides(grid)) if merges else H * W,
      cap=self.cap,
      redistribute=self.redistribute,
    )
    squares = jnp.sum(weights * weights, axis=1)
    aux = {
      'relevance': relevance,
      'tokens_per_frame': n,
      'grids': jnp.stack([h, w], axis=2),
      # 1 / sum w^2: near T the scorer tells nothing, near 1 one frame has all.
      'effective_frames': jnp.sum(weights, axis=1) / jnp.maximum(squares, 1e-9),
    }
    K = self.slots(budget.k_max, T)
    patches = interface.TokenSet(
      tokens=ts.tokens[:, ts.special :],
      mask=mask,
      positions=ts.positions[:, ts.special :],
      size=ts.size[:, ts.special :],
      grid=grid,
    )
    newline = None if self.newline == 'none' else given.params['newline']
    if merges:
      by_axis = self.kind == 'tome_grid'
      made = quota_tome.merge_frames(patches, n, h, w, K, by_axis=by_axis)
      out = {name: getattr(made, name) for name in _FIELDS}
      out['newlines'] = jnp.zeros((B,), jnp.int32)
    else:
      one = functools.partial(
        _resample_one, grid, self.kind, self.newline, K, newline
      )
      out = jax.vmap(one)(
        patches.tokens, patches.positions, patches.size, mask, n, h, w
      )
    if self.newline == 'end':
      out = jax.vmap(lambda row: _with_end(row, newline))(out)
    assignment = jnp.pad(
      out['assignment'], ((0, 0), (ts.special, 0)), constant_values=-1
    )
    return interface.Reduced(
      tokens=out['tokens'],
      mask=out['mask'],
      positions=out['positions'],
      size=out['size'],
      index=jnp.full_like(out['mask'], -1, jnp.int32),
      assignment=assignment,
      count=jnp.sum(out['mask'], axis=1, dtype=jnp.int32),
      aux=aux | {'newlines': out['newlines']},
    )


def frame_count(
  duration: float, base: int = 96, per_hour: int = 64, limit: int | None = None
) -> int:
  """How many frames to sample from a video of so many seconds.

  Raises:
    ValueError: there are more than `limit`, which shapes were made for.
  """
  number = base + int(duration / 3600 * per_hour)
  if limit is not None and number > limit:
    raise ValueError(
      f'frame_count: {number} frames for {duration} seconds; at most '
      f'limit={limit}. Raise the limit, or lower base or per_hour.'
    )
  return number


def frame_indices(number: int, available: int) -> np.ndarray:
  """`number` evenly spaced frames of `available`: (number,) int."""
  return np.linspace(0, available - 1, number).astype(int)


def frame_weights(
  relevance: jax.Array, seen: jax.Array, gamma: float = 2.0
) -> jax.Array:
  """Shares of the budget (B, T) float32, relevance^gamma over its sum.

  Args:
    relevance: (B, T), not negative. Where all of it is 0, frames share equally.
    seen: (B, T) bool; the others get 0.
    gamma: exponent.
  """
  s = jnp.where(seen, jnp.maximum(relevance.astype(jnp.float32), 0.0), 0.0)
  most = jnp.max(s, axis=1, keepdims=True)
  s = jnp.where(most > 0, s, 1.0) / jnp.where(most > 0, most, 1.0)
  powers = jnp.where(seen, s**gamma, 0.0)
  return powers / jnp.maximum(jnp.sum(powers, axis=1, keepdims=True), 1e-30)


def cap_weights(
  weights: jax.Array, cap: jax.Array, mode: str = 'exact'
) -> jax.Array:
  """Shares (B, T) with none above cap (B, 1).

  'exact' is water filling; 'one_pass' spreads what is cut once, in proportion,
  and may lift a share above the cap again.
  """
  if mode == 'none':
    return weights
  if mode == 'exact':
    return frames.capped(weights, cap)
  above = weights > cap
  excess = jnp.sum(jnp.where(above, weights - cap, 0.0), axis=1, keepdims=True)
  others = jnp.where(above, 0.0, weights)
  total = jnp.sum(others, axis=1, keepdims=True)
  factor = 1 + excess / jnp.where(total > 0, total, 1.0)
  return jnp.where(above, cap, others * factor)


def assign_tokens(
  weights: jax.Array,
  total: jax.Array,
  most: int,
  *,
  area: int,
  cap: str = 'none',
  redistribute: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Tokens and grid of each frame.

  Args:
    weights: (B, T) shares.
    total: (B,) int32 tokens to share, N_t.
    most: the largest total there can be, static.
    area: H * W, the cap.
    cap: of CAPS.
    redistribute: whole numbers by largest remainder, and grids by `best_grids`.

  Returns:
    n, h, w (B, T) int32; h * w <= n, and 0 for frames that get nothing.
  """
  total = total[:, None].astype(jnp.float32)
  share = jnp.minimum(area / jnp.maximum(total, 1.0), 1.0)
  # A hair above: 1 / 64 of 12,544 is 196, whatever float32 makes of it.
  exact = cap_weights(weights, share, cap) * total * (1 + 2**-20)
  n = jnp.floor(exact)
  if redistribute:
    left = jnp.sum(exact, axis=1, keepdims=True) - jnp.sum(
      n, axis=1, keepdims=True
    )
    remainder = jnp.where(weights > 0, exact - n, -1.0)
    order = jnp.argsort(-remainder, axis=1, stable=True)
    rank = jnp.argsort(order, axis=1, stable=True)
    more = (rank.astype(jnp.float32) < jnp.floor(left)) & (remainder >= 0)
    n = n + more.astype(jnp.float32)
  n = n.astype(jnp.int32)
  if redistribute:
    table = jnp.asarray(best_grids(most), jnp.int32)
    grids = table[jnp.minimum(n, most)]  # (B, T, 2)
    return n, grids[..., 0], grids[..., 1]
  a = jnp.floor(jnp.sqrt(n.astype(jnp.float32))).astype(jnp.int32)
  h = a + (((a + 1) * a <= n) & (a > 0)).astype(jnp.int32)
  return n, h, a


@functools.lru_cache(maxsize=8)
def best_grids(most: int) -> np.ndarray:
  """(most + 1, 2) int: the fullest h x w of at most n, h / w in [1, 2].

  Of equal ones the squarest.
  """
  table = np.zeros((most + 1, 2), int)
  n = np.arange(most + 1)
  for w in range(1, math.isqrt(most) + 1):
    h = np.minimum(n // w, 2 * w)
    better = (h >= w) & (h * w >= table[:, 0] * table[:, 1])
    table[better] = np.stack([h, np.full_like(h, w)], axis=1)[better]
  return table


def check_scores(scores: jax.Array, mask: jax.Array) -> None:
  """Raises ValueError for scores outside [0, 1]; warns where all are 0.

  Only of values that can be looked at: not under jit.
  """
  if isinstance(scores, jax.core.Tracer) or isinstance(mask, jax.core.Tracer):
    return
  seen = np.asarray(scores)[np.asarray(mask)]
  if not np.all((seen >= 0) & (seen <= 1)):
    raise ValueError(
      f'QuotaConfig: scores from {seen.min()} to {seen.max()}; a relevance is '
      'a probability, in [0, 1]. Use softmax or sigmoid on logits.'
    )
  if seen.size and not seen.any():
    logging.warning('QuotaConfig: all scores are 0; frames share equally.')


_RESAMPLE = {
  'adaptive_avg': ragged.adaptive_average,
  'bilinear': ragged.bilinear,
  'linspace': ragged.linspace,
}


def _resample_one(grid, kind, newline, K, newline_token, *arrays):
  """One row of the batch: tokens, positions, size, mask, n, h, w."""
  tokens, positions, size, mask, n, h, w = arrays
  T, H, W = grid
  if kind == 'linspace':
    h, w = n, jnp.minimum(n, 1)
  at = ragged.slots_of(n, h, w, K, newline == 'row')
  weight = jnp.where(mask, size, 0.0)
  # Positions are resampled as channels: a slot is at the mean of its patches.
  x = jnp.concatenate(
    [tokens.astype(jnp.float32), positions.astype(jnp.float32)], axis=1
  )
  x = jnp.where(mask[:, None], x, 0.0)
  if kind == 'auto':
    small = (2 * at.h < H) | (2 * at.w < W)
    coarse, coarse_share = ragged.adaptive_average(x, weight, grid, at)
    fine, fine_share = ragged.bilinear(x, weight, grid, at)
    sums = jnp.where(small[:, None], coarse, fine)
    share = jnp.where(small, coarse_share, fine_share)
  else:
    sums, share = _RESAMPLE[kind](x, weight, grid, at)
  # A share may be a rounding error of 0: sums of 0 and 1 weights are not.
  made = at.used & (at.j < at.w) & (share > 1e-6)
  means = sums / jnp.where(made, share, 1.0)[:, None]
  mass = jnp.sum(weight.reshape(T, H * W), axis=1)
  is_newline = at.used & (at.j == at.w) & (mass[at.frame] > 0)
  index, used = primitives.compact((made | is_newline)[None], K)
  index, used = index[0], used[0]
  take = lambda values: primitives.gather(values[None], index[None])[0]
  D = tokens.shape[1]
  out = take(means[:, :D].astype(tokens.dtype))
  if newline == 'row':
    out = jnp.where(take(is_newline)[:, None], newline_token[None], out)
  cells = jnp.maximum(h * w, 1).astype(jnp.float32)
  per_slot = jnp.where(is_newline, 1.0, (mass / cells)[at.frame])
  result = {
    'tokens': out,
    'positions': take(jnp.floor(means[:, D:] + 0.5).astype(jnp.int32)),
    'size': take(jnp.where(made | is_newline, per_slot, 0.0)),
    'mask': used,
    'newlines': jnp.sum(is_newline, dtype=jnp.int32),
  }
  slot = primitives.scatter_slots(jnp.where(take(made), index, -1)[None], K)[0]
  result['assignment'] = _assignment(grid, kind, newline, n, h, w, mask, slot)
  return result


def _assignment(grid, kind, newline, n, h, w, mask, slot):
  """(T * H * W,) int32: the slot of the cell that holds a patch's centre."""
  T, H, W = grid
  row = jnp.arange(H, dtype=jnp.int32)[None, :, None]
  column = jnp.arange(W, dtype=jnp.int32)[None, None]
  h, w, n = (a[:, None, None] for a in (h, w, n))
  if kind == 'linspace':  # Only the patches that were taken have a slot.
    place, last, steps = row * W + column, H * W - 1, jnp.maximum(n - 1, 1)
    cell = -(-place * steps // max(last, 1))
    cell = jnp.where((cell < n) & (cell * last // steps == place), cell, -1)
  else:
    width = w + int(newline == 'row')
    cell = (2 * row + 1) * h // (2 * H) * width
    cell = cell + (2 * column + 1) * w // (2 * W)
  taken = h * (w + int(newline == 'row'))
  start = jnp.cumsum(taken, axis=0) - taken
  cell = jnp.where((cell >= 0) & (h > 0), cell + start, -1)
  cell = jnp.where(mask, jnp.broadcast_to(cell, (T, H, W)).reshape(-1), -1)
  return primitives.gather(slot[None] + 1, cell[None])[0] - 1


def _with_end(result, newline_token):
  """A newline in the first free slot; slots are one more than tokens."""
  count = jnp.sum(result['mask'], dtype=jnp.int32)
  at = jnp.arange(result['mask'].shape[0], dtype=jnp.int32) == count
  at = at & (count > 0)
  tokens = jnp.where(at[:, None], newline_token[None], result['tokens'])
  return {
    **result,
    'tokens': tokens,
    'mask': result['mask'] | at,
    'size': jnp.where(at, 1.0, result['size']),
    'newlines': jnp.sum(at, dtype=jnp.int32),
  }
