"""Tests of jaxq.kvcache.qjl."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.kvcache import interface, qjl
from tests.kvcache import testing

CONFIG = testing.CACHES['qjl']
PLAIN = dataclasses.replace(CONFIG, outliers=0)


@functools.partial(jax.jit, static_argnums=0)
def stored(config, k):
  """The store of keys k (B, T, Hkv, D)."""
  B, T, Hkv, D = k.shape
  shape = interface.CacheShape(batch=B, capacity=T, kv_heads=Hkv, head_dim=D)
  store = config.init(shape).k
  slots = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
  return store.put(store.encode(k), slots)


def estimate(q, k, s):
  """q (D,), k (D,) and a sketch s (m, D), by NumPy."""
  signs = np.where(s @ k >= 0, 1.0, -1.0)
  scale = qjl.correction(len(k)) / len(s) * np.linalg.norm(k)
  return scale * (s @ q) @ signs


class QjlTest(parameterized.TestCase):
  def test_the_sketch_is_orthogonal_in_blocks(self):
    s = qjl.sketch(40, 16, 0)
    for block in (s[:16], s[16:32]):
      np.testing.assert_allclose(block @ block.T, 16 * np.eye(16), atol=1e-4)
    self.assertEqual(s.shape, (40, 16))
    self.assertFalse(np.allclose(s, qjl.sketch(40, 16, 1)))

  def test_correction_by_hand(self):
    # On a circle of radius sqrt(2) the mean of |s_1| is sqrt(2) 2 / pi.
    self.assertAlmostEqual(qjl.correction(2), np.pi / 2 / 2**0.5)
    self.assertAlmostEqual(
      qjl.correction(512) / np.sqrt(np.pi / 2), 1 - 1 / 2048, places=6
    )

  def test_products_are_unbiased(self):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 16))
    found = [estimate(q, k, qjl.sketch(24, 16, seed)) for seed in range(2000)]
    error = np.std(found) / np.sqrt(len(found))
    self.assertLess(abs(np.mean(found) - q @ k), 3 * error)
    # The bound of the paper: sqrt(pi / 2 / m) of both lengths.
    bound = np.sqrt(np.pi / 2 / 24) * np.linalg.norm(q) * np.linalg.norm(k)
    self.assertLess(np.std(found), bound)

  @parameterized.parameters(0, 2)
  def test_scores_are_those_of_loops(self, outliers):
    config = dataclasses.replace(CONFIG, outliers=outliers)
    _, k, _ = testing.qkv(16)
    q = testing.qkv(3)[0].reshape(testing.B, 3, testing.HKV, 2, testing.D)
    q = q.transpose(0, 2, 3, 1, 4)  # (B, Hkv, G, T, D)
    store = stored(config, k)
    read = jax.jit(lambda s, q: (s.scores(q, 8, 8), s.values(8, 8)))
    got, values = read(store, q)
    np.testing.assert_allclose(
      got, jnp.einsum('bkgtd,bskd->bkgts', q, values), atol=1e-3
    )
    s = qjl.sketch(56, testing.D, 0).astype(np.float64)
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    for head in range(testing.HKV):
      group = k[1, 8:16, head]
      large = np.argsort(-(group**2).sum(0))[:outliers]
      out = np.isin(np.arange(testing.D), large)
      for t in range(8):
        one, key = q[1, head, 1, 2], group[t]
        want = estimate(one * ~out, key * ~out, s)
        if outliers:
          want += estimate(one * out, key * out, s[:32])
        # Norms are stored in float16.
        self.assertAlmostEqual(
          float(got[1, head, 1, 2, t]), want, delta=5e-3 * abs(want) + 1e-3
        )

  def test_more_signs_and_outliers_of_their_own_are_closer(self):
    q, k, _ = testing.qkv(32)  # One channel is large in all keys.
    q = q[:, :, ::2].transpose(0, 2, 1, 3)[:, :, None]
    want = jnp.einsum('bkgtd,bskd->bkgts', q, k)
    scores = jax.jit(lambda store, q: store.scores(q, 0, 32))

    def error(**changes):
      store = stored(dataclasses.replace(CONFIG, **changes), k)
      return float(jnp.std(scores(store, q) - want))

    plain, more = error(outliers=0), error(outliers=0, sketch=896)
    self.assertLess(more, 0.4 * plain)  # 1 / 4 by theory.
    self.assertLess(error(), 0.8 * plain)

  def test_bits_per_element(self):
    shape = interface.CacheShape(
      batch=1, capacity=4096, kv_heads=8, head_dim=128
    )
    cache = jax.eval_shape(lambda: qjl.QjlConfig().init(shape))
    keys = (256 + 64 + 32) / 128 + 8 * 8 / (32 * 128)
    self.assertAlmostEqual(
      interface.stored_bits_per_element(cache), (keys + 3) / 2, delta=1e-4
    )

  def test_a_key_of_zeros(self):
    store = stored(CONFIG, 0 * testing.qkv(16)[1])
    np.testing.assert_array_equal(store.norm, 0.0)
    np.testing.assert_array_equal(store.outlier_norm, 0.0)

  @parameterized.parameters(
    ({'sketch': 100}, 'qjl: sketch=100; signs fill whole bytes. .* of 8'),
    ({'outlier_sketch': 0}, 'qjl: outlier_sketch=0; signs fill'),
    ({'outlier_sketch': 512}, 'outlier_sketch=512, sketch=256; it is the firs'),
    ({'outliers': -1}, 'qjl: outliers=-1; allowed 0'),
    ({'residual': 100}, 'residual=100, group_size=32; .* multiple of 32'),
    ({'value_bits': 5}, 'value_bits=5; allowed'),
  )
  def test_messages(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      qjl.QjlConfig(**fields)

  def test_messages_of_init(self):
    config = dataclasses.replace(CONFIG, outliers=16)
    with self.assertRaisesRegex(ValueError, 'outliers=16 of head_dim=16; few'):
      config.init(testing.shape())


if __name__ == '__main__':
  absltest.main()
