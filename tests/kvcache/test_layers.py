"""Tests of jaxq.kvcache.layers: a layer of a stack is read as a cache alone."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.kvcache import interface, layers, stores
from tests.kvcache import testing

DATA = testing.qkv(20)
NAMES = ('contiguous', 'ring', 'int8', 'fp8', 'oscar_head')


@jax.jit
def over_layers(stack, q, k, v, positions):
  """What a model does: a scan over the layers, (L, B, T, H, D)."""
  own, whole = interface.split(stack)

  def layer(_, own):
    cache = own if whole is None else own.joined(whole, None)
    return None, cache.attend(q, k, v, positions, testing.PLAIN)

  return jax.lax.scan(layer, None, own)[1]


class LayersTest(parameterized.TestCase):
  @parameterized.parameters(*NAMES)
  def test_a_layer_of_a_stack_is_a_cache_alone(self, name):
    config = testing.CACHES[name]
    caches = [
      testing.run(config, tuple(scale * x for x in DATA), (20,))[1]
      for scale in (1.0, -0.5)
    ]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *caches)
    new = testing.qkv(1, seed=1)
    positions = jnp.full((testing.B, 1), 20)
    out, update = over_layers(stack, *new, positions)
    made = jax.jit(interface.append)(stack, update)
    for i, cache in enumerate(caches):
      want, alone = testing.step(testing.PLAIN, cache, *new, positions)
      np.testing.assert_allclose(out[i], want, atol=1e-6)
      for a, b in zip(
        jax.tree.leaves(made), jax.tree.leaves(alone), strict=True
      ):
        np.testing.assert_allclose(
          np.asarray(a[i], np.float32), np.asarray(b, np.float32), atol=1e-6
        )

  def test_nothing_of_a_stack_is_taken_out_for_a_kernel(self):
    stack = jnp.arange(2 * 3 * 4.0).reshape(2, 3, 4, 1, 1)
    store = layers.of_layer(stores.FloatStore(stack), jnp.int32(1))
    self.assertEqual(store.slots, 4)
    self.assertEqual(store.x.dtype, jnp.float32)
    self.assertEqual(int(layers.first_row(store)), 3)
    np.testing.assert_array_equal(
      layers.rows(store).x, stack.reshape(6, 4, 1, 1)
    )
    np.testing.assert_array_equal(layers.cut(store).x, stack[1])
    alone = stores.FloatStore(stack[0])
    self.assertIsNone(layers.first_row(alone))
    self.assertIs(layers.cut(alone).x, alone.x)


if __name__ == '__main__':
  absltest.main()
