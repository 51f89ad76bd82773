"""The sets that CaCoVID tries: their sizes, groups and probabilities."""

import collections
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import cacovid_sampling as sampling
from jaxq.tokens import primitives

CONFIG = sampling.SamplingConfig()
T, CELLS, D = 8, 50, 4


@functools.partial(jax.jit, static_argnames=('rate', 'config'))
def sets_of(key, a, f, x, rate, config=CONFIG):
  return sampling.sample_combinations(key, a, f, x, rate, config)


def video(seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  return (
    2 * jax.random.normal(keys[0], (T * CELLS,)),
    jax.random.normal(keys[1], (T,)),
    jax.random.normal(keys[2], (T * CELLS, D)),
  )


class GroupsTest(parameterized.TestCase):
  @parameterized.parameters(
    (196, 0.02, 4, [8] * 21 + [7] * 4, 0.1),
    (196, 0.01, 2, [4] * 46 + [3] * 4, 0.1),
    (196, 0.12, 24, [49] * 4, 0.5),
    (10, 0.6, 6, [10], 1.0),
  )
  def test_by_hand(self, cells, rate, k, sizes, cap):
    self.assertEqual(sampling.kept_per_frame(rate, cells), k)
    got = sampling.group_sizes(rate, cells, CONFIG)
    self.assertEqual(got, sizes)
    self.assertEqual(sum(got), cells)
    self.assertAlmostEqual(sampling.group_cap(len(got), CONFIG), cap)
    ranks = sampling.group_of_ranks(got)
    np.testing.assert_array_equal(np.bincount(ranks), sizes)
    self.assertTrue((np.diff(ranks) >= 0).all())

  def test_draws_without_replacement_are_sequential_ones(self):
    # Chi-square on the sets of 2 of 6, 15 of them.
    p = np.array([0.3, 0.25, 0.2, 0.1, 0.1, 0.05])
    n = 20_000
    drawn = primitives.gumbel_topk(
      jax.random.key(0), jnp.broadcast_to(jnp.log(jnp.array(p)), (n, 6)), 2
    )
    seen = collections.Counter(
      map(tuple, np.sort(np.asarray(drawn), axis=1).tolist())
    )
    total = 0.0
    for i, j in itertools.combinations(range(6), 2):
      share = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
      total += (seen[i, j] - n * share) ** 2 / (n * share)
    self.assertLess(total, 36.1)  # One in a thousand for 14 degrees.


class SetsTest(parameterized.TestCase):
  @parameterized.parameters(0.02, 0.04, 0.12)
  def test_every_set_keeps_as_many(self, rate):
    a, f, x = video()
    sets = sets_of(jax.random.key(1), a, f, x, rate)
    k = sampling.kept_per_frame(rate, CELLS)
    self.assertEqual(sets.keep.shape, (32, T * CELLS))
    np.testing.assert_array_equal(sets.keep.sum(1), k * T)
    by_frame = np.asarray(sets.keep).reshape(32, T, CELLS).sum(2)
    np.testing.assert_array_equal(by_frame[:24], k)  # Content and tokens.
    np.testing.assert_array_equal(sets.frames.sum(1), 1)
    self.assertFalse((by_frame[24:] > 0)[~np.asarray(sets.frames)].any())

  def test_the_first_of_each_is_greedy(self):
    a, f, x = video()
    sets = sets_of(jax.random.key(1), a, f, x, 0.04)
    best = np.argsort(-np.asarray(a).reshape(T, CELLS), axis=1)[:, :2]
    kept = np.asarray(sets.keep[1]).reshape(T, CELLS)
    for t in range(T):
      np.testing.assert_array_equal(np.flatnonzero(kept[t]), np.sort(best[t]))
    self.assertEqual(int(sets.frames[0].argmax()), int(f.argmax()))

  def test_a_set_is_of_one_group_per_frame(self):
    a, f, x = video()
    sets = sets_of(jax.random.key(2), a, f, x, 0.04)
    order = np.argsort(-np.asarray(a).reshape(T, CELLS), axis=1)
    group = np.asarray(
      sampling.group_of_ranks(sampling.group_sizes(0.04, CELLS, CONFIG))
    )
    seen = set()
    for kept in np.asarray(sets.keep[2:24]).reshape(-1, T, CELLS):
      for t in range(T):
        groups = set(group[np.flatnonzero(kept[t][order[t]])])
        self.assertLen(groups, 1)
        seen |= groups
    self.assertGreater(len(seen), 3)

  def test_plain_draws_cross_groups(self):
    a, f, x = video()
    plain = dataclasses.replace(CONFIG, grouped=False)
    sets = sets_of(jax.random.key(2), 0 * a, f, x, 0.04, plain)
    group = np.arange(CELLS) // 4
    kept = np.asarray(sets.keep[2:24]).reshape(-1, CELLS)
    crossing = [len(set(group[row])) > 1 for row in kept]
    self.assertGreater(np.mean(crossing), 0.8)

  def test_content_is_diverse(self):
    # Each frame has two heaps; two tokens of a frame are one of each.
    heaps = jnp.tile(jnp.arange(CELLS) < 25, (T,))
    x = 9 * heaps[:, None].astype(jnp.float32) + jax.random.normal(
      jax.random.key(0), (T * CELLS, D)
    )
    a, f, _ = video()
    sets = sets_of(jax.random.key(1), a, f, x, 0.04)
    of_heap = np.asarray(sets.keep[0] & heaps).reshape(T, CELLS).sum(1)
    np.testing.assert_array_equal(of_heap, 1)

  def test_messages(self):
    a, f, x = video()
    make = sampling.sample_combinations
    with self.assertRaisesRegex(ValueError, 'rate=0.005 of 50 tokens per'):
      make(jax.random.key(0), a, f, x, 0.005, CONFIG)
    with self.assertRaisesRegex(ValueError, '399 tokens of 8 frames'):
      make(jax.random.key(0), a[1:], f, x[1:], 0.02, CONFIG)
    with self.assertRaisesRegex(ValueError, '96 tokens of 1 frames of 50'):
      make(jax.random.key(0), a, f, x, 0.24, CONFIG)
    small = dataclasses.replace(CONFIG, group_size=0.5, frame_ratio=1.0)
    with self.assertRaisesRegex(ValueError, '12 tokens of groups of 6'):
      make(jax.random.key(0), a, f, x, 0.24, small)
    with self.assertRaisesRegex(ValueError, 'tokens=1, frames=8; an adv'):
      sampling.SamplingConfig(tokens=1)
    with self.assertRaisesRegex(ValueError, 'frame_ratio=0'):
      sampling.SamplingConfig(frame_ratio=0)


if __name__ == '__main__':
  absltest.main()
