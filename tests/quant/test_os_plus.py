"""Tests of jaxq.quant.os_plus."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import blocks, linear, matmul, taps
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import (
  activations,
  equivalence,
  os_plus,
  rotate,
  round_to_nearest,
  transform,
)
from tests.quant import planted, testing

QuantSpec = spec_lib.QuantSpec
W8, W6 = QuantSpec(dtype='int8'), QuantSpec(dtype='int6', symmetric=False)
A8 = QuantSpec(dtype='int8', granularity='tensor')
A6 = QuantSpec(dtype='int6', granularity='tensor', symmetric=False)
A6_TOKEN = QuantSpec(dtype='int6', granularity='token', symmetric=False)


def config(weights=W6, inputs=A6, n_grid=20, **fields):
  fields = {'n_max': n_grid, **fields}
  return os_plus.OsPlusConfig(
    weights=weights, inputs=inputs, n_grid=n_grid, **fields
  )


def migration(**fields):
  """The first stage alone."""
  chain = os_plus.os_plus(config(**fields))
  return transform.stages(chain)[0]


def rtn(weights, inputs):
  """Round to nearest, inputs static per tensor."""
  return transform.chain(
    round_to_nearest.round_to_nearest(
      round_to_nearest.RoundToNearestConfig(weights=weights)
    ),
    activations.activations(
      activations.ActivationsConfig(
        inputs=inputs, mode='static', observer='average'
      )
    ),
  )


def variables(params, quant=None):
  return {'params': params, 'quant': quant or {}}


def sample_of(block, params, site, x):
  """What a site's consumers read."""
  tapped = block.tapped(variables(params), x)
  return taps.get_path(tapped, block.linear(site.consumers[0]).tap)


def relative(y, expected):
  return float(jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected))


class EquationsTest(parameterized.TestCase):
  def test_shift_and_scale_by_hand(self):
    low, high = jnp.array([-1.0, 29.0, -4.0]), jnp.array([3.0, 31.0, 4.0])
    np.testing.assert_array_equal(os_plus.channel_shift(low, high), [1, 30, 0])
    s = os_plus.threshold_scale(
      jnp.array([-1.0, -2.0, -8.0]), jnp.array([1.0, 6.0, 3.0]), jnp.float32(2)
    )
    np.testing.assert_array_equal(s, [1, 3, 4])

  def test_scales_are_at_least_one_and_exactly_one_within_the_threshold(self):
    x = jax.random.t(jax.random.key(0), 2.0, (1, 200, 32))
    low, high = os_plus.channel_range(x)
    u = jnp.max(jnp.abs(x))
    for t in (u, 0.5 * u, 0.1 * u):
      s = np.asarray(os_plus.threshold_scale(low, high, t))
      self.assertGreaterEqual(s.min(), 1.0)
      inside = (np.asarray(high) <= t) & (np.asarray(low) >= -t)
      np.testing.assert_array_equal(s[inside], 1.0)
      self.assertEqual(inside.all(), t == u)
      # No channel is left beyond the threshold.
      largest = np.abs(np.asarray(x)).max((0, 1)) / s
      self.assertLessEqual(largest.max(), float(t) * (1 + 1e-6))

  def test_shifted_channels_are_symmetric(self):
    block, params = planted.block('layer', planted.SHIFTED)
    site = block.sites[0]
    x = sample_of(block, params, site, planted.inputs())
    z = os_plus.channel_shift(*os_plus.channel_range(x))
    params = equivalence.shift_producer(params, site, z)
    low, high = os_plus.channel_range(
      sample_of(block, params, site, planted.inputs())
    )
    # The norm's own rounding at values of 30 is all that is left.
    excess = np.abs(high + low)
    np.testing.assert_array_less(excess, 1e-6 * 30 + 1e-6 * (high - low))

  def test_search_takes_the_first_of_equal_minima_and_skips_what_is_beyond(
    self,
  ):
    low, high = jnp.array([-3.0]), jnp.array([8.0])
    seen = []

    def loss(s, t):
      del s
      jax.debug.callback(lambda t: seen.append(float(t)), t)
      return jnp.where(t > 5, 1.0, 0.0)

    t, s, losses = os_plus.search_threshold(
      loss, low, high, config(n_grid=4, n_max=30), 4.0
    )
    jax.effects_barrier()
    # max(x) / 0.5 = 16 candidates' steps of 0.25: 8.0, 7.75, .., 4.0.
    self.assertLen(seen, 17)
    np.testing.assert_allclose(sorted(seen)[::-1], np.arange(8, 3.9, -0.25))
    self.assertEqual(float(t), 5.0)
    np.testing.assert_allclose(s, [8 / 5])
    self.assertTrue(np.all(np.isinf(losses[17:])))

  def test_a_bound_above_the_range_leaves_all_as_it_is(self):
    t, s, _ = os_plus.search_threshold(
      lambda s, t: t, jnp.array([-0.1]), jnp.array([0.2]), config(), 1.0
    )
    self.assertEqual((float(t), float(s[0])), (1.0, 1.0))

  def test_no_finite_loss_gives_nan(self):
    nan = lambda s, t: jnp.float32(jnp.nan)
    _, s, _ = os_plus.search_threshold(
      nan, jnp.array([-1.0]), jnp.array([2.0]), config(), 0.1
    )
    self.assertTrue(np.isnan(s).all())

  @parameterized.parameters(1.0, 0.8)
  def test_token_range_by_loops(self, quantile):
    batches = [
      np.random.default_rng(i).normal(size=(2, 10, 3)).astype(np.float32)
      for i in range(3)
    ]
    batches[1][0, 3] *= 50  # An outlier token.
    batches[2][1, 7] = 0  # Padding.
    state = os_plus.token_range(quantile)((2, 10, 3))
    lows, highs = [], []
    for x in batches:
      state = state.update(jnp.asarray(x))
      rows = [row for row in x.reshape(-1, 3) if np.any(row)]
      for sign, found in ((1, highs), (-1, lows)):
        tops = np.array([(sign * row).max() for row in rows])
        bound = np.quantile(np.abs(tops), quantile)
        found.append(sign * tops[tops <= bound].max())
    np.testing.assert_allclose(state.low[0], np.mean(lows), rtol=1e-5)
    np.testing.assert_allclose(state.high[0], np.mean(highs), rtol=1e-5)

  @parameterized.parameters(A8, A6)
  def test_search_agrees_with_loops_in_numpy(self, inputs):
    """A linear site, everything written out again in float64."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 30, 16)) * np.exp(rng.normal(size=16))
    x[..., 3] *= 20
    w = rng.normal(size=(16, 8)) / 4
    block, site, params = _one_linear(jnp.asarray(w, jnp.float32))
    weights = QuantSpec(dtype='int6', symmetric=False)
    made = config(weights=weights, inputs=inputs, n_grid=100, lower_bound=0.1)
    moved, losses = os_plus.migrate(
      block, site, params, jnp.asarray(x, jnp.float32), made
    )
    expected, best, s = _search_by_loops(x, w, inputs, 6, 100, 0.1)
    # A value at a tie rounds otherwise in float64: two of 100 losses have one.
    np.testing.assert_allclose(losses[:-1], expected[:-1], rtol=2e-2)
    self.assertEqual(int(np.argmin(losses)), best)
    np.testing.assert_allclose(1 / moved['norm']['scale'], s, rtol=1e-5)


class EquivalenceTest(parameterized.TestCase):
  @parameterized.parameters(
    ('layer', 'SHIFTED'),
    ('layer', 'SCALED'),
    ('parallel', 'SHIFTED'),
    ('post', 'SHIFTED'),
    ('rms', 'SCALED'),
  )
  def test_the_float_block_is_unchanged(self, kind, plant):
    plant = getattr(planted, plant)
    block, params = planted.block(kind, plant)
    x = planted.inputs(plant)
    moved, quant = testing.run(block, params, migration(n_grid=5), x)
    self.assertEqual(quant, {})
    expected = testing.output(block, params, {}, x)
    y = testing.output(block, moved, {}, x)
    self.assertLess(relative(y, expected), 1e-5)
    # And something was moved.
    norm = 'input_norm'
    ratio = moved[norm]['scale'] / params[norm]['scale']
    self.assertLess(float(jnp.min(ratio)), 0.9)
    if kind != 'rms':
      self.assertGreater(relative(moved[norm]['bias'], params[norm]['bias']), 0)

  def test_an_rms_norm_gets_a_bias_and_its_consumers_too(self):
    block, params = planted.block('rms', planted.SCALED)
    x = planted.inputs()
    stage = migration(shift='always', allow_new_bias=True)
    moved, _ = testing.run(block, params, stage, x)
    self.assertEqual(moved['input_norm']['bias'].shape, (planted.C,))
    self.assertEqual(moved['mlp']['gate_proj']['bias'].shape, (planted.F,))
    self.assertNotIn('bias', moved['mlp']['down_proj'])  # SwiGLU: no shift.
    self.assertLess(
      relative(
        testing.output(block, moved, {}, x),
        testing.output(block, params, {}, x),
      ),
      1e-5,
    )

  def test_a_post_norm_residual_reads_the_value_as_it_was(self):
    block, params = planted.block('post', planted.SHIFTED)
    moved, _ = testing.run(block, params, migration(), planted.inputs())
    skip = moved['mlp_shortcut']
    # x * s + z, with s and z of the norm.
    np.testing.assert_allclose(
      skip['scale'],
      params['post_norm']['scale'] / moved['post_norm']['scale'],
      rtol=1e-5,
    )
    z = skip['bias'] - params['mlp_shortcut']['bias']
    np.testing.assert_allclose(z[5], 30, atol=2)
    np.testing.assert_allclose(z[41], -30, atol=2)

  @parameterized.parameters('layer', 'rms')
  def test_the_search_is_never_worse_than_no_scaling(self, kind):
    block, params = planted.block(kind, planted.SCALED)
    x = planted.inputs()
    site = block.sites[0]
    _, losses = os_plus.migrate(
      block, site, params, sample_of(block, params, site, x), config()
    )
    self.assertLess(float(jnp.min(losses)), 0.5 * float(losses[0]))

  def test_two_branches_on_one_norm_add_their_losses(self):
    block, params = planted.block('parallel', planted.SCALED)
    site = block.sites[0]
    x = sample_of(block, params, site, planted.inputs())
    both = block.inner_output(site, variables(params), x)
    tapped = block.tapped(variables(params), planted.inputs())
    np.testing.assert_allclose(
      both,
      jnp.concatenate(
        [tapped['attention']['o_proj']['in'], tapped['mlp']['fc1']['out']], -1
      ),
      rtol=1e-5,
      atol=1e-5,
    )

  def test_a_consumer_that_stays_float_is_folded_and_not_quantized(self):
    # A router beside the experts: its rows are scaled, its values kept.
    block, params = planted.block('parallel', planted.SHIFTED)
    fewer = block.without(('fc1',), 0)
    x = planted.inputs()
    made, quant = testing.run(fewer, params, os_plus.os_plus(config()), x)
    kernel = blocks.kernel_of(made, 'mlp/fc1')
    self.assertNotIsInstance(kernel, qarray.QArray)
    ratio = kernel / params['mlp']['fc1']['kernel']
    s = params['input_norm']['scale'] / made['input_norm']['scale']
    np.testing.assert_allclose(
      ratio, jnp.broadcast_to(s[:, None], ratio.shape), rtol=1e-4
    )
    self.assertIsNone(taps.get_path(quant, 'mlp/fc1/input'))

  def test_rows_of_zeros_are_padding(self):
    block, params = planted.block('layer', planted.SHIFTED)
    site = block.sites[2]  # A linear: tokens do not see one another.
    x = sample_of(block, params, site, planted.inputs())
    padded = jnp.concatenate([x, jnp.zeros_like(x)], axis=1)
    a, losses = os_plus.migrate(block, site, params, x, config())
    b, other = os_plus.migrate(block, site, params, padded, config())
    np.testing.assert_allclose(losses, other, rtol=1e-4)
    jax.tree.map(
      lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-4, atol=1e-5), a, b
    )


class ContractTest(parameterized.TestCase):
  def test_static_inputs_and_the_outputs_of_qkv(self):
    block, params = planted.block('layer', planted.SHIFTED)
    x = planted.inputs()
    made, quant = testing.run(block, params, os_plus.os_plus(config()), x)
    for lin in block.linears:
      act = taps.get_path(quant, f'{lin.path}/input')
      self.assertEqual(act.scale.shape, (1, 1))
      self.assertEqual(act.spec, A6)
      q = blocks.kernel_of(made, lin.path)
      self.assertEqual(q.spec, W6)
      output = taps.get_path(quant, f'{lin.path}/output')
      self.assertEqual(
        output is not None,
        'attention/o' not in lin.path and 'fc' not in lin.path,
      )
    # Of one batch the average is its extremes: those of v's float output.
    seen = block.tapped(variables(params), x)['attention']['v_proj']['out']
    v = taps.get_path(quant, 'attention/v_proj/output')
    low, high = min(seen.min(), 0), max(seen.max(), 0)
    np.testing.assert_allclose(v.scale[0, 0], (high - low) / 63, rtol=1e-3)

  def test_per_token_and_per_group_inputs_are_dynamic(self):
    group = QuantSpec(
      dtype='int4', granularity='group', group_size=32, symmetric=False
    )
    block, params = planted.block('layer', planted.SHIFTED)
    x = planted.inputs()
    expected = testing.output(block, params, {}, x)
    for inputs in (A6_TOKEN, group):
      weights = dataclasses.replace(group) if inputs == group else W6
      method = os_plus.os_plus(config(weights=weights, inputs=inputs))
      made, quant = testing.run(block, params, method, x)
      act = taps.get_path(quant, 'attention/q_proj/input')
      self.assertIsNone(act.scale)
      self.assertIsNone(taps.get_path(quant, 'attention/q_proj/output'))
      y = testing.output(block, made, quant, x)
      self.assertLess(relative(y - x, expected - x), 0.4)

  def test_groups_of_inputs_run_along_the_channels(self):
    spec = QuantSpec(dtype='int4', granularity='group', group_size=4)
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    got = matmul.fake_input(x, linear.ActQuant(None, None, spec))
    for b in range(2):
      for t in range(3):
        for g in range(2):
          part = np.asarray(x[b, t, 4 * g : 4 * g + 4])
          scale = np.abs(part).max() / 7
          want = np.clip(np.round(part / scale), -8, 7) * scale
          np.testing.assert_allclose(
            got[b, t, 4 * g : 4 * g + 4], want, rtol=1e-5
          )

  def test_jit_is_eager(self):
    block, params = planted.block('layer', planted.SHIFTED)
    stage = migration(n_grid=5)
    stats = testing.observe(block, params, {}, stage, planted.inputs())
    eager = stage.apply(block, params, {}, stats)
    jitted = jax.jit(stage.apply, static_argnums=0)(block, params, {}, stats)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      eager,
      jitted,
    )

  def test_a_rotated_consumer_is_left_alone(self):
    block, params = planted.block('rms', planted.SCALED)
    x = planted.inputs()
    turned = transform.chain(rotate.rotate(rotate.RotateConfig()), migration())
    once, _ = testing.run(
      block, params, rotate.rotate(rotate.RotateConfig()), x
    )
    both, _ = testing.run(block, params, turned, x)
    np.testing.assert_array_equal(
      blocks.kernel_of(once, 'mlp/down_proj'),
      blocks.kernel_of(both, 'mlp/down_proj'),
    )


class MessagesTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(shift='yes'), r"shift='yes'; allowed \['always', 'auto', 'never'\]"),
    (dict(clip='max'), r"clip='max'; allowed \['avgminmax', 'token_quantile"),
    (dict(site_loss='model'), r"site_loss='model'; allowed \['block', 'linear"),
    (dict(n_grid=0, n_max=5), 'n_grid=0; allowed 1 or more. Use 100'),
    (dict(sample_sequences=0), 'sample_sequences=0; allowed 1 or more'),
    (dict(n_grid=9, n_max=5), 'n_max=5 below n_grid=9'),
    (dict(lower_bound=0.0), 'lower_bound=0.0; it must be above 0'),
    (dict(token_quantile=0.2), r'token_quantile=0.2; it must lie in \(0.5, 1'),
    (
      dict(inputs=QuantSpec(dtype='fp8_e4m3', granularity='token')),
      "inputs.dtype='fp8_e4m3'; allowed int2..int8",
    ),
    (
      dict(weights=QuantSpec(dtype='nvfp4')),
      "weights.dtype='nvfp4'; allowed int2..int8",
    ),
    (
      dict(inputs=QuantSpec(dtype='int8', granularity='channel')),
      "granularity='channel'; allowed .'group', 'tensor', 'token'.",
    ),
  )
  def test_config(self, fields, regex):
    with self.assertRaisesRegex(ValueError, regex):
      config(**fields)

  def test_a_shift_needs_a_bias(self):
    block, params = planted.block('rms')
    with self.assertRaisesRegex(
      ValueError, "shift='always' and input_norm has no bias.*allow_new_bias"
    ):
      testing.run(block, params, migration(shift='always'), planted.inputs())

  def test_all_padding(self):
    x = jnp.zeros((1, 3, 4))
    with self.assertRaisesRegex(ValueError, 'none of the 3 tokens.*padding'):
      os_plus.channel_range(x, os_plus.real_tokens(x))
    block, params = planted.block('layer')
    stage = migration()
    stats = testing.observe(block, params, {}, stage, planted.inputs())
    stats = jax.tree.map(jnp.zeros_like, stats)
    made, _ = jax.jit(stage.apply, static_argnums=0)(block, params, {}, stats)
    self.assertTrue(np.isnan(made['input_norm']['scale']).all())
    self.assertRegex(
      os_plus.failure('blocks.0.input_norm.scale'),
      'no threshold gives a finite error at blocks.0.input_norm.scale.*padding',
    )

  def test_a_group_that_does_not_divide(self):
    group = QuantSpec(dtype='int4', granularity='group', group_size=48)
    block, params = planted.block('layer')
    with self.assertRaisesRegex(ValueError, 'K=64, group_size=48'):
      testing.run(block, params, migration(weights=group), planted.inputs())

  def test_a_block_without_sites(self):
    block, params = planted.block('layer')
    bare = dataclasses.replace(block, sites=())
    with self.assertRaisesRegex(ValueError, 'Block declares no site.*norm'):
      testing.run(bare, params, migration(), planted.inputs())

  def test_a_shift_of_a_linear(self):
    block, params = planted.block('layer')
    with self.assertRaisesRegex(NotImplementedError, 'v_proj, a linear; only'):
      equivalence.shift_producer(params, block.sites[1], jnp.ones(planted.C))

  def test_a_wrong_order(self):
    block, params = planted.block('layer')
    late = transform.chain(rtn(W8, A8), migration())
    with self.assertRaisesRegex(ValueError, 'os_plus: .* int8 already'):
      testing.run(block, params, late, planted.inputs())


def _one_linear(kernel):
  """A block whose only site is producer 'norm' -> consumer 'dense'."""
  block = blocks.BlockSpec(
    module=planted.MLP(),  # Not called: the site compares the linear alone.
    linears=(blocks.Linear(path='dense', tap='dense/in'),),
    sites=(blocks.Site(producer='norm', consumers=('dense',)),),
  )
  params = {
    'norm': {'scale': jnp.ones(kernel.shape[0])},
    'dense': {'kernel': kernel},
  }
  return block, block.sites[0], params


def _fake_quant(x, low, high, bits, symmetric):
  """One slice, in NumPy."""
  if symmetric:
    qmax = 2 ** (bits - 1) - 1
    scale = max(-low, high, 1e-5) / qmax
    return np.clip(np.round(x / scale), -qmax - 1, qmax) * scale
  scale = max(high - low, 1e-5) / (2**bits - 1)
  zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
  codes = np.clip(np.round(x / scale) + zero, 0, 2**bits - 1)
  return (codes - zero) * scale


def _search_by_loops(x, w, inputs, w_bits, n, bound):
  """Losses, the index of the best threshold, and its s."""
  flat = x.reshape(-1, x.shape[-1])
  low, high = flat.min(0), flat.max(0)
  u = max(-min(flat.min(), 0), max(flat.max(), 0))
  losses, scales = [], []
  for i in range(n + 1):
    t = u - i * (u - bound) / n
    s = np.maximum(1, np.maximum(high / t, low / -t))
    qw = np.stack(
      [
        _fake_quant(c, min(c.min(), 0), max(c.max(), 0), w_bits, False)
        for c in (w * s[:, None]).T
      ],
      axis=1,
    )
    qx = _fake_quant(flat / s, -t, t, inputs.bits, inputs.symmetric)
    losses.append(np.mean(np.sum((qx @ qw - flat @ w) ** 2, axis=-1)))
    scales.append(s)
  best = int(np.argmin(losses))
  return losses, best, scales[best]


if __name__ == '__main__':
  absltest.main()
