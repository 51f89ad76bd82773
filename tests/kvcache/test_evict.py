"""Tests of jaxq.kvcache.evict and slots."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.kvcache import evict, interface, slots
from jaxq.nn import rope as rope_lib
from tests.kvcache import testing

INF = float('inf')


def kept(cache, row=0, head=0):
  """Positions that a head holds, in order."""
  held = np.asarray(cache.positions)[row, :, head, 0]
  return sorted(held[held >= 0].tolist())


class PlacesTest(parameterized.TestCase):
  def test_by_hand(self):
    # Slots hold 5, nothing, 1; of 4, 9, 2 come: 5, 9, 4 stay.
    rank = jnp.array([[[5.0, -INF, 1.0, 4.0, 9.0, 2.0]]])
    np.testing.assert_array_equal(slots.places(rank, 3)[0, :, 0], [1, 2, 3])
    # One at a time: over the lowest, or nowhere.
    one = lambda *x: int(slots.places(jnp.array([[x]]), 3)[0, 0, 0])
    self.assertEqual(one(5.0, 1.0, 2.0, 4.0), 1)
    self.assertEqual(one(5.0, 1.0, 2.0, 0.5), 3)
    self.assertEqual(one(5.0, -INF, 2.0, 0.5), 1)
    self.assertEqual(one(5.0, -INF, 2.0, -INF), 3)

  @parameterized.parameters(1, 4, 20)
  def test_the_highest_stay_and_none_moves(self, T):
    rng = np.random.default_rng(T)
    S, B, H = 8, 3, 2
    rank = rng.permutation(B * H * (S + T)).reshape(B, H, S + T)
    rank = rank.astype(np.float32)
    rank[0, 0, 5:S] = -np.inf
    where = np.asarray(slots.places(jnp.asarray(rank), S))
    for b in range(B):
      for h in range(H):
        held = list(rank[b, h, :S])
        for t, slot in enumerate(where[b, :, h]):
          if slot < S:
            held[slot] = rank[b, h, S + t]
        best = np.sort(rank[b, h])[::-1][:S]
        np.testing.assert_array_equal(np.sort(held)[::-1], best)


class EvictTest(parameterized.TestCase):
  @parameterized.parameters(*evict.POLICIES)
  def test_sinks_and_the_newest_stay_in_a_budget(self, policy):
    config = dataclasses.replace(testing.EVICT, policy=policy)
    _, cache = testing.run(config, testing.qkv(40), (20,) + (1,) * 20)
    self.assertEqual(cache.k.slots, 24)
    for row in range(testing.B):
      for head in range(testing.HKV):
        held = kept(cache, row, head)
        self.assertLen(set(held), 24)
        self.assertContainsSubset([0, 1, 36, 37, 38, 39], held)
        if policy == 'streaming':
          self.assertEqual(held, [0, 1, *range(18, 40)])

  def test_memory_is_that_of_the_budget(self):
    whole = dataclasses.replace(testing.EVICT, policy='knorm', ratio=1.0)
    whole = dataclasses.replace(whole, budget=None)
    half = dataclasses.replace(whole, ratio=0.5)
    size = lambda config: interface.nbytes(
      config.init(testing.shape(capacity=512))
    )
    self.assertAlmostEqual(size(half) / size(whole), 0.5, delta=0.01)

  @parameterized.parameters('int8', 'contiguous')
  def test_what_stays_keeps_its_bits(self, inner):
    config = dataclasses.replace(testing.EVICT, policy='h2o', inner=inner)
    data = testing.qkv(40)
    first = jax.tree.map(lambda x: x[:, :20], data)
    rest = jax.tree.map(lambda x: x[:, 20:], data)
    _, before = testing.run(config, first, (20,))
    _, after = testing.run(config, rest, (1,) * 20, cache=before)
    same = np.asarray(before.positions == after.positions)[..., 0]
    same = same & (np.asarray(before.positions)[..., 0] >= 0)
    self.assertGreater(same.sum(), 10)
    for a, b in zip(
      jax.tree.leaves(before.k), jax.tree.leaves(after.k), strict=True
    ):
      np.testing.assert_array_equal(
        np.asarray(a, np.float32)[same], np.asarray(b, np.float32)[same]
      )

  def test_a_step_sees_exactly_what_is_held(self):
    # Masking the evicted tokens in plain attention gives the same.
    config = dataclasses.replace(testing.EVICT, policy='knorm')
    q, k, v = testing.qkv(40)
    first = (x[:, :39] for x in (q, k, v))
    _, cache = testing.run(config, tuple(first), (20,) + (1,) * 19)
    out, _ = testing.run(
      config, (q[:, 39:], k[:, 39:], v[:, 39:]), (1,), cache=cache
    )
    for head in range(testing.H):
      at = kept(cache, 0, head // 2) + [39]
      key, value = (np.asarray(x)[0, at, head // 2] for x in (k, v))
      s = key @ np.asarray(q)[0, 39, head] / np.sqrt(testing.D)
      p = np.exp(s - s.max())
      np.testing.assert_allclose(
        out[0, 0, head], p @ value / p.sum(), atol=1e-5
      )

  def test_heads_share_a_budget(self):
    config = dataclasses.replace(testing.EVICT, head_budgets=True)
    q, k, v = testing.qkv(40)
    k = k.at[:, 5:15, 1].multiply(4.0)  # Keys of one head draw attention.
    _, cache = testing.run(config, (q, k, v), (20,) + (1,) * 20)
    self.assertEqual(cache.k.slots, 2 * 24)
    head = np.asarray(cache.head)[..., 0, 0]
    sizes = [(head[0] == h).sum() for h in range(2)]
    self.assertEqual(sum(sizes), 48)
    self.assertGreaterEqual(min(sizes), int(0.2 * 24))
    self.assertNotEqual(*sizes)

  def test_streaming_numbers_anew(self):
    # As if the text were what is held, at positions without gaps.
    config = testing.SELECTING['evict_streaming']
    rope = rope_lib.Rope()
    q, k, v = testing.qkv(41)
    at = jnp.broadcast_to(jnp.arange(41)[None], (testing.B, 41))
    turned = tuple(rope_lib.rotate(x, at, rope) for x in (q, k))
    _, cache = testing.run(
      config,
      (turned[0][:, :40], turned[1][:, :40], v[:, :40]),
      (20,) + (1,) * 20,
    )
    last = (turned[0][:, 40:], turned[1][:, 40:], v[:, 40:])
    out, _ = testing.run(config, last, (1,), cache=cache)
    held = jnp.array([*kept(cache), 40])
    n = len(held)
    places = jnp.broadcast_to(jnp.arange(n)[None], (testing.B, n))
    plain = tuple(rope_lib.rotate(x[:, held], places, rope) for x in (q, k))
    want = testing.attention((*plain, v[:, held]))
    np.testing.assert_allclose(out[:, 0], want[:, -1], atol=1e-5)

  def test_of_layers(self):
    config = dataclasses.replace(testing.EVICT, policy='random')
    cache = config.init(testing.shape())
    stacked = jax.tree.map(lambda a: jnp.stack([a] * 2), cache)
    np.testing.assert_array_equal(stacked.of_layers(range(3, 5)).layer, [3, 4])

  @parameterized.parameters(
    ({'policy': 'lru'}, r"policy='lru'; allowed \['expected', 'h2o'"),
    ({'inner': 'kivi'}, r"inner='kivi'; allowed \['contiguous', 'fp8', 'int2'"),
    ({'ratio': 0.0}, 'ratio=0.0; it is the share of tokens'),
    ({'safeguard': 2.0}, 'safeguard=2.0; it is a share'),
    ({'budget': 0}, 'budget=0; it must be at least 1'),
    ({'kernel': 4}, 'kernel=4; it must be odd.*Use 5'),
    ({'interval': 64}, 'interval=64, recent=32; a token must be scored'),
    ({'reposition': True}, "reposition with policy='snapkv'; only streaming"),
    (
      {'reposition': True, 'policy': 'streaming', 'head_budgets': True},
      'reposition with head_budgets',
    ),
  )
  def test_messages(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      evict.EvictConfig(**fields)

  def test_messages_of_init(self):
    config = evict.EvictConfig(budget=36)
    with self.assertRaisesRegex(ValueError, 'budget=36, sinks=4, recent=32; t'):
      config.init(testing.shape())
    with self.assertRaisesRegex(
      ValueError, 'budget=36 for a cache of 20 token'
    ):
      config.init(testing.shape(capacity=20))
    shape = dataclasses.replace(testing.shape(), heads=None, rope=None)
    with self.assertRaisesRegex(ValueError, "'snapkv' keeps queries; CacheSha"):
      testing.EVICT.init(shape)
    with self.assertRaisesRegex(ValueError, 'have no rotary positions'):
      testing.SELECTING['evict_streaming'].init(shape)
    _, k, v = testing.qkv(1)
    with self.assertRaisesRegex(ValueError, 'an update without scores'):
      interface.append(
        testing.EVICT.init(testing.shape()), interface.Update(k=k, v=v)
      )


if __name__ == '__main__':
  absltest.main()
