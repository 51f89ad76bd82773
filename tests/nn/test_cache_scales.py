"""Tests of the stored scales of keys and values in jaxq.nn.attention."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import attention, linear, matmul
from jaxq.numerics import spec as spec_lib


class CacheScalesTest(parameterized.TestCase):
  @parameterized.parameters('k_cache', 'v_cache')
  def test_keys_and_values_are_rounded(self, name):
    module = attention.Attention(num_heads=2, num_kv_heads=1, head_dim=4)
    x = jax.random.normal(jax.random.key(0), (1, 5, 8))
    positions = jnp.arange(5)[None]
    params = module.init(jax.random.key(1), x, positions)['params']

    def run(scale):
      spec = spec_lib.QuantSpec(dtype='int8', granularity='tensor')
      act = linear.ActQuant(jnp.full((1, 1), scale), None, spec)
      variables = {'params': params, 'quant': {name: act}}
      return module.apply(variables, x, positions)[0]

    plain = module.apply({'params': params}, x, positions)[0]
    fine, coarse = run(4 / 127), run(4.0)
    # Half a step of 4 / 127 moves an output by less than a few of them.
    np.testing.assert_allclose(fine, plain, atol=0.1)
    self.assertGreater(np.abs(coarse - plain).max(), 0.1)

  def test_fake_input_in_groups_under_a_stored_scale(self):
    spec = spec_lib.QuantSpec(dtype='nvfp4')
    x = np.zeros((1, 2, 16), np.float32)
    x[0, 0, :3] = (6.0, 1.4, -0.2)
    # Tensor scale 1/8: the group's scale is 1 * 8 / 8, its values as they are.
    act = linear.ActQuant(jnp.full((1, 1), 0.125), None, spec)
    got = matmul.fake_input(jnp.asarray(x), act)
    np.testing.assert_array_equal(got[0, 0, :3], [6.0, 1.5, -0.0])
    np.testing.assert_array_equal(got[0, 1], np.zeros(16))


if __name__ == '__main__':
  absltest.main()
