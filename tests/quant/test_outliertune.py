"""Tests of jaxq.quant.outliertune."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import blocks, linear, matmul, taps
from jaxq.numerics import qarray, ranges
from jaxq.numerics import spec as spec_lib
from jaxq.quant import (
  activations,
  outliertune,
  round_to_nearest,
  smoothquant,
  transform,
)
from tests.quant import planted, testing

QuantSpec = spec_lib.QuantSpec
W8, W6 = QuantSpec(dtype='int8'), QuantSpec(dtype='int6')
W6_ASYM = QuantSpec(dtype='int6', symmetric=False)
A8 = QuantSpec(dtype='int8', granularity='token')
A6 = QuantSpec(dtype='int6', granularity='token')
TENSOR6 = QuantSpec(dtype='int6', granularity='tensor')


def config(weights=W6, inputs=A6, **fields):
  return outliertune.OutlierTuneConfig(weights=weights, inputs=inputs, **fields)


def method(**fields):
  return outliertune.outliertune(config(**fields))


def fold(**fields):
  """The method with kernels left float, and its input quantizers taken off."""
  chain = method(weight='none', **fields)
  block_free = transform.Transform(
    name='forget', apply=lambda block, params, quant, stats: (params, {})
  )
  return transform.chain(chain, block_free)


def rtn(weights, inputs, mode='static'):
  return transform.chain(
    round_to_nearest.round_to_nearest(
      round_to_nearest.RoundToNearestConfig(weights=weights)
    ),
    activations.activations(
      activations.ActivationsConfig(inputs=inputs, mode=mode, observer='absmax')
    ),
  )


def variables(params, quant=None):
  return {'params': params, 'quant': quant or {}}


def norm_inputs(block, params, x, quant=None):
  """{tap: what passes} of the sites of norms."""
  tapped = block.tapped(variables(params, quant), x)
  found = {}
  for norm, consumers in block.norms:
    found[norm] = taps.get_path(tapped, block.linear(consumers[0]).tap)
  return found


def relative(y, expected):
  return float(jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected))


class EquationsTest(parameterized.TestCase):
  def test_scale_by_hand(self):
    low = jnp.array([-1.0, -31.0, 0.0, 0.5])
    high = jnp.array([3.0, 10.0, 0.0, 62.0])
    np.testing.assert_allclose(
      outliertune.channel_scale(low, high, TENSOR6),
      [3 / 31, 1.0, 1e-5 / 31, 2.0],
      rtol=1e-6,
    )
    # Half of the tensor's extremes, -31 and 62, at most.
    np.testing.assert_allclose(
      outliertune.channel_scale(low, high, TENSOR6, clip=0.5),
      [3 / 31, 15.5 / 31, 1e-5 / 31, 1.0],
      rtol=1e-6,
    )
    s = jnp.array([1.0, 2.0, 40.0])
    self.assertEqual(float(outliertune.imbalance(s)), 20.0)

  def test_middles_are_of_each_text_and_skip_padding(self):
    x = np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32) + 4
    x[1, 3:] = 0  # Padding.
    x[2] = 0  # No text at all.
    state = outliertune.MidRange(jnp.zeros(2), jnp.zeros(()))
    state = state.update(jnp.asarray(x[:1])).update(jnp.asarray(x[1:]))
    middles = [(text.min(0) + text.max(0)) / 2 for text in (x[0], x[1, :3])]
    np.testing.assert_allclose(state.mean, np.mean(middles, 0), rtol=1e-6)

  def test_searched_scale_by_loops(self):
    x = np.random.default_rng(1).standard_t(2.5, size=(3, 60, 4))
    x = x.astype(np.float32)
    spec = QuantSpec(dtype='int4', granularity='tensor')
    state = outliertune.SearchedMax(jnp.zeros(4), spec)
    state = state.update(jnp.asarray(x[:2])).update(jnp.asarray(x[2:]))
    best = np.zeros(4)
    ratios = ranges.RangeSearch().ratios
    np.testing.assert_allclose(ratios[[0, -1]], [1.0, 0.21], rtol=1e-6)
    for text in x:
      for j in range(4):
        a = np.abs(text[:, j]).max()
        errors = []
        for p in ratios:
          s = p * a / 7
          q = np.clip(np.round(text[:, j] / s), -8, 7) * s
          errors.append(np.sum(np.abs(q - text[:, j]) ** 2.4))
        best[j] = max(best[j], ratios[int(np.argmin(errors))] * a)
    np.testing.assert_allclose(state.absmax, best, rtol=1e-5)
    self.assertTrue(np.any(best < np.abs(x).max((0, 1))))

  def test_integer_hessian(self):
    x = jnp.array([[0.4, 1.6], [200.0, -3.0]])
    spec = QuantSpec(dtype='int6', granularity='tensor')
    stage = transform.stages(method(weight='gptq'))[-1]
    block, _ = planted.block('layer')
    requests = stage.observe(block)
    state = requests['attention/q_proj/in']['hessian']((2, 2)).update(x)
    q = np.array([[0.0, 2.0], [31.0, -3.0]])
    np.testing.assert_allclose(state.mean, q.T @ q)
    self.assertEqual(state.spec, spec)
    other = requests['mlp/fc2/in']['hessian']((2, 2)).update(x)
    np.testing.assert_allclose(other.mean, np.asarray(x).T @ np.asarray(x))


class ExactTest(parameterized.TestCase):
  @parameterized.parameters(
    ('layer', 'SHIFTED', 'absmax'),
    ('layer', 'SCALED', 'mse'),
    ('parallel', 'SHIFTED', 'absmax'),
    ('post', 'SHIFTED', 'absmax'),
    ('rms', 'SCALED', 'absmax'),
  )
  def test_the_float_block_is_unchanged(self, kind, plant, scale):
    plant = getattr(planted, plant)
    block, params = planted.block(kind, plant)
    x = planted.inputs(plant)
    moved, quant = testing.run(block, params, fold(scale=scale), x)
    self.assertEqual(quant, {})
    expected = testing.output(block, params, {}, x)
    self.assertLess(
      relative(testing.output(block, moved, {}, x), expected), 1e-5
    )

  def test_an_rms_norm_gets_a_bias(self):
    block, params = planted.block('rms', planted.SCALED)
    x = planted.inputs()
    stage = fold(symmetrize='always', allow_new_bias=True)
    moved, _ = testing.run(block, params, stage, x)
    self.assertEqual(moved['post_norm']['bias'].shape, (planted.C,))
    self.assertEqual(moved['attention']['k_proj']['bias'].shape, (32,))
    self.assertLess(
      relative(
        testing.output(block, moved, {}, x),
        testing.output(block, params, {}, x),
      ),
      1e-5,
    )

  @parameterized.parameters('layer', 'rms')
  def test_without_symmetrization_it_is_smoothquant_at_one(self, kind):
    block, params = planted.block(kind, planted.SCALED)
    x = planted.inputs()
    ours = method(symmetrize='never', bmm=())
    made, quant = testing.run(block, params, ours, x)
    # Its twin: s = a_j, one static scale per tensor on the norms' outputs.
    smooth = smoothquant.SmoothQuantConfig(alpha=1.0)
    rounding, ranged = transform.stages(rtn(W6, TENSOR6))
    twin = transform.chain(smoothquant.smoothquant(smooth), ranged, rounding)
    twin_made, twin_quant = testing.run(block, params, twin, x)
    fed = {path for _, consumers in block.norms for path in consumers}
    for lin in block.linears:
      if lin.path not in fed:
        twin_quant = taps.set_path(
          twin_quant,
          f'{lin.path}/input',
          taps.get_path(quant, f'{lin.path}/input'),
        )
    for path in sorted(fed):
      ours_q, twin_q = (
        np.asarray(qarray.codes(blocks.kernel_of(tree, path))).astype(int)
        for tree in (made, twin_made)
      )
      differ = np.mean(ours_q != twin_q)  # Ties, broken by another rounding.
      self.assertLess(differ, 1e-3, path)
    y = testing.output(block, made, quant, x)
    expected = testing.output(block, twin_made, twin_quant, x)
    self.assertLess(relative(y - x, expected - x), 1e-5)

  def test_gains_and_smoothing_before_change_nothing(self):
    block, params = planted.block('rms', planted.SCALED)
    x = planted.inputs()
    plain = testing.run(block, params, method(bmm=()), x)
    smoothed = testing.run(block, params, method(presmooth=0.35, bmm=()), x)
    folded = params
    for norm, consumers in block.norms:
      gain = params[norm]['scale']
      folded = taps.set_path(folded, f'{norm}/scale', jnp.ones_like(gain))
      for path in consumers:
        kernel = blocks.kernel_of(folded, path) * gain[:, None]
        folded = taps.set_path(folded, f'{path}/kernel', kernel)
    folded = testing.run(block, folded, method(bmm=()), x)
    for other in (smoothed, folded):
      self.assertLess(
        relative(
          testing.output(block, *other, x) - x,
          testing.output(block, *plain, x) - x,
        ),
        1e-5,
      )
    # With a common cut they do: it falls on other channels.
    cut = testing.run(block, params, method(clip=0.5, bmm=()), x)
    both = testing.run(
      block, params, method(clip=0.5, presmooth=0.35, bmm=()), x
    )
    self.assertGreater(
      relative(testing.output(block, *cut, x), testing.output(block, *both, x)),
      1e-3,
    )

  def test_shifting_by_the_pooled_middle_never_widens(self):
    x = planted.inputs(batch=1) + 3  # One text: pooled is per text.
    state = outliertune.MidRange(jnp.zeros(planted.C), jnp.zeros(()))
    z = state.update(x).mean
    before = jnp.max(jnp.abs(x), axis=(0, 1))
    after = jnp.max(jnp.abs(x - z[None, None]), axis=(0, 1))
    self.assertTrue(bool(jnp.all(after <= before)))

  @parameterized.parameters(
    (W8, A8, False), (W8, A8, True), (W6, A6, True), (W6_ASYM, A6, True)
  )
  def test_integers_equal_floats_to_the_bit(self, weights, inputs, jit):
    block, params = planted.block('layer', planted.SHIFTED)
    x = planted.inputs()
    made, quant = testing.run(
      block, params, method(weights=weights, inputs=inputs), x
    )
    site = norm_inputs(block, made, x, quant)['post_norm']
    w = blocks.kernel_of(made, 'mlp/fc1')
    act = taps.get_path(quant, 'mlp/fc1/input')
    self.assertIsInstance(act, linear.StepInput)

    def run(implementation):
      f = lambda x: matmul.matmul(x, w, act, implementation=implementation)
      return (jax.jit(f) if jit else f)(site)

    np.testing.assert_array_equal(run('integer'), run('float'))
    # And both are the codes times the dequantized weights.
    codes = act.codes(site).astype(jnp.float32)
    np.testing.assert_allclose(
      run('float'), codes @ qarray.dequantize(w), rtol=1e-4, atol=1e-4
    )

  @parameterized.parameters(A8, A6)
  def test_codes_are_integers_within_the_range(self, inputs):
    block, params = planted.block('layer', planted.SHIFTED)
    x = planted.inputs()
    made, quant = testing.run(block, params, method(inputs=inputs), x)
    qmax = 2 ** (inputs.bits - 1) - 1
    for norm, consumers in block.norms:
      act = taps.get_path(quant, f'{consumers[0]}/input')
      site = norm_inputs(block, made, x, quant)[norm]
      codes = act.codes(site * 3)  # Beyond what was calibrated.
      self.assertEqual(codes.dtype, jnp.int8)
      self.assertEqual(int(jnp.max(codes)), qmax)
      self.assertEqual(int(jnp.min(codes)), -qmax - 1)
    # The calibrated values themselves are not cut off (post_norm's are those
    # of a quantized attention).
    site = norm_inputs(block, made, x, quant)['input_norm']
    self.assertLessEqual(float(jnp.max(jnp.abs(site))), qmax * (1 + 1e-5))

  @parameterized.parameters('rms', 'layer')
  def test_nothing_runs_on_the_activations_but_rounding(self, kind):
    block, params = planted.block(kind, planted.SCALED)
    x = planted.inputs()
    made, quant = testing.run(block, params, method(bmm=()), x)
    path = block.norms[1][1][0]
    site = norm_inputs(block, made, x, quant)[block.norms[1][0]]
    leaves = taps.get_path(made, path)
    layer = linear.QuantDense(planted.F)

    def run(site, implementation):
      return layer.clone(implementation=implementation).apply(
        {
          'params': leaves,
          'quant': {'input': taps.get_path(quant, f'{path}/input')},
        },
        site,
      )

    for implementation in ('float', 'integer'):
      jaxpr = jax.make_jaxpr(lambda s, i=implementation: run(s, i))(site)
      used = testing.primitives_on_width(jaxpr.jaxpr, planted.C)
      self.assertLessEqual(
        used,
        {
          'round',
          'clamp',
          'max',
          'min',
          'convert_element_type',
          'reshape',
          'dot_general',
        },
      )
      self.assertIn('round', used)
      self.assertIn('dot_general', used)
    # The control: a dynamic input of the same layer is reduced and divided.
    dynamic = {'input': linear.ActQuant(None, None, A6)}
    control = jax.make_jaxpr(
      lambda s: layer.apply({'params': leaves, 'quant': dynamic}, s)
    )(site)
    used = testing.primitives_on_width(control.jaxpr, planted.C)
    self.assertIn('div', used)
    self.assertTrue({'reduce_max', 'reduce_min'} & used)


class ContractTest(parameterized.TestCase):
  def test_what_each_linear_gets(self):
    block, params = planted.block('layer', planted.SHIFTED)
    x = planted.inputs()
    made, quant = testing.run(block, params, method(), x)
    for lin in block.linears:
      act = taps.get_path(quant, f'{lin.path}/input')
      name = lin.path.rpartition('/')[2]
      if name in ('o_proj', 'fc2'):
        self.assertEqual(act, linear.ActQuant(None, None, A6))
      else:
        self.assertEqual(act, linear.StepInput(TENSOR6))
      output = taps.get_path(quant, f'{lin.path}/output')
      self.assertEqual(
        output is not None, name in ('q_proj', 'k_proj', 'v_proj')
      )
      self.assertIsInstance(blocks.kernel_of(made, lin.path), qarray.QArray)

  def test_an_ignored_consumer_reads_steps_and_stays_float(self):
    block, params = planted.block('layer', planted.SHIFTED)
    fewer = block.without(('k_proj',), 0)
    x = planted.inputs()
    made, quant = testing.run(
      fewer, params, method(weights=W8, inputs=A8, bmm=()), x
    )
    k = blocks.kernel_of(made, 'attention/k_proj')
    self.assertNotIsInstance(k, qarray.QArray)
    y = testing.output(block, made, quant, x)
    expected = testing.output(block, params, {}, x)
    self.assertLess(relative(y - x, expected - x), 0.05)

  def test_a_dead_channel_is_harmless(self):
    block, params = planted.block('layer')
    for leaf in ('scale', 'bias'):
      params['post_norm'][leaf] = params['post_norm'][leaf].at[3].set(0.0)
    x = planted.inputs()
    made, quant = testing.run(block, params, method(weights=W8, inputs=A8), x)
    w = qarray.dequantize(blocks.kernel_of(made, 'mlp/fc1'))
    np.testing.assert_allclose(w[3], 0, atol=1e-5)
    y = testing.output(block, made, quant, x)
    self.assertTrue(bool(jnp.all(jnp.isfinite(y))))
    stage = transform.stages(method())[1]
    with self.assertLogs(level='WARNING') as logs:
      stage.check('blocks.2', testing.observe(block, params, {}, stage, x))
    self.assertRegex(
      logs.output[0], '1 of 64 channels at blocks.2/mlp/fc1/in are zero'
    )

  def test_saturation_is_counted(self):
    block, params = planted.block('layer', planted.SHIFTED)
    x = planted.inputs(length=200)
    made, quant = testing.run(block, params, method(inputs=A8), x)
    trees = variables(made, quant)
    rates = outliertune.saturation_rates(block, trees, x)
    fed = {path for _, consumers in block.norms for path in consumers}
    self.assertEqual(set(rates), fed)
    # The extremes of each channel themselves: at most two of 800 values.
    self.assertLessEqual(float(rates['attention/q_proj']), 2 / 800)
    louder = taps.set_path(
      made, 'input_norm/scale', made['input_norm']['scale'] * 2
    )
    rates = outliertune.saturation_rates(block, variables(louder, quant), x)
    self.assertGreater(
      float(rates['attention/q_proj']), 10 * outliertune.SATURATION_ALARM
    )
    x = jnp.array([[30.4, -31.0], [31.0, 2.0]])
    self.assertEqual(float(outliertune.saturation(x, TENSOR6)), 0.5)

  def test_jit_is_eager(self):
    block, params = planted.block('layer', planted.SHIFTED)
    for stage in transform.stages(method(weight='none'))[:2]:
      stats = testing.observe(block, params, {}, stage, planted.inputs())
      eager = stage.apply(block, params, {}, stats)
      jitted = jax.jit(stage.apply, static_argnums=0)(block, params, {}, stats)
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        eager,
        jitted,
      )


class MessagesTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(symmetrize='yes'), "symmetrize='yes'; allowed .'always', 'auto'"),
    (dict(scale='max'), r"scale='max'; allowed \['absmax', 'mse'\]"),
    (dict(weight='awq'), r"weight='awq'; allowed \['gptq', 'none', 'rtn'\]"),
    (dict(clip=0.0), r'clip=0.0; it must lie in \(0, 1\].*0.8'),
    (
      dict(inputs=QuantSpec(dtype='int3', granularity='token')),
      'inputs are int3.*allowed symmetric int4..int8',
    ),
    (
      dict(inputs=QuantSpec(dtype='fp8_e4m3', granularity='token')),
      'inputs are fp8_e4m3',
    ),
    (
      dict(inputs=dataclasses.replace(A8, symmetric=False)),
      'int8, symmetric=False',
    ),
    (
      dict(weights=QuantSpec(dtype='int4', granularity='group', group_size=32)),
      'weights are int4 per group; allowed int2..int8 per channel',
    ),
  )
  def test_config(self, fields, regex):
    with self.assertRaisesRegex(ValueError, regex):
      config(**fields)

  def test_a_shift_needs_a_bias(self):
    block, params = planted.block('rms')
    with self.assertRaisesRegex(
      ValueError, "symmetrize='always' and input_norm has no bias"
    ):
      testing.run(block, params, method(symmetrize='always'), planted.inputs())

  def test_missing_statistics(self):
    block, params = planted.block('layer')
    for stage in transform.stages(method())[:2]:
      with self.assertRaisesRegex(
        ValueError, 'no (middle|range) was observed at attention/q_proj/in'
      ):
        stage.apply(block, params, {}, {})

  def test_an_int32_sum_must_not_overflow(self):
    block, params = planted.block('layer')
    stage = transform.stages(method(weights=W8, inputs=A8))[1]
    stats = testing.observe(block, params, {}, stage, planted.inputs())
    wide = jax.tree.map(lambda a: jnp.ones((65536,)) if a.ndim else a, stats)
    with self.assertRaisesRegex(
      ValueError, 'K=65536 products of int8 and int8'
    ):
      stage.apply(block, params, {}, wide)
    x = jnp.ones((2, 65536))
    w = qarray.quantize(jnp.ones((65536, 1)), W8)
    with self.assertRaisesRegex(NotImplementedError, 'may overflow int32'):
      matmul.matmul(x, w, linear.StepInput(A8), implementation='integer')

  def test_a_block_without_norms(self):
    block, params = planted.block('layer')
    bare = dataclasses.replace(block, norms=())
    with self.assertRaisesRegex(ValueError, 'Block declares no site.*norm'):
      testing.run(bare, params, method(), planted.inputs())

  def test_a_wrong_order(self):
    block, params = planted.block('layer')
    late = transform.chain(rtn(W8, TENSOR6), method())
    with self.assertRaisesRegex(ValueError, 'outliertune: .* int8 already'):
      testing.run(block, params, late, planted.inputs())
    twice = transform.chain(method(weight='none'), method(weight='none'))
    with self.assertRaisesRegex(ValueError, 'is static, taken before outlier'):
      testing.run(block, params, twice, planted.inputs())

  def test_non_finite_scales(self):
    low = jnp.array([0.0, jnp.nan])
    s = outliertune.channel_scale(low, low, TENSOR6)
    self.assertTrue(np.isnan(s[1]))
    self.assertRegex(
      outliertune.failure('blocks.1.input_norm.scale'),
      'scales of blocks.1.input_norm.scale are not finite.*calibration data',
    )


if __name__ == '__main__':
  absltest.main()
