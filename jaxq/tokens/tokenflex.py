"""TokenFLEX: one projector for any number of visual tokens.

Hu et al., 2025, https://arxiv.org/abs/2504.03154. Patches X (H x W, d) become
n x n tokens:

  Y = R_h X R_w^T                 adaptive average pooling, per channel
  Z = W_o (silu(W_g y) * W_u y),  y = layer_norm(Y)

R_h (n, H) and R_w (n, W) average the bins [floor(i H / n), ceil((i + 1) H / n))
and overlap where n does not divide H. A model that is trained with a random n
at every step (jaxq.tokens.tokenflex_training) can be asked for any n later. n
may be traced: one program serves a batch of mixed counts, padded to the
largest.

The paper gives no widths, no probabilities and no place of the norm; the
defaults here (hidden width = output width, no biases, norm behind the pooling,
equal probabilities) are ours. Masked patches weigh nothing in their bins.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from jaxq.nn import linear, norms
from jaxq.parallel import mesh as mesh_lib
from jaxq.tokens import interface, primitives

BLOCKS = ('mlp', 'swiglu')
NORMS = ('after', 'before', 'none')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFlexConfig(interface.Config):
  """n x n tokens for each frame; k_max must be frames * n * n.

  Attributes:
    budget: share of the patches; n is the largest that stays below it.
    project: whether the SwiGLU projector follows the pooling; it needs params.
    features: output width D of the projector; 0: that of the tokens.
    hidden: its inner width m; 0: D.
    block: of BLOCKS. 'mlp' is what SwiGLU is compared with, W_2 gelu(W_1 y) of
      about as many parameters.
    norm: LayerNorm 'after' the pooling, 'before' it, or 'none'.
    count_embed: whether the gate gets a learned vector for each of `counts`.
    counts: tokens per frame that training draws from, squares.
    probs: of the counts; () is equal ones.
  """

  project: bool = False
  features: int = 0
  hidden: int = 0
  block: str = 'swiglu'
  norm: str = 'after'
  count_embed: bool = False
  counts: tuple[int, ...] = (64, 144, 256)
  probs: tuple[float, ...] = ()

  def __post_init__(self):
    super().__post_init__()
    for count in self.counts:
      side_of('TokenFlexConfig', count)
    if not self.counts:
      raise ValueError(
        'TokenFlexConfig: counts=(); at least one number of tokens is needed. '
        'The paper trains with (64, 144, 256).'
      )
    if self.probs and (
      len(self.probs) != len(self.counts)
      or min(self.probs) < 0
      or abs(sum(self.probs) - 1) > 1e-6
    ):
      raise ValueError(
        f'TokenFlexConfig: probs={self.probs} for counts={self.counts}; one '
        'probability per count is needed, and they must sum to 1. Use () for '
        'equal ones.'
      )
    if self.norm not in NORMS:
      raise ValueError(
        f'TokenFlexConfig: norm={self.norm!r}; allowed {sorted(NORMS)}.'
      )
    if self.block not in BLOCKS:
      raise ValueError(
        f'TokenFlexConfig: block={self.block!r}; allowed {sorted(BLOCKS)}.'
      )
    if self.count_embed and self.block == 'mlp':
      raise ValueError(
        "TokenFlexConfig: count_embed=True with block='mlp'; the vector of a "
        "count is added to the gate, which an MLP has not. Use block='swiglu'."
      )
    if min(self.features, self.hidden) < 0:
      raise ValueError(
        f'TokenFlexConfig: features={self.features}, hidden={self.hidden}; '
        'neither may be negative. 0 takes the width of what comes before.'
      )

  @property
  def traits(self) -> interface.Traits:
    """Pooling resamples; only the projector has weights."""
    return interface.Traits(
      kind='resampler', params=self.project, grid=True, conserves_mass=False
    )

  def budget_for(self, ts: interface.TokenSet) -> interface.Budget:
    """The largest n x n per frame within the share; at least 1 x 1."""
    T, H, W = interface.square_grid(ts)
    share = math.floor(round(self.budget * H * W, 9))
    side = max(1, min(math.isqrt(share), H, W))
    return interface.Budget(k_max=T * side * side)

  def init_params(
    self,
    rng: jax.Array,
    ts: interface.TokenSet,
    query: jax.Array | None = None,
  ) -> Any:
    """Of the projector; None without one."""
    del query
    if not self.project:
      return None
    T, H, W = interface.square_grid(ts)
    patches = jnp.zeros((1, T * H * W, ts.tokens.shape[-1]), ts.tokens.dtype)
    weight = jnp.ones(patches.shape[:2])
    module = self.projector(ts.tokens.shape[-1])
    init = jax.jit(module.init, static_argnums=(3, 4, 5))
    return init(rng, patches, weight, (T, H, W), 1, 1)['params']

  def projector(self, width: int) -> 'TokenAdaptiveProjector':
    """The projector for patches of `width` channels."""
    features = self.features or width
    hidden = self.hidden or features
    if self.block == 'mlp':  # m (2 d + D) parameters, in two matrices.
      hidden = hidden * (2 * width + features) // (width + features)
    return TokenAdaptiveProjector(
      features=features,
      hidden=hidden,
      norm=self.norm,
      gated=self.block == 'swiglu',
      counts=self.counts if self.count_embed else (),
    )

  def example(self) -> interface.Example:
    """Two frames of 4 x 4 patches to 3 x 3, whose bins overlap."""
    return interface.Example(reducer=self, grid=(2, 4, 4), k_max=18)

  def _reduce(
    self,
    ts: interface.TokenSet,
    budget: interface.Budget,
    given: interface.Given,
  ) -> interface.Reduced:
    grid = T, H, W = interface.square_grid(ts)
    per_frame, rest = divmod(budget.k_max, T)
    n_max = side_of('TokenFlexConfig', 0 if rest else per_frame, T)
    if n_max > min(H, W):
      raise ValueError(
        f'TokenFlexConfig: {n_max} x {n_max} tokens of a frame of {H} x {W} '
        f'patches; at most {min(H, W)} x {min(H, W)}. Lower k_max.'
      )
    B = ts.mask.shape[0]
    n = jnp.full((B,), n_max, jnp.int32)
    if budget.k is not None:
      n = _side(jnp.minimum(budget.counts(B), budget.k_max) // T)
    mask = ts.mask[:, ts.special :]
    weight = jnp.where(mask, ts.size[:, ts.special :], 0.0)
    patches = jnp.where(mask[..., None], ts.tokens[:, ts.special :], 0)
    pooled = jax.vmap(lambda x, w, n: pool(x, w, grid, n, n_max))
    if self.project:
      module = self.projector(patches.shape[-1])
      tokens: Any = module.apply(
        {'params': given.params}, patches, weight, grid, n, n_max
      )
    else:
      tokens = pooled(patches, weight, n)[0]
    positions = ts.positions[:, ts.special :].astype(jnp.float32)
    positions = jnp.where(mask[..., None], positions, 0.0)
    positions, mass = pooled(positions, weight, n)
    index, used = primitives.compact(mass > 0, budget.k_max)
    cell = jax.vmap(lambda n: cells(grid, n, n_max))(n)  # (B, T * H * W)
    slot = primitives.scatter_slots(index, budget.k_max)
    cell = jnp.where(mask & (n[:, None] > 0), cell, -1)
    assignment = primitives.gather(slot, cell)
    assignment = jnp.where(cell < 0, -1, assignment)
    rows, columns = jax.vmap(lambda n: _matrices(H, W, n, n_max))(n)
    return interface.Reduced(
      tokens=primitives.gather(tokens, index),
      mask=used,
      positions=primitives.gather(
        jnp.floor(positions + 0.5).astype(jnp.int32), index
      ),
      size=primitives.gather(mass, index),
      index=jnp.full_like(index, -1),
      assignment=jnp.pad(
        assignment, ((0, 0), (ts.special, 0)), constant_values=-1
      ),
      count=jnp.sum(used, axis=1, dtype=jnp.int32),
      aux={'row_weights': rows, 'column_weights': columns},
    )


class TokenAdaptiveProjector(nn.Module):
  """Pooling and the SwiGLU block behind it.

  Attributes:
    features, hidden: D, m.
    norm: of NORMS.
    gated: False: an MLP with GELU, in place of SwiGLU.
    counts: numbers of tokens per frame with a vector of their own in the gate;
      () is none. Other numbers get no vector.
  """

  features: int
  hidden: int
  norm: str = 'after'
  gated: bool = True
  counts: tuple[int, ...] = ()

  @nn.compact
  def __call__(
    self,
    patches: jax.Array,
    weight: jax.Array,
    grid: interface.Grid,
    n: jax.Array | int,
    n_max: int,
  ) -> jax.Array:
    """Patches (B, T * H * W, d) -> tokens (B, T * n_max * n_max, D).

    Args:
      patches: in raster order.
      weight: (B, T * H * W) float32, 0 where masked.
      grid: (T, H, W).
      n: tokens along a side, at most n_max; a number (then nothing is padded
        if it is n_max) or (B,) int32.
      n_max: static. Slots i, j of a frame with i or j >= n are of no use.
    """
    B = patches.shape[0]
    n = jnp.broadcast_to(jnp.asarray(n, jnp.int32), (B,))
    if self.norm == 'before':
      patches = norms.LayerNorm(name='norm')(patches)
    y, _ = jax.vmap(lambda x, w, n: pool(x, w, grid, n, n_max))(
      patches, weight, n
    )
    if self.norm == 'after':
      y = norms.LayerNorm(name='norm')(y)

    def dense(features, name):
      return linear.QuantDense(features, name=name)

    if not self.gated:
      hidden = jax.nn.gelu(dense(self.hidden, 'up_proj')(y))
      return dense(self.features, 'down_proj')(hidden)
    gate = dense(self.hidden, 'gate_proj')(y)
    if self.counts:
      shape = (len(self.counts), self.hidden)
      table = self.param('count_embed', nn.initializers.zeros, shape)
      trained = jnp.array(self.counts, jnp.int32)[None] == (n * n)[:, None]
      vector = trained.astype(table.dtype) @ table  # (B, m)
      gate = gate + vector.astype(gate.dtype)[:, None]
    hidden = jax.nn.silu(gate) * dense(self.hidden, 'up_proj')(y)
    return dense(self.features, 'down_proj')(hidden)


def pool(
  x: jax.Array,
  weight: jax.Array,
  grid: interface.Grid,
  n: jax.Array | int,
  n_max: int,
) -> tuple[jax.Array, jax.Array]:
  """Adaptive average pooling of each frame to n x n cells of n_max x n_max.

  Args:
    x: (T * H * W, d), finite where weight is 0.
    weight: (T * H * W,) float32.
    grid: (T, H, W).
    n: cells along a side, may be traced.
    n_max: static.

  Returns:
    Means (T * n_max * n_max, d) in x.dtype and the summed weight of each cell's
    bin (T * n_max * n_max,); 0 in cells from n on.
  """
  T, H, W = grid
  rows, columns = _matrices(H, W, n, n_max)
  x32 = x.astype(jnp.float32) * weight[:, None]
  sums = primitives.resample_grid(x32.reshape(T, H, W, -1), rows, columns)
  weight = weight.reshape(T, H, W, 1)
  shares = primitives.resample_grid(weight, rows, columns)  # (T, n, n, 1)
  means = sums / jnp.where(shares > 0, shares, 1.0)
  inside = lambda matrix: (matrix > 0).astype(jnp.float32)
  mass = primitives.resample_grid(weight, inside(rows), inside(columns))
  return means.reshape(T * n_max**2, -1).astype(x.dtype), mass.reshape(-1)


def cells(grid: interface.Grid, n: jax.Array | int, n_max: int) -> jax.Array:
  """The cell (T * H * W,) int32 of n_max x n_max that holds a patch's centre.

  Bins overlap; this is the one of them that a patch is assigned to.
  """
  T, H, W = grid
  row = (2 * jnp.arange(H, dtype=jnp.int32) + 1) * n // (2 * H)
  column = (2 * jnp.arange(W, dtype=jnp.int32) + 1) * n // (2 * W)
  frame = jnp.arange(T, dtype=jnp.int32)[:, None, None] * n_max
  cell = (frame + row[None, :, None]) * n_max + column[None, None]
  return cell.reshape(-1)


def sharding_rules(hidden: int, shards: int) -> mesh_lib.Rules:
  """How the projector lies on the `model` axis: columns, then rows.

  Raises:
    ValueError: the inner width does not divide.
  """
  if hidden % shards:
    raise ValueError(
      f'mesh model:{shards}: hidden={hidden} is not a multiple of {shards}; '
      'choose a hidden width that divides it.'
    )
  return (
    (r'(gate|up)_proj/kernel', PartitionSpec(None, 'model')),
    (r'down_proj/kernel', PartitionSpec('model', None)),
    (r'count_embed', PartitionSpec(None, 'model')),
  )


def side_of(owner: str, count: int, frames: int = 1) -> int:
  """The square root of a number of tokens.

  Raises:
    ValueError: it is no square of a positive number.
  """
  side = math.isqrt(max(count, 0))
  if count < 1 or side * side != count:
    of = f'{frames} frames of ' if frames > 1 else ''
    raise ValueError(
      f'{owner}: tokens must be {of}n x n, a square number; got {count} for '
      'one. Use 16, 64, 144 or another square, times the number of frames.'
    )
  return side


def _side(count: jax.Array) -> jax.Array:
  """floor(sqrt(count)) of int32 below 2^22, where float32 is exact."""
  return jnp.floor(jnp.sqrt(count.astype(jnp.float32))).astype(jnp.int32)


def _matrices(
  H: int, W: int, n: jax.Array | int, n_max: int
) -> tuple[jax.Array, jax.Array]:
  """R_h (n_max, H) and R_w (n_max, W)."""
  return (
    primitives.resample_matrix(H, n, n_max),
    primitives.resample_matrix(W, n, n_max),
  )
