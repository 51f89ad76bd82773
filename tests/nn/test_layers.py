"""Tests of jaxq.nn.norms, rope, embed and attention."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.kvcache import contiguous, interface
from jaxq.nn import attention, embed, norms, rope


class LayersTest(parameterized.TestCase):
  def test_rms_norm_by_hand(self):
    x = jnp.array([[[3.0, 4.0]]])  # Mean square 12.5.
    y = norms.RMSNorm(eps=0.0).apply(
      {'params': {'scale': jnp.array([1.0, 2.0])}}, x
    )
    np.testing.assert_allclose(
      y[0, 0], [3 / 12.5**0.5, 8 / 12.5**0.5], rtol=1e-6
    )

  def test_rope_turns_by_position_and_keeps_relative_products(self):
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    at = lambda x, p: rope.rotate(
      x, jnp.full((1, 1), p), rope.Rope(theta=100.0)
    )[0, 0, 0]
    np.testing.assert_allclose(at(q, 0), q[0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(
      jnp.dot(at(q, 7), at(k, 3)), jnp.dot(at(q, 14), at(k, 10)), rtol=1e-4
    )
    # Channel 0 turns with channel D/2 by the position itself.
    x = jnp.zeros((1, 1, 1, 8)).at[..., 0].set(1.0)
    np.testing.assert_allclose(at(x, 2)[0], np.cos(2.0), rtol=1e-5)
    np.testing.assert_allclose(at(x, 2)[4], np.sin(2.0), rtol=1e-5)

  def test_embed_and_its_tied_head(self):
    table = jax.random.normal(jax.random.key(0), (7, 4))
    module = embed.Embed(7, 4)
    variables = {'params': {'embedding': table}}
    x = module.apply(variables, jnp.array([[1, 6]]))
    np.testing.assert_array_equal(x[0], table[jnp.array([1, 6])])
    logits = module.apply(variables, x, method='attend')
    np.testing.assert_allclose(
      logits[0], np.asarray(x[0]) @ np.asarray(table).T, rtol=1e-5
    )

  @parameterized.parameters((4, 4), (4, 2), (8, 1))
  def test_attention_with_cache_token_by_token(self, H, Hkv):
    module = attention.Attention(H, Hkv, 8)
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    positions = jnp.broadcast_to(jnp.arange(6)[None], (2, 6))
    variables = module.init(jax.random.key(1), x, positions)
    expected, none = module.apply(variables, x, positions)
    self.assertIsNone(none)
    cache = contiguous.init(2, 10, Hkv, 8)
    for t in range(6):
      y, update = module.apply(
        variables, x[:, t : t + 1], positions[:, t : t + 1], cache
      )
      cache = interface.append(cache, update)
      np.testing.assert_allclose(y[:, 0], expected[:, t], atol=1e-5)
    np.testing.assert_array_equal(cache.length, [6, 6])

  def test_attention_is_causal(self):
    module = attention.Attention(2, 2, 8)
    x = jax.random.normal(jax.random.key(0), (1, 5, 16))
    positions = jnp.arange(5)[None]
    variables = module.init(jax.random.key(1), x, positions)
    before, _ = module.apply(variables, x, positions)
    after, _ = module.apply(variables, x.at[:, 3:].add(1.0), positions)
    np.testing.assert_allclose(before[:, :3], after[:, :3], atol=1e-6)
    self.assertGreater(float(jnp.max(jnp.abs(before - after)[:, 3:])), 1e-3)


class ContiguousCacheTest(parameterized.TestCase):
  def test_ragged_append_and_overflow(self):
    cache = contiguous.init(2, 4, 1, 2)
    cache = cache.replace(length=jnp.array([0, 3]))
    k = jnp.arange(8.0).reshape(2, 2, 1, 2)
    cache = contiguous.append(cache, k, -k)
    np.testing.assert_array_equal(cache.length, [2, 5])
    np.testing.assert_array_equal(cache.k[0, :2], k[0])
    np.testing.assert_array_equal(cache.k[1, 3], k[1, 0])  # Slot 4: dropped.
    np.testing.assert_array_equal(cache.v[1, 3], -k[1, 0])
    self.assertEqual(cache.capacity, 4)
    self.assertEqual(contiguous.nbytes(cache), 2 * 2 * 4 * 2 * 4 + 8)


if __name__ == '__main__':
  absltest.main()
