"""Tests of jaxq.tokens.redundancy."""

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from jaxq.tokens import redundancy

D = 6
CONFIG = redundancy.KnnConfig()


def item(rng, n=3):
  """States (5, D) of a prompt with an item at 1..n; its last token carries it.

  Tokens that carry an item share a direction, so do the others.
  """
  states = 0.3 * rng.normal(size=(5, D))
  states[1 : n + 1, 0] += 1.0
  states[n, 1] += 2.0
  return jnp.asarray(states, jnp.float32)


def labelled(rng, number):
  features, labels = [], []
  for _ in range(number):
    features.append(
      redundancy.features(item(rng), (1, 4), [True, False, False], CONFIG)
    )
    labels += [True, True, False]
  return jnp.concatenate(features), jnp.asarray(labels)


class RedundancyTest(absltest.TestCase):
  def test_representative_tokens_by_majority(self):
    rng = np.random.default_rng(0)
    states, pads = item(rng), jnp.full((5, D), -1.0)
    seen = []

    def shows(edited, seed):
      seen.append(edited.shape)
      carries = np.asarray(edited[..., 1] > 1.0).any(axis=1)
      return carries if seed else ~carries  # One of three images is wrong.

    found = redundancy.representative(shows, states, pads, (1, 4), (0, 1, 2))
    np.testing.assert_array_equal(found, [False, False, True])
    self.assertEqual(seen, [(3, 5, D)] * 3)
    with self.assertRaisesRegex(ValueError, r'range \(4, 6\) of S=5'):
      redundancy.representative(shows, states, pads, (4, 6))

  def test_predicts_new_items(self):
    rng = np.random.default_rng(1)
    bank = redundancy.fit(*labelled(rng, 20), *labelled(rng, 20))
    hits = []
    for _ in range(20):
      new = redundancy.features(item(rng), (1, 4), [True, False, False], CONFIG)
      np.testing.assert_allclose(jnp.linalg.norm(new, axis=1), 1.0, rtol=1e-5)
      said = redundancy.redundant_of_item(bank, new)
      hits.append(np.asarray(said)[:2].all() and not said[2])
    self.assertGreater(np.mean(hits), 0.9)
    keep = redundancy.keep_mask(5, [((1, 4), said)])
    np.testing.assert_array_equal(keep, [True, False, False, True, True])

  def test_an_item_keeps_one_token(self):
    bank = redundancy.Bank(
      features=jnp.eye(D)[:5], redundant=jnp.ones(5, bool),
      threshold=jnp.float32(0.5),
    )  # fmt: skip
    new = jnp.eye(D)[:3]
    said = redundancy.redundant_of_item(bank, new)
    np.testing.assert_array_equal(said, [True, True, False])

  def test_votes_are_weighted_by_distance(self):
    bank = jnp.array([[1.0, 0], [0.6, 0.8], [0.0, 1.0]])
    redundant = jnp.array([True, False, True])
    vote = redundancy.vote(
      bank, redundant, jnp.array([[0.8, 0.6]]), redundancy.KnnConfig(k=2)
    )
    # cosines 0.96 (not redundant) and 0.8 (redundant).
    np.testing.assert_allclose(vote, [(1 / 0.2) / (1 / 0.2 + 1 / 0.04)], 1e-4)

  def test_threshold(self):
    votes = np.array([0.0, 0.2, 0.4, 0.6, 0.8])
    redundant = np.array([False, False, True, True, True])
    self.assertEqual(redundancy.choose_threshold(votes, redundant, 0.9), 0.4)
    self.assertEqual(redundancy.choose_threshold(votes, redundant, 0.7), 0.2)
    self.assertEqual(
      redundancy.choose_threshold(votes, np.zeros(5, bool), 0.9), np.inf
    )

  def test_bad_input(self):
    with self.assertRaisesRegex(ValueError, 'k=0.*k is at least 1'):
      redundancy.KnnConfig(k=0)
    features, labels = labelled(np.random.default_rng(0), 1)
    with self.assertRaisesRegex(ValueError, '3 labelled tokens for k=5'):
      redundancy.fit(features, labels, features, labels)


if __name__ == '__main__':
  absltest.main()
