"""Which channels matter to which tokens; clusters of tokens, and their routers.

  I_tj = |x_tj| |E_j|        a channel's part in the error of a token's output
  S_t  = the k largest of I_t
  f_j  = mean over modalities of the share of their tokens with j in S_t

Channels in most tokens' S_t, of every modality, are `independent` of the token;
those in S_t of some are `dependent`. Tokens are clustered by their dependent
channels, and routers are fitted that tell a token's cluster by its input.

All arrays are of one tap: T tokens of all sequences, K channels, E clusters.
`counted` is False for tokens that say nothing: padding, and the first of a text
(an attention sink's massive channels are the same whatever the text is).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.quant import low_rank

_TINY = 1e-20
_HIGHEST = lax.Precision.HIGHEST
ITERATIONS = 20
LEAST_OCCURRENCES = 8


class Channels(NamedTuple):
  """independent, dependent: (K,) bool, disjoint."""

  independent: jax.Array
  dependent: jax.Array


class Clusters(NamedTuple):
  """labels (T,) int32; centroids (E, K) of length one; sizes (E,).

  A size is 0 where fewer than E sets of features differ.
  """

  labels: jax.Array
  centroids: jax.Array
  sizes: jax.Array


def channel_importance(x: jax.Array, error_norms: jax.Array) -> jax.Array:
  """I (T, K) float32.

  Args:
    x: (T, K).
    error_norms: |E_j| (K,), of the rows of W - Q over all linears that read x.
  """
  return jnp.abs(x.astype(jnp.float32)) * error_norms[None]


def top_channels(importance: jax.Array, k: int) -> jax.Array:
  """(T, K) float32: 1 at the k largest of each token; of equals the first."""
  _, index = lax.top_k(importance, k)  # (T, k)
  rows = jnp.arange(importance.shape[0])[:, None]
  return jnp.zeros(importance.shape, jnp.float32).at[rows, index].set(1.0)


def importance_frequency(
  member: jax.Array,
  counted: jax.Array,
  modality: jax.Array,
  modalities: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """How often each channel is among a token's most important.

  Args:
    member: (T, K), from top_channels.
    counted: (T,) bool.
    modality: (T,) int32 in 0 .. modalities - 1.
    modalities: static.

  Returns:
    f (modalities, K), and the tokens of each (modalities,).
  """
  one_hot = _one_hot(modality, counted, modalities)
  tokens = jnp.sum(one_hot, axis=0)
  total = jnp.matmul(one_hot.T, member, precision=_HIGHEST)
  return total / jnp.maximum(tokens, 1.0)[:, None], tokens


def split_channels(
  frequency: jax.Array, tokens: jax.Array, k: int, tau: float
) -> Channels:
  """Channels by how often they matter.

  Independent: in S_t of a share of at least tau of the tokens of every modality
  that was seen. Dependent: of the others, those seen more often than in one of
  10 k tokens, and at least 8 times.

  Args:
    frequency, tokens: from importance_frequency.
    k: size of S_t.
    tau: in (0, 1].
  """
  seen = tokens > 0
  least = jnp.min(jnp.where(seen[:, None], frequency, 1.0), axis=0)
  independent = (least >= tau) & jnp.any(seen)
  modalities = jnp.maximum(jnp.sum(seen.astype(jnp.float32)), 1.0)
  mean = jnp.sum(frequency, axis=0) / modalities
  count = jnp.sum(frequency * tokens[:, None], axis=0)
  often = (mean > 1 / (10 * k)) & (count > LEAST_OCCURRENCES - 0.5)
  return Channels(independent, often & ~independent)


def features(values: jax.Array, channels: jax.Array) -> jax.Array:
  """Rows (T, K) restricted to channels (K,) bool, of length one or zero."""
  values = jnp.where(channels[None], values, 0.0)
  norm = jnp.sqrt(jnp.sum(jnp.square(values), axis=-1, keepdims=True))
  return values / jnp.maximum(norm, _TINY)


def spherical_kmeans(
  rows: jax.Array, counted: jax.Array, clusters: int, key: jax.Array
) -> Clusters:
  """k-means by cosine, from k-means++; an empty cluster is seeded anew.

  Args:
    rows: (T, K), from `features`; rows of zeros do not count.
    counted: (T,) bool.
    clusters: E; static.
    key: of the first choice.
  """
  counted = counted & jnp.any(rows != 0, axis=-1)

  def nearest(centroids):  # -> labels (T,), cosine (T,)
    cosine = jnp.matmul(rows, centroids.T, precision=_HIGHEST)  # (T, E)
    return jnp.argmax(cosine, axis=-1), jnp.max(cosine, axis=-1)

  def draw(key, weight):
    logits = jnp.where(counted, jnp.log(jnp.maximum(weight, 1e-12)), -jnp.inf)
    logits = jnp.where(jnp.any(counted), logits, 0.0)
    return rows[jax.random.categorical(key, logits)]

  keys = jax.random.split(key, clusters)
  chosen = [draw(keys[0], jnp.ones(rows.shape[0]))]
  for own in keys[1:]:
    _, cosine = nearest(jnp.stack(chosen))
    chosen.append(draw(own, 1 - cosine))  # Half the squared distance.

  def step(_, centroids):
    labels, cosine = nearest(centroids)
    one_hot = _one_hot(labels, counted, clusters)
    total = jnp.matmul(one_hot.T, rows, precision=_HIGHEST)  # (E, K)
    empty = jnp.sum(one_hot, axis=0) == 0
    # The i-th empty cluster goes to the i-th farthest token.
    farthest = lax.top_k(jnp.where(counted, -cosine, -jnp.inf), clusters)[1]
    rank = jnp.cumsum(empty.astype(jnp.int32)) - 1
    seeds = rows[farthest[jnp.maximum(rank, 0)]]
    total = jnp.where(empty[:, None], seeds, total)
    return features(total, jnp.ones(rows.shape[1], bool))

  centroids = lax.fori_loop(0, ITERATIONS, step, jnp.stack(chosen))
  labels, _ = nearest(centroids)
  sizes = jnp.sum(_one_hot(labels, counted, clusters), axis=0)
  return Clusters(labels.astype(jnp.int32), centroids, sizes)


def fit_router(
  x: jax.Array, labels: jax.Array, counted: jax.Array, clusters: int
) -> jax.Array:
  """R (K, E) float32: argmax of x / |x| @ R is about the label.

  Ridge regression of the labels, one hot, on the inputs; the ridge is one
  percent of the mean diagonal.

  Args:
    x: (T, K).
    labels: (T,) int32.
    counted: (T,) bool.
    clusters: E; static.
  """
  u = features(x.astype(jnp.float32), jnp.ones(x.shape[1], bool))
  u = jnp.where(counted[:, None], u, 0.0)
  lower = low_rank.whitening(jnp.matmul(u.T, u, precision=_HIGHEST))
  target = jnp.matmul(
    u.T, _one_hot(labels, counted, clusters), precision=_HIGHEST
  )
  return jax.scipy.linalg.cho_solve((lower, True), target)


def mean_importance(
  rows: jax.Array, labels: jax.Array, counted: jax.Array, clusters: int
) -> jax.Array:
  """(K, E): each cluster's mean of rows (T, K), of length one."""
  one_hot = _one_hot(labels, counted, clusters)
  total = jnp.matmul(one_hot.T, rows, precision=_HIGHEST)  # (E, K)
  return features(total, jnp.ones(rows.shape[1], bool)).T


def lift(member: jax.Array, gates: jax.Array, counted: jax.Array) -> jax.Array:
  """P(j in S_t | t goes to e) / P(j in S_t), (E, K); 0 where never in S_t.

  Args:
    member: (T, K), from top_channels.
    gates: (T, E), how much of each expert a token takes.
    counted: (T,) bool.
  """
  gates = jnp.where(counted[:, None], gates, 0.0)
  within = jnp.matmul(gates.T, member, precision=_HIGHEST)  # (E, K)
  within = within / jnp.maximum(jnp.sum(gates, axis=0), 1.0)[:, None]
  tokens = jnp.maximum(jnp.sum(counted.astype(jnp.float32)), 1.0)
  overall = jnp.sum(jnp.where(counted[:, None], member, 0.0), axis=0) / tokens
  positive = jnp.maximum(overall, _TINY)[None]
  return jnp.where(overall[None] > 0, within / positive, 0.0)


def _one_hot(labels, counted, clusters) -> jax.Array:
  """(T, E) float32; rows of zeros for tokens that do not count."""
  one_hot = jax.nn.one_hot(labels, clusters, dtype=jnp.float32)
  return jnp.where(counted[:, None], one_hot, 0.0)
