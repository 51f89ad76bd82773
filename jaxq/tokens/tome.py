"""ToMe: the most similar tokens become one, by bipartite soft matching.

Bolya et al., 2022, "Token Merging: Your ViT But Faster", arXiv 2210.09461.

  S = A B^T            cosines of the sources' keys with the destinations'
  best_i = max_j S_ij  the r sources with the largest join their argmax
  x = sum size x / sum size, size = sum size

Every second token is a destination, so one round of matching takes at most
half of the tokens; further rounds go on from the merged ones. Inside an
encoder there is one round per layer, between attention and MLP, and attention
weighs each key by its size (`proportional`). Training-free; off-the-shelf
masked autoencoders want proportional=false.

Slots are in order of their destination, whose position they have: the order of
the paper's code (sources that stay, then destinations) is not spatial, and a
causal model would be misled by it.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxq.tokens import interface, primitives, schedule

PARTITIONS = ('random', 'strided')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TomeConfig(interface.Config):
  """r: tokens that each layer of an encoder merges away, on average.

  budget: as of interface.Config; used where there are no layers.
  inflect: -1..1, how r grows over the layers (schedule.by_count).
  partition: 'strided': every `stride`-th token is a destination; 'random': all
    but the r tokens that are drawn are.
  stride: at least 2. Above it, rows whose traced k is below stride - 1 lose
    slots instead of merging the last few.
  proportional: attention weighs keys by their sizes.
  """

  budget: float = 0.5
  r: int = 13
  inflect: float = 0.0
  partition: str = 'strided'
  stride: int = 2
  proportional: bool = True

  def __post_init__(self):
    super().__post_init__()
    if self.r < 0 or not -1 <= self.inflect <= 1 or self.stride < 2:
      raise ValueError(
        f'TomeConfig: r={self.r}, inflect={self.inflect}, stride='
        f'{self.stride}; allowed are r >= 0, inflect in [-1, 1] and stride >= '
        '2. r=0 merges nothing.'
      )
    if self.partition not in PARTITIONS:
      raise ValueError(
        f'TomeConfig: partition={self.partition!r}; allowed '
        f'{sorted(PARTITIONS)}.'
      )

  @property
  def traits(self) -> interface.Traits:
    """A merger by keys."""
    return interface.Traits(kind='merger', rng=self.partition == 'random')

  def example(self) -> interface.Example:
    """One round, and those that a smaller k takes."""
    return interface.Example(reducer=self, grid=(1, 4, 5), k_max=11)

  def schedule(self, num_layers: int, n: int, special: int) -> tuple[int, ...]:
    """Slots behind each layer: r fewer each time."""
    return schedule.by_count(
      self.r,
      num_layers,
      n,
      special,
      inflect=self.inflect,
      most=1 - 1 / self.stride,
    )

  def _reduce(
    self,
    ts: interface.TokenSet,
    budget: interface.Budget,
    given: interface.Given,
  ) -> interface.Reduced:
    B, N = ts.mask.shape
    goal, k = min(budget.k_max, N), budget.counts(B)
    index, used = primitives.compact(ts.mask, N)  # Padding goes last.
    state = _State(
      x=primitives.gather(ts.tokens, index),
      size=primitives.gather(ts.size, index),
      keys=primitives.gather(primitives.keys_of(ts), index),
      index=index,
      used=used,
      assignment=primitives.scatter_slots(index, N),
    )
    key = jax.random.key(0) if given.rng is None else given.rng

    def merged(state, taken, left, key):
      count = jnp.sum(state.used, axis=1, dtype=jnp.int32)
      to, sources = match(
        state.keys,
        state.used,
        jnp.clip(count - k, 0, taken),
        taken,
        special=ts.special,
        stride=self.stride,
        rng=key if self.partition == 'random' else None,
      )
      return _join(state, to, sources, left)

    n = N
    while (taken := min(n - goal, self._sources(n, ts.special))) > 0:
      key, key_round = jax.random.split(key)
      state = merged(state, taken, n - taken, key_round)
      n -= taken
    if budget.k is None:
      return _answer(ts, state, budget)
    # Rows may have to go on, to k of their own; the slots stay as many.
    most, rounds = n, 0
    while (taken := self._sources(most, ts.special)) > 0:
      most, rounds = most - taken, rounds + 1
    if rounds:
      taken = self._sources(n, ts.special)
      state, _ = jax.lax.scan(
        lambda state, key: (merged(state, taken, n, key), None),
        state,
        jax.random.split(key, rounds),
      )
    return _answer(ts, state, budget)

  def _sources(self, n: int, special: int) -> int:
    """The most of n tokens that one round can merge."""
    return max(n - special, 0) * (self.stride - 1) // self.stride


@flax.struct.dataclass
class _State:
  """Slots between two rounds: x (B, n, D) and what belongs to them.

  assignment (B, N) int32: the slot of each source token.
  """

  x: jax.Array
  size: jax.Array
  keys: jax.Array
  index: jax.Array
  used: jax.Array
  assignment: jax.Array


def match(
  keys: jax.Array,
  used: jax.Array,
  r: jax.Array,
  r_max: int,
  *,
  special: int = 0,
  stride: int = 2,
  rng: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """One round of bipartite soft matching.

  Args:
    keys: (B, n, Dk), of length 1.
    used: (B, n) bool.
    r: (B,) int32 tokens to merge; at most r_max, which is static.
    r_max: at most the number of sources.
    special: leading tokens that are neither source nor destination.
    stride: every so-many-th token is a destination.
    rng: draws r sources instead; all others are destinations.

  Returns:
    to (B, n) int32: where each token goes, mostly itself; and the tokens that
    go elsewhere (B, r_max) int32, -1 for none.
  """
  B, n, _ = keys.shape
  own = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None], (B, n))
  free = used & (own >= special)
  if rng is not None:
    draws = jax.random.uniform(rng, (B, n))
    sources, _ = primitives.select_topk(draws, free, r_max, r)
    is_source = primitives.scatter_slots(sources, n) >= 0
    _, best = primitives.nearest(
      primitives.gather(keys, sources),
      keys,
      allowed=(free & ~is_source)[:, None],
    )
    # Where all are sources there is no destination, and nothing moves.
    sources = jnp.where(jnp.any(free & ~is_source, 1)[:, None], sources, -1)
    destinations = best[..., 0]
  else:
    is_destination = np.arange(n) % stride == stride - 1
    if not is_destination[special:].any():
      is_destination[-1:] = True
    a = np.flatnonzero(~is_destination & (np.arange(n) >= special))
    b = np.flatnonzero(is_destination & (np.arange(n) >= special))
    value, best = primitives.nearest(
      keys[:, a], keys[:, b], allowed=free[:, None, b]
    )
    chosen, _ = primitives.select_topk(value[..., 0], free[:, a], r_max, r)
    destinations = primitives.gather(
      jnp.asarray(b, jnp.int32)[best[..., 0]], chosen
    )
    sources = jnp.where(
      chosen >= 0, jnp.asarray(a, jnp.int32)[jnp.maximum(chosen, 0)], -1
    )
  rows = jnp.arange(B)[:, None]
  moved = jnp.where(sources < 0, n, sources)
  return own.at[rows, moved].set(destinations, mode='drop'), sources


def _join(state: _State, to: jax.Array, sources: jax.Array, n: int) -> _State:
  """The state with sources (B, r) added to where they go; n slots remain."""
  width = state.used.shape[1]
  stays = primitives.scatter_slots(sources, width) < 0
  index, used = primitives.compact(state.used & stays, n)
  slot = primitives.gather(primitives.scatter_slots(index, width) + 1, to) - 1

  def add(values):  # (B, width, D) float32, sums over the joined ones.
    moved = primitives.gather(values, sources)
    at = jnp.where(sources < 0, -1, primitives.gather(slot, sources))
    one_hot = jax.nn.one_hot(at, n, axis=1, dtype=jnp.float32)  # (B, n, r)
    moved = jnp.matmul(one_hot, moved, precision=jax.lax.Precision.HIGHEST)
    return primitives.gather(values, index) + moved

  weight = state.size[..., None]
  size = add(weight)
  divisor = jnp.where(size > 0, size, 1.0)
  x = add(state.x.astype(jnp.float32) * weight) / divisor
  return _State(
    x=x.astype(state.x.dtype),
    size=size[..., 0],
    keys=primitives.normalize(add(state.keys * weight)),
    index=primitives.gather(state.index + 1, index) - 1,
    used=used,
    assignment=primitives.gather(slot + 1, state.assignment) - 1,
  )


def _answer(
  ts: interface.TokenSet, state: _State, budget: interface.Budget
) -> interface.Reduced:
  reduced = interface.Reduced(
    tokens=state.x,
    mask=state.used,
    positions=primitives.gather(ts.positions, state.index),
    size=state.size,
    index=state.index,
    assignment=state.assignment,
    count=jnp.sum(state.used, axis=1, dtype=jnp.int32),
  )
  if budget.k is None and state.used.shape[1] == budget.k_max:
    return reduced
  # A row that its special tokens hold above k loses its last slots.
  return primitives.packed(reduced, budget.k_max, budget.k)
