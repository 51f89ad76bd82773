"""Tests of jaxq.quant.activations."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.calibrate import observers
from jaxq.nn import linear, taps
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import activations
from jaxq.quant import transform as transform_lib
from tests.quant import testing

Config = activations.ActivationsConfig
QuantSpec = spec_lib.QuantSpec
TOKEN = QuantSpec(dtype='int8', granularity='token')
TENSOR = QuantSpec(dtype='int8', granularity='tensor')
CHANNEL = QuantSpec(dtype='int8', granularity='channel')


def quantize(config, x, block=None, params=None):
  if block is None:
    block, params = testing.small_block()
  _, quant = testing.run(block, params, activations.activations(config), x)
  return quant


def inputs_of(block, params, x):
  """What each tap sees: {tap: (B, T, K)}."""
  requests = {
    lin.tap: {'sample': observers.sample(len(x))} for lin in block.linears
  }
  recording = transform_lib.Transform(
    name='recording', apply=lambda *a: a, observe=lambda _: requests
  )
  stats = testing.observe(block, params, {}, recording, x)
  return {tap: stats[tap]['sample'].x for tap in stats}


class ActivationsTest(parameterized.TestCase):
  def test_hand_case(self):
    spec = QuantSpec(dtype='int8', granularity='channel', symmetric=False)
    low, high = jnp.array([-1.0, 0.5]), jnp.array([1.55, 2.55])
    scale, zero = activations.static_params(low, high, spec)
    # (1.55 + 1) / 255, and (2.55 - 0) / 255 as zero is always in range.
    np.testing.assert_allclose(scale, [[0.01, 0.01]], rtol=1e-5)
    np.testing.assert_array_equal(zero, [[100, 0]])
    scale, zero = activations.static_params(low, high, TENSOR)
    np.testing.assert_allclose(scale, [[2.55 / 127]], rtol=1e-5)
    self.assertIsNone(zero)

  @parameterized.product(
    inputs=(
      TENSOR,
      CHANNEL,
      QuantSpec(dtype='int8', granularity='tensor', symmetric=False),
      QuantSpec(dtype='fp8_e4m3', granularity='channel'),
    ),
    observer=('minmax', 'absmax'),
  )
  def test_static_scales_are_those_of_all_inputs(self, inputs, observer):
    block, params = testing.small_block()
    x = testing.inputs()
    config = Config(inputs=inputs, mode='static', observer=observer)
    quant = quantize(config, x)
    seen = inputs_of(block, params, x)
    for lin in block.linears:
      act = taps.get_path(quant, f'{lin.path}/input')
      flat = seen[lin.tap].reshape(-1, seen[lin.tap].shape[-1])  # (T, K)
      if observer == 'absmax':
        flat = jnp.concatenate([flat, -flat])
      scale, zero = qarray.find_params(flat, inputs)
      np.testing.assert_array_equal(act.scale, scale)
      jax.tree.map(np.testing.assert_array_equal, act.zero_point, zero)

  def test_linears_are_fed_quantized_inputs(self):
    block, params = testing.small_block()
    x = testing.inputs()
    quant = quantize(Config(inputs=TOKEN), x)
    for lin in block.linears:
      act = taps.get_path(quant, f'{lin.path}/input')
      self.assertIsInstance(act, linear.ActQuant)
      self.assertIsNone(act.scale)
      self.assertEqual(act.spec, TOKEN)
    expected = testing.output(block, params, {}, x)
    error = jnp.linalg.norm(testing.output(block, params, quant, x) - expected)
    error /= jnp.linalg.norm(expected)
    self.assertBetween(float(error), 1e-4, 0.05)  # Not none, and small.

  def test_a_scale_per_channel_serves_outlier_channels(self):
    block, params = testing.small_block()
    x = testing.inputs()
    params['input_norm']['scale'] *= jnp.ones(32).at[3].set(50.0)
    expected = testing.output(block, params, {}, x)

    def error(inputs):
      config = Config(inputs=inputs, mode='static')
      quant = quantize(config, x, block, params)
      return jnp.mean((testing.output(block, params, quant, x) - expected) ** 2)

    self.assertLess(error(CHANNEL), 0.5 * error(TENSOR))

  def test_percentile_clips(self):
    x = testing.inputs()
    scale = {}
    for observer in ('minmax', 'percentile'):
      config = Config(
        inputs=TENSOR, mode='static', observer=observer, quantile=0.99
      )
      scale[observer] = quantize(config, x)['mlp']['down_proj']['input'].scale
    self.assertLess(
      float(scale['percentile'][0, 0]), 0.9 * float(scale['minmax'][0, 0])
    )

  @parameterized.parameters('average', 'ema')
  def test_batch_observers_start_at_the_first_batch(self, observer):
    x = testing.inputs()
    config = Config(inputs=TENSOR, mode='static', observer=observer)
    expected = Config(inputs=TENSOR, mode='static')
    jax.tree.map(
      np.testing.assert_array_equal,
      jax.tree.leaves(quantize(config, x)),
      jax.tree.leaves(quantize(expected, x)),
    )

  def test_observes_each_distinct_tap_once(self):
    block, _ = testing.small_block()
    dynamic = activations.activations(Config(inputs=TOKEN))
    self.assertEqual(dynamic.observe(block), {})
    static = activations.activations(Config(inputs=TENSOR, mode='static'))
    self.assertLen(static.observe(block), 4)

  def test_ignored_linears_keep_float_inputs(self):
    block, params = testing.small_block()
    block = block.without(('re:attention',), 0)
    config = Config(inputs=TENSOR, mode='static')
    quant = quantize(config, testing.inputs(), block, params)
    self.assertEqual(list(quant), ['mlp'])

  def test_missing_statistics_name_the_linear(self):
    block, params = testing.small_block()
    fewer = block.without(('down_proj',), 0)
    transform = activations.activations(Config(inputs=TENSOR, mode='static'))
    stats = testing.observe(fewer, params, {}, transform, testing.inputs())
    with self.assertRaisesRegex(
      ValueError, "input of mlp/down_proj .*observed.*mode='dynamic'"
    ):
      transform.apply(block, params, {}, stats)

  @parameterized.parameters(
    (dict(mode='both'), r"mode='both'; allowed \['dynamic', 'static'\]"),
    (dict(observer='max'), r"observer='max'; allowed \['absmax', 'average'"),
    (
      dict(inputs=TENSOR),
      r"'tensor' with mode='dynamic'; .*'group', 'token'\]",
    ),
    (dict(mode='static'), r"'token' with mode='static'; allowed \['channel'"),
    (
      dict(inputs=CHANNEL, mode='static', observer='percentile'),
      "percentile.*Use granularity='tensor'",
    ),
    (dict(decay=1.0), r'decay=1.0; it must lie in \[0, 1\)'),
    (dict(quantile=99.0), r'quantile=99.0; it must lie in \(0.5, 1\]'),
  )
  def test_config_messages(self, fields, regex):
    with self.assertRaisesRegex(ValueError, regex):
      Config(**{'inputs': TOKEN, **fields})

  def test_groups_of_channels_are_dynamic(self):
    self.assertEqual(Config(inputs=QuantSpec(dtype='mxfp8')).mode, 'dynamic')
    with self.assertRaisesRegex(
      ValueError, "granularity='group' with mode='static'; allowed"
    ):
      Config(inputs=QuantSpec(dtype='mxfp8'), mode='static')

  def test_nvfp4_calibrates_its_tensor_scale(self):
    spec = QuantSpec(dtype='nvfp4')
    Config(inputs=spec, mode='static')
    low, high = jnp.array([-1.0, 0.0]), jnp.array([2.0, 6.0])
    scale, zero = activations.static_params(low, high, spec)
    self.assertIsNone(zero)
    self.assertEqual(scale.shape, (1, 1))
    # 6 / (6 * 448), rounded to 20 bits.
    np.testing.assert_allclose(scale, 1 / 448, rtol=2.0**-20)


if __name__ == '__main__':
  absltest.main()
