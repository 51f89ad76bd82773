"""Tests of jaxq.quant.round_to_nearest."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import blocks
from jaxq.numerics import qarray, ranges
from jaxq.numerics import spec as spec_lib
from jaxq.quant import round_to_nearest
from tests.quant import testing

QuantSpec = spec_lib.QuantSpec
Config = round_to_nearest.RoundToNearestConfig
INT4 = QuantSpec(dtype='int4', granularity='group', group_size=16)


class RoundToNearestTest(parameterized.TestCase):
  def test_hand_case(self):
    w = jnp.array([[1.4], [-7.0], [2.6], [0.0]])  # absmax 7: scale 1.
    config = Config(weights=QuantSpec(dtype='int4', granularity='channel'))
    q = round_to_nearest.quantize(w, config)
    np.testing.assert_array_equal(qarray.codes(q)[:, 0], [1, -7, 3, 0])

  def test_search_lowers_the_error_it_minimises(self):
    w = jax.random.t(jax.random.key(0), 4.0, (64, 16))  # Heavy tails.

    def error(search):
      q = round_to_nearest.quantize(w, Config(weights=INT4, search=search))
      return jnp.mean((w - qarray.dequantize(q)) ** 2)

    self.assertLess(error(ranges.RangeSearch(norm=2.0)), 0.95 * error(None))

  def test_error_is_at_most_half_a_step(self):
    w = jax.random.normal(jax.random.key(0), (64, 16))
    q = round_to_nearest.quantize(w, Config(weights=INT4))
    error = np.abs(w - qarray.dequantize(q)).reshape(4, 16, 16)
    self.assertTrue(np.all(error <= 0.5001 * np.asarray(q.scale)[:, None]))

  def test_quantizes_each_linear_and_nothing_else(self):
    block, params = testing.small_block()
    block = block.without(('down_proj',), 0)
    transform = round_to_nearest.round_to_nearest(Config(weights=INT4))
    self.assertEqual(transform.observe(block), {})
    x = testing.inputs()
    quantized, quant = testing.run(block, params, transform, x)
    self.assertEqual(quant, {})
    self.assertCountEqual(quantized, params)
    for lin in block.linears:
      q = blocks.kernel_of(quantized, lin.path)
      w = blocks.kernel_of(params, lin.path)
      jax.tree.map(np.testing.assert_array_equal, q, qarray.quantize(w, INT4))
    for path in ('mlp/down_proj', 'input_norm', 'post_norm'):
      np.testing.assert_array_equal(
        *(list(leaf_of(tree, path).values())[0] for tree in (quantized, params))
      )

  def test_more_bits_bring_the_block_closer(self):
    block, params = testing.small_block()
    x = testing.inputs()
    expected = testing.output(block, params, {}, x)

    def error(dtype):
      config = Config(weights=QuantSpec(dtype=dtype, granularity='channel'))
      quantized, _ = testing.run(
        block, params, round_to_nearest.round_to_nearest(config), x
      )
      return jnp.mean((testing.output(block, quantized, {}, x) - expected) ** 2)

    # A bit halves the step, so two divide the squared error by 16; 8 to spare.
    self.assertLess(error('int8'), error('int6') / 8)

  def test_refuses_quantized_kernels_and_indivisible_groups(self):
    block, params = testing.small_block()
    transform = round_to_nearest.round_to_nearest(Config(weights=INT4))
    quantized, _ = testing.run(block, params, transform, testing.inputs())
    with self.assertRaisesRegex(ValueError, 'round_to_nearest: .*int4 already'):
      transform.apply(block, quantized, {}, {})
    with self.assertRaisesRegex(ValueError, 'K=40, group_size=16'):
      round_to_nearest.quantize(jnp.zeros((40, 2)), Config(weights=INT4))


def leaf_of(params, path):
  for key in path.split('/'):
    params = params[key]
  return params


if __name__ == '__main__':
  absltest.main()
