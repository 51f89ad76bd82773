"""Tests of jaxq.quant.token_clusters."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.quant import token_clusters

KEY = jax.random.key(0)


def ones(T):
  return jnp.ones(T, bool)


def bumps(T=120, K=30, clusters=3, seed=0):
  """Rows with large values in one third of the channels; their labels."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, clusters, T)
  rows = rng.uniform(0, 0.3, (T, K))
  width = K // clusters
  for t, label in enumerate(labels):
    own = slice(label * width, (label + 1) * width)
    rows[t, own] += rng.uniform(1, 2, width)
  return jnp.asarray(rows, jnp.float32), labels


def agreement(found, labels, clusters):
  """Share of rows in clusters that are named by their most frequent label."""
  found = np.asarray(found)
  hits = 0
  for e in range(clusters):
    own = labels[found == e]
    hits += np.bincount(own).max() if own.size else 0
  return hits / len(labels)


class ImportanceTest(parameterized.TestCase):
  def test_by_hand(self):
    x = jnp.array([[-3.0, 1.0, 2.0], [0.5, 1.0, -9.0]])
    importance = token_clusters.channel_importance(
      x, jnp.array([1.0, 2.0, 1.0])
    )
    np.testing.assert_allclose(importance, [[3, 2, 2], [0.5, 2, 9]])
    member = token_clusters.top_channels(importance, 2)
    np.testing.assert_array_equal(member, [[1, 1, 0], [0, 1, 1]])
    frequency, tokens = token_clusters.importance_frequency(
      member, jnp.array([True, False]), jnp.zeros(2, jnp.int32)
    )
    np.testing.assert_array_equal(frequency, [[1, 1, 0]])
    np.testing.assert_array_equal(tokens, [1])

  def test_many_tokens_of_one_modality_do_not_decide(self):
    """Ten image tokens for one of text, each with channels of its own."""
    T, K = 220, 8
    modality = (jnp.arange(T) % 11 == 0).astype(jnp.int32)  # 1: text.
    x = jnp.ones((T, K)).at[:, 0].set(9.0)  # Channel 0 matters to all.
    x = x.at[:, 1].set(jnp.where(modality == 0, 8.0, 0.1))
    x = x.at[:, 2].set(jnp.where(modality == 1, 8.0, 0.1))
    member = token_clusters.top_channels(x, 2)

    def channels(modality, modalities):
      f, tokens = token_clusters.importance_frequency(
        member, ones(T), modality, modalities
      )
      return token_clusters.split_channels(f, tokens, 2, 0.5)

    pooled = channels(jnp.zeros(T, jnp.int32), 1)
    self.assertEqual(list(np.flatnonzero(pooled.independent)), [0, 1])
    apart = channels(modality, 2)
    self.assertEqual(list(np.flatnonzero(apart.independent)), [0])
    self.assertEqual(list(np.flatnonzero(apart.dependent)), [1, 2])

  def test_rare_channels_are_neither(self):
    frequency = jnp.array([[0.9, 0.2, 0.02, 0.2]])
    found = token_clusters.split_channels(
      frequency, jnp.array([1000.0]), 3, 0.5
    )
    np.testing.assert_array_equal(found.independent, [True] + [False] * 3)
    # 1 / (10 k) is 0.033.
    np.testing.assert_array_equal(found.dependent, [False, True, False, True])
    few = token_clusters.split_channels(frequency, jnp.array([30.0]), 3, 0.5)
    self.assertFalse(bool(few.dependent[1]))  # 6 occurrences.

  def test_a_modality_without_tokens_does_not_count(self):
    frequency = jnp.array([[0.9, 0.3], [0.0, 0.0]])
    found = token_clusters.split_channels(
      frequency, jnp.array([100.0, 0.0]), 2, 0.5
    )
    np.testing.assert_array_equal(found.independent, [True, False])
    np.testing.assert_array_equal(found.dependent, [False, True])


class ClustersTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_planted_clusters_are_found(self, jit):
    values, labels = bumps()
    rows = token_clusters.features(values, ones(30))
    np.testing.assert_allclose(jnp.sum(rows**2, axis=-1), 1, rtol=1e-5)
    run = token_clusters.spherical_kmeans
    if jit:
      run = jax.jit(run, static_argnums=2)
    found = run(rows, ones(120), 3, KEY)
    self.assertEqual(agreement(found.labels, labels, 3), 1.0)
    np.testing.assert_array_equal(
      np.sort(found.sizes), np.sort(np.bincount(labels))
    )
    np.testing.assert_allclose(
      jnp.sum(found.centroids**2, axis=-1), 1, rtol=1e-5
    )

  def test_uncounted_tokens_have_no_say(self):
    values, labels = bumps()
    rows = token_clusters.features(values, ones(30))
    noise = jax.random.normal(KEY, (40, 30))
    both = jnp.concatenate([rows, noise])
    counted = jnp.arange(160) < 120
    found = token_clusters.spherical_kmeans(both, counted, 3, KEY)
    self.assertEqual(agreement(found.labels[:120], labels, 3), 1.0)
    self.assertEqual(float(jnp.sum(found.sizes)), 120)

  def test_fewer_sets_than_clusters_leave_one_empty(self):
    rows = jnp.eye(8)[jnp.arange(90) % 2]
    found = token_clusters.spherical_kmeans(rows, ones(90), 3, KEY)
    np.testing.assert_array_equal(np.sort(found.sizes), [0, 45, 45])
    enough = token_clusters.spherical_kmeans(rows, ones(90), 2, KEY)
    np.testing.assert_array_equal(enough.sizes, [45, 45])

  def test_a_router_tells_the_cluster_of_the_input(self):
    values, labels = bumps(T=400)
    signs = jnp.where(jnp.arange(30) % 2 == 0, 1.0, -1.0)
    x = values * signs[None]  # Outliers with a sign each.
    targets = jnp.asarray(labels, jnp.int32)
    router = token_clusters.fit_router(x[:300], targets[:300], ones(300), 3)
    u = np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True)
    u, y = u[:300], np.eye(3)[labels[:300]]
    gram = u.T @ u
    damped = gram + 0.01 * np.mean(np.diag(gram)) * np.eye(30)
    np.testing.assert_allclose(
      router, np.linalg.solve(damped, u.T @ y), atol=1e-3
    )
    guess = np.argmax(np.asarray(x[300:]) @ np.asarray(router), axis=1)
    self.assertGreater(np.mean(guess == labels[300:]), 0.95)

  def test_means_and_lift_by_hand(self):
    rows = jnp.array([[3.0, 4.0], [3.0, 4.0], [0.0, 2.0]])
    labels = jnp.array([0, 0, 1])
    mean = token_clusters.mean_importance(rows, labels, ones(3), 2)
    np.testing.assert_allclose(mean, [[0.6, 0.0], [0.8, 1.0]], rtol=1e-6)
    member = jnp.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    gates = jax.nn.one_hot(labels, 2)
    lift = token_clusters.lift(member, gates, ones(3))
    np.testing.assert_allclose(lift, [[1.5, 0.75, 0], [0, 1.5, 0]], rtol=1e-6)


if __name__ == '__main__':
  absltest.main()
