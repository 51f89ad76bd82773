"""Tests of jaxq.quant.equivalence."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import taps
from jaxq.quant import equivalence
from tests.quant import planted, testing


class EquivalenceTest(parameterized.TestCase):
  @parameterized.parameters(0, 1, 2, 3)
  def test_the_block_keeps_its_function_at_every_site(self, index):
    block, params = testing.small_block()
    site = block.sites[index]
    producer = taps.get_path(params, site.producer)
    width = jax.tree.leaves(producer)[0].shape[-1]
    s = jnp.exp(jax.random.normal(jax.random.key(0), (width,)))
    moved = equivalence.divide_producer(params, site, s)
    x = testing.inputs()
    before = testing.output(block, params, {}, x)
    after = testing.output(block, moved, {}, x)
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)
    self.assertTrue(
      np.any(
        np.asarray(jax.tree.leaves(producer)[0])
        != np.asarray(jax.tree.leaves(taps.get_path(moved, site.producer))[0])
      )
    )

  @parameterized.parameters(*planted.KINDS)
  def test_a_shift_and_a_scale_of_a_norm(self, kind):
    block, params = planted.block(kind)
    x = planted.inputs()
    before = testing.output(block, params, {}, x)
    z = 5 * jax.random.normal(jax.random.key(0), (planted.C,))
    s = jnp.exp(jax.random.normal(jax.random.key(1), (planted.C,)))
    for site in block.sites:
      if 'norm' in site.producer:
        params = equivalence.shift_producer(params, site, z)
        params = equivalence.divide_producer(params, site, s)
        self.assertIn('bias', taps.get_path(params, site.consumers[0]))
    after = testing.output(block, params, {}, x)
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)

  def test_consumer_absmax_by_hand(self):
    block, params = testing.small_block()
    site = block.sites[0]
    kernels = [params['attention'][f'{n}_proj']['kernel'] for n in 'qkv']
    expected = np.abs(np.concatenate(kernels, axis=1)).max(axis=1)
    np.testing.assert_array_equal(
      equivalence.consumer_absmax(params, site), expected
    )


if __name__ == '__main__':
  absltest.main()
