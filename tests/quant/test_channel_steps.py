"""Tests of jaxq.quant.channel_steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.calibrate import observers
from jaxq.nn import blocks, linear, taps
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import (
  activations,
  channel_split,
  channel_steps,
  rotate,
  transform,
)
from tests.quant import planted, testing

QuantSpec = spec_lib.QuantSpec
W4 = QuantSpec(dtype='int4')
STEPS = QuantSpec(dtype='int4', granularity='tensor', narrow=True)


def config(**fields):
  return channel_steps.StepsConfig(weights=W4, steps=STEPS, **fields)


def method(**fields):
  how = config(**fields)
  return transform.chain(channel_steps.migrate(how), channel_steps.clip(how))


@functools.cache
def spiked():
  """(8, 128, C), even but for one value of 1024 in each channel: twice it."""
  shape = (8 * 128, planted.C)
  x = jax.random.uniform(jax.random.key(2), shape, minval=-1.0)
  channels = jnp.arange(planted.C)
  return x.at[5 + 16 * channels, channels].set(2.0).reshape(8, 128, planted.C)


def relative(y, expected):
  return float(jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected))


class EquationsTest(parameterized.TestCase):
  def test_scale_by_hand(self):
    s = channel_steps.fit_scale(jnp.array([14.0, 0.0, 3.5]), STEPS)
    np.testing.assert_allclose(s, [2.0, 1e-5 / 7, 0.5], rtol=1e-6)

  def test_errors_by_loops_without_the_first_tokens(self):
    x = np.random.default_rng(0).standard_t(2.5, size=(2, 9, 3))
    x[:, 0] = 1000.0
    x = x.astype(np.float32)
    zeros = jnp.zeros((51, 3), jnp.float32)
    state = channel_steps.Later(channel_steps.ClipErrors(zeros, STEPS), 1)
    for text in x:
      state = state.update(jnp.asarray(text[None]))
    for c, errors in zip(
      channel_steps.CLIP_RATIOS, state.state.errors, strict=True
    ):
      for j in range(3):
        q = np.clip(np.round(x[:, 1:, j] / np.float32(c)), -7, 7)
        expected = np.sum((x[:, 1:, j] - c * q) ** 2)
        np.testing.assert_allclose(errors[j], expected, rtol=1e-4)
    self.assertEqual(channel_steps.CLIP_RATIOS[0], 1.0)
    self.assertEqual(channel_steps.CLIP_RATIOS[-1], 0.5)

  def test_grouped_heads_take_the_largest(self):
    site = blocks.Site(producer='v', consumers=('o',), heads=(2, 3, 2))
    x = jnp.arange(12.0)
    s = channel_steps._to_producer(site, x, jnp.max)
    np.testing.assert_array_equal(s, [4, 5, 10, 11])
    self.assertEqual(site.expand(s).shape, (12,))


class ExactTest(parameterized.TestCase):
  @parameterized.parameters(
    ('layer', False), ('parallel', True), ('post', True), ('rms', True)
  )
  def test_the_float_block_is_unchanged(self, kind, all_sites):
    block, params = planted.block(kind, planted.SCALED)
    # A sign is carried, and a scale of 0 stays one.
    gain = params['input_norm']['scale'].at[1].multiply(-2.0).at[2].set(0.0)
    params = taps.set_path(params, 'input_norm/scale', gain)
    x = planted.inputs()
    moved, quant = testing.run(block, params, method(all_sites=all_sites), x)
    self.assertEqual(
      {path.rpartition('/')[2] for path, _ in taps.leaves(quant)}, {'steps'}
    )
    expected = testing.output(block, params, {}, x)
    self.assertLess(
      relative(testing.output(block, moved, quant, x), expected), 1e-5
    )
    # The steps that are left for others are those that were folded.
    for site in channel_steps.sites(False, block):
      name = site.site.producer
      np.testing.assert_allclose(
        moved[name]['scale'] * quant[name]['steps'],
        params[name]['scale'],
        rtol=1e-5,
      )
      self.assertGreater(float(jnp.min(quant[name]['steps'])), 0)
      quant, steps = channel_steps.take_steps(quant, site.site)
      self.assertEqual(steps.shape, (planted.C,))
    self.assertEqual(quant, {})

  def test_a_reader_that_stays_float_sees_what_it_did(self):
    block, params = planted.block('rms', planted.SCALED)
    fewer = block.without(('k_proj',), 0)
    x = planted.inputs()
    moved, quant = testing.run(fewer, params, method(), x)
    self.assertLess(
      relative(
        testing.output(block, moved, quant, x),
        testing.output(block, params, {}, x),
      ),
      1e-5,
    )
    site = channel_steps.sites(False, fewer)[0]
    self.assertEqual(site.paths, ('attention/q_proj', 'attention/v_proj'))


class GainTest(parameterized.TestCase):
  @parameterized.parameters(dict(), dict(refine=2), dict(clip='none', refine=2))
  def test_clipping_gains_where_a_channel_has_one_outlier(self, **fields):
    block, params = planted.block('rms')
    x = spiked()
    exact = testing.output(block, params, {}, x)
    errors = []
    for how in (dict(clip='none'), fields):
      moved, quant = testing.run(block, params, method(**how), x)
      for site in channel_steps.sites(False, block):
        for path in site.paths:
          quant = taps.set_path(quant, f'{path}/input', linear.StepInput(STEPS))
      y = testing.output(block, moved, quant, x)
      errors.append(float(jnp.mean(jnp.square(y - exact))))
    self.assertLess(errors[1], 0.7 * errors[0])

  def test_a_channel_that_will_be_split_keeps_its_range(self):
    """Its copies have codes for all of it, and clipping would lose that."""
    block, params = planted.block('rms', planted.SCALED)
    how = channel_split.SplitConfig(multiple=16, max_share=0.05)
    found = {}
    for name, fields in (
      ('whole', dict(clip='none')),
      ('clipped', {}),
      ('split', dict(split=how)),
    ):
      _, quant = testing.run(block, params, method(**fields), spiked())
      found[name] = np.asarray(quant['input_norm']['steps'])
    large = np.zeros(planted.C, bool)
    large[list(planted.SCALED.channels)] = True
    self.assertTrue(np.all(found['clipped'] < 0.95 * found['whole']))
    np.testing.assert_array_equal(found['split'][large], found['whole'][large])
    np.testing.assert_array_equal(
      found['split'][~large], found['clipped'][~large]
    )

  def test_the_first_token_is_cut_off_and_the_others_gain(self):
    block, params = planted.block('rms', planted.MASSIVE)
    x = planted.inputs(planted.MASSIVE)
    exact = testing.output(block, params, {}, x)
    errors = []
    for skip in (0, 1):
      how = method(clip='none', skip_tokens=skip)
      moved, quant = testing.run(block, params, how, x)
      site = channel_steps.sites(False, block)[0]
      for path in site.paths:
        act = linear.StepInput(STEPS)
        quant = taps.set_path(quant, f'{path}/input', act)
      # What else differs at position 0 reaches the others through attention.
      tapped = block.tapped({'params': moved, 'quant': quant}, x)
      seen = taps.get_path(tapped, site.tap)
      s = quant['input_norm']['steps']
      rounded = act.codes(seen).astype(jnp.float32) * s[None, None]
      own = jnp.mean(jnp.square(rounded - seen * s[None, None])[:, 1:], (0, 1))
      errors.append(float(own[planted.MASSIVE_CHANNEL]))
    self.assertLess(errors[1], 0.5 * errors[0])
    rates = channel_steps.saturation_by_position(
      block, {'params': moved, 'quant': quant}, x
    )
    self.assertEqual(set(rates), set(site.paths))
    rate = rates['attention/q_proj']
    self.assertEqual(rate.shape, (x.shape[1],))
    # One channel of 64, in every text.
    self.assertGreaterEqual(float(rate[0]), 1 / 64)
    self.assertEqual(exact.shape, x.shape)


class MessagesTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(clip='all'), r"clip='all'; allowed \['adaptive', 'none'\]"),
    (dict(refine=-1), 'refine=-1; allowed 0 or more'),
    (dict(skip_tokens=-1), 'skip_tokens=-1; allowed 0 or more'),
  )
  def test_config(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      config(**fields)

  def test_sequences_too_short(self):
    block, params = planted.block('layer')
    with self.assertRaisesRegex(
      ValueError, 'sequences have 24 tokens and skip_tokens=24; some must be'
    ):
      testing.run(block, params, method(skip_tokens=24), planted.inputs())

  def test_a_block_without_norms(self):
    block, _ = planted.block('layer')
    bare = dataclasses.replace(block, norms=())
    with self.assertRaisesRegex(ValueError, 'Block declares no site.*norm'):
      channel_steps.sites(False, bare)

  def test_a_reader_outside_the_site(self):
    block, _ = planted.block('layer')
    norm, fed = block.norms[1]
    shared = dataclasses.replace(
      block, norms=(block.norms[0], (norm, (*fed, 'mlp/router')))
    )
    with self.assertRaisesRegex(
      ValueError,
      r"mlp/router reads post_norm and is not of its site \['mlp/fc1",
    ):
      channel_steps.sites(False, shared)

  def test_missing_statistics(self):
    block, params = planted.block('layer')
    for stage in transform.stages(method()):
      with self.assertRaisesRegex(
        ValueError, 'no (absmax|errors) was observed at attention/q_proj/in'
      ):
        stage.apply(block, params, {}, {})

  def test_an_int32_sum_must_not_overflow(self):
    block, params = planted.block('layer')
    wide = {
      'absmax': channel_steps.Later(observers.AbsMax(jnp.ones(1 << 17)), 1)
    }
    stats = {site.tap: wide for site in channel_steps.sites(False, block)}
    w8, steps8 = QuantSpec(dtype='int8'), QuantSpec(dtype='int8', narrow=True)
    how = channel_steps.StepsConfig(weights=w8, steps=steps8)
    with self.assertRaisesRegex(
      ValueError, 'sums K=131072 products of int8 and int8, which may pass 2'
    ):
      channel_steps.migrate(how).apply(block, params, {}, stats)

  def test_a_wrong_order(self):
    block, params = planted.block('rms')
    q = qarray.quantize(blocks.kernel_of(params, 'mlp/up_proj'), W4)
    rounded = taps.set_path(params, 'mlp/up_proj/kernel', q)
    stage = transform.stages(method())[0]
    stats = {
      site.tap: {
        'absmax': channel_steps.Later(observers.AbsMax(jnp.ones(64)), 1)
      }
      for site in channel_steps.sites(True, block)
    }
    with self.assertRaisesRegex(ValueError, 'mergequant: .* int4 already'):
      stage.apply(block, rounded, {}, stats)
    static = activations.static_params(jnp.zeros(1), jnp.ones(1), STEPS)
    quant = {'mlp': {'up_proj': {'input': linear.ActQuant(*static, STEPS)}}}
    with self.assertRaisesRegex(ValueError, 'is static, taken before mergequ'):
      stage.apply(block, params, quant, stats)
    turned = {'mlp': {'down_proj': {'hadamard': linear.OnlineHadamard(128)}}}
    stage = transform.stages(method(all_sites=True))[0]
    stats['mlp/down_proj/in']['absmax'] = channel_steps.Later(
      observers.AbsMax(jnp.ones(128)), 1
    )
    with self.assertRaisesRegex(
      ValueError, "input of mlp/down_proj is rotated online.*rest='dynamic'"
    ):
      stage.apply(block, params, turned, stats)
    self.assertEqual(rotate.block_size(128), 128)

  def test_dead_channels_are_named(self):
    absmax = observers.AbsMax(jnp.array([1.0, 0.0, 2.0]))
    stats = {'mlp/fc1/in': {'absmax': channel_steps.Later(absmax, 1)}}
    with self.assertLogs(level='WARNING') as logs:
      channel_steps.warn_of_dead_channels('blocks.2', stats)
    self.assertRegex(
      logs.output[0], '1 of 3 channels at blocks.2/mlp/fc1/in are zero'
    )

  def test_non_finite_scales(self):
    s = channel_steps.fit_scale(jnp.array([jnp.nan]), STEPS)
    self.assertTrue(np.isnan(s[0]))
    self.assertRegex(
      channel_steps.failure('blocks.1.input_norm.scale'),
      'scales of blocks.1.input_norm.scale are not finite.*calibration data',
    )


if __name__ == '__main__':
  absltest.main()
