"""What the token reducers share: choosing, packing, merging and resampling.

All of it keeps static shapes, does its arithmetic on scores and sizes in
float32, and never looks at the values of masked tokens, which may be anything.
Ties between scores go to the lower index, on every backend.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxq.tokens import interface
from pallas_kernels.gather_rows import api as gather_rows
from pallas_kernels.nearest_center import api as nearest_center

_ONE_HOT_SLOTS = 2048  # Above it a segment sum reads and writes less.
_SORT_SHARE = 8  # lax.top_k sorts; past N / 8 slots counting is cheaper.
_HIGHEST = jax.lax.Precision.HIGHEST
RESAMPLING = ('adaptive_avg', 'bilinear')


def select_topk(
  scores: jax.Array, mask: jax.Array, k_max: int, k: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The k best tokens of each row, in increasing order of their index.

  Args:
    scores: (B, N), higher is kept; -inf and NaN never are.
    mask: (B, N) bool; False never is.
    k_max: slots, static; at most N.
    k: (B,) int32 of them to use.

  Returns:
    index (B, k_max) int32, -1 where not in use, and mask (B, k_max).
  """
  N = scores.shape[1]
  scores = usable(scores, mask)
  if k_max * _SORT_SHARE > N:
    return compact(_top_mask(scores, jnp.minimum(k, k_max)), k_max)
  values, index = jax.lax.top_k(scores, k_max)
  used = (values > -jnp.inf) & (jnp.arange(k_max)[None] < k[:, None])
  index = jnp.sort(jnp.where(used, index, N), axis=1)
  used = index < N
  return jnp.where(used, index, -1).astype(jnp.int32), used


def usable(scores: jax.Array, mask: jax.Array) -> jax.Array:
  """scores (B, N) float32, -inf at masked tokens and NaNs, and 0.0 for -0.0."""
  scores = jnp.asarray(scores, jnp.float32)
  scores = jnp.where(scores == 0, 0.0, scores)
  return jnp.where(mask & ~jnp.isnan(scores), scores, -jnp.inf)


def _top_mask(scores: jax.Array, k: jax.Array) -> jax.Array:
  """True at the k (B,) largest finite-or-inf scores (B, N), by counting.

  Floats are ordered as their bits are, negative ones turned round. The k-th
  largest is found bit by bit from the top: 32 counts over N instead of a sort.
  """
  bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
  order = jnp.where(bits < 0, ~bits, bits ^ jnp.int32(-(2**31)))
  order = jax.lax.bitcast_convert_type(order, jnp.uint32)
  allowed = scores > -jnp.inf
  k = jnp.minimum(k, jnp.sum(allowed, axis=1, dtype=jnp.int32))[:, None]

  def bit(i, threshold):
    higher = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
    above = jnp.sum(order >= higher, axis=1, keepdims=True, dtype=jnp.int32)
    return jnp.where(above >= k, higher, threshold)

  zero = jnp.zeros((scores.shape[0], 1), jnp.uint32)
  threshold = jax.lax.fori_loop(0, 32, bit, zero)
  above = order > threshold
  ties = (order == threshold) & allowed
  left = k - jnp.sum(above, axis=1, keepdims=True, dtype=jnp.int32)
  return (above | (ties & (jnp.cumsum(ties, axis=1) <= left))) & (k > 0)


def compact(
  mask: jax.Array, k_max: int, k: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """The indices at which mask (B, N) is True, in order.

  Args:
    mask: which tokens; those past k_max (or past k) are left out.
    k_max: slots, static.
    k: (B,) int32 of them to use at most; None: k_max.

  Returns:
    index (B, k_max) int32, -1 where not in use, and mask (B, k_max).
  """
  B, N = mask.shape
  slot = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
  limit = k_max if k is None else jnp.minimum(k, k_max)[:, None]
  slot = jnp.where(mask & (slot < limit), slot, k_max)  # k_max is dropped.
  source = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32)[None], (B, N))
  rows = jnp.arange(B)[:, None]
  index = jnp.full((B, k_max), -1, jnp.int32)
  index = index.at[rows, slot].set(source, mode='drop')
  return index, index >= 0


def gather(
  x: jax.Array, index: jax.Array, *, implementation: str | None = None
) -> jax.Array:
  """Rows of x (B, N, ...) at index (B, K) -> (B, K, ...); 0 where index < 0.

  implementation: of pallas_kernels.gather_rows, for an x (B, N, D); None picks.
  """
  if x.ndim == 3 and index.size and x.size:
    name = implementation or gather_rows.choose(x, index)
    if name != 'xla':
      return gather_rows.gather_rows(x, index, implementation=name)
  trailing = (1,) * (x.ndim - 2)
  at = index.reshape(*index.shape, *trailing)
  rows = jnp.take_along_axis(x, jnp.maximum(at, 0), axis=1)
  return jnp.where(at >= 0, rows, jnp.zeros((), x.dtype))


def scatter_slots(index: jax.Array, n: int) -> jax.Array:
  """index (B, K) -> assignment (B, n): slot of each token in it, else -1."""
  B, K = index.shape
  rows = jnp.arange(B)[:, None]
  slots = jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32)[None], (B, K))
  out = jnp.full((B, n), -1, jnp.int32)
  return out.at[rows, jnp.where(index < 0, n, index)].set(slots, mode='drop')


def selected(
  ts: interface.TokenSet,
  index: jax.Array,
  mask: jax.Array,
  aux: Mapping[str, Any] | None = None,
) -> interface.Reduced:
  """The answer of a selector that keeps tokens index (B, K) where mask.

  Slots in use must come first. Tokens are copied bit by bit.
  """
  index = jnp.where(mask, index, -1).astype(jnp.int32)
  return interface.Reduced(
    tokens=gather(ts.tokens, index),
    mask=mask,
    positions=gather(ts.positions, index),
    size=gather(ts.size, index),
    index=index,
    assignment=scatter_slots(index, ts.mask.shape[1]),
    count=jnp.sum(mask, axis=1, dtype=jnp.int32),
    aux=dict(aux or {}),
  )


def protect(ts: interface.TokenSet, scores: jax.Array) -> jax.Array:
  """scores (B, N) float32 with +inf at special tokens: these are kept first."""
  special = jnp.arange(ts.mask.shape[1])[None] < ts.special
  return jnp.where(special, jnp.inf, scores.astype(jnp.float32))


def spaced(mask: jax.Array, k: jax.Array) -> jax.Array:
  """True at k (B,) evenly spaced ones of the tokens of mask (B, N)."""
  rank = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
  n = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.int32), 1)
  k = jnp.minimum(k[:, None], n)
  return mask & ((rank + 1) * k // n > rank * k // n)


def merge(
  x: jax.Array, size: jax.Array, assignment: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
  """Means of what is assigned to each of k slots, weighted by size.

  Args:
    x: (B, N, D).
    size: (B, N).
    assignment: (B, N) int32 in [-1, k); -1: to none, its value never matters.
    k: slots, static.

  Returns:
    Means (B, k, D) in x.dtype and summed sizes (B, k) float32; 0 where a slot
    has nothing. Sums in float32.
  """
  kept = assignment >= 0
  size = jnp.where(kept, jnp.asarray(size, jnp.float32), 0.0)
  x32 = jnp.where(kept[..., None], x.astype(jnp.float32), 0.0)
  weighted = x32 * size[..., None]
  if k <= _ONE_HOT_SLOTS:
    slots = jax.nn.one_hot(assignment, k, dtype=jnp.float32)  # (B, N, k)
    sums = jnp.einsum('bnk,bnd->bkd', slots, weighted, precision=_HIGHEST)
    sizes = jnp.einsum('bnk,bn->bk', slots, size, precision=_HIGHEST)
  else:
    slot = jnp.where(kept, assignment, k)  # Slot k is cut off below.
    add = jax.vmap(lambda v, s: jax.ops.segment_sum(v, s, k + 1)[:k])
    sums, sizes = add(weighted, slot), add(size, slot)
  means = sums / jnp.where(sizes > 0, sizes, 1.0)[..., None]
  return means.astype(x.dtype), sizes


def representatives(assignment: jax.Array, k: int) -> jax.Array:
  """The first member of each slot (B, k) int32; -1: it has none."""
  B, N = assignment.shape
  rows = jnp.arange(B)[:, None]
  slot = jnp.where(assignment < 0, k, assignment)
  source = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32)[None], (B, N))
  first = jnp.full((B, k), N, jnp.int32)
  first = first.at[rows, slot].min(source, mode='drop')
  return jnp.where(first < N, first, -1)


def order_slots(assignment: jax.Array, k: int) -> jax.Array:
  """The same groups, slots in order of their first member, empty ones last."""
  first = representatives(assignment, k)
  N = assignment.shape[1]
  order = jnp.argsort(jnp.where(first < 0, N, first), axis=1, stable=True)
  new = scatter_slots(order, k)  # (B, k): old slot -> new slot.
  return jnp.where(assignment < 0, -1, gather(new, assignment))


def merged(
  ts: interface.TokenSet,
  assignment: jax.Array,
  k_max: int,
  *,
  index: jax.Array | None = None,
  positions: jax.Array | None = None,
  aux: Mapping[str, Any] | None = None,
) -> interface.Reduced:
  """The answer of a merger: the weighted mean of each slot's members.

  Args:
    ts: the tokens.
    assignment: (B, N); slots with members come first (`order_slots`). Masked
      tokens are taken out.
    k_max: slots.
    index: (B, k_max) representatives; None: the first members.
    positions: (B, k_max, P); None: those of the representatives.
    aux: of the answer.
  """
  assignment = jnp.where(ts.mask, assignment, -1).astype(jnp.int32)
  first = representatives(assignment, k_max)
  mask = first >= 0
  index = first if index is None else jnp.where(mask, index, -1)
  tokens, size = merge(ts.tokens, ts.size, assignment, k_max)
  if positions is None:
    positions = gather(ts.positions, index)
  return interface.Reduced(
    tokens=tokens,
    mask=mask,
    positions=jnp.where(mask[..., None], positions, 0).astype(jnp.int32),
    size=size,
    index=index.astype(jnp.int32),
    assignment=assignment,
    count=jnp.sum(mask, axis=1, dtype=jnp.int32),
    aux=dict(aux or {}),
  )


def packed(
  reduced: interface.Reduced, k_max: int, k: jax.Array | None = None
) -> interface.Reduced:
  """The same with slots in use first, the rest zero, and k_max slots in all.

  Args:
    reduced: slots in any order of use; what unused ones hold never matters.
    k_max: slots of the answer.
    k: (B,) slots to use at most, the first ones; None: k_max.
  """
  index, mask = compact(reduced.mask, k_max, k)
  slots = scatter_slots(index, reduced.mask.shape[1])
  source = gather(reduced.index + 1, index) - 1  # -1 where there is no slot.
  assignment = gather(slots + 1, reduced.assignment) - 1
  return dataclasses.replace(
    reduced,
    tokens=gather(reduced.tokens, index),
    mask=mask,
    positions=gather(reduced.positions, index),
    size=gather(reduced.size, index),
    index=source,
    assignment=assignment,
    count=jnp.sum(mask, axis=1, dtype=jnp.int32),
  )


def renumbered(mask: jax.Array, axes: int) -> jax.Array:
  """Positions 0..count-1 on all axes of slots in use: (B, K, axes) int32.

  An option where a method asks for it: it moves tokens nearer to each other.
  """
  place = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
  place = jnp.where(mask, place, 0)
  return jnp.broadcast_to(place[..., None], (*mask.shape, axes))


def unmerge(reduced: interface.Reduced) -> jax.Array:
  """Each source token's slot (B, N, D); 0 where it was dropped."""
  return gather(reduced.tokens, reduced.assignment)


def resample_matrix(
  n_in: int,
  n_out: jax.Array | int,
  n_out_max: int,
  kind: str = 'adaptive_avg',
) -> jax.Array:
  """The matrix (n_out_max, n_in) that resamples one axis.

  'adaptive_avg': row i averages [floor(i n_in / n_out), ceil((i + 1) n_in /
  n_out)). 'bilinear': pixel centres at halves, edges repeated, no smoothing.
  Both are what torch.nn.functional computes.

  Args:
    n_in: samples of the axis, static.
    n_out: samples to make of it, may be traced, so one compile serves all.
    n_out_max: rows; those from n_out on are 0.
    kind: of RESAMPLING.

  Raises:
    ValueError: another kind.
  """
  if kind not in RESAMPLING:
    raise ValueError(
      f'resample_matrix: kind={kind!r}; allowed {sorted(RESAMPLING)}.'
    )
  row = jnp.arange(n_out_max, dtype=jnp.int32)[:, None]
  column = jnp.arange(n_in, dtype=jnp.int32)[None]
  n_out = jnp.asarray(n_out, jnp.int32)
  some = jnp.maximum(n_out, 1)  # Rows of n_out = 0 are cut off below.
  if kind == 'adaptive_avg':
    start, stop = row * n_in // some, -(-(row + 1) * n_in // some)
    inside = (column >= start) & (column < stop)
    out = inside.astype(jnp.int32) / jnp.maximum(stop - start, 1)
  else:
    # (i + 1/2) n_in / n_out - 1/2 in halves, so that floor is exact.
    twice = jnp.maximum((2 * row + 1) * n_in - some, 0)
    low = jnp.minimum(twice // (2 * some), n_in - 1)
    high = jnp.minimum(low + 1, n_in - 1)
    weight = (twice - 2 * some * low) / (2 * some)
    out = jnp.where(column == low, 1 - weight, 0.0)
    out += jnp.where(column == high, weight, 0.0)
  return jnp.where(row < n_out, out, 0.0)


def resample_grid(
  x: jax.Array, rows: jax.Array, columns: jax.Array
) -> jax.Array:
  """Resamples both axes of a grid: rows x columns^T for every channel.

  Args:
    x: (..., H, W, D).
    rows, columns: (..., H', H), (..., W', W).

  Returns:
    (..., H', W', D) in x.dtype; sums in float32.
  """
  out = jnp.einsum(
    '...rh,...hwd->...rwd', rows, x.astype(jnp.float32), precision=_HIGHEST
  )
  out = jnp.einsum('...cw,...rwd->...rcd', columns, out, precision=_HIGHEST)
  return out.astype(x.dtype)


def gumbel_topk(rng: jax.Array, logp: jax.Array, k: int) -> jax.Array:
  """k draws without replacement from logits (..., N) -> (..., k) int32.

  Exact: the largest logp + Gumbel noise (Kool et al., 2019, arXiv 1903.06059).
  Logits of -inf are drawn last.
  """
  noise = jax.random.gumbel(rng, logp.shape, jnp.float32)
  return jax.lax.top_k(logp.astype(jnp.float32) + noise, k)[1]


def ste(hard: jax.Array, soft: jax.Array) -> jax.Array:
  """The value of `hard` with the gradient of `soft` (straight-through)."""
  return soft + jax.lax.stop_gradient(hard - soft)


def masked_mean(
  x: jax.Array, mask: jax.Array, axis: int, *, keepdims: bool = False
) -> jax.Array:
  """The mean of x where mask, which broadcasts to it; 0 where nothing is."""
  x = x.astype(jnp.float32)
  total = jnp.sum(jnp.where(mask, x, 0.0), axis=axis, keepdims=keepdims)
  count = jnp.sum(mask, axis=axis, keepdims=keepdims, dtype=jnp.float32)
  return total / jnp.maximum(count, 1.0)


def normalize(x: jax.Array, eps: float = 1e-12) -> jax.Array:
  """x (..., D) float32 over its length; 0 stays 0, with a finite gradient."""
  x = x.astype(jnp.float32)
  squared = jnp.sum(x * x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(squared, eps * eps))


def nearest(
  x: jax.Array,
  c: jax.Array,
  *,
  top: int = 1,
  allowed: jax.Array | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The `top` largest inner products of x (..., N, D) with c (..., M, D).

  Args:
    x, c: queries and centres; products are made in float32.
    top: how many.
    allowed: (..., N, M) bool or what broadcasts to it; False: not this centre.
    implementation: of pallas_kernels.nearest_center, which serves an `allowed`
      that is the same for all N; None picks.

  Returns:
    values, indices (..., N, top), best first, ties to the lower index; a value
    is -inf where there is no centre.
  """
  x, c = x.astype(jnp.float32), c.astype(jnp.float32)
  shared = allowed is None or allowed.shape[-2] == 1
  name = implementation or nearest_center.choose(x, c, top=top)
  if shared and name != 'xla':
    bias = None
    if allowed is not None:
      valid = jnp.broadcast_to(allowed[..., 0, :], c.shape[:-1])
      bias = jnp.where(valid, 0.0, -jnp.inf)
    return nearest_center.nearest_center(
      x, c, top=top, bias=bias, implementation=name
    )
  scores = jnp.einsum('...nd,...md->...nm', x, c, precision=_HIGHEST)
  if allowed is not None:
    scores = jnp.where(allowed, scores, -jnp.inf)
  if top > 1:
    return jax.lax.top_k(scores, top)
  values = jnp.max(scores, axis=-1, keepdims=True)
  index = jnp.argmax(scores, axis=-1, keepdims=True).astype(jnp.int32)
  return values, index


def keys_of(ts: interface.TokenSet) -> jax.Array:
  """What tokens are compared by (B, N, Dk), 0 where masked, length 1."""
  keys = ts.tokens if ts.keys is None else ts.keys
  return normalize(jnp.where(ts.mask[..., None], keys, 0))


def group_sizes(assignment: jax.Array, k: int) -> jax.Array:
  """Members of each slot (B, k) int32."""
  return jnp.sum(
    jax.nn.one_hot(assignment, k, dtype=jnp.int32), axis=1, dtype=jnp.int32
  )
