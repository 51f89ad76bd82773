"""Tests of jaxq.kvcache.quest."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.kvcache import quest, softmax
from tests.kvcache import testing

CONFIG = testing.SELECTING['quest']  # Pages of 4, 3 of them.


step = functools.partial(testing.step, testing.PLAIN)
bounds = jax.jit(quest.QuestCache.bounds)


def filled(config, T=20):
  """The cache of T tokens, and their keys."""
  data = testing.qkv(T)
  _, cache = testing.run(config, data, (T,))
  return cache, data


class QuestTest(parameterized.TestCase):
  def test_a_bound_by_hand(self):
    config = dataclasses.replace(CONFIG, page_size=2)
    cache = config.init(testing.shape(batch=1, capacity=40))
    low, high = (jnp.zeros_like(cache.low) for _ in range(2))
    cache = dataclasses.replace(
      cache,
      low=low.at[0, 0, 0, :2].set(jnp.array([-1.0, 2.0])),
      high=high.at[0, 0, 0, :2].set(jnp.array([3.0, 5.0])),
      length=jnp.array([2]),
    )
    q = jnp.zeros((1, 2, 2, 1, testing.D)).at[0, 0, 0, 0, 0].set(2.0)
    q = q.at[0, 0, 0, 0, 1].set(-1.0)
    bound = bounds(cache, q)
    self.assertEqual(float(bound[0, 0, 0, 0, 0]), 2 * 3 - 1 * 2)
    self.assertEqual(float(bound[0, 0, 0, 0, 1]), -np.inf)

  @parameterized.parameters(*range(5))
  def test_bounds_hold_for_every_token(self, seed):
    cache, (_, k, _) = filled(CONFIG, 20)
    q = 3 * jax.random.normal(
      jax.random.key(seed), (testing.B, testing.HKV, 2, 1, testing.D)
    )
    bound = np.asarray(bounds(cache, q))[:, :, :, 0]  # (B, Hkv, G, pages)
    scores = np.einsum('bkgtd,bskd->bkgs', q, k)
    pages = np.repeat(bound, 4, axis=-1)[..., :20]
    self.assertTrue((pages >= scores - 1e-4).all())

  @parameterized.parameters(('kv_head',), ('all',))
  def test_picking_is_masking(self, group_by):
    config = dataclasses.replace(CONFIG, group_by=group_by, dense_prefill=False)
    cache, _ = filled(config)
    q, k, v = (x[:, -2:] for x in testing.qkv(22, seed=1))
    # Twice the same token: several queries mask where one picks.
    twice = tuple(jnp.repeat(x[:, :1], 2, axis=1) for x in (q, k, v))
    positions = testing.positions_of(cache.length, 1)
    one, _ = step(cache, *(x[:, :1] for x in twice), positions)
    many, _ = step(
      cache, *twice, jnp.concatenate([positions, positions + 1], 1)
    )
    np.testing.assert_allclose(one[:, 0], many[:, 0], atol=1e-5)
    dense = dataclasses.replace(cache, sparse=jnp.array(False))
    plain, _ = step(dense, *(x[:, :1] for x in twice), positions)
    self.assertGreater(float(jnp.abs(plain - one).max()), 1e-4)

  def test_reads_the_pages_of_the_highest_bounds(self):
    cache, _ = filled(CONFIG)
    q = testing.qkv(1, seed=2)[0]
    queries = softmax.group(q, testing.HKV, None)
    index, some = jax.jit(quest.QuestCache.select)(cache, queries[:, :, :, 0])
    bound = np.asarray(bounds(cache, queries))[:, :, :, 0].max(axis=2)
    want = np.argsort(-bound, axis=-1)[..., :3]
    np.testing.assert_array_equal(np.sort(index), np.sort(want))
    self.assertTrue(np.asarray(some).all())

  def test_at_least_three_pages(self):
    self.assertEqual(quest.QuestConfig(budget=16).pages_read(), 3)
    self.assertEqual(quest.QuestConfig(budget=256).pages_read(), 16)

  def test_first_layers_read_everything(self):
    cache = quest.QuestConfig(budget=32).init(testing.shape())
    stacked = jax.tree.map(lambda a: jnp.stack([a] * 4), cache)
    self.assertEqual(
      stacked.of_layers(range(4)).sparse.tolist(), [False, False, True, True]
    )

  def test_top(self):
    scores = jnp.array([[1.0, 3.0, 3.0, -jnp.inf]])
    self.assertEqual(
      quest.top(scores, 2).tolist(), [[False, True, True, False]]
    )
    self.assertEqual(quest.top(scores, 1).tolist()[0], [False, True, 0, 0])
    self.assertEqual(quest.top(scores, 9).tolist()[0], [True, True, True, 0])

  @parameterized.parameters(
    ({'page_size': 0}, 'quest: page_size=0; it must be at least 1'),
    ({'budget': 0}, 'quest: budget=0'),
    ({'group_by': 'layer'}, r"group_by='layer'; allowed \['all', 'kv_head'"),
    ({'pages': 9}, "quest: pages=9, inner='contiguous'; there is a pool with"),
    (
      {'inner': 'paged', 'page_size': 12},
      'quest: page_size=12; it must be a power of two',
    ),
    ({'inner': 'zipcache'}, "quest: inner='zipcache'; allowed"),
  )
  def test_messages(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      quest.QuestConfig(**fields)


if __name__ == '__main__':
  absltest.main()
