"""What every token reducer is: a set of tokens and a budget in, slots out.

  ts = token_set(tokens, grid=(T, H, W))
  reduced = config.reduce(ts, scores=scores, budget=Budget(k_max=64))

A reducer is a frozen config. It says with `traits` what it needs and what it
promises, and does its work in `_reduce`; `Config.reduce` checks the arguments
before that, for all reducers in the same words. Shapes are static: a budget has
a static number of slots `k_max` (K), and a traced number of them in use, `k`.

What every reducer keeps to (tests/tokens/test_contract.py):
  * Shapes depend on static arguments only; one compile whatever k, the mask and
    the scores are.
  * Slots in use come first, in increasing order of their source index unless
    `traits.ordered` is False. The other slots are 0 in `tokens`, `size` and
    `positions`, False in `mask` and -1 in `index`.
  * `assignment[b, j]` is the slot that holds source token j; -1: dropped. Of a
    selector, assignment[b, index[b, s]] == s and the others are -1; of a
    merger, size[b, s] = sum of ts.size over what is assigned to s.
  * Selectors copy bits. Mergers whose `traits.conserves_mass` is True keep
    sum size * tokens of what is assigned.
  * Positions are the original ones: of the selected token, of the slot's
    representative, or of the centre of what was pooled.
  * Masked tokens are never selected nor merged, and their values never matter.
    A mask that is all False gives count 0 and no NaN, under jit.
  * Gradients reach the tokens, and the scores where
    `traits.differentiable_scores`; they are finite for counts 0 and 1.
"""

import dataclasses
import math
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Grid = tuple[int, int, int]  # Frames, rows and columns: (T, H, W).
KINDS = ('selector', 'merger', 'resampler', 'generator')
ROUNDING = ('ceil', 'floor', 'round')


@flax.struct.dataclass
class Budget:
  """k_max: slots, static. k: (B,) int32 in use at most, traced; None: k_max."""

  k_max: int = flax.struct.field(pytree_node=False)
  k: jax.Array | None = None

  def counts(self, batch: int) -> jax.Array:
    """k as (B,) int32."""
    if self.k is None:
      return jnp.full((batch,), self.k_max, jnp.int32)
    return jnp.broadcast_to(jnp.asarray(self.k, jnp.int32), (batch,))


@flax.struct.dataclass
class TokenSet:
  """Tokens of a batch, before a reduction; made by `token_set`.

  tokens (B, N, D). mask (B, N) bool, False: padding. positions (B, N, P) int32.
  size (B, N) float32: how many original tokens each one stands for.
  modality: (B, N) int32, or None where there is one only.
  keys: (B, N, Dk) by which tokens are compared (attention keys, mean over
    heads); None: the tokens themselves.
  grid: (T, H, W) of the tokens behind the special ones, in raster order; None:
    they lie on no grid.
  special: leading tokens that are no patches (class token first, then a
    distillation token or registers).
  """

  tokens: jax.Array
  mask: jax.Array
  positions: jax.Array
  size: jax.Array
  modality: jax.Array | None = None
  keys: jax.Array | None = None
  grid: Grid | None = flax.struct.field(pytree_node=False, default=None)
  special: int = flax.struct.field(pytree_node=False, default=0)


@flax.struct.dataclass
class Reduced:
  """Slots of a batch, behind a reduction.

  tokens (B, K, D), mask (B, K) bool, positions (B, K, P) int32, size (B, K)
  float32, as of a TokenSet.
  index: (B, K) int32 source of the slot's representative; -1: none, the slot is
    synthesized or not in use.
  assignment: (B, N) int32 slot that absorbed a source token; -1: none.
  count: (B,) int32 slots in use.
  aux: what else the method gives: losses, logits, soft weights, groups.
  """

  tokens: jax.Array
  mask: jax.Array
  positions: jax.Array
  size: jax.Array
  index: jax.Array
  assignment: jax.Array
  count: jax.Array
  aux: dict[str, Any] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class Given:
  """What a reducer gets beside tokens and budget; None where not given.

  scores: (B, N) float32, higher is kept. query (B, L, Dq), query_mask (B, L)
  bool (None: all True). rng: a key. params: of `init_params`, trained or not.
  """

  scores: jax.Array | None = None
  query: jax.Array | None = None
  query_mask: jax.Array | None = None
  rng: jax.Array | None = None
  params: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
  """What a reducer needs, and what it promises.

  kind: 'selector' copies tokens, 'merger' averages them, 'resampler' makes new
    ones at new places, 'generator' writes ones that have no place.
  scores, query, rng, params, grid, modality: needed, or not.
  class_token: the scores (or the method) need one; `ts.special` is at least 1
    or the scores are those of a class token that the caller has left out.
  position_axes: P must be at least so many.
  ordered: slots are in order of their source.
  conserves_mass: sum size * tokens of what is assigned is kept.
  differentiable_scores: gradients reach the scores.
  """

  kind: str
  scores: bool = False
  query: bool = False
  rng: bool = False
  params: bool = False
  grid: bool = False
  modality: bool = False
  class_token: bool = False
  position_axes: int = 1
  ordered: bool = True
  conserves_mass: bool = True
  differentiable_scores: bool = False

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f'Traits: kind={self.kind!r}; allowed {sorted(KINDS)}.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
  """Small inputs by which the contract test can run a reducer.

  reducer: the config, perhaps with smaller fields. grid, dim (D), query_length
  (L), query_dim (Dq), position_axes (P), special: of the inputs; scores, query,
  modality (two halves), rng and params are made where the traits need them.
  k_max: of the budget.
  """

  reducer: 'Config'
  grid: Grid = (2, 4, 4)
  dim: int = 16
  query_length: int = 5
  query_dim: int = 16
  position_axes: int = 3
  special: int = 0
  k_max: int = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Base of the reducers' configs; equal ones share programs.

  budget: tokens kept where the caller names no Budget, as a share of N.
  """

  budget: float = 0.25

  def __post_init__(self):
    check_ratio(type(self).__name__, 'budget', self.budget)

  @property
  def traits(self) -> Traits:
    """What it needs and promises; may depend on the fields."""
    raise NotImplementedError

  def budget_for(self, ts: TokenSet) -> Budget:
    """The budget its own fields ask for; shapes of `ts` are enough."""
    return budget_from_ratio(ts.mask.shape[1], self.budget)

  def init_params(
    self, rng: jax.Array, ts: TokenSet, query: jax.Array | None = None
  ) -> Any:
    """Untrained parameters for inputs like these; None: it has none."""
    del rng, ts, query

  def example(self) -> Example:
    """Inputs for the contract test."""
    return Example(reducer=self)

  def reduce(
    self,
    ts: TokenSet,
    *,
    scores: jax.Array | None = None,
    query: jax.Array | None = None,
    query_mask: jax.Array | None = None,
    budget: Budget | None = None,
    rng: jax.Array | None = None,
    params: Any = None,
  ) -> Reduced:
    """Reduces a set of tokens.

    Args:
      ts: the tokens.
      scores: (B, N), higher is kept.
      query: (B, L, Dq) embeddings of the question.
      query_mask: (B, L) bool; None: all True.
      budget: None: `budget_for(ts)`.
      rng: a key.
      params: of `init_params`.

    Raises:
      ValueError: an argument is missing, or does not fit the tokens.
    """
    budget = self.budget_for(ts) if budget is None else budget
    given = Given(
      scores=scores, query=query, query_mask=query_mask, rng=rng, params=params
    )
    check(self, ts, budget, given)
    return self._reduce(ts, budget, given)

  def _reduce(self, ts: TokenSet, budget: Budget, given: Given) -> Reduced:
    """The method itself; the arguments have been checked."""
    raise NotImplementedError


class Reducer(Protocol):
  """A `Config`, as far as its callers see it."""

  @property
  def traits(self) -> Traits:
    """What it needs and promises."""
    ...

  def budget_for(self, ts: TokenSet) -> Budget:
    """The budget its own fields ask for."""
    ...

  def init_params(
    self, rng: jax.Array, ts: TokenSet, query: jax.Array | None = None
  ) -> Any:
    """Untrained parameters, or None."""
    ...

  def reduce(
    self,
    ts: TokenSet,
    *,
    scores: jax.Array | None = None,
    query: jax.Array | None = None,
    query_mask: jax.Array | None = None,
    budget: Budget | None = None,
    rng: jax.Array | None = None,
    params: Any = None,
  ) -> Reduced:
    """The reduction."""
    ...


def token_set(
  tokens: jax.Array,
  *,
  mask: jax.Array | None = None,
  positions: jax.Array | None = None,
  size: jax.Array | None = None,
  modality: jax.Array | None = None,
  keys: jax.Array | None = None,
  grid: Grid | None = None,
  special: int = 0,
) -> TokenSet:
  """A TokenSet of tokens (B, N, D) with what is left out filled in.

  mask: None: all True. positions: None: (frame, row, column) on a grid, where
  special tokens are at 0, else 0..N-1. size: None: 1.

  Raises:
    ValueError: shapes, grid or special do not fit N, or all is masked.
  """
  B, N, _ = tokens.shape
  if positions is None:
    table = np.arange(N)[:, None]
    if grid is not None:
      check_grid(grid, N, special)
      table = np.concatenate(
        [np.zeros((special, 3)), np.indices(grid).reshape(3, -1).T]
      )
    positions = jnp.broadcast_to(
      jnp.asarray(table, jnp.int32), (B, *table.shape)
    )
  ts = TokenSet(
    tokens=tokens,
    mask=jnp.ones((B, N), bool) if mask is None else mask,
    positions=positions,
    size=jnp.ones((B, N), jnp.float32) if size is None else size,
    modality=modality,
    keys=keys,
    grid=grid,
    special=special,
  )
  check_token_set(ts)
  return ts


def as_token_set(reduced: Reduced) -> TokenSet:
  """The slots as tokens of a next reduction; they lie on no grid."""
  return TokenSet(
    tokens=reduced.tokens,
    mask=reduced.mask,
    positions=reduced.positions,
    size=reduced.size,
  )


def budget_from_ratio(n: int, ratio: float, rounding: str = 'floor') -> Budget:
  """Of n tokens the share `ratio`, at least 1 token.

  'round' is floor(x + 0.5), not Python's round, which takes halves to even.

  Raises:
    ValueError: n < 1, ratio not in (0, 1], unknown rounding.
  """
  if n < 1:
    raise ValueError(
      f'budget_from_ratio: n={n}; there must be at least 1 token. Pass the '
      'number of tokens before the reduction.'
    )
  check_ratio('budget_from_ratio', 'ratio', ratio)
  if rounding not in ROUNDING:
    raise ValueError(
      f'budget_from_ratio: rounding={rounding!r}; allowed {sorted(ROUNDING)}.'
    )
  # 0.29 * 100 is 28.999...: what is an integer but for float error is one.
  exact = round(n * ratio, 9)
  made = {
    'floor': math.floor(exact),
    'ceil': math.ceil(exact),
    'round': math.floor(exact + 0.5),
  }
  return Budget(k_max=max(1, made[rounding]))


def check_ratio(owner: str, name: str, ratio: float) -> None:
  """Raises ValueError unless 0 < ratio <= 1."""
  if not 0 < ratio <= 1:
    raise ValueError(
      f'{owner}: {name}={ratio}; a share of the tokens is needed, in (0, 1]. '
      'Give a number of tokens as Budget(k_max=...).'
    )


def check_grid(grid: Grid, n: int, special: int = 0) -> None:
  """Raises ValueError unless T * H * W + special == n."""
  if len(grid) != 3 or math.prod(grid) + special != n:
    raise ValueError(
      f'tokens: grid={grid} and special={special} for N={n} tokens; frames * '
      'rows * columns + special must be N. Pass the grid of these tokens.'
    )


def square_grid(ts: TokenSet) -> Grid:
  """ts.grid; without one, a square frame.

  Raises:
    ValueError: no grid, and N - special is not a square.
  """
  if ts.grid is not None:
    return ts.grid
  N = ts.mask.shape[1] - ts.special
  side = math.isqrt(N)
  if side * side != N:
    raise ValueError(
      f'tokens: N={N} tokens without a grid; N must be a square where no grid '
      'is given. Pass token_set(..., grid=(frames, rows, columns)).'
    )
  return 1, side, side


def check_token_set(ts: TokenSet) -> None:
  """Raises ValueError unless the fields of a TokenSet fit each other."""
  B, N, _ = ts.tokens.shape
  shapes = {
    'mask': (ts.mask, (B, N)),
    'size': (ts.size, (B, N)),
    'modality': (ts.modality, (B, N)),
    'positions': (ts.positions, (B, N, ts.positions.shape[-1])),
    'keys': (ts.keys, (B, N, 0 if ts.keys is None else ts.keys.shape[-1])),
  }
  for name, (array, shape) in shapes.items():
    if array is not None and array.shape != shape:
      raise ValueError(
        f'tokens: {name} {array.shape} for tokens {ts.tokens.shape}; it must '
        f'be {shape}. Make it for the tokens of this batch.'
      )
  if not 0 <= ts.special <= N:
    raise ValueError(
      f'tokens: special={ts.special} for N={N} tokens; allowed 0..N. Pass how '
      'many leading tokens are no patches.'
    )
  if ts.grid is not None:
    check_grid(ts.grid, N, ts.special)
  if _concrete(ts.mask) and not np.asarray(ts.mask).any():
    raise ValueError(
      f'tokens: all {B} x {N} tokens are masked; at least one must be True. '
      'Skip the reduction for an empty batch.'
    )


def check_budget(owner: str, budget: Budget, limit: int | None = None) -> None:
  """Raises ValueError unless 0 < k_max <= limit and 0 <= k <= k_max."""
  if budget.k_max < 1:
    raise ValueError(
      f'{owner}: k_max={budget.k_max}; at least 1 slot is needed. For fewer '
      'tokens in some rows pass Budget(k_max=..., k=...).'
    )
  if limit is not None and budget.k_max > limit:
    raise ValueError(
      f'{owner}: k_max={budget.k_max} for N={limit} tokens; a selector keeps '
      f'at most all. Use k_max={limit}, or fewer.'
    )
  if budget.k is not None and _concrete(budget.k):
    k = np.asarray(budget.k)
    if k.size and not (k.min() >= 0 and k.max() <= budget.k_max):
      raise ValueError(
        f'{owner}: k={k.tolist()} with k_max={budget.k_max}; allowed '
        '0..k_max. Raise k_max, which is static.'
      )


def check(reducer: Config, ts: TokenSet, budget: Budget, given: Given) -> None:
  """Raises ValueError unless a reducer can work on these arguments."""
  owner, traits = type(reducer).__name__, reducer.traits
  check_token_set(ts)
  B, N = ts.mask.shape
  check_budget(owner, budget, N if traits.kind == 'selector' else None)
  for name in ('scores', 'query', 'rng', 'params'):
    if getattr(traits, name) and getattr(given, name) is None:
      raise ValueError(
        f'{owner}: {name}=None; this reducer needs {name}. Pass '
        f'reduce(..., {name}=...); its docstring says which.'
      )
  if given.scores is not None and given.scores.shape != (B, N):
    raise ValueError(
      f'{owner}: scores {given.scores.shape} for {B} x {N} tokens; they must '
      f'be {(B, N)}. Give one score per token, of special tokens too.'
    )
  if given.query is not None and (
    given.query.ndim != 3 or given.query.shape[0] != B
  ):
    raise ValueError(
      f'{owner}: query {given.query.shape} for a batch of {B}; it must be '
      f'({B}, L, Dq). Embed one question per row.'
    )
  if given.query_mask is not None and (
    given.query is None or given.query_mask.shape != given.query.shape[:2]
  ):
    raise ValueError(
      f'{owner}: query_mask {given.query_mask.shape} does not fit the query; '
      'it must be (B, L) of query (B, L, Dq). Pass both, or neither.'
    )
  if traits.modality and ts.modality is None:
    raise ValueError(
      f'{owner}: ts.modality is None; this reducer needs to know which tokens '
      'are of which kind. Pass token_set(..., modality=...).'
    )
  if traits.class_token and not ts.special:
    raise ValueError(
      f'{owner}: ts.special=0; this reducer needs a class token. Use a model '
      'that has one, or a reducer that needs none.'
    )
  if ts.positions.shape[-1] < traits.position_axes:
    raise ValueError(
      f'{owner}: positions have {ts.positions.shape[-1]} axes; at least '
      f'{traits.position_axes} are needed. Pass token_set(..., '
      'grid=(frames, rows, columns)).'
    )
  if traits.grid:
    square_grid(ts)


def _concrete(array: Any) -> bool:
  """Whether the values can be looked at: not traced, and not a shape only."""
  return isinstance(array, np.ndarray | jax.Array) and not isinstance(
    array, jax.core.Tracer
  )
