"""Tests of jaxq.kvcache.zipcache and saliency."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.kvcache import interface, saliency, softmax, stores, zipcache
from tests.kvcache import testing

ALL = dataclasses.replace(
  testing.ZIPCACHE, probe_recent=0, probe_random=0, scale_dtype='float32'
)


def by_loops(q, k, denominator):
  """Saliency (B, Hkv, T) of whole sequences from an explicit softmax."""
  B, T, H, D = q.shape
  Hkv = k.shape[2]
  out = np.zeros((B, Hkv, T))
  for b in range(B):
    for h in range(H):
      scores = np.asarray(q[b, :, h] @ k[b, :, h // (H // Hkv)].T) / D**0.5
      scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
      a = np.exp(scores - scores.max(1, keepdims=True))
      out[b, h // (H // Hkv)] += (a / a.sum(1, keepdims=True)).sum(0)
  return out if denominator == 'none' else out / (T - np.arange(T))


def in_order(cache, count):
  """Dequantized keys, values (B, count, Hkv, D), in the order of tokens."""
  R = cache.k_residual.shape[1]
  k = np.zeros((testing.B, count, testing.HKV, testing.D), np.float32)
  v = np.zeros_like(k)
  rows = np.arange(testing.B)[:, None, None]
  heads = np.arange(testing.HKV)[None, None]
  for pool in cache.pools:
    n = count // R * pool.count
    slots = jnp.arange(n)
    positions = np.asarray(pool.positions(slots, cache.length, R))
    values = cache._values(pool).values(0, n)
    k[rows, positions, heads] = pool.k.values(0, n)
    v[rows, positions, heads] = values
  return jnp.asarray(k), jnp.asarray(v)


class SaliencyTest(parameterized.TestCase):
  @parameterized.parameters('probe', 'full', 'none')
  def test_all_probes_are_the_definition(self, denominator):
    q, k, _ = testing.qkv(30)
    probes = jnp.broadcast_to(jnp.arange(30)[None], (testing.B, 30))
    got = saliency.from_probes(q, k, probes, denominator=denominator)
    np.testing.assert_allclose(got, by_loops(q, k, denominator), atol=1e-5)

  def test_uniform_attention_has_no_bias_for_old_tokens(self):
    q, k, _ = testing.qkv(64)
    probes = jnp.broadcast_to(jnp.arange(64)[None], (testing.B, 64))
    summed = saliency.from_probes(q * 0, k, probes, denominator='none')
    self.assertTrue(bool(jnp.all(jnp.diff(summed, axis=-1) < 0)))
    score = saliency.from_probes(q * 0, k, probes)
    # H(n) - H(i) over n - i: the last token is seen once, with 1 / n; the
    # first by all, with about log(n) / n. Summed they differ by n log(n).
    self.assertLess(float(score[0, 0, 0] / score[0, 0, -1]), np.log(64) + 1)
    self.assertGreater(float(summed[0, 0, 0] / summed[0, 0, -1]), 64)

  def test_probe_count_is_of_the_probes_that_saw_it(self):
    q, k, _ = testing.qkv(30)
    probes = jnp.array([[10, 29]] * testing.B)
    score = saliency.from_probes(q, k, probes)
    parity = saliency.from_probes(q, k, probes, denominator='full')
    # Token 5 was seen by 2 probes and by 25 queries; token 20 by 1 and 10.
    np.testing.assert_allclose(
      score[..., 5] * 2, parity[..., 5] * 25, rtol=1e-5
    )
    np.testing.assert_allclose(score[..., 20], parity[..., 20] * 10, rtol=1e-5)

  def test_probes_are_the_last_and_some_before(self):
    index, valid = saliency.probe_indices(200, jnp.array([200, 120, 4]))
    self.assertEqual(index.shape, (3, 20))
    np.testing.assert_array_equal(index[0, :10], np.arange(199, 189, -1))
    np.testing.assert_array_equal(index[1, :10], np.arange(119, 109, -1))
    self.assertTrue(bool(jnp.all(index[0, 10:] < 190)))
    self.assertTrue(bool(jnp.all(index[1, 10:] < 110)))
    self.assertTrue(bool(jnp.all(valid[:2])))
    np.testing.assert_array_equal(valid[2, :10], [True] * 4 + [False] * 6)

  def test_few_rows_are_all_probes(self):
    index, valid = saliency.probe_indices(19, jnp.array([19, 3]))
    np.testing.assert_array_equal(index[0], np.arange(19))
    self.assertEqual(valid.sum(axis=1).tolist(), [19, 3])

  def test_split_takes_the_lower_index_of_ties(self):
    scores = jnp.array([[[1.0, 3.0, 1.0, 2.0, 1.0]]])
    high, low = saliency.split_salient(scores, 3)
    np.testing.assert_array_equal(high[0, 0], [1, 3, 0])
    np.testing.assert_array_equal(low[0, 0], [2, 4])

  def test_unknown_denominator(self):
    with self.assertRaisesRegex(
      ValueError, "denominator='all'; allowed .'full"
    ):
      saliency.check_denominator('all')


class ZipCacheTest(parameterized.TestCase):
  def test_the_cache_splits_by_the_definition(self):
    # All rows of one prefill are probes: its blocks are split by equation (d).
    q, k, v = testing.qkv(32)
    _, cache = testing.run(ALL, (q, k, v), (32,))
    score = by_loops(q, k, 'full')
    salient, other = ALL.counts()
    self.assertEqual((salient, other), (10, 6))
    pool = cache.pools[0]
    positions = pool.positions(jnp.arange(20), cache.length, testing.R)
    for row in range(testing.B):
      for head in range(testing.HKV):
        expected = [
          first + i
          for first in (0, 16)
          for i in np.argsort(-score[row, head, first : first + 16])[:10]
        ]
        self.assertCountEqual(positions[row, :, head].tolist(), expected)

  def test_pools_are_attention_over_the_tokens_in_order(self):
    data = testing.qkv(33)
    q, k, v = data
    for config in (ALL, dataclasses.replace(ALL, separate=False)):
      first = jax.tree.map(lambda x: x[:, :32], data)
      _, cache = testing.run(config, first, (32,))
      out, _ = testing.run(
        config, jax.tree.map(lambda x: x[:, 32:], data), (1,), cache=cache
      )
      old_k, old_v = in_order(cache, 32)
      whole = (
        q,
        jnp.concatenate([old_k, k[:, 32:]], axis=1),
        jnp.concatenate([old_v, v[:, 32:]], axis=1),
      )
      np.testing.assert_allclose(
        out, testing.attention(whole)[:, 32:], atol=1e-5
      )

  def test_salient_tokens_are_kept_better(self):
    data = testing.qkv(32)
    _, cache = testing.run(ALL, data, (32,))
    k, v = in_order(cache, 32)
    salient = np.zeros((testing.B, 32, testing.HKV), bool)
    positions = cache.pools[0].positions(
      jnp.arange(20), cache.length, testing.R
    )
    rows = np.arange(testing.B)[:, None, None]
    salient[rows, np.asarray(positions), np.arange(testing.HKV)] = True
    for got, exact in ((k, data[1]), (v, data[2])):
      error = np.asarray(jnp.mean((got - exact) ** 2, axis=-1))
      self.assertLess(error[salient].mean(), 0.3 * error[~salient].mean())

  def test_eight_bits_are_close(self):
    data = testing.qkv(40)
    config = dataclasses.replace(testing.ZIPCACHE, bits=8, low_bits=8)
    out, _ = testing.run(config, data, (32,) + (1,) * 8)
    expected = testing.attention(data)
    error = jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected)
    self.assertLess(float(error), 1e-2)

  def test_separate_channels_beat_plain_tokens(self):
    # Values with channels of unlike size, 4 bits.
    _, k, v = testing.qkv(32)
    v = v * jnp.exp(jnp.linspace(-2, 2, testing.D)).reshape(1, 1, 1, -1)

    def error(separate):
      config = dataclasses.replace(
        ALL, low_bits=4, separate=separate, split='random'
      )
      _, cache = testing.run(config, (testing.qkv(32)[0], k, v), (32,))
      # Of every channel by its own size.
      relative = (in_order(cache, 32)[1] - v) / jnp.std(
        v, axis=1, keepdims=True
      )
      return float(jnp.mean(relative**2))

    self.assertLess(error(True), 0.5 * error(False))

  def test_channel_scale_is_the_root_of_the_largest(self):
    data = testing.qkv(16)
    _, cache = testing.run(ALL, data, (16,))
    np.testing.assert_allclose(
      cache.channel[:, 0],
      jnp.sqrt(jnp.max(jnp.abs(data[2]), axis=1)),
      rtol=1e-5,
    )

  def test_random_split_differs_between_layers(self):
    config = dataclasses.replace(testing.ZIPCACHE, split='random')
    q, k, v = testing.qkv(16)
    _, a = testing.run(config, (q, k, v), (16,))
    _, b = testing.run(config, (q, k + 0.25, v), (16,))
    _, again = testing.run(config, (q, k, v), (16,))
    self.assertTrue(testing.same(a.pools[0].place, again.pools[0].place))
    self.assertFalse(testing.same(a.pools[0].place, b.pools[0].place))

  def test_bits_per_element(self):
    shape = interface.CacheShape(
      batch=1, capacity=4096, kv_heads=8, head_dim=128
    )
    config = zipcache.ZipCacheConfig()
    cache = jax.eval_shape(lambda: config.init(shape))
    average = (77 * 4 + 51 * 2) / 128
    # Keys: two classes' parameters over 128 tokens. Values: a token's over 128
    # channels, and c. Places: a byte per token and head, half of it each.
    keys, values = 2 * 32 / 128, 32 / 128 + 16 / 128
    self.assertAlmostEqual(
      interface.stored_bits_per_element(cache),
      average + (keys + values) / 2 + 8 / 128 / 2,
      delta=1e-4,
    )

  @parameterized.parameters(
    (dict(bits=3), r'bits=3; allowed \[2, 4, 8, 16'),
    (dict(low_bits=1), 'low_bits=1; allowed'),
    (dict(salient=1.5), r'salient=1.5; it is a share, 0\.\.1'),
    (dict(probe_random=-0.1), 'probe_random=-0.1; it is a share'),
    (dict(residual=512), 'residual=512; allowed 2..256'),
    (dict(split='best'), "split='best'; allowed .'random'"),
    (dict(denominator='all'), "denominator='all'; allowed"),
  )
  def test_messages(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      zipcache.ZipCacheConfig(**fields)

  def test_an_update_without_scores_is_refused(self):
    cache = testing.ZIPCACHE.init(testing.shape())
    _, k, v = testing.qkv(1)
    with self.assertRaisesRegex(ValueError, 'an update without scores; .*Appe'):
      interface.append(cache, interface.Update(k=k, v=v))


class SeparateStoreTest(absltest.TestCase):
  def test_folded_is_dequantized(self):
    _, cache = testing.run(ALL, testing.qkv(48), (48,))
    pool = cache.pools[0]
    store = cache._values(pool)
    self.assertIsInstance(store, zipcache.SeparateStore)
    self.assertIsInstance(pool.v, stores.IntStore)
    p = jax.random.uniform(
      jax.random.key(0), (testing.B, testing.HKV, 2, 1, 2 * pool.count)
    )
    for first in (0, pool.count):
      np.testing.assert_allclose(
        store.combine(p, first, 2 * pool.count),
        jnp.einsum('bkgts,bskd->bkgtd', p, store.values(first, 2 * pool.count)),
        atol=1e-4,
      )
    self.assertEqual(softmax.BLOCK, 512)


if __name__ == '__main__':
  absltest.main()
