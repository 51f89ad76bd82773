"""Tests of jaxq.quant.smoothquant."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import blocks
from jaxq.numerics import spec as spec_lib
from jaxq.quant import activations, round_to_nearest, smoothquant
from jaxq.quant import transform as transform_lib
from tests.quant import testing

Config = smoothquant.SmoothQuantConfig
QuantSpec = spec_lib.QuantSpec
INT8 = QuantSpec(dtype='int8', granularity='channel')
INT8_TOKEN = QuantSpec(dtype='int8', granularity='token')


class SmoothQuantTest(parameterized.TestCase):
  def test_hand_case(self):
    s = smoothquant.scales(
      jnp.array([16.0, 4.0, 0.0, 1.0]),
      jnp.array([4.0, 1.0, 1.0, 0.0]),
      Config(alpha=0.5),
    )
    # sqrt(16 / 4), sqrt(4 / 1), clamped, sqrt(1 / 1e-5).
    np.testing.assert_allclose(s, [2, 2, 1e-5, 1e5**0.5], rtol=1e-5)

  @parameterized.product(sites=('norms', 'all'), alpha=(0.5, 0.85))
  def test_float_block_is_unchanged(self, sites, alpha):
    block, params = testing.small_block()
    x = testing.inputs()
    smoothed, quant = testing.run(
      block,
      params,
      smoothquant.smoothquant(Config(alpha=alpha, sites=sites)),
      x,
    )
    self.assertEqual(quant, {})
    expected = testing.output(block, params, {}, x)
    y = testing.output(block, smoothed, {}, x)
    # Float32 rounding of the folded scales.
    self.assertLess(jnp.max(jnp.abs(y - expected)) / jnp.std(expected), 1e-4)
    self.assertLess(relative(y, expected), 1e-5)

  def test_folds_what_the_equation_says(self):
    block, params = testing.small_block()
    x = testing.inputs()
    config = Config(alpha=0.7)
    transform = smoothquant.smoothquant(config)
    stats = testing.observe(block, params, {}, transform, x)
    smoothed, _ = testing.run(block, params, transform, x)
    paths = [f'attention/{name}_proj' for name in 'qkv']
    kernels = [np.asarray(blocks.kernel_of(params, path)) for path in paths]
    w_absmax = np.abs(np.concatenate(kernels, axis=1)).max(axis=1)
    x_absmax = np.asarray(stats['attention/q_proj/in']['absmax'].absmax)
    s = x_absmax**0.7 / w_absmax**0.3
    np.testing.assert_allclose(
      smoothed['input_norm']['scale'],
      params['input_norm']['scale'] / s,
      rtol=1e-5,
    )
    for path, kernel in zip(paths, kernels, strict=True):
      np.testing.assert_allclose(
        blocks.kernel_of(smoothed, path), kernel * s[:, None], rtol=1e-5
      )
    # The paper leaves o_proj and down_proj alone.
    np.testing.assert_array_equal(
      smoothed['mlp']['down_proj']['kernel'],
      params['mlp']['down_proj']['kernel'],
    )

  def test_outliers_cost_less_after_smoothing(self):
    block, params = testing.small_block()
    x = testing.inputs()
    # A norm divides by the whole token, so give its scale the outliers.
    params['input_norm']['scale'] *= jnp.ones(32).at[3].set(50.0)
    params['post_norm']['scale'] *= jnp.ones(32).at[5].set(50.0)
    expected = testing.output(block, params, {}, x)

    def error(*first):
      transform = transform_lib.chain(
        *first,
        round_to_nearest.round_to_nearest(
          round_to_nearest.RoundToNearestConfig(weights=INT8)
        ),
        activations.activations(
          activations.ActivationsConfig(inputs=INT8_TOKEN)
        ),
      )
      quantized, quant = testing.run(block, params, transform, x)
      return relative(testing.output(block, quantized, quant, x), expected)

    smooth = smoothquant.smoothquant(Config(alpha=0.5))
    self.assertLess(error(smooth), 0.7 * error())

  def test_observes_the_taps_of_its_sites(self):
    block, _ = testing.small_block()
    norms = ['attention/q_proj/in', 'mlp/gate_proj/in']
    self.assertEqual(
      list(smoothquant.smoothquant(Config()).observe(block)), norms
    )
    everything = smoothquant.smoothquant(Config(sites='all')).observe(block)
    self.assertCountEqual(
      everything, [*norms, 'attention/o_proj/in', 'mlp/down_proj/in']
    )

  def test_ignored_consumers(self):
    block, params = testing.small_block()
    # k and v still quantized: the site is smoothed, q_proj's rows included.
    fewer = block.without(('q_proj', 'gate_proj', 'up_proj'), 0)
    transform = smoothquant.smoothquant(Config())
    self.assertEqual(list(transform.observe(fewer)), ['attention/q_proj/in'])
    x = testing.inputs()
    smoothed, _ = testing.run(fewer, params, transform, x)
    self.assertLess(
      relative(
        testing.output(block, smoothed, {}, x),
        testing.output(block, params, {}, x),
      ),
      1e-5,
    )
    np.testing.assert_array_equal(
      smoothed['post_norm']['scale'], params['post_norm']['scale']
    )

  def test_jit_is_eager(self):
    block, params = testing.small_block()
    transform = smoothquant.smoothquant(Config(sites='all'))
    stats = testing.observe(block, params, {}, transform, testing.inputs())
    eager = transform.apply(block, params, {}, stats)
    jitted = jax.jit(transform.apply, static_argnums=0)(
      block, params, {}, stats
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), eager, jitted
    )

  @parameterized.parameters(
    (dict(alpha=1.5), r'alpha=1.5; it must lie in \[0, 1\].*0.85'),
    (dict(sites='norm'), r"sites='norm'; allowed \['all', 'norms'\]"),
  )
  def test_config_messages(self, fields, regex):
    with self.assertRaisesRegex(ValueError, regex):
      Config(**fields)

  def test_refuses_to_follow_what_it_changes(self):
    block, params = testing.small_block()
    x = testing.inputs()
    smooth = smoothquant.smoothquant(Config())
    rtn = round_to_nearest.round_to_nearest(
      round_to_nearest.RoundToNearestConfig(weights=INT8)
    )
    with self.assertRaisesRegex(ValueError, 'smoothquant: .*int8 already'):
      testing.run(block, params, transform_lib.chain(rtn, smooth), x)
    static = activations.activations(
      activations.ActivationsConfig(
        inputs=QuantSpec(dtype='int8', granularity='tensor'), mode='static'
      )
    )
    with self.assertRaisesRegex(ValueError, 'is static, taken before smoothq'):
      testing.run(block, params, transform_lib.chain(static, smooth), x)


def relative(y, expected):
  return jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected)


if __name__ == '__main__':
  absltest.main()
