"""Tests of jaxq.kvcache.contiguous, ring, paged, per_token and fp8."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.kvcache import contiguous, fp8, interface, paged, per_token, ring
from tests.kvcache import testing


class RingTest(parameterized.TestCase):
  @parameterized.parameters((8, (40,)), (8, (1,) * 40), (5, (7, 1, 12, 20)))
  def test_is_contiguous_under_the_window(self, window, sizes):
    data = testing.qkv(40)
    scoring = interface.Scoring(window=window)
    expected, _ = testing.run(
      contiguous.ContiguousConfig(), data, sizes, scoring=scoring
    )
    # By the layer's window, and by one that was asked for.
    cache = ring.RingConfig().init(testing.shape(window=window))
    self.assertEqual(cache.k.shape[1], window)
    out, _ = testing.run(None, data, sizes, scoring=scoring, cache=cache)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    out, _ = testing.run(ring.RingConfig(window=window), data, sizes)
    np.testing.assert_allclose(out, expected, atol=1e-5)

  def test_holds_the_newest(self):
    data = testing.qkv(11)
    _, cache = testing.run(ring.RingConfig(window=4), data, (3, 8))
    np.testing.assert_array_equal(
      cache.positions(jnp.arange(4))[0, :, 0], [8, 9, 10, 7]
    )
    np.testing.assert_array_equal(cache.k[:, 0], data[1][:, 8])
    self.assertAlmostEqual(
      interface.bits_per_element(cache), 32 * 4 / 64 + 32 / (2 * 64 * 32)
    )

  def test_a_layer_without_a_window_keeps_everything(self):
    cache = ring.RingConfig().init(testing.shape())
    self.assertIsInstance(cache, contiguous.ContiguousCache)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, 'window=0; it must be at least 1'):
      ring.RingConfig(window=0)
    with self.assertRaisesRegex(
      ValueError, 'window=65 and a capacity of 64 tokens; .* contiguous cache'
    ):
      ring.RingConfig(window=65).init(testing.shape())


class PagedTest(parameterized.TestCase):
  def test_any_order_of_pages_is_contiguous(self):
    data = testing.qkv(40)
    expected, _ = testing.run(
      contiguous.ContiguousConfig(), data, (30,) + (1,) * 10
    )
    config = paged.PagedConfig(page_size=8)
    outs = []
    for seed in (None, 0, 1):
      cache = config.init(testing.shape())
      if seed is not None:
        order = np.random.default_rng(seed).permutation(16) + 1
        cache = cache.with_table(jnp.asarray(order.reshape(2, 8)))
      out, _ = testing.run(None, data, (30,) + (1,) * 10, cache=cache)
      np.testing.assert_allclose(out, expected, atol=1e-5)
      outs.append(out)
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])

  def test_a_pool_smaller_than_all_rows(self):
    # 7 pages for rows of 20 and 9 tokens: 3 and 2 pages of 8, the null page.
    config = paged.PagedConfig(page_size=8, pages=7)
    cache = config.init(testing.shape())
    self.assertFalse(bool(jnp.any(cache.table)))
    pages = paged.Pages(7)
    table = np.zeros((2, 8), np.int32)
    table[0, :3], table[1, :2] = pages.allocate(3), pages.allocate(2)
    self.assertEqual(pages.free, 1)
    cache = cache.with_table(jnp.asarray(table))
    data = testing.qkv(20)
    positions = testing.positions_of(cache.length, 20, (20, 9))
    expected = contiguous.ContiguousConfig().init(testing.shape())
    for t in (20, 1):
      new = jax.tree.map(lambda x, t=t: x[:, :t], data)
      out, cache = testing.step(testing.PLAIN, cache, *new, positions)
      plain, expected = testing.step(testing.PLAIN, expected, *new, positions)
      np.testing.assert_allclose(out[0], plain[0], atol=1e-5)
      np.testing.assert_allclose(out[1, :9], plain[1, :9], atol=1e-5)
      positions = cache.length[:, None]
    np.testing.assert_array_equal(cache.k[0], jnp.zeros_like(cache.k[0]))
    with self.assertRaisesRegex(ValueError, '2 pages asked for and 1 free'):
      pages.allocate(2)
    pages.release([1, 2, 3])
    self.assertEqual(pages.free, 4)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, 'page_size=12; .* power of two'):
      paged.PagedConfig(page_size=12)
    with self.assertRaisesRegex(ValueError, 'pages=1; allowed 0'):
      paged.PagedConfig(pages=1)
    cache = paged.PagedConfig(page_size=8).init(testing.shape())
    with self.assertRaisesRegex(
      ValueError, r'a table \(2, 7\) for 2 rows of 64 tokens; .*\(2, 8 or more'
    ):
      cache.with_table(jnp.zeros((2, 7), jnp.int32))


class PerTokenTest(parameterized.TestCase):
  def test_bits_per_element(self):
    shape = interface.CacheShape(
      batch=1, capacity=4096, kv_heads=8, head_dim=128
    )
    for fields, bits in (
      (dict(bits=8), 8.125),
      (dict(bits=4), 4.25),
      (dict(bits=2, group_size=32), 3.0),
      (dict(bits=8, value_bits=4), (8.125 + 4.25) / 2),
    ):
      config = per_token.PerTokenConfig(**fields)
      cache = jax.eval_shape(lambda config=config: config.init(shape))
      self.assertAlmostEqual(
        interface.bits_per_element(cache), bits, delta=1e-4
      )

  def test_more_bits_are_closer(self):
    data = testing.qkv(40)
    expected = testing.attention(data)
    errors = []
    for bits in (8, 4, 3, 2):
      config = per_token.PerTokenConfig(bits=bits)
      out, _ = testing.run(config, data, (20,) + (1,) * 20)
      errors.append(float(jnp.std((out - expected)[:, 20:])))
    self.assertEqual(errors, sorted(errors))
    self.assertLess(errors[0], 0.05)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, 'bits=0; allowed'):
      per_token.PerTokenConfig(bits=0)
    with self.assertRaisesRegex(ValueError, 'bits=12; allowed'):
      per_token.PerTokenConfig(value_bits=12)
    with self.assertRaisesRegex(ValueError, 'group_size=0; allowed -1'):
      per_token.PerTokenConfig(group_size=0)


class Fp8Test(parameterized.TestCase):
  def test_values_are_the_formats(self):
    for name, expected in (('e4m3', 448.0), ('e5m2', 512.0)):
      config = fp8.Fp8Config(k_dtype=name, v_dtype=name)
      cache = config.init(testing.shape())
      x = jnp.full((testing.B, 1, testing.HKV, testing.D), 480.0)
      slots = jnp.zeros((testing.B, 1), jnp.int32)
      store = cache.k.put(cache.k.encode(x), slots)
      # Past 448, e4m3 clips; e5m2 has range, and rounds to even.
      np.testing.assert_array_equal(
        store.values(0, 1), jnp.full_like(x, expected)
      )

  def test_scales_fold(self):
    data = testing.qkv(33)
    big = data[0] / 100, data[1] * 100, data[2]  # Keys up to 1,100.
    plain, _ = testing.run(fp8.Fp8Config(), data, (32, 1))
    clipped, _ = testing.run(fp8.Fp8Config(), big, (32, 1))
    scaled, _ = testing.run(
      fp8.Fp8Config(k_scale=128.0, v_scale=0.5), big, (32, 1)
    )
    expected = testing.attention(data)
    error = lambda out: float(jnp.std((out - expected)[:, 32:]))
    self.assertLess(error(plain), 0.05)
    self.assertLess(error(scaled), 0.05)
    self.assertGreater(error(clipped), 2 * error(scaled))
    self.assertGreater(fp8.out_of_range(big[1]), 0.05)
    self.assertEqual(fp8.out_of_range(big[1], scale=128.0), 0.0)

  def test_keys_alone_may_stay(self):
    cache = fp8.Fp8Config(k_dtype='none').init(testing.shape())
    self.assertEqual(cache.k.x.dtype, jnp.float32)
    self.assertEqual(cache.v.store.x.dtype, jnp.float8_e4m3fn)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, "k_dtype='int8'; allowed .'e4m3'"):
      fp8.Fp8Config(k_dtype='int8')
    with self.assertRaisesRegex(ValueError, 'v_scale=0; it must be positive'):
      fp8.Fp8Config(v_scale=0)


class BitsTest(absltest.TestCase):
  def test_stored_bits_leave_the_window_out(self):
    cache = testing.KIVI.init(testing.shape())
    less = interface.bits_per_element(
      cache
    ) - interface.stored_bits_per_element(cache)
    self.assertAlmostEqual(less, 32 * testing.R / 64)
    plain = dataclasses.replace(testing.KIVI, bits=16).init(
      testing.shape(dtype=jnp.bfloat16)
    )
    self.assertAlmostEqual(
      interface.stored_bits_per_element(plain), 16, delta=0.02
    )


if __name__ == '__main__':
  absltest.main()
