"""Tests of jaxq.quant.gptq."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import blocks
from jaxq.numerics import qarray, ranges
from jaxq.numerics import spec as spec_lib
from jaxq.quant import gptq, round_to_nearest
from jaxq.quant import transform as transform_lib
from tests.quant import testing

K, N, G = 64, 8, 16
QuantSpec = spec_lib.QuantSpec
INT4 = QuantSpec(dtype='int4', granularity='channel')
INT4_GROUP = QuantSpec(dtype='int4', granularity='group', group_size=G)
SPECS = {
  'int3_group': QuantSpec(dtype='int3', granularity='group', group_size=G),
  'int4_asymmetric': QuantSpec(
    dtype='int4', granularity='group', group_size=G, symmetric=False
  ),
  'int8_tensor': QuantSpec(dtype='int8', granularity='tensor'),
  'int4_per_row': QuantSpec(dtype='int4', granularity='token'),
  'binary': QuantSpec(dtype='binary', granularity='channel'),
  'fp8_e4m3': QuantSpec(dtype='fp8_e4m3', granularity='channel'),
  'fp4_e2m1': QuantSpec(dtype='fp4_e2m1', granularity='group', group_size=G),
  'mxfp4': QuantSpec(dtype='mxfp4'),
  'nvfp4': QuantSpec(dtype='nvfp4'),
  'nf4': QuantSpec(dtype='nf4', granularity='group', group_size=G),
}

run = jax.jit(gptq.quantize, static_argnames='config')


def correlated(channels=K, samples=200, seed=0):
  """x (samples, channels) whose channels share a few factors."""
  rng = np.random.default_rng(seed)
  factors = rng.normal(size=(samples, 6)) @ rng.normal(size=(6, channels))
  x = factors + 0.5 * rng.normal(size=(samples, channels))
  return (x * rng.uniform(0.3, 3, size=channels)).astype(np.float32)


def kernel(rows=K, columns=N, seed=1):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(rows, columns)), jnp.float32)


def hessian_of(x):
  return jnp.asarray(2 * x.T @ x / len(x))


def output_error(w, q, hessian):
  error = np.asarray(w) - np.asarray(qarray.dequantize(q))
  return np.trace(error.T @ np.asarray(hessian) @ error)


def oracle(w, hessian, *, group, act_order, static_groups, damping=0.01):
  """Section 3 of the paper in float64, corrections scattered; int4 values.

  Returns:
    dequantized (K, N) and scales (K / group, N).
  """
  w, h = np.array(w, np.float64), np.array(hessian, np.float64)
  rows = len(w)

  def scale_of(slab):
    return np.maximum(np.abs(slab).max(0), 1e-5) / 7

  dead = np.diag(h) == 0
  h[dead, dead] = 1
  w[dead] = 0
  scales = np.stack([scale_of(w[i : i + group]) for i in range(0, rows, group)])
  order = np.arange(rows)
  if act_order:
    order = np.argsort(-np.diag(h), kind='stable')
  w, h = w[order], h[order][:, order]
  h += damping * np.mean(np.diag(h)) * np.eye(rows)
  upper = np.linalg.cholesky(np.linalg.inv(h)).T
  q = np.zeros_like(w)
  for j in range(rows):
    if not static_groups and j % group == 0:
      scales[j // group] = scale_of(w[j : j + group])
    scale = scales[order[j] // group]
    q[j] = np.clip(np.round(w[j] / scale), -8, 7) * scale
    error = (w[j] - q[j]) / upper[j, j]
    w[j + 1 :] -= np.outer(upper[j, j + 1 :], error)
  restored = np.empty_like(q)
  restored[order] = q
  return restored, scales


class ArrayTest(parameterized.TestCase):
  def test_hand_case(self):
    # absmax 7: scale 1. Row 0 leaves E = 0.4. F = 2 / 4.04, so row 1 is
    # rounded from 2.4 + 0.198 = 2.598, up, where alone it goes down.
    w = jnp.array([[1.4], [2.4], [7.0]])
    hessian = jnp.array([[4.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 4.0]])
    config = gptq.GptqConfig(weights=INT4, act_order=False)
    q = run(w, hessian, config)
    np.testing.assert_array_equal(qarray.codes(q)[:, 0], [1, 3, 7])
    # 4 * .16 + 4 * .36 - 4 * .24 = 1.12; rounding to nearest has 1.92.
    np.testing.assert_allclose(output_error(w, q, hessian), 1.12, rtol=1e-5)

  @parameterized.parameters(
    dict(weights=INT4),
    dict(weights=INT4, act_order=False),
    dict(weights=SPECS['int3_group']),
  )
  def test_trades_weight_error_for_output_error(self, **fields):
    w, hessian = kernel(), hessian_of(correlated())
    config = gptq.GptqConfig(**fields)
    q = run(w, hessian, config)
    nearest = qarray.quantize(w, config.weights)
    self.assertLess(
      output_error(w, q, hessian), 0.6 * output_error(w, nearest, hessian)
    )
    self.assertGreater(
      output_error(w, q, np.eye(K)), output_error(w, nearest, np.eye(K))
    )

  @parameterized.parameters(
    dict(group=K, act_order=False, static_groups=True),
    dict(group=K, act_order=True, static_groups=True),
    dict(group=G, act_order=False, static_groups=True),
    dict(group=G, act_order=True, static_groups=True),
    dict(group=G, act_order=False, static_groups=False),
  )
  def test_equals_the_paper_in_float64(self, group, act_order, static_groups):
    x = correlated()
    x[:, 5] = 0  # A dead channel.
    w, hessian = kernel(), hessian_of(x)
    config = gptq.GptqConfig(
      weights=QuantSpec(dtype='int4', granularity='group', group_size=group),
      act_order=act_order,
      static_groups=static_groups,
      block_size=16,
    )
    q = run(w, hessian, config)
    expected, scales = oracle(
      w, hessian, group=group, act_order=act_order, static_groups=static_groups
    )
    # Half a step would be a different code; these differ by float32 rounding.
    np.testing.assert_allclose(q.scale, scales, rtol=1e-4)
    np.testing.assert_allclose(qarray.dequantize(q), expected, atol=1e-3)

  @parameterized.named_parameters(*SPECS.items())
  def test_uncorrelated_inputs_make_it_round_to_nearest(self, weights):
    w = kernel()
    q = run(w, jnp.eye(K), gptq.GptqConfig(weights=weights))
    qarray.validate(q)
    expected = qarray.quantize(w, weights)
    jax.tree.map(np.testing.assert_array_equal, q, expected)

  def test_searched_ranges_are_those_of_round_to_nearest(self):
    search = ranges.RangeSearch(grid=10)
    config = gptq.GptqConfig(weights=INT4_GROUP, search=search)
    expected = qarray.quantize(kernel(), INT4_GROUP, search=search)
    q = run(kernel(), hessian_of(correlated()), config)
    np.testing.assert_array_equal(q.scale, expected.scale)
    q = run(kernel(), jnp.eye(K), config)
    np.testing.assert_array_equal(q.qvalue, expected.qvalue)

  @parameterized.parameters(SPECS['int4_asymmetric'], SPECS['nvfp4'])
  def test_updated_scales_without_correlation_are_the_static_ones(self, spec):
    config = gptq.GptqConfig(weights=spec, act_order=False, static_groups=False)
    q = run(kernel(), jnp.eye(K), config)
    expected = qarray.quantize(kernel(), spec)
    jax.tree.map(np.testing.assert_array_equal, q, expected)

  @parameterized.parameters('fp8_e4m3', 'mxfp4', 'nvfp4', 'int4_asymmetric')
  def test_every_format_gains(self, name):
    w, hessian = kernel(), hessian_of(correlated())
    q = run(w, hessian, gptq.GptqConfig(weights=SPECS[name]))
    nearest = qarray.quantize(w, SPECS[name])
    self.assertLess(
      output_error(w, q, hessian), 0.8 * output_error(w, nearest, hessian)
    )

  @parameterized.parameters(7, 20)
  def test_block_size_changes_nothing(self, block_size):
    # Neither divides K = 64.
    w, hessian = kernel(), hessian_of(correlated())
    q = run(w, hessian, gptq.GptqConfig(weights=INT4, block_size=block_size))
    expected = run(w, hessian, gptq.GptqConfig(weights=INT4))
    np.testing.assert_array_equal(q.qvalue, expected.qvalue)

  def test_dead_channels_become_zero(self):
    x = correlated()
    x[:, [0, 17]] = 0
    config = gptq.GptqConfig(weights=SPECS['int4_asymmetric'])
    w = qarray.dequantize(run(kernel(), hessian_of(x), config))
    np.testing.assert_array_equal(w[jnp.array([0, 17])], np.zeros((2, N)))
    self.assertTrue(np.all(np.isfinite(w)))

  def test_singular_hessian_is_retried(self):
    # Eigenvalues 2.5 and -0.5, mean of the diagonal 1: damping 0.01 and 0.1
    # fail, 1 does.
    hessian = jnp.array([[1.0, 1.5], [1.5, 1.0]])
    config = gptq.GptqConfig(weights=INT4)
    self.assertAlmostEqual(
      float(gptq.feedback(hessian, config).damping), 1.0, places=5
    )
    q = run(kernel(2), hessian, config)
    self.assertTrue(np.all(np.isfinite(q.scale)))

  def test_rank_deficient_hessian_is_usable(self):
    x = correlated(samples=4)  # 4 tokens for 64 channels.
    config = gptq.GptqConfig(weights=INT4, damping=1e-9, max_retries=8)
    q = run(kernel(), hessian_of(x), config)
    self.assertTrue(np.all(np.isfinite(qarray.dequantize(q))))

  @parameterized.parameters(
    dict(hessian=[[1.0, 1.5], [1.5, 1.0]], max_retries=1),
    dict(hessian=[[1.0, np.nan], [np.nan, 1.0]], max_retries=5),
    dict(hessian=[[1.0, 0.0], [0.0, np.inf]], max_retries=5),
  )
  def test_hopeless_hessian_gives_nan_scales(self, hessian, max_retries):
    config = gptq.GptqConfig(weights=INT4, max_retries=max_retries)
    q = run(kernel(2), jnp.array(hessian), config)
    self.assertTrue(np.all(np.isnan(q.scale)))

  def test_failure_names_layer_and_dampings(self):
    config = gptq.GptqConfig(weights=INT4, max_retries=2)
    self.assertRegex(
      gptq.failure('blocks.3.mlp.down_proj', config),
      'blocks.3.mlp.down_proj is not positive definite.* 0.01 to 1; .*finite',
    )

  def test_jit_is_eager(self):
    w, hessian = kernel(), hessian_of(correlated())
    config = gptq.GptqConfig(weights=INT4_GROUP)
    jax.tree.map(
      np.testing.assert_array_equal,
      run(w, hessian, config),
      gptq.quantize(w, hessian, config),
    )

  def test_columns_are_independent(self):
    # So q, k and v may be rounded one by one, or sharded over N.
    w, hessian = kernel(columns=16), hessian_of(correlated())
    config = gptq.GptqConfig(weights=INT4)
    whole = qarray.codes(run(w, hessian, config))
    parts = [
      qarray.codes(run(part, hessian, config)) for part in jnp.split(w, 2, 1)
    ]
    np.testing.assert_array_equal(whole, jnp.concatenate(parts, axis=1))

  def test_accepts_bfloat16(self):
    q = run(
      kernel().astype(jnp.bfloat16),
      hessian_of(correlated()),
      gptq.GptqConfig(weights=INT4),
    )
    self.assertEqual(q.scale.dtype, jnp.float32)


class MessagesTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(damping=0.0), 'damping=0.0; it must be above 0.*0.01'),
    (dict(max_retries=-1), 'max_retries=-1; allowed 0 or more'),
    (dict(block_size=0), 'block_size=0; allowed 1 or more.*128'),
    (dict(num_taps=0), 'num_taps=0; allowed 1 or more'),
    (
      dict(weights=INT4_GROUP, static_groups=False),
      'act_order=True .*static_groups=False.*Set static_groups=True',
    ),
  )
  def test_config(self, fields, regex):
    with self.assertRaisesRegex(ValueError, regex):
      gptq.GptqConfig(**{'weights': INT4, **fields})

  def test_shapes(self):
    config = gptq.GptqConfig(weights=INT4)
    with self.assertRaisesRegex(ValueError, r'shape \(4, 3\).*\(K, K\)'):
      gptq.feedback(jnp.zeros((4, 3)), config)
    with self.assertRaisesRegex(ValueError, r'w has shape \(5, 2\).*own input'):
      run(jnp.zeros((5, 2)), jnp.eye(4), config)
    config = gptq.GptqConfig(weights=INT4_GROUP)
    with self.assertRaisesRegex(ValueError, 'K=40, group_size=16'):
      run(jnp.zeros((40, 2)), jnp.eye(40), config)


class TransformTest(parameterized.TestCase):
  def test_block_output_is_closer_than_round_to_nearest(self):
    block, params = testing.small_block()
    block = block.without(('re:attention',), 0)  # Half the compile time.
    x = testing.inputs()
    weights = QuantSpec(dtype='int3', granularity='channel')
    expected = testing.output(block, params, {}, x)

    def error(transform):
      quantized, quant = testing.run(block, params, transform, x)
      self.assertEqual(quant, {})
      for lin in block.linears:
        kernel_leaf = blocks.kernel_of(quantized, lin.path)
        self.assertIsInstance(kernel_leaf, qarray.QArray)
      return jnp.mean((testing.output(block, quantized, {}, x) - expected) ** 2)

    nearest = error(
      round_to_nearest.round_to_nearest(
        round_to_nearest.RoundToNearestConfig(weights=weights)
      )
    )
    plain = error(gptq.gptq(gptq.GptqConfig(weights=weights)))
    sequential = error(
      gptq.gptq(gptq.GptqConfig(weights=weights, true_sequential=True))
    )
    self.assertLess(plain, 0.6 * nearest)
    self.assertLess(sequential, 0.6 * nearest)

  def test_observes_each_distinct_tap_once(self):
    block, _ = testing.small_block()
    requests = gptq.gptq(gptq.GptqConfig(weights=INT4)).observe(block)
    self.assertEqual(
      list(requests),
      [
        'attention/q_proj/in',
        'attention/o_proj/in',
        'mlp/gate_proj/in',
        'mlp/down_proj/in',
      ],
    )

  def test_true_sequential_is_a_stage_per_tap(self):
    block, _ = testing.small_block()
    config = gptq.GptqConfig(weights=INT4, true_sequential=True)
    stages = transform_lib.stages(gptq.gptq(config))
    self.assertEqual(
      [list(stage.observe(block)) for stage in stages],
      [
        [tap] for tap in gptq.gptq(gptq.GptqConfig(weights=INT4)).observe(block)
      ],
    )
    # An ignored linear leaves the last stage without work.
    fewer = block.without(('down_proj',), 0)
    self.assertEqual(stages[3].observe(fewer), {})

  def test_too_few_stages_names_the_number(self):
    block, _ = testing.small_block()
    config = gptq.GptqConfig(weights=INT4, true_sequential=True, num_taps=3)
    with self.assertRaisesRegex(ValueError, 'num_taps=3.*4 distinct.*=4'):
      gptq.gptq(config).observe(block)

  def test_ignored_linears_stay_float_and_a_second_method_is_refused(self):
    block, params = testing.small_block()
    x = testing.inputs()
    kept = block.without(('re:mlp', 're:[kvo]_proj'), 0)
    transform = gptq.gptq(gptq.GptqConfig(weights=INT4))
    quantized, _ = testing.run(kept, params, transform, x)
    self.assertEqual(
      [
        lin.path
        for lin in block.linears
        if isinstance(blocks.kernel_of(quantized, lin.path), qarray.QArray)
      ],
      ['attention/q_proj'],
    )
    with self.assertRaisesRegex(ValueError, 'gptq: .*q_proj is int4 already'):
      testing.run(kept, quantized, transform, x)


if __name__ == '__main__':
  absltest.main()
