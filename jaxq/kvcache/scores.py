"""What a cached token is worth: (B, Hkv, N), higher is kept.

  random     a number drawn when the token comes: the control
  streaming  its position: the newest are kept (Xiao et al., 2309.17453)
  knorm      -|k|: keys of small norm draw attention (Devoto et al., 2406.11430)
  h2o        attention received so far, from every query (Zhang et al.,
             2306.14048); only from queries that were there: sums over later
             ones, as in the reference's evaluation, know the future
  snapkv     attention received from the last W queries, averaged over
             neighbouring tokens (Li et al., 2404.14469)
  expected   attention that queries to come would pay, were they normal with the
             mean and covariance of the last W, averaged over the next
             positions, times |v| (Devoto et al., 2510.00636)

Query heads that share a key head are averaged. Sinks and the newest tokens are
not the scores' business: jaxq.kvcache.evict protects them.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxq.kvcache import interface, reposition, softmax
from jaxq.nn import rope as rope_lib

_CHUNK = 128  # Queries whose attention exists at a time.


@flax.struct.dataclass
class Candidates:
  """Tokens to score. k, v (B, N, Hkv, D); positions (B, N, Hkv), -1: none."""

  k: jax.Array
  v: jax.Array
  positions: jax.Array


@flax.struct.dataclass
class Window:
  """The last W queries, in order.

  q: (B, W, H, D), at their positions. positions: (B, W), negative: none.
  """

  q: jax.Array
  positions: jax.Array


def random(
  positions: jax.Array, heads: int, seed: int, layer: jax.Array
) -> jax.Array:
  """positions (B, T) -> uniform (B, heads, T), the same for a row in any batch.

  seed, layer (): layers keep different tokens.
  """
  key = jax.random.fold_in(jax.random.key(seed), layer)

  def draw(position):
    own = jax.random.fold_in(key, jnp.maximum(position, 0))
    return jax.random.uniform(own, (heads,))

  return jax.vmap(jax.vmap(draw))(positions).transpose(0, 2, 1)


def streaming(positions: jax.Array, heads: int) -> jax.Array:
  """positions (B, T) -> themselves, (B, heads, T)."""
  shape = (positions.shape[0], heads, positions.shape[1])
  return jnp.broadcast_to(positions.astype(jnp.float32)[:, None], shape)


def knorm(k: jax.Array) -> jax.Array:
  """k (B, T, Hkv, D) -> -|k|."""
  norm = jnp.linalg.norm(k.astype(jnp.float32), axis=-1)
  return -norm.transpose(0, 2, 1)


def received(
  queries: jax.Array,
  lse: jax.Array,
  query_positions: jax.Array,
  k: Any,
  positions: jax.Array,
  scoring: interface.Scoring,
) -> jax.Array:
  """Attention that keys receive from all queries: what h2o sums up.

  Args:
    queries: (B, Hkv, G, T, D), scaled.
    lse: (B, Hkv, G, T), of each query's whole softmax.
    query_positions: (B, T), negative: padding.
    k: a store of N slots.
    positions: (B, N, Hkv), -1: nothing.
    scoring: softcap and window.

  Returns:
    (B, Hkv, N), mean over the G query heads.
  """
  B, Hkv, G, T, D = queries.shape
  size = min(T, _CHUNK)
  count = -(-T // size)
  short = count * size - T

  def split(a, axis, fill):
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, short)
    a = jnp.pad(a, widths, constant_values=fill)
    shape = (*a.shape[:axis], count, size, *a.shape[axis + 1 :])
    return jnp.moveaxis(a.reshape(shape), axis, 0)

  held = positions.transpose(0, 2, 1)[:, :, None, None]  # (B, Hkv, 1, 1, N)

  def body(total, part):
    q, of, at = part
    at = at[:, None, None, :, None]  # (B, 1, 1, size, 1)
    seen = (held >= 0) & (held <= at) & (at >= 0)
    if scoring.window is not None:
      seen &= held > at - scoring.window
    scores = softmax.cap(k.scores(q, 0, k.slots), scoring)
    p = jnp.exp(jnp.where(seen, scores - of[..., None], -jnp.inf))
    return total + jnp.sum(p, axis=(2, 3)), None

  start = jnp.zeros((B, Hkv, k.slots), jnp.float32)
  parts = split(queries, 3, 0), split(lse, 3, 0), split(query_positions, 1, -1)
  total, _ = jax.lax.scan(body, start, parts)
  return total / G


def snapkv(
  window: Window,
  tokens: Candidates,
  scoring: interface.Scoring,
  kernel: int,
) -> jax.Array:
  """Attention from the window to the tokens before it, pooled.

  Tokens of the window itself score as much as the best before it. `kernel`
  neighbours, odd, are averaged in the order of positions, zeros at the ends.
  """
  B, N, Hkv, _ = tokens.k.shape
  queries = softmax.group(window.q, Hkv, scoring.scale)
  scores = jnp.einsum(
    'bkgtd,bskd->bkgts', queries, tokens.k.astype(jnp.float32)
  )
  held = tokens.positions.transpose(0, 2, 1)  # (B, Hkv, N)
  at = window.positions[:, None, None, :, None]
  seen = held[:, :, None, None] <= at
  seen &= (held[:, :, None, None] >= 0) & (at >= 0)
  if scoring.window is not None:
    seen &= held[:, :, None, None] > at - scoring.window
  p = softmax.cap(scores, scoring)
  p = jax.nn.softmax(jnp.where(seen, p, -1e30), axis=-1)
  p = jnp.where(seen, p, 0.0)
  valid = window.positions >= 0
  count = jnp.maximum(jnp.sum(valid, axis=1), 1).astype(jnp.float32)
  mean = jnp.sum(p, axis=(2, 3)) / count[:, None, None] / queries.shape[2]
  first = jnp.min(jnp.maximum(window.positions, 0), axis=1)
  prefix = (held >= 0) & (held < first[:, None, None])
  mean = jnp.where(prefix, mean, 0.0)
  order = jnp.argsort(held, axis=-1)
  sums = jax.lax.reduce_window(
    jnp.take_along_axis(mean, order, axis=-1),
    0.0,
    jax.lax.add,
    (1, 1, kernel),
    (1, 1, 1),
    [(0, 0), (0, 0), (kernel // 2, kernel // 2)],
  )
  back = jnp.argsort(order, axis=-1)
  pooled = jnp.take_along_axis(sums / kernel, back, axis=-1)
  pooled = jnp.where(prefix, pooled, 0.0)
  most = jnp.max(pooled, axis=-1, keepdims=True)
  return jnp.where((held >= 0) & ~prefix, most, pooled)


def expected(
  window: Window,
  tokens: Candidates,
  scoring: interface.Scoring,
  *,
  rope: rope_lib.Rope | None,
  length: jax.Array,
  future: int,
  sinks: int,
) -> jax.Array:
  """Attention that the next `future` queries are expected to pay, times |v|.

  With q ~ N(mu, C) before positions and A the mean rotation of the positions to
  come, E exp(q k) = exp(k A mu + k A C A' k / 2): a softmax over the tokens.

  Args:
    window, tokens, scoring: the queries, what is scored, the scale.
    rope: None: queries have no positions.
    length: (B,) tokens so far, the position of the next.
    future: positions to come.
    sinks: first tokens of the text, whose queries are unlike the others and
      which take no part.
  """
  B, N, Hkv, D = tokens.k.shape
  valid = window.positions >= sinks  # (B, W)
  q = window.q.astype(jnp.float32)
  if rope is not None:
    q = reposition.turn(q, -jnp.maximum(window.positions, 0), rope)
  weight = valid.astype(jnp.float32)
  weight = weight / jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1.0)
  mean = jnp.einsum('bw,bwhd->bhd', weight, q)
  centred = q - mean[:, None]
  cov = jnp.einsum('bw,bwhi,bwhj->bhij', weight, centred, centred)
  if rope is not None:
    cos, sin = _mean_rotation(rope, D, length, future)
    mean = _turn(mean, cos, sin, rope.dim)
    cov = _turn(cov, cos[:, None], sin[:, None], rope.dim)
    cov = _turn(cov.mT, cos[:, None], sin[:, None], rope.dim).mT
  scale = D**-0.5 if scoring.scale is None else scoring.scale
  H = mean.shape[1]
  mean = mean.reshape(B, Hkv, H // Hkv, D) * scale
  cov = cov.reshape(B, Hkv, H // Hkv, D, D) * scale**2
  k = tokens.k.astype(jnp.float32)
  scores = jnp.einsum('bkgd,bskd->bkgs', mean, k)
  spread = jnp.einsum('bskd,bkgde->bkgse', k, cov)
  scores += jnp.einsum('bkgse,bske->bkgs', spread, k) / 2
  held = tokens.positions.transpose(0, 2, 1)
  counted = held >= sinks
  p = jax.nn.softmax(jnp.where(counted[:, :, None], scores, -1e30), axis=-1)
  norm = jnp.linalg.norm(tokens.v.astype(jnp.float32), axis=-1)
  out = jnp.mean(p, axis=2) * norm.transpose(0, 2, 1)
  return jnp.where(counted, out, 0.0)


def _mean_rotation(
  rope: rope_lib.Rope, D: int, length: jax.Array, future: int
) -> tuple[jax.Array, jax.Array]:
  """Mean cos and sin (B, dim / 2) over the `future` next positions."""
  frequencies = rope.frequencies_at(D, length + future)  # (B, dim / 2)
  at = length[:, None] + jnp.arange(future)[None]
  angles = at.astype(jnp.float32)[..., None] * frequencies[:, None]
  return jnp.mean(jnp.cos(angles), axis=1), jnp.mean(jnp.sin(angles), axis=1)


def _turn(
  x: jax.Array, cos: jax.Array, sin: jax.Array, dim: int | None
) -> jax.Array:
  """The last axis of x (B, H, ..., D) by cos, sin (B, ..., dim / 2)."""
  cos, sin = cos[:, None], sin[:, None]
  dim = dim or x.shape[-1]
  a, b = jnp.split(x[..., :dim], 2, axis=-1)
  turned = [a * cos - b * sin, b * cos + a * sin]
  return jnp.concatenate([*turned, x[..., dim:]], axis=-1)
