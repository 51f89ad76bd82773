"""Tests of jaxq.kvcache.turboquant."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.kvcache import interface, rotation, turboquant
from tests.kvcache import testing

SHAPE = interface.CacheShape(batch=1, capacity=64, kv_heads=4, head_dim=128)


@functools.partial(jax.jit, static_argnums=0)
def decoded(config, k):
  """Keys as they come back, unrotated."""
  cache = config.init(SHAPE)
  slots = jnp.arange(k.shape[1])[None]
  store = cache.k.put(cache.k.encode(cache.key_rotation.apply(k)), slots)
  return cache.key_rotation.undo(store.values(0, k.shape[1]))


class CentroidsTest(parameterized.TestCase):
  def test_one_bit_by_hand(self):
    # The mean of half a normal law: sqrt(2 / pi).
    np.testing.assert_allclose(
      turboquant.centroids(1), [-((2 / np.pi) ** 0.5), (2 / np.pi) ** 0.5]
    )

  @parameterized.parameters((1, 0.36), (2, 0.117), (3, 0.034), (4, 0.0093))
  def test_error_of_unit_vectors(self, bits, expected):
    # Not of key 0, which the rotation's signs are drawn from: they would turn
    # the first vector into a single large coordinate.
    keys = jax.random.normal(jax.random.key(1), (1, 64, 4, 128))
    unit = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
    config = turboquant.TurboQuantConfig(bits=bits, correct_norm=False)
    error = jnp.mean(jnp.sum((decoded(config, unit) - unit) ** 2, axis=-1))
    self.assertBetween(float(error) / expected, 0.95, 1.05)


class TurboQuantTest(parameterized.TestCase):
  def test_decoded_keys_have_the_length_of_the_keys(self):
    k = jax.random.normal(jax.random.key(0), (1, 8, 4, 128)) * 3
    for bits in (1, 2, 4):
      got = decoded(turboquant.TurboQuantConfig(bits=bits), k)
      np.testing.assert_allclose(
        jnp.linalg.norm(got, axis=-1), jnp.linalg.norm(k, axis=-1), rtol=2e-3
      )
    zeros = decoded(turboquant.TurboQuantConfig(bits=2), k * 0)
    np.testing.assert_array_equal(zeros, k * 0)

  def test_scores_are_of_decoded_keys(self):
    config = turboquant.TurboQuantConfig(bits=3)
    _, cache = testing.run(config, testing.qkv(32), (32,))
    q = jax.random.normal(
      jax.random.key(1), (testing.B, testing.HKV, 2, 1, testing.D)
    )
    np.testing.assert_allclose(
      cache.k.scores(q, 8, 16),
      jnp.einsum('bkgtd,bskd->bkgts', q, cache.k.values(8, 16)),
      atol=1e-4,
    )

  def test_bits_per_element(self):
    cache = turboquant.TurboQuantConfig(bits=3).init(SHAPE)
    bits = interface.stored_bits_per_element(cache)
    # Keys 3 + 16 / 128, values 3 + 32 / 128, and a length.
    self.assertAlmostEqual(bits, 3 + 24 / 128, delta=1e-3)

  def test_rotation_is_of_the_seed(self):
    x = jnp.eye(8)
    a, b = (rotation.Rotation(seed=seed).apply(x) for seed in (0, 1))
    np.testing.assert_allclose(a @ a.T, x, atol=1e-6)
    self.assertFalse(np.allclose(a, b))

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, 'bits=5; allowed 1..4'):
      turboquant.TurboQuantConfig(bits=5)
    with self.assertRaisesRegex(ValueError, 'bits=9; allowed .1, 2'):
      turboquant.TurboQuantConfig(value_bits=9)
    shape = dataclasses.replace(SHAPE, head_dim=76)
    with self.assertRaisesRegex(ValueError, 'head_dim=76 with a rotation'):
      turboquant.TurboQuantConfig().init(shape)


if __name__ == '__main__':
  absltest.main()
