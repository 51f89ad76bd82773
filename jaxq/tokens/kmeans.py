"""Spherical k-means with a traced number of clusters, and how many to take.

  label_j = argmax_k cos(x_j, c_k)      c_k = mean of the members

on unit vectors x, with k-means++ starts (Arthur and Vassilvitskii, 2007). The
picks of k-means++ are nested: the first k of them are the start for any k, so a
sweep over k shares one start. All shapes are those of the largest k; unused
centroids are never chosen, and a cluster that loses its members keeps its
centroid. Nothing is differentiated: callers take means under the labels.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxq.tokens import primitives

_FLOOR = 1e-6  # Added to squared distances, so that a draw is always possible.


class Clusters(NamedTuple):
  """What k-means finds in M vectors.

  centroids: (K, D) float32, means of the members.
  labels: (M,) int32, of the nearest centroid; -1 where the weight is 0.
  distortion: () sum of weight * |x - centroid|^2.
  silhouette: () mean of (b - a) / max(a, b), a and b the distances to the own
    and to the next centroid; 0 with fewer than two.
  inertia: (iters,) sum of weight * (1 - cos) at each iteration; the last value
    repeated behind the last one. It never rises.
  """

  centroids: jax.Array
  labels: jax.Array
  distortion: jax.Array
  silhouette: jax.Array
  inertia: jax.Array


def starts(
  rng: jax.Array, x: jax.Array, weight: jax.Array, k_max: int
) -> jax.Array:
  """k-means++: each next start is drawn by its squared distance to the others.

  Of a few draws the one that leaves the least distance is taken, as in
  scikit-learn: single draws miss one of 30 heaps every few runs.

  Args:
    rng: a key.
    x: (M, D) float32.
    weight: (M,) float32; 0 is never drawn.
    k_max: how many, static.

  Returns:
    (k_max, D). Past as many as there are different vectors, some repeat.
  """
  logw = jnp.log(weight)  # -inf where 0.
  keys = jax.random.split(rng, k_max)
  first = x[jax.random.categorical(keys[0], logw)]
  picked = jnp.zeros((k_max, x.shape[1]), x.dtype).at[0].set(first)
  if k_max == 1:
    return picked

  trials = 2 + int(math.log(k_max))

  def pick(carry, key):
    picked, squared, i = carry
    logits = jnp.log(squared) + logw
    new = x[jax.random.categorical(key, logits, shape=(trials,))]
    left = jnp.minimum(squared[:, None], _squared(x, new))  # (M, trials)
    best = jnp.argmin(jnp.sum(weight[:, None] * left, axis=0))
    return (picked.at[i].set(new[best]), left[:, best], i + 1), None

  carry = (picked, _squared(x, first[None])[:, 0], jnp.int32(1))
  return jax.lax.scan(pick, carry, keys[1:])[0][0]


def fit(
  x: jax.Array,
  weight: jax.Array,
  start: jax.Array,
  k: jax.Array,
  *,
  iters: int = 50,
  tol: float = 1e-4,
) -> Clusters:
  """Iterates until the centroids move by less than tol (Frobenius), or iters.

  Args:
    x: (M, D) float32, of length 1 or 0.
    weight: (M,) float32, not negative.
    start: (K, D).
    k: () int32 clusters, traced, at most K.
    iters, tol: static.
  """
  K = start.shape[0]
  valid = jnp.arange(K) < k

  def assign(centroids):
    unit = primitives.normalize(centroids)
    (cosine, label) = primitives.nearest(x, unit, allowed=valid[None])
    label = jnp.where(weight > 0, label[:, 0], -1)
    near = jnp.where(weight > 0, cosine[:, 0], 1.0)
    return label, jnp.sum(weight * (1 - near))

  def body(carry):
    i, centroids, _, inertia = carry
    label, total = assign(centroids)
    means, sizes = primitives.merge(x[None], weight[None], label[None], K)
    new = jnp.where(sizes[0][:, None] > 0, means[0], centroids)
    moved = jnp.sqrt(jnp.sum((new - centroids) ** 2))
    # From here on, in case this is the last iteration.
    inertia = jnp.where(jnp.arange(iters) >= i, total, inertia)
    return i + 1, new, moved < tol, inertia

  def unfinished(carry):
    return (carry[0] < iters) & ~carry[2]

  first = (jnp.int32(0), start, jnp.array(False), jnp.zeros(iters))
  _, centroids, _, inertia = jax.lax.while_loop(unfinished, body, first)
  label, _ = assign(centroids)
  nearest = centroids[jnp.maximum(label, 0)]
  squared = jnp.sum((x - nearest) ** 2, axis=1)
  return Clusters(
    centroids=centroids,
    labels=label.astype(jnp.int32),
    distortion=jnp.sum(jnp.where(weight > 0, weight * squared, 0.0)),
    silhouette=_silhouette(x, weight, centroids, valid),
    inertia=inertia,
  )


def sweep(
  x: jax.Array,
  weight: jax.Array,
  start: jax.Array,
  k_min: int,
  *,
  iters: int = 100,
  tol: float = 1e-4,
) -> Clusters:
  """`fit` for k = k_min..K from one start; every field has a leading axis."""
  ks = jnp.arange(k_min, start.shape[0] + 1, dtype=jnp.int32)
  return jax.lax.map(
    lambda k: fit(x, weight, start, k, iters=iters, tol=tol), ks
  )


def elbow(
  distortions: jax.Array,
  k_min: int,
  limit: jax.Array | int | None = None,
  *,
  reference: bool = False,
) -> jax.Array:
  """The k at which the curve bends most: the largest second difference.

  Args:
    distortions: (n,) of k = k_min..k_min + n - 1.
    k_min: static.
    limit: the largest k allowed; None: the last one.
    reference: the authors' index instead, i + 4 for the i-th difference (it is
      k_min + 1 + i), and k_min at least.

  Returns:
    () int32. Where no k has two allowed neighbours: the limit.
  """
  n = distortions.shape[0]
  last = k_min + n - 1
  limit = jnp.minimum(last if limit is None else limit, last)
  limit = limit.astype(jnp.int32)
  if n < 3:
    return limit
  bend = distortions[2:] - 2 * distortions[1:-1] + distortions[:-2]
  inner = k_min + 1 + jnp.arange(n - 2, dtype=jnp.int32)
  allowed = inner < limit
  i = jnp.argmax(jnp.where(allowed, bend, -jnp.inf)).astype(jnp.int32)
  if reference:
    return jnp.minimum(jnp.maximum(i + 4, k_min), limit)
  return jnp.where(jnp.any(allowed), inner[i], limit)


def best_silhouette(
  silhouettes: jax.Array, k_min: int, limit: jax.Array | int
) -> jax.Array:
  """The k of k_min.. up to limit with the largest silhouette, () int32."""
  ks = k_min + jnp.arange(silhouettes.shape[0], dtype=jnp.int32)
  best = jnp.argmax(jnp.where(ks <= limit, silhouettes, -jnp.inf))
  return jnp.minimum(ks[best], limit).astype(jnp.int32)


def _squared(x, c):
  """Squared distances (M, n) of x (M, D) to c (n, D), and a little."""
  product = jnp.einsum('md,nd->mn', x, c, precision=jax.lax.Precision.HIGHEST)
  length = lambda a: jnp.sum(a * a, axis=1)
  squared = length(x)[:, None] + length(c)[None] - 2 * product
  return jnp.maximum(squared, 0.0) + _FLOOR


def _silhouette(x, weight, centroids, valid):
  if centroids.shape[0] < 2:
    return jnp.zeros(())
  unit = primitives.normalize(centroids)
  cosine, _ = primitives.nearest(x, unit, top=2, allowed=valid[None])
  own, other = 1 - cosine[:, 0], 1 - cosine[:, 1]
  known = (weight > 0) & jnp.isfinite(other)
  other = jnp.where(known, other, 1.0)
  value = (other - own) / jnp.maximum(jnp.maximum(own, other), 1e-12)
  total = jnp.sum(jnp.where(known, weight * value, 0.0))
  return total / jnp.maximum(jnp.sum(jnp.where(known, weight, 0.0)), 1e-12)
