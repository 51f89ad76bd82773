"""Spherical k-means: starts, iterations, the sweep and the elbow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import kmeans, primitives

K = 8


def blobs(number, seed=0, each=12, D=32, noise=0.05):
  """Unit vectors around `number` orthogonal directions, and which."""
  rng = np.random.default_rng(seed)
  centres = np.linalg.qr(rng.normal(size=(D, D)))[0][:number]
  label = rng.permutation(np.repeat(np.arange(number), each))
  x = centres[label] + noise * rng.normal(size=(len(label), D)) / np.sqrt(D)
  x = jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)
  return x, label


@functools.partial(jax.jit, static_argnames='k_max')
def cluster(key, x, weight, k, k_max=K):
  start = kmeans.starts(key, x, weight, k_max)
  return kmeans.fit(x, weight, start, k)


def same_groups(a, b):
  """Whether two labellings are equal but for their names."""
  pairs = set(zip(np.asarray(a).tolist(), np.asarray(b).tolist(), strict=True))
  return len(pairs) == len({p[0] for p in pairs}) == len({p[1] for p in pairs})


class FitTest(parameterized.TestCase):
  def test_separate_blobs_are_found_from_20_seeds(self):
    x, label = blobs(K)
    ones = jnp.ones(x.shape[0])
    for seed in range(20):
      found = cluster(jax.random.key(seed), x, ones, K)
      self.assertTrue(same_groups(found.labels, label), seed)

  def test_inertia_never_rises_labels_are_nearest_means_are_means(self):
    x = primitives.normalize(jax.random.normal(jax.random.key(0), (96, 32)))
    found = cluster(jax.random.key(1), x, jnp.ones(96), K)
    self.assertTrue((np.diff(found.inertia) <= 1e-5).all())
    self.assertLess(float(found.inertia[-1]), float(found.inertia[0]))
    unit = found.centroids / jnp.linalg.norm(
      found.centroids, axis=1, keepdims=True
    )
    np.testing.assert_array_equal(found.labels, jnp.argmax(x @ unit.T, axis=1))
    distortion = 0.0
    for k in range(K):
      members = np.asarray(x)[np.asarray(found.labels) == k]
      np.testing.assert_allclose(found.centroids[k], members.mean(0), atol=1e-5)
      distortion += ((members - members.mean(0)) ** 2).sum()
    np.testing.assert_allclose(found.distortion, distortion, rtol=1e-4)

  def test_weights_are_copies_and_zero_weights_are_not_there(self):
    x, _ = blobs(K, each=6)
    start = x[:K]
    fit = jax.jit(kmeans.fit)
    twice = fit(jnp.concatenate([x, x]), jnp.ones(2 * x.shape[0]), start, K)
    once = fit(x, jnp.full(x.shape[0], 2.0), start, K)
    np.testing.assert_array_equal(twice.labels[: x.shape[0]], once.labels)
    np.testing.assert_allclose(twice.centroids, once.centroids, atol=1e-5)
    padded = jnp.concatenate([x, jnp.zeros_like(x)])
    weight = jnp.arange(2 * x.shape[0]) < x.shape[0]
    alone = fit(x, jnp.ones(x.shape[0]), start, K)
    other = fit(padded, weight.astype(jnp.float32), start, K)
    np.testing.assert_array_equal(other.labels[: x.shape[0]], alone.labels)
    np.testing.assert_array_equal(other.labels[x.shape[0] :], -1)
    np.testing.assert_allclose(other.centroids, alone.centroids, atol=1e-6)

  def test_fewer_clusters_than_slots(self):
    x, _ = blobs(K)
    found = cluster(jax.random.key(0), x, jnp.ones(x.shape[0]), 3)
    self.assertLess(int(found.labels.max()), 3)

  def test_starts_are_tokens_and_nested(self):
    x, _ = blobs(K)
    ones, key = jnp.ones(x.shape[0]), jax.random.key(3)
    start = kmeans.starts(key, x, ones, K)
    gap = jnp.abs(start[:, None] - x[None]).sum(-1).min(1)
    np.testing.assert_array_equal(gap, 0)
    one = kmeans.starts(key, x, ones.at[1:].set(0), 1)
    np.testing.assert_array_equal(one[0], x[0])


class ElbowTest(parameterized.TestCase):
  def test_by_hand(self):
    d = jnp.array([10, 8, 6, 5, 4.5])
    self.assertEqual(int(kmeans.elbow(d, 12)), 14)
    self.assertEqual(int(kmeans.elbow(d, 12, reference=True)), 12)
    self.assertEqual(int(kmeans.elbow(d, 12, 14)), 13)
    self.assertEqual(int(kmeans.elbow(d, 12, 12)), 12)
    self.assertEqual(int(kmeans.elbow(d[:2], 12)), 13)

  @parameterized.parameters(14, 19, 30)
  def test_finds_the_number_of_blobs(self, number):
    x, _ = blobs(number, each=4, D=40)
    x = jnp.pad(x, ((0, 120 - x.shape[0]), (0, 0)))
    weight = (jnp.arange(120) < 4 * number).astype(jnp.float32)

    found = sweep(jax.random.key(0), x, weight)
    self.assertEqual(int(kmeans.elbow(found.distortion, 12)), number)
    best = kmeans.best_silhouette(found.silhouette, 12, 32)
    self.assertEqual(int(best), number)


@jax.jit
def sweep(key, x, weight):
  start = kmeans.starts(key, x, weight, 32)
  return kmeans.sweep(x, weight, start, 12, iters=20)


if __name__ == '__main__':
  absltest.main()
