"""Tests of jaxq.nn.bidirectional and jaxq.nn.shortcut."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec

from jaxq.nn import bidirectional, shortcut


def softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


class BidirectionalTest(parameterized.TestCase):
  def test_attention_against_numpy(self):
    module = bidirectional.SelfAttention(2)
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    params = module.init(jax.random.key(1), x)['params']
    params = jax.tree.map(
      lambda a: jax.random.normal(jax.random.key(a.size), a.shape) * 0.5, params
    )
    mask = jnp.array([[True] * 5, [True, True, True, False, False]])
    got = module.apply({'params': params}, x, mask)
    p = jax.tree.map(np.asarray, params)
    for row, length in ((0, 5), (1, 3)):
      own = np.asarray(x)[row, :length]
      q, k, v = (
        own @ p[f'{n}_proj']['kernel'] + p[f'{n}_proj']['bias'] for n in 'qkv'
      )
      heads = []
      for h in (slice(0, 4), slice(4, 8)):
        weights = softmax(q[:, h] @ k[:, h].T / 2.0)
        heads.append(weights @ v[:, h])
      out = np.concatenate(heads, axis=1) @ p['o_proj']['kernel']
      expected = out + p['o_proj']['bias']
      np.testing.assert_allclose(got[row, :length], expected, atol=1e-5)

  @parameterized.parameters(
    (bidirectional.SelfAttention(2), ('q_proj', 'o_proj')),
    (bidirectional.MLP(16), ('up_proj', 'down_proj')),
  )
  def test_linears_see_zeros_at_padding(self, module, names):
    x = jax.random.normal(jax.random.key(0), (1, 4, 8))
    mask = jnp.array([[True, True, False, False]])
    params = module.init(jax.random.key(1), x)['params']
    params = jax.tree.map(lambda a: a + 0.1, params)  # Biases that are not 0.
    _, seen = module.apply({'params': params}, x, mask, mutable=['tapped'])
    for name in names:
      tapped = seen['tapped'][name]['in']
      np.testing.assert_array_equal(tapped[:, 2:], 0)
      np.testing.assert_array_equal(bidirectional.mask_of(tapped), mask)

  def test_activations(self):
    x = jnp.array([-1.0, 0.5])
    gelu = bidirectional.ACTIVATIONS['gelu'](x)
    np.testing.assert_allclose(gelu, [-0.158655, 0.345731], atol=1e-5)
    tanh = bidirectional.ACTIVATIONS['gelu_new'](x)
    np.testing.assert_allclose(tanh, [-0.158808, 0.345714], atol=1e-5)

  def test_sharding(self):
    rules = dict(bidirectional.sharding_rules(4, 16, 2))
    self.assertEqual(rules['attention/[qkv]_proj/bias'], PartitionSpec('model'))
    self.assertEqual(
      rules['mlp/down_proj/kernel'], PartitionSpec('model', None)
    )
    whole = dict(bidirectional.sharding_rules(3, 16, 2))
    self.assertNotIn('attention/o_proj/kernel', whole)
    with self.assertRaisesRegex(ValueError, 'model:3: intermediate_size=16'):
      bidirectional.sharding_rules(3, 16, 3)

  def test_shortcut(self):
    module = shortcut.Shortcut()
    x = jnp.array([[[1.0, 2.0]]])
    np.testing.assert_array_equal(
      module.init_with_output(jax.random.key(0), x)[0], x
    )
    params = {'scale': jnp.array([2.0, 3.0]), 'bias': jnp.array([1.0, -1.0])}
    y = module.apply({'params': params}, x)
    np.testing.assert_array_equal(y, [[[3.0, 5.0]]])


if __name__ == '__main__':
  absltest.main()
