"""CaCoVID: tokens that let a frozen model answer, found by trial.

2026, https://arxiv.org/abs/2602.01649. A small policy reads the prompt, one
decoder layer of the language model's width without the causal mask, and scores
every video token (a) and every frame (f) for this question. It is trained by
reinforcement (jaxq.tokens.cacovid_training): the reward is whether the frozen
model answers correctly from the kept tokens alone.

Of k tokens to keep, `importance` * k are the policy's:

  p   = softmax(3 f / max |f|), clipped to [0.5 / T, cap / T], sum 1
  n_t = round(p_t * importance * k), moved to the exact total
        the n_t best tokens by a of frame t

and the rest are evenly spaced among the tokens that were not chosen. Kept
tokens keep their order and positions.

The policy costs one full-length decoder layer: count it. A third head of the
reference, whose loss is never added and which inference ignores, is left out.
Where bounds forbid the total, the reference breaks them; here what is missing
goes to the even part (`reference_bounds`).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxq.nn import linear, norms
from jaxq.tokens import (
  decoder_layers,
  frames,
  interface,
  primitives,
  sync_rope,
)

SCORERS = ('given', 'policy')


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaCoVIDConfig(interface.Config):
  """Keeps k tokens of a video, shared among its frames.

  Attributes:
    importance: share of k that the policy chooses; the rest is even.
    cap: of a frame's share, over that of equal shares.
    scorer: 'policy' (params and query), or 'given': `scores` of the tokens,
      whose mean in a frame is the frame's score.
    reference_bounds: exceed a frame's bound where the total asks for it.
    num_heads, num_kv_heads, head_dim, intermediate_size, qkv_bias, norm_eps,
      theta: of the policy's layer, those of the language model's. 0: as many
      kv heads as heads, D / num_heads, 4 D.
  """

  importance: float = 0.5
  cap: float = 1.5
  scorer: str = 'policy'
  reference_bounds: bool = False
  num_heads: int = 8
  num_kv_heads: int = 0
  head_dim: int = 0
  intermediate_size: int = 0
  qkv_bias: bool = True
  norm_eps: float = 1e-6
  theta: float = 1e6

  def __post_init__(self):
    super().__post_init__()
    interface.check_ratio('CaCoVIDConfig', 'importance', self.importance)
    if self.cap < 1:
      raise ValueError(
        f'CaCoVIDConfig: cap={self.cap}; a frame must be allowed at least the '
        "share of equal ones, 1. The paper's is 1.5."
      )
    if self.scorer not in SCORERS:
      raise ValueError(
        f'CaCoVIDConfig: scorer={self.scorer!r}; allowed {sorted(SCORERS)}.'
      )

  @property
  def traits(self) -> interface.Traits:
    """A selector on a grid of frames."""
    policy = self.scorer == 'policy'
    return interface.Traits(
      kind='selector', scores=not policy, query=policy, params=policy, grid=True
    )

  def layer(self, width: int) -> decoder_layers.LayerConfig:
    """The policy's decoder layer at `width` channels."""
    return decoder_layers.LayerConfig(
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads or self.num_heads,
      head_dim=self.head_dim or width // self.num_heads,
      intermediate_size=self.intermediate_size or 4 * width,
      norm_eps=self.norm_eps,
      qkv_bias=self.qkv_bias,
    )

  def policy(self, width: int) -> 'CompressionPolicy':
    """The policy at `width` channels."""
    return CompressionPolicy(layer=self.layer(width), theta=self.theta)

  def init_params(
    self,
    rng: jax.Array,
    ts: interface.TokenSet,
    query: jax.Array | None = None,
  ) -> Any:
    """Of the policy, untrained; `from_block` puts the model's layer 0 in."""
    del query
    if self.scorer == 'given':
      return None
    D = ts.tokens.shape[-1]
    x = jnp.zeros((1, 2, D), ts.tokens.dtype)
    at, mask = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    init = jax.jit(self.policy(D).init, static_argnums=5)
    return init(rng, x, at, mask, at[:, :1], 1)['params']

  def example(self) -> interface.Example:
    """A small policy."""
    return interface.Example(
      reducer=dataclasses.replace(self, num_heads=2, intermediate_size=16)
    )

  def _reduce(
    self,
    ts: interface.TokenSet,
    budget: interface.Budget,
    given: interface.Given,
  ) -> interface.Reduced:
    grid = interface.square_grid(ts)
    aux: dict[str, Any] = {}
    if self.scorer == 'policy':
      u, v = self.logits(given.params, ts, given.query, given.query_mask)
      a, f = margin(u), margin(v)
      aux = {'token_logits': u, 'frame_logits': v}
    else:
      assert given.scores is not None  # Traits ask for it.
      check_scores(given.scores, ts.mask)
      a = given.scores[:, ts.special :].astype(jnp.float32)
      f = frame_means(a[..., None], ts, grid)[..., 0]
    mask = ts.mask[:, ts.special :]
    k = jnp.minimum(budget.counts(mask.shape[0]), budget.k_max)
    one = functools.partial(self._choose, grid, budget.k_max)
    keep, n = jax.vmap(one)(a, f, mask, k)
    special = jnp.zeros((mask.shape[0], ts.special), bool)
    index, used = primitives.compact(
      jnp.concatenate([special, keep], axis=1), budget.k_max
    )
    return primitives.selected(ts, index, used, aux | {'tokens_per_frame': n})

  def logits(
    self,
    params: Any,
    ts: interface.TokenSet,
    query: jax.Array | None,
    query_mask: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """The policy's logits of a prompt of the tokens, then the question.

    Returns:
      u (B, N, 2) and v (B, T, 2) float32; N without special tokens.
    """
    assert query is not None
    B, N, D = ts.tokens.shape
    if query.shape[-1] != D:
      raise ValueError(
        f'CaCoVIDConfig: tokens of width {D} and a query of width '
        f'{query.shape[-1]}; the policy reads both as one sequence. Embed the '
        "question in the language model's width."
      )
    if query_mask is None:
      query_mask = jnp.ones(query.shape[:2], bool)
    mask = jnp.concatenate([ts.mask, query_mask], axis=1)
    x = jnp.concatenate([ts.tokens, query.astype(ts.tokens.dtype)], axis=1)
    at = jnp.broadcast_to(
      jnp.arange(x.shape[1], dtype=jnp.int32)[None], mask.shape
    )
    video = jnp.broadcast_to(
      jnp.arange(ts.special, N, dtype=jnp.int32)[None], (B, N - ts.special)
    )
    T = interface.square_grid(ts)[0]
    out: Any = self.policy(D).apply({'params': params}, x, at, mask, video, T)
    return out

  def _choose(self, grid, k_max, a, f, mask, k):
    """One row: keep (T * H * W,) bool and the policy's tokens per frame."""
    T, H, W = grid
    mask = mask.reshape(T, H * W)
    limit = jnp.sum(mask, axis=1, dtype=jnp.int32)  # (T,)
    k = jnp.minimum(k, jnp.sum(limit))
    seen = jnp.maximum(jnp.sum(limit > 0, dtype=jnp.int32), 1)
    share = self.importance * k.astype(jnp.float32)
    upper = jnp.floor(share * self.cap / seen.astype(jnp.float32))
    n = allocate_frames(
      f,
      jnp.round(share).astype(jnp.int32),
      jnp.floor(share).astype(jnp.int32),
      upper.astype(jnp.int32),
      limit,
      H * W,
      cap=self.cap,
      reference_bounds=self.reference_bounds,
    )
    best = top_per_frame(a.reshape(T, H * W), mask, n)
    chosen = best.reshape(-1)
    rest = mask.reshape(-1) & ~chosen
    return chosen | evenly_spaced(rest, k - jnp.sum(n), k_max), n


class Head(nn.Module):
  """D -> D / 2 -> D / 4 -> D / 8 -> D / 16 -> 2, SiLU between."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., D) -> (..., 2) float32: drop, keep."""
    D = x.shape[-1]
    for i in range(1, 5):
      width = max(1, D >> i)
      x = linear.QuantDense(width, use_bias=True, name=f'dense_{i}')(x)
      x = jax.nn.silu(x)
    out = linear.QuantDense(2, use_bias=True, name='out')(x)
    return out.astype(jnp.float32)


class CompressionPolicy(nn.Module):
  """Logits of keeping each video token and each frame.

  Attributes:
    layer: the decoder layer.
    theta: of its rotary positions.
  """

  layer: decoder_layers.LayerConfig
  theta: float = 1e6

  def setup(self):
    self.block = decoder_layers.Layer(self.layer)
    self.norm = norms.RMSNorm(self.layer.norm_eps)
    self.token_head = Head()
    self.frame_head = Head()

  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    video: jax.Array,
    num_frames: int,
  ) -> tuple[jax.Array, jax.Array]:
    """A prompt to u (B, N, 2) and v (B, T, 2) float32.

    Args:
      x: (B, S, D) embeddings: system, video, question.
      positions: (B, S) int32, of the prefill.
      mask: (B, S) bool; False is padding.
      video: (B, N) int32, where the video tokens are, frame by frame.
      num_frames: T, static; divides N.
    """
    B, N = video.shape
    x = jnp.where(mask[..., None], x, jnp.zeros((), x.dtype))
    rope = sync_rope.plain(self.layer.head_dim, self.theta)
    tables = sync_rope.tables(positions[..., None], rope)

    def attend(q, k, v):  # Everything sees everything.
      return decoder_layers.masked_attention(q, k, v, mask[:, None]), None

    hidden, _ = self.block(x, tables, attend)
    tokens = primitives.gather(hidden, video)  # (B, N, D)
    seen = primitives.gather(mask, video)
    u = self.token_head(self.norm(tokens))
    by_frame = tokens.reshape(B, num_frames, N // num_frames, -1)
    seen = seen.reshape(B, num_frames, N // num_frames, 1)
    total = jnp.sum(jnp.where(seen, by_frame, 0), axis=2)
    number = jnp.maximum(jnp.sum(seen, axis=2, dtype=jnp.int32), 1)
    v = self.frame_head(self.norm(total / number.astype(total.dtype)))
    return u, v


def from_block(
  params: Mapping[str, Any], block: Mapping[str, Any]
) -> dict[str, Any]:
  """The policy's parameters with a decoder block's in its layer.

  block: of the language model's first block (models.decoder.Block).
  """
  names = ('attention', 'input_norm', 'mlp', 'post_norm')
  return {**params, 'block': {name: block[name] for name in names}}


def margin(logits: jax.Array) -> jax.Array:
  """keep - drop of logits (..., 2)."""
  return logits[..., 1] - logits[..., 0]


def frame_means(
  x: jax.Array, ts: interface.TokenSet, grid: interface.Grid
) -> jax.Array:
  """Means of x (B, N, D) over each frame's unmasked tokens: (B, T, D)."""
  T, H, W = grid
  mask = ts.mask[:, ts.special :].reshape(-1, T, H * W, 1)
  x = x.reshape(x.shape[0], T, H * W, -1)
  number = jnp.maximum(jnp.sum(mask, axis=2, dtype=jnp.int32), 1)
  return jnp.sum(jnp.where(mask, x, 0.0), axis=2) / number.astype(x.dtype)


def check_scores(scores: jax.Array, mask: jax.Array) -> None:
  """Raises ValueError for scores of tokens that are not finite.

  Only of values that can be looked at: not under jit.
  """
  if isinstance(scores, jax.core.Tracer) or isinstance(mask, jax.core.Tracer):
    return
  bad = int(np.sum(~np.isfinite(np.asarray(scores)) & np.asarray(mask)))
  if bad:
    raise ValueError(
      f'CaCoVIDConfig: {bad} scores are not finite; one of them would spoil '
      "the shares of all frames. Mask these tokens, or mend the scorer's "
      'overflow.'
    )


def allocate_frames(
  f: jax.Array,
  wanted: jax.Array,
  total: jax.Array,
  upper: jax.Array,
  limit: jax.Array,
  most: int,
  *,
  cap: float = 1.5,
  reference_bounds: bool = False,
) -> jax.Array:
  """Tokens of each frame.

  Args:
    f: (T,) scores of the frames.
    wanted: () int32, multiplied by the frames' shares and rounded.
    total: () int32, the sum of the result.
    upper: () int32, of one frame; at least 1 counts.
    limit: (T,) int32, tokens that a frame has.
    most: the largest limit, static.
    cap: of a share, over that of equal ones.
    reference_bounds: past `upper` where the total asks for it; else the sum is
      below the total there.

  Returns:
    (T,) int32.
  """
  seen = limit > 0
  number = jnp.maximum(jnp.sum(seen, dtype=jnp.float32), 1.0)
  f = jnp.where(seen, f.astype(jnp.float32), 0.0)
  largest = jnp.max(jnp.abs(f))
  f = 3 * f / jnp.where(largest > 0, largest, 1.0)
  p = jnp.where(seen, jnp.exp(f - 3), 0.0)
  p = p / jnp.maximum(jnp.sum(p), 1e-12)
  p = jnp.where(seen, jnp.clip(p, 0.5 / number, cap / number), 0.0)
  p = p / jnp.maximum(jnp.sum(p), 1e-12)
  n = jnp.round(p * wanted.astype(jnp.float32)).astype(jnp.int32)
  upper = jnp.maximum(upper, 1)
  n = jnp.minimum(jnp.clip(n, 1, upper), limit)
  bound = limit if reference_bounds else jnp.minimum(limit, upper)
  return frames.fit_total(n, total, bound, most)


def top_per_frame(a: jax.Array, mask: jax.Array, n: jax.Array) -> jax.Array:
  """True at the n (T,) best of each frame's scores (T, hw); ties to the first.

  mask (T, hw): others are never taken.
  """
  a = jnp.where(mask, a.astype(jnp.float32), -jnp.inf)
  order = jnp.argsort(-a, axis=1, stable=True)
  rank = jnp.argsort(order, axis=1, stable=True)
  return mask & (rank < n[:, None])


def evenly_spaced(mask: jax.Array, count: jax.Array, most: int) -> jax.Array:
  """True at `count` of the M True places of mask (N,), evenly spaced.

  They are the places round(i (M - 1) / (count - 1)) of the True ones, halves to
  even, in whole numbers: no rounding of floats, no place twice.

  Args:
    mask: where to choose.
    count: () int32, at most M.
    most: the largest count, static; below 32,768.
  """
  M = jnp.sum(mask, dtype=jnp.int32)
  i = jnp.arange(most, dtype=jnp.int32)
  steps = jnp.maximum(count - 1, 1)
  whole, part = (M - 1) // steps, (M - 1) % steps
  low, rest = i * whole + i * part // steps, i * part % steps
  up = (2 * rest > steps) | ((2 * rest == steps) & (low % 2 == 1))
  place = jnp.where(i < count, low + up.astype(jnp.int32), mask.shape[0])
  taken = jnp.zeros(mask.shape, bool).at[place].set(True, mode='drop')
  rank = jnp.cumsum(mask, dtype=jnp.int32) - 1
  return mask & taken[jnp.maximum(rank, 0)]
