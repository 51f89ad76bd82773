"""Cross-attention against its formula, with grouped heads and padding."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import cross_attention


class CrossAttentionTest(parameterized.TestCase):
  def test_is_the_formula(self):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 3, 8))
    memory = jax.random.normal(keys[1], (2, 5, 6))
    mask = jnp.arange(5)[None] < jnp.array([[5], [2]])
    module = cross_attention.CrossAttention(4, 2, 4, o_bias=True)
    params = jax.jit(module.init)(keys[2], x, memory, mask)['params']
    apply = jax.jit(module.apply)
    out, (q, k) = apply({'params': params}, x, memory, mask)
    self.assertEqual((q.shape, k.shape), ((2, 3, 4, 4), (2, 5, 2, 4)))
    params = jax.tree.map(np.asarray, params)
    q, k = np.asarray(q), np.asarray(k)
    v = (
      np.asarray(memory) @ params['v_proj']['kernel'] + params['v_proj']['bias']
    )
    v = v.reshape(2, 5, 2, 4)
    for b, n in enumerate((5, 2)):
      heads = []
      for h in range(4):
        p = np.exp(q[b, :, h] @ k[b, :n, h // 2].T / 2)
        p = p / p.sum(-1, keepdims=True)
        heads.append(p @ v[b, :n, h // 2])
      expected = np.concatenate(heads, axis=-1) @ params['o_proj']['kernel']
      expected = expected + params['o_proj']['bias']
      np.testing.assert_allclose(out[b], expected, atol=1e-5)

  def test_nothing_to_see_is_finite(self):
    module = cross_attention.CrossAttention(2, 2, 4)
    x, memory = jnp.ones((1, 3, 8)), jnp.ones((1, 5, 8))
    mask = jnp.zeros((1, 5), bool)
    (out, _), _ = jax.jit(module.init_with_output)(
      jax.random.key(0), x, memory, mask
    )
    self.assertTrue(np.isfinite(out).all())


if __name__ == '__main__':
  absltest.main()
