"""Tests of jaxq.quant.llm_fp4."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.calibrate import checks
from jaxq.io import compressed_tensors, gguf_export
from jaxq.nn import blocks, linear, taps
from jaxq.numerics import fpx, qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import (
  activations,
  fp_search,
  gptq,
  llm_fp4,
  rotate,
  round_to_nearest,
  smoothquant,
  transform,
)
from tests.numerics import test_fpx
from tests.quant import planted, testing

QuantSpec = spec_lib.QuantSpec
W4 = QuantSpec(dtype='int4')
A4 = QuantSpec(dtype='int4', granularity='token')
A8 = QuantSpec(dtype='int8', granularity='token')


def config(weights=W4, inputs=A4, **fields):
  fields = {'rounds': 2, 'n_grid': 12, 'sample_sequences': 4, **fields}
  return llm_fp4.LlmFp4Config(weights=weights, inputs=inputs, **fields)


def method(**fields):
  return llm_fp4.llm_fp4(config(**fields))


search = jax.jit(fp_search.search_layer, static_argnames='config')


def layer(seed=0, T=48, K=8, N=6):
  """x (T, K) with an outlier channel and small ones, w (K, N)."""
  key_x, key_w = jax.random.split(jax.random.key(seed))
  x = jax.random.normal(key_x, (T, K))
  spread = jnp.ones(K).at[1].set(20.0).at[2].set(0.1)
  return x * spread[None], jax.random.normal(key_w, (K, N))


def absmax(x):
  return jnp.max(jnp.abs(x), axis=0)


def rounded(x, w, made, n=0, bits=(4, 4)):
  """Output of a layer as LayerParams say."""
  scales = made.input_scale * jnp.exp2(-made.shift.astype(jnp.float32))
  xq = fpx.round_to(x, scales[None], made.input_man, bits[1])
  wq = fpx.round_to(w, made.weight_scales[n], made.weight_mans[n], bits[0])
  return jnp.matmul(xq, wq, precision='highest')


def numpy_search(x, w, c):
  """The search in loops, on single errors; one kernel."""
  x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
  y = x @ w
  gammas, w_bits, x_bits = c.gammas, c.weights.bits, c.inputs.bits
  w_mans, x_mans = c.weight_mans, c.input_mans

  def bias(size, m, bits):
    top = 2.0 ** (2.0 ** (bits - 1 - m) - 1)
    return np.log2((2 - 2.0**-m) * top / size)

  def candidates(first):
    if c.reference_search:
      return [first * float(g) for g in gammas]
    return [first - np.log2(float(g)) for g in gammas]

  size_x, size_w = np.abs(x).max(0), np.abs(w).max(0)

  def inputs(m, rho):
    low, span = np.round(rho), 2 ** (x_bits - 1 - m) - 1
    k = np.clip(np.round(bias(size_x, m, x_bits)), low, low + span) - low
    return test_fpx.numpy_fp(x, m, x_bits, rho + k * c.preshift)

  def weights(m, b):
    return test_fpx.numpy_fp(w, m, w_bits, b)

  bw = {m: bias(size_w, m, w_bits) for m in w_mans}
  rho = {m: bias(size_x.max(), m, x_bits) for m in x_mans}
  mw, ma = w_mans[0], x_mans[0]
  for number in range(c.rounds):
    xq, wq = inputs(ma, rho[ma]), weights(mw, bw[mw])
    late = c.reference_search and number == 0
    for m in w_mans:
      tried = candidates(bias(size_w, m, w_bits))
      errors = [((xq @ weights(m, b) - y) ** 2).sum(0) for b in tried]
      bw[m] = np.array(tried)[np.argmin(errors, 0), range(w.shape[1])]
    wq = wq if late else weights(mw, bw[mw])
    for m in x_mans:
      tried = candidates(bias(size_x.max(), m, x_bits))
      rho[m] = tried[
        np.argmin([((inputs(m, b) @ wq - y) ** 2).sum() for b in tried])
      ]
    xq = xq if late else inputs(ma, rho[ma])
    totals = [((xq @ weights(m, bw[m]) - y) ** 2).sum() for m in w_mans]
    mw = w_mans[int(np.argmin(totals))]
    wq = weights(mw, bw[mw])
    totals = [((inputs(m, rho[m]) @ wq - y) ** 2).sum() for m in x_mans]
    ma = x_mans[int(np.argmin(totals))]
  return mw, bw[mw], ma, rho[ma], min(totals) / y.size


class EquationsTest(parameterized.TestCase):
  def test_initial_bias_covers_the_largest(self):
    # 2^E - log2(absmax) + log2(2 - 2^-M) - 1, of e2m1 and 6: bias 1.
    self.assertEqual(float(fp_search.initial_bias(jnp.float32(6), 1, 4)), 1.0)
    for m in (0, 1, 2):
      b = fp_search.initial_bias(jnp.float32(2.7), m, 4)
      np.testing.assert_allclose(
        fpx.largest(m, 4) * 2.0 ** -float(b), 2.7, rtol=1e-6
      )

  def test_shifts_by_hand(self):
    # Biases 1, 4, 5 and of a dead channel; e2: 0 to 3 above round(rho).
    size = jnp.array([6.0, 0.75, 0.375, 0.0])
    bias = fp_search.initial_bias(size, 1, 4)
    self.assertTrue(bool(jnp.all(jnp.isfinite(bias))))
    rho = jnp.min(bias)
    k = functools.partial(fp_search.channel_shift, bias)
    np.testing.assert_array_equal(k(rho, 2), [0, 3, 3, 3])
    np.testing.assert_array_equal(k(rho, 3), [0, 3, 4, 7])
    np.testing.assert_array_equal(k(rho + 2.2, 2), [0, 1, 2, 3])

  def test_candidates(self):
    gammas = llm_fp4.LlmFp4Config(
      weights=W4, inputs=A4, reference_search=True
    ).gammas
    np.testing.assert_allclose(
      gammas, 0.01 + np.arange(100) * 1.19 / 100, rtol=1e-6
    )
    ours = config(n_grid=100).gammas
    np.testing.assert_array_equal(ours[:-1], [1.0, *gammas])
    self.assertEqual(ours[-1], np.float32(1.2))
    size = jnp.array([6.0])
    ours = fp_search.candidate_scale(size, 1, 4, 0.5, False)
    np.testing.assert_allclose(ours, [0.25])  # Half the range.
    theirs = fp_search.candidate_scale(size, 1, 4, 0.5, True)
    np.testing.assert_allclose(theirs, [2**-0.5], rtol=1e-6)  # Half the bias.

  def test_the_paper_s_values_are_the_defaults(self):
    c = llm_fp4.LlmFp4Config(weights=W4, inputs=A4)
    self.assertEqual(
      (c.rounds, c.n_grid, c.gamma_low, c.gamma_high, c.sample_sequences),
      (3, 100, 0.01, 1.2, 32),
    )
    self.assertEqual((c.weight_format, c.input_format), ('search', 'search'))
    self.assertTrue(c.preshift)

  def test_formats(self):
    self.assertEqual(config().weight_mans, (1, 0, 2))
    eight = config(weights=QuantSpec(dtype='int8'))
    self.assertEqual(eight.weight_mans, (5, 2, 3, 4, 6))
    self.assertEqual(config(input_format='e3m0').input_mans, (0,))


class SearchTest(parameterized.TestCase):
  @parameterized.parameters(
    (6, {}),
    (10, {}),
    (6, {'preshift': False}),
    (6, {'reference_search': True, 'n_grid': 30, 'rounds': 3}),
    (6, {'inputs': A8}),
  )
  def test_equals_loops(self, N, fields):
    x, w = layer(N=N)
    c = config(**fields)
    made = search(x, [w], absmax(x), c)
    mw, bw, ma, rho, loss = numpy_search(x, w, c)
    self.assertEqual(int(made.weight_mans[0]), mw)
    self.assertEqual(int(made.input_man), ma)
    np.testing.assert_allclose(-jnp.log2(made.weight_scales[0][0]), bw, 1e-4)
    np.testing.assert_allclose(-jnp.log2(made.input_scale), rho, 1e-4)
    np.testing.assert_allclose(made.losses[-1], loss, rtol=1e-3)
    # And it is the loss of what is returned.
    y = jnp.matmul(x, w, precision='highest')
    found = rounded(x, w, made, bits=(c.weights.bits, c.inputs.bits))
    np.testing.assert_allclose(jnp.mean((found - y) ** 2), loss, rtol=1e-3)
    if not c.reference_search:  # Which can be for the worse.
      self.assertTrue(bool(jnp.all(jnp.diff(made.losses) <= 1e-6)))
      self.assertEqual(int(made.shift[1]), 0)  # The largest channel.
    if c.preshift:
      self.assertGreater(int(jnp.max(made.shift)), 0)

  def test_layers_gain_from_shifts_and_from_the_search(self):
    made = [layer(seed) for seed in range(20)]
    x, w = (jnp.stack(parts) for parts in zip(*made, strict=True))

    def losses(c):
      run = lambda x, w: fp_search.search_layer(x, [w], absmax(x), c).losses
      return np.asarray(jax.jit(jax.vmap(run))(x, w))

    ours, plain = losses(config()), losses(config(preshift=False))
    self.assertGreaterEqual(np.mean(ours[:, -1] <= plain[:, -1]), 0.95)
    self.assertLess(ours[:, -1].mean(), 0.7 * plain[:, -1].mean())
    self.assertLess(plain[:, -1].mean(), 0.9 * plain[:, 0].mean())
    for found in (ours, plain):  # Never worse than at the start.
      self.assertTrue(np.all(found[:, -1] <= found[:, 0]))

  def test_linears_of_one_input_have_formats_of_their_own(self):
    x, w = layer()
    spread = w * jnp.exp(3 * jax.random.normal(jax.random.key(5), w.shape))
    flat = jax.random.uniform(jax.random.key(6), w.shape, minval=0.7)
    c = config(inputs=A8)
    made = search(x, [spread, flat], absmax(x), c)
    self.assertLess(int(made.weight_mans[0]), int(made.weight_mans[1]))
    self.assertEqual(made.weight_scales[1].shape, (1, 6))
    y = jnp.matmul(x, flat, precision='highest')
    error = jnp.mean((rounded(x, flat, made, 1, (4, 8)) - y) ** 2)
    self.assertLess(float(error), 0.02 * float(jnp.mean(y**2)))

  def test_padding_zeros_and_nan(self):
    x, w = layer()
    x = x.at[:, 3].set(0.0)  # A dead channel, and a dead column.
    w = w.at[:, 2].set(0.0)
    c = config()
    made = search(x, [w], absmax(x), c)
    padded = search(jnp.pad(x, ((0, 16), (0, 0))), [w], absmax(x), c)
    np.testing.assert_allclose(padded.losses, made.losses, rtol=1e-4)
    y = rounded(x, w, made)
    self.assertTrue(bool(jnp.all(jnp.isfinite(y))))
    np.testing.assert_array_equal(y[:, 2], 0)
    for bad in (jnp.nan, 1e30):
      found = search(x.at[0, 0].set(bad), [w], absmax(x), c)
      self.assertTrue(bool(jnp.isnan(found.input_scale)))
    nothing = search(0 * x, [w], absmax(0 * x), c)
    self.assertTrue(bool(jnp.isfinite(nothing.input_scale)))


@functools.cache
def planted_error(name, plant=planted.SCALED):
  """Of an MLP with outlier channels, after each method."""
  block, params = planted.block('rms', plant)
  block = block.without(('re:attention',), 0)  # Half the compilation.
  per_tensor = QuantSpec(dtype='int4', granularity='tensor')
  made = {
    'ours': lambda: method(),
    'unshifted': lambda: method(preshift=False),
    'minmax': lambda: method(rounds=0, preshift=False),
    'int4': lambda: transform.chain(
      round_to_nearest.round_to_nearest(
        round_to_nearest.RoundToNearestConfig(weights=W4)
      ),
      activations.activations(
        activations.ActivationsConfig(inputs=per_tensor, mode='static')
      ),
    ),
  }[name]()
  return planted.error(block, params, made, planted.inputs(plant))


class BlockTest(parameterized.TestCase):
  @parameterized.parameters(
    ('ours', 'unshifted', 0.75),
    ('unshifted', 'minmax', 0.6),
    ('ours', 'int4', 0.4),
  )
  def test_gain_on_outlier_channels(self, better, worse, factor):
    self.assertLess(planted_error(better), factor * planted_error(worse))

  def test_gain_with_massive_first_tokens(self):
    """A token whose other channels are next to nothing, beside outliers."""
    plant = planted.Plant(scale=50.0, first_token=1000.0)
    self.assertLess(
      planted_error('ours', plant), 0.75 * planted_error('unshifted', plant)
    )

  @parameterized.parameters('rms', 'layer', 'post')
  def test_folded_or_at_run_time_is_the_same(self, kind):
    block, params = planted.block(kind, planted.SCALED)
    x = planted.inputs()
    run = functools.partial(testing.run, params=params, x=x)
    folded = run(block, transform=method(rounds=0))
    bare = dataclasses.replace(block, sites=())
    online = run(bare, transform=method(rounds=0))
    np.testing.assert_allclose(
      testing.output(block, *folded, x),
      testing.output(block, *online, x),
      rtol=1e-5,
      atol=1e-5,
    )
    for norm, consumers in block.norms:
      ratio = folded[0][norm]['scale'] / params[norm]['scale']
      self.assertGreater(float(jnp.max(ratio)), 1)
      mantissa, _ = np.frexp(np.asarray(ratio))
      np.testing.assert_array_equal(mantissa, 0.5)  # Powers of two.
      for path in consumers:
        act = taps.get_path(folded[1], f'{path}/input')
        self.assertIsNone(act.shift)
        act = taps.get_path(online[1], f'{path}/input')
        self.assertEqual(act.shift.dtype, jnp.int8)
        q = blocks.kernel_of(folded[0], path)
        self.assertGreater(int(jnp.max(q.row_shift)), 0)

  def test_each_linear_by_itself(self):
    block, params = planted.block('rms', planted.SCALED)
    x = planted.inputs()
    made = method(rounds=0, share_inputs=False)
    params, quant = testing.run(block, params, made, x)
    for path in ('attention/q_proj', 'mlp/gate_proj'):
      self.assertIsNotNone(taps.get_path(quant, f'{path}/input').shift)
    # The only reader of its input is folded as before.
    self.assertIsNone(taps.get_path(quant, 'mlp/down_proj/input').shift)
    self.assertTrue(
      bool(jnp.all(jnp.isfinite(testing.output(block, params, quant, x))))
    )

  def test_an_ignored_linear_stays_float_and_right(self):
    block, params = planted.block('layer', planted.SCALED)
    fewer = block.without(('k_proj', 'fc2'), 0)
    x = planted.inputs()
    eight = QuantSpec(dtype='int8')
    made = method(weights=eight, inputs=A8, rounds=0)
    made = testing.run(fewer, params, made, x)
    k = blocks.kernel_of(made[0], 'attention/k_proj')
    self.assertNotIsInstance(k, qarray.QArray)
    # With the norm before it, it is what it was, to the bit.
    for leaf in ('scale', 'bias'):
      np.testing.assert_array_equal(
        made[0]['input_norm'][leaf][:, None] * k,
        params['input_norm'][leaf][:, None]
        * blocks.kernel_of(params, 'attention/k_proj'),
      )
    y = testing.output(block, *made, x)
    self.assertTrue(bool(jnp.all(jnp.isfinite(y))))

  def test_bits_are_counted(self):
    block, params = planted.block('rms')
    made, _ = testing.run(block, params, method(rounds=0), planted.inputs())
    q = blocks.kernel_of(made, 'mlp/up_proj')
    self.assertIsInstance(q, fpx.FpxArray)
    self.assertTrue(q.is_packed)
    K, N = q.shape
    self.assertAlmostEqual(
      qarray.bits_per_weight(q), 4 + 32 / K + 8 / N + 8 / (K * N), places=5
    )

  def test_nothing_is_reduced_at_run_time(self):
    block, params = planted.block('rms', planted.SCALED)
    x = planted.inputs()
    made = testing.run(block, params, method(rounds=0), x)
    layer_ = linear.QuantDense(planted.F)

    def used(quant):
      leaves = taps.get_path(made[0], 'mlp/up_proj')
      run = lambda x: layer_.apply({'params': leaves, 'quant': quant}, x)
      return str(jax.make_jaxpr(run)(x))

    ours = used(taps.get_path(made[1], 'mlp/up_proj'))
    self.assertNotRegex(ours, 'reduce_|argmax|sort')
    self.assertIn('round', ours)
    dynamic = used({'input': linear.ActQuant(None, None, A4)})
    self.assertRegex(dynamic, 'reduce_(max|min)')

  def test_behind_a_rotation(self):
    block, params = planted.block('rms', planted.SCALED)
    x = planted.inputs()
    turn = rotate.rotate(rotate.RotateConfig())
    turned = transform.chain(turn, method(rounds=0))
    made = testing.run(block, params, turned, x)
    act = taps.get_path(made[1], 'mlp/down_proj/input')
    self.assertIsNotNone(act.shift)  # The rotation is in the way.
    self.assertIsNone(taps.get_path(made[1], 'mlp/up_proj/input').shift)
    exact = testing.output(block, params, {}, x)
    x = rotate.residual_rotation(x, 0)
    error = testing.output(block, *made, x) - rotate.residual_rotation(exact, 0)
    power = jnp.sum((rotate.residual_rotation(exact, 0) - x) ** 2)
    self.assertLess(float(jnp.sum(error**2) / power), planted_error('minmax'))

  @parameterized.parameters('smooth', 'gptq')
  def test_chains(self, name):
    block, params = planted.block('rms', planted.SCALED)
    x = planted.inputs()
    ours = method(rounds=0)
    smooth = smoothquant.smoothquant(smoothquant.SmoothQuantConfig(alpha=0.5))
    e2m1 = gptq.GptqConfig(weights=QuantSpec(dtype='fp4_e2m1'))
    made = {
      'smooth': lambda: transform.chain(smooth, ours),
      'gptq': lambda: transform.chain(
        method(rounds=0, weight='none'), gptq.gptq(e2m1)
      ),
    }[name]()
    self.assertLess(
      planted.error(block, params, made, x),
      planted.error(block, params, ours, x),
    )


class OutsideTest(parameterized.TestCase):
  def test_embedding_and_head(self):
    table = jax.random.normal(jax.random.key(0), (20, 8))
    table = table * jnp.arange(1, 21)[:, None].astype(jnp.float32)
    params = {'embed': {'embedding': table}, 'head': {'kernel': table.T}}
    made = method(embed_bits=4).outside(params)
    y = made['embed']['embedding']
    np.testing.assert_array_equal(made['head']['kernel'], y.T)
    self.assertTrue(all(len(np.unique(np.abs(row))) <= 8 for row in y))
    start = method(embed_bits=4, rounds=0).outside(params)
    start = start['embed']['embedding']
    error = lambda y: float(jnp.sum((y - table) ** 2))
    self.assertLess(error(y), 0.9 * error(start))
    same = method().outside(params)
    self.assertIs(same['embed']['embedding'], table)


class MessagesTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(weight_format='e3m1'), "weight_format='e3m1' at 4 bits.*'e2m1'"),
    (dict(input_format='e0m3'), "input_format='e0m3'.*must be 4"),
    (dict(input_format='fp4'), "input_format='fp4'.*'e1m2', 'e2m1', 'e3m0'"),
    (
      dict(inputs=A8, input_format='e7m0'),
      r"'e7m0' at 8 bits.*\['e1m6', 'e2m5', 'e3m4', 'e4m3', 'e5m2'\]",
    ),
    (dict(weights=QuantSpec(dtype='int2')), 'weights are int2; allowed 3 to 8'),
    (dict(inputs=QuantSpec(dtype='mxfp4')), 'inputs are mxfp4.*no block'),
    (
      dict(weights=QuantSpec(dtype='int4', symmetric=False)),
      'weights have a zero point and floats have none.*symmetric=True',
    ),
    (
      dict(weights=QuantSpec(dtype='int4', granularity='group', group_size=32)),
      'one scale per group; .*--group_size=-1',
    ),
    (dict(weight='rtn'), r"weight='rtn'; allowed \['none', 'search'\]"),
    (dict(rounds=-1), 'rounds=-1; allowed 0 or more'),
    (dict(n_grid=0), 'n_grid=0; allowed 1 or more. Use 100'),
    (dict(sample_sequences=0), 'sample_sequences=0'),
    (dict(gamma_low=1.5), 'gamma_low=1.5, gamma_high=1.2; it must be 0 <'),
    (dict(embed_bits=2), r'embed_bits=2; allowed 0 \(float\) and 3 to 8'),
  )
  def test_config(self, fields, regex):
    with self.assertRaisesRegex(ValueError, regex):
      config(**fields)

  def test_a_wrong_order(self):
    block, params = planted.block('rms')
    stage = method()
    rounded_ = qarray.quantize(blocks.kernel_of(params, 'mlp/up_proj'), W4)
    late = taps.set_path(params, 'mlp/up_proj/kernel', rounded_)
    with self.assertRaisesRegex(ValueError, 'llm_fp4: .*up_proj is int4 alr'):
      stage.apply(block, late, {}, {})
    static = linear.ActQuant(jnp.ones((1, 1)), None, A4)
    with self.assertRaisesRegex(ValueError, 'down_proj is static, taken bef'):
      stage.apply(block, params, {'mlp': {'down_proj': {'input': static}}}, {})

  def test_missing_statistics(self):
    block, params = planted.block('rms')
    with self.assertRaisesRegex(
      ValueError, 'no sample was observed at attention/q_proj/in'
    ):
      method().apply(block, params, {}, {})

  def test_a_model_without_an_embedding(self):
    with self.assertRaisesRegex(
      ValueError, r"embed_bits=4 and .*has \['patch'\].*Use embed_bits=0"
    ):
      method(embed_bits=4).outside({'patch': {}})

  def test_other_formats_refuse_it(self):
    act = linear.FpxInput(
      jnp.ones((1, 1)), jnp.ones((1, 1)), None, fpx.spec(4, 'tensor')
    )
    self.assertRegex(compressed_tensors.why_not_input(act), 'by FpxInput; comp')
    w = jnp.ones((32, 2))
    q = fpx.quantize(w, jnp.ones((1, 2)), jnp.int32(1), 4)
    self.assertRegex(compressed_tensors.why_not(q.spec), 'weights are fpx4; co')
    self.assertRegex(gguf_export.misfit(q, 'Q8_0'), 'fpx4')

  def test_not_finite(self):
    """Scales of NaN become the one sentence that names the linear."""
    block, params = planted.block('rms')
    block = block.without(('re:attention', 'down_proj'), 0)
    huge = 1e30 * blocks.kernel_of(params, 'mlp/up_proj')
    params = taps.set_path(params, 'mlp/up_proj/kernel', huge)
    stage = method(rounds=0)
    made, _ = testing.run(block, params, stage, planted.inputs())
    with self.assertRaisesRegex(
      ValueError, 'error of blocks.1.mlp.*_proj.* is not finite.*calibration da'
    ):
      checks.finite(made, 'blocks.1', stage.failure)


if __name__ == '__main__':
  absltest.main()
