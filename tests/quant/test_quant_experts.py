"""Tests of jaxq.quant.quant_experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.calibrate import checks, probe, steps
from jaxq.nn import blocks, linear, matmul, routed_low_rank, taps
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import (
  gptq,
  quant_experts,
  rotate,
  smoothquant,
  transform,
)
from tests.quant import planted, testing

QuantSpec = spec_lib.QuantSpec
W4 = QuantSpec(
  dtype='int4', granularity='group', group_size=16, symmetric=False
)
A6 = QuantSpec(dtype='int6', granularity='token')
A8 = QuantSpec(dtype='int8', granularity='token')
RANKS = {'shared_rank': 2, 'num_experts': 2, 'expert_rank': 4}
# One term of equal work, and one of equal size.
ACTIVE, STORED = ({'shared_rank': rank, 'num_experts': 0} for rank in (6, 10))


def config(weights=W4, **fields):
  fields = {'base': 'rtn', 'skip_tokens': 0, 'share': 0.1, **RANKS, **fields}
  return quant_experts.QuantExpertsConfig(weights=weights, **fields)


def method(**fields):
  return quant_experts.quant_experts(config(**fields))


def inputs():
  return planted.modal_inputs()[0]


def small_block():
  """A block of which two linears, on one tap, are quantized."""
  block, params = planted.block('rms')
  return block.without(('re:attention', 'down_proj'), 0), params


@functools.cache
def made(**fields):
  """small_block, and its (params, quant) after the method."""
  block, params = small_block()
  return block, params, testing.run(block, params, method(**fields), inputs())


def error_of(block, params, result, x=None):
  """Relative squared error of what the block adds."""
  x = inputs() if x is None else x
  exact = testing.output(block, params, {}, x)
  y = testing.output(block, *result, x)
  return float(jnp.mean((y - exact) ** 2) / jnp.mean((exact - x) ** 2))


@functools.cache
def error(**fields):
  return error_of(*made(**fields))


def stage_stats(stage, x, **rest):
  """What a stage's check and apply are given on the planted block."""
  block, params = small_block()
  stats = testing.observe(block, params, {}, stage, x)
  return steps.with_streams(stage, stats, [x], None, **rest)


class GainTest(parameterized.TestCase):
  def test_w4a16_routed_single_base(self):
    """At equal work far below one term, which is below rounding alone."""
    base = error(shared_rank=0, num_experts=0)
    single, ours = error(**ACTIVE), error()
    self.assertLess(ours, 0.7 * single)
    self.assertLess(single, 0.8 * base)
    # At equal size one term is no worse, in this measure, on this data.
    self.assertLess(error(**STORED), 1.05 * ours)

  @parameterized.parameters(A6, A8)
  def test_quantized_inputs(self, spec):
    base = error(inputs=spec, shared_rank=0, num_experts=0)
    single = error(inputs=spec, **ACTIVE)
    self.assertLess(error(inputs=spec), single)
    self.assertLess(single, base)
    _, _, (_, quant) = made(inputs=spec)
    act = taps.get_path(quant, 'mlp/up_proj/input')
    self.assertEqual(act, linear.ActQuant(None, None, spec))

  def test_gain_beside_massive_first_tokens(self):
    """They say nothing of channels, and leave the gain of the others."""
    block, params = small_block()
    x = inputs().at[:, 0, planted.MASSIVE_CHANNEL].set(1000.0)
    exact = testing.output(block, params, {}, x)
    errors = []
    for fields in ({}, ACTIVE):
      result = testing.run(block, params, method(skip_tokens=1, **fields), x)
      y = testing.output(block, *result, x)
      errors.append(float(jnp.mean((y - exact)[:, 1:] ** 2)))
    self.assertLess(errors[0], 0.8 * errors[1])

  def test_gain_on_text_that_it_was_not_fitted_to(self):
    fresh = planted.modal_inputs(seed=4)[0]
    errors = [error_of(*made(**fields), x=fresh) for fields in ({}, ACTIVE)]
    self.assertLess(errors[0], 0.8 * errors[1])

  @parameterized.parameters('awq', 'gptq')
  def test_other_bases(self, base):
    alone = error(base=base, shared_rank=0, num_experts=0)
    self.assertLess(error(base=base), 0.8 * alone)

  def test_gptq_alone_is_gptq(self):
    block, params = small_block()
    solver = gptq.gptq(gptq.GptqConfig(weights=W4))
    expected, _ = testing.run(block, params, solver, inputs())
    _, _, (got, quant) = made(base='gptq', shared_rank=0, num_experts=0)
    self.assertEqual(quant, {})
    np.testing.assert_array_equal(
      blocks.kernel_of(got, 'mlp/up_proj').qvalue,
      blocks.kernel_of(expected, 'mlp/up_proj').qvalue,
    )

  def test_behind_smoothquant(self):
    smooth = smoothquant.smoothquant(smoothquant.SmoothQuantConfig(alpha=0.5))
    block, params = small_block()

    def run(**fields):
      chain = transform.chain(smooth, method(inputs=A6, **fields))
      return error_of(
        block, params, testing.run(block, params, chain, inputs())
      )

    self.assertLess(run(), run(shared_rank=0, num_experts=0))

  def test_behind_rotation(self):
    """Terms read what the kernel reads: the input as it is turned."""
    turn = rotate.rotate(rotate.RotateConfig())
    block, params = small_block()
    x = inputs()
    exact = rotate.residual_rotation(
      testing.output(block, params, {}, x) - x, 0
    )
    turned = rotate.residual_rotation(x, 0)

    def run(**fields):
      chain = transform.chain(turn, method(**fields))
      result = testing.run(block, params, chain, turned)
      y = testing.output(block, *result, turned) - turned
      return float(jnp.mean((y - exact) ** 2) / jnp.mean(exact**2))

    self.assertLess(run(), run(shared_rank=0, num_experts=0))

  def test_refinement_lowers_the_error_of_the_block(self):
    fields = {'inputs': A6, 'refine_rate': 1e-3, 'dtype': 'float32'}
    plain = error(refine_epochs=0, **fields)
    self.assertLess(error(refine_epochs=2, **fields), 0.97 * plain)

  def test_refinement_that_fails_changes_nothing(self):
    fields = {'num_experts': 0, 'dtype': 'float32'}
    _, _, (_, plain) = made(**fields)
    _, _, (_, wild) = made(refine_epochs=1, refine_rate=1.0, **fields)
    jax.tree.map(np.testing.assert_array_equal, plain, wild)


class ContractTest(parameterized.TestCase):
  def test_what_each_linear_gets(self):
    block, params = planted.block('parallel')  # All of four read one norm.
    block = block.without(('o_proj', 'fc2'), 0)
    after, quant = testing.run(block, params, method(inputs=A8), inputs())
    routers = {}
    for lin in block.linears:
      marks = taps.get_path(quant, lin.path)
      self.assertEqual(set(marks), {'input', 'low_rank'})
      term = marks['low_rank']
      self.assertIsInstance(term, routed_low_rank.RoutedLowRank)
      K, N = blocks.kernel_of(params, lin.path).shape
      self.assertEqual((term.a.shape, term.b.shape), ((K, 10), (10, N)))
      self.assertEqual(term.a.dtype, jnp.bfloat16)
      self.assertIsInstance(blocks.kernel_of(after, lin.path), qarray.QArray)
      routers.setdefault(lin.tap, []).append(term.router)
    for found in routers.values():  # One for all that read a tensor.
      for router in found[1:]:
        np.testing.assert_array_equal(router, found[0])
    self.assertLess(error_of(block, params, (after, quant)), 0.05)

  def test_terms_read_the_input_before_its_rounding(self):
    _, _, (after, quant) = made(inputs=A6)
    marks = taps.get_path(quant, 'mlp/up_proj')
    kernel = blocks.kernel_of(after, 'mlp/up_proj')
    x = inputs().reshape(-1, planted.C)
    variables = {'params': {'kernel': kernel}, 'quant': marks}
    y = linear.QuantDense(planted.F).apply(variables, x)
    rounded, term = matmul.fake_input(x, marks['input']), marks['low_rank']
    base = jnp.matmul(rounded, qarray.dequantize(kernel), precision='highest')
    distance = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
    self.assertLess(distance(base + term(x), y), 1e-5)
    self.assertGreater(distance(base + term(rounded), y), 1e-4)

  def test_ignored_linears_stay_as_they_are(self):
    _, _, (after, quant) = made()
    for path in ('attention/k_proj', 'mlp/down_proj'):
      self.assertIsInstance(blocks.kernel_of(after, path), jax.Array)
      self.assertIsNone(taps.get_path(quant, path))

  def test_modalities_come_with_the_carry(self):
    """Ten tokens of one for each of the other, and still both are seen."""
    x, modality = planted.modal_inputs(length=44)
    few = jnp.arange(44) % 11 == 0
    right = few[None] == (modality == 1)
    x = jnp.where(right[..., None], x, x[:, ::-1])
    carry = {'x': x, 'modality': few.astype(jnp.int32)[None].repeat(8, 0)}
    block, params = small_block()
    fields = {'modalities': 2, 'balanced': True, 'rows': 'channels'}
    stage = method(**fields)
    self.assertTrue(stage.streams)
    stats = testing.observe(block, params, {}, stage, carry)
    stats = steps.with_streams(stage, stats, [carry], None)
    stage.check('blocks.0', stats)
    touched = {}
    for name, how in (('both', stage), ('pooled', method(rows='channels'))):
      apply = jax.jit(how.apply, static_argnums=0)
      _, quant = apply(block, params, {}, stats)
      a = taps.get_path(quant, 'mlp/up_proj/low_rank').a[:, :2]
      touched[name] = set(np.flatnonzero(jnp.any(a != 0, axis=1)))
    self.assertTrue(touched['both'] < touched['pooled'], touched)

  def test_reported_bits_count_the_terms(self):
    block, params, (after, quant) = made(dtype='int8')
    path = 'mlp/up_proj'
    kernel = blocks.kernel_of(after, path)
    marks = taps.get_path(quant, path)
    bits, w = probe.stored(kernel, marks, planted.C)
    bare, rounded = probe.stored(kernel, {}, planted.C)
    K, N = kernel.shape
    # Codes of int8, a scale of 4 bytes per column of a and row of b, a router.
    terms = 8 * 10 * (K + N) + 32 * (10 + 10) + 16 * 2 * K
    self.assertAlmostEqual(bits - bare, terms / (K * N), places=6)
    exact = blocks.kernel_of(params, path)
    shared = marks['low_rank'].product
    np.testing.assert_allclose(w, rounded + shared, atol=1e-6)
    x = inputs()
    self.assertLess(
      float(jnp.sum((x @ (w - exact)) ** 2)),
      float(jnp.sum((x @ (rounded - exact)) ** 2)),
    )

  def test_bits_of_the_paper_s_example(self):
    """K = N = 4096, 32 + 4 x 16: 0.75 bits a weight beside the routers."""
    K = N = 4096
    term = jax.eval_shape(
      lambda: routed_low_rank.RoutedLowRank(
        jnp.zeros((K, 96), jnp.bfloat16),
        jnp.zeros((96, N), jnp.bfloat16),
        jnp.zeros((K, 4), jnp.bfloat16),
        None,
        32,
      )
    )
    stored = 16 * (term.a.size + term.b.size) / (K * N)
    self.assertEqual(stored, 0.75)
    self.assertEqual(term.active, 48)
    self.assertAlmostEqual(48 * (K + N) / (K * N), 0.0234, places=4)
    self.assertLess(16 * term.router.size / (K * N), 0.02)


class MessagesTest(parameterized.TestCase):
  def test_the_values_of_the_description_are_the_defaults(self):
    c = quant_experts.QuantExpertsConfig(weights=W4)
    self.assertEqual((c.shared_rank, c.num_experts, c.expert_rank), (32, 4, 16))
    self.assertEqual((c.top_k, c.share, c.tau), (1, 0.02, 0.5))
    self.assertEqual((c.base, c.router, c.rows), ('awq', 'linear', 'all'))
    self.assertEqual(
      (c.refine_epochs, c.refine_rate, c.refine_sequences), (0, 1e-4, 128)
    )

  @parameterized.parameters(
    (dict(base='mbq'), r"base='mbq'; allowed \['awq', 'gptq', 'rtn'\]"),
    (dict(router='x'), "router='x'; allowed"),
    (dict(sample_sequences=0), 'sample_sequences=0; allowed 1 or more'),
    (dict(refine_sequences=0), 'refine_sequences=0; allowed 1 or more'),
    (dict(refine_epochs=-1), 'epochs=-1; allowed 0 to'),
    (dict(balanced=True), 'balanced=True with modalities=1; there is nothing'),
    (
      dict(inputs=QuantSpec(dtype='int8', granularity='tensor')),
      r"inputs.granularity='tensor'; allowed \['group', 'token'\]",
    ),
    (
      dict(base='awq', weights=QuantSpec(dtype='int4', granularity='tensor')),
      "AwqConfig: weights.granularity='tensor'",
    ),
  )
  def test_config(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      config(**fields)

  def test_too_few_tokens(self):
    with self.assertRaisesRegex(
      ValueError, r"is of 24 calibration tokens; K=.* or use gram='diagonal'"
    ):
      stage = method()
      stage.check('blocks.0', stage_stats(stage, inputs()[:1, :24]))
    with self.assertRaisesRegex(
      ValueError,
      'num_experts=4 for 240 calibration tokens at blocks.0; each needs 64. '
      'Lower num_experts',
    ):
      stage = method(num_experts=4, sample_sequences=8, skip_tokens=2)
      stage.check('blocks.0', stage_stats(stage, inputs()))
    stage = method(num_experts=0, gram='diagonal')
    stage.check('blocks.0', stage_stats(stage, inputs()[:1, :24]))

  def test_a_tap_with_too_few_is_told(self):
    stage = method()
    stats = dict(stage_stats(stage, inputs()))
    few = stats['mlp/gate_proj/in']['sample']
    few = few.replace(x=few.x.at[2:].set(0))
    stats['mlp/down_proj/in'] = {'sample': few}
    with self.assertLogs('absl', 'WARNING') as logs:
      stage.check('blocks.0', stats)
    self.assertRegex(
      logs.output[0], 'mlp/down_proj/in saw 64 tokens, fewer than the 128'
    )

  @parameterized.parameters(
    (None, "names none; its carry must have 'modality'"),
    (0, 'no token of .* is of modality 1; all of 2 .* balanced=False'),
    (2, 'has modality 2; allowed 0 to 1. Raise modalities'),
  )
  def test_modalities(self, value, message):
    stage = method(modalities=2, balanced=True)
    carry = {'x': inputs()}
    if value is not None:
      carry['modality'] = jnp.full((8, 32), value, jnp.int32)
    stats = stage_stats(stage, carry)
    with self.assertRaisesRegex(ValueError, message):
      stage.check('blocks.0', stats)
    if value == 0:
      with self.assertLogs('absl', 'WARNING') as logs:
        method(modalities=2).check('blocks.0', stats)
      self.assertRegex(logs.output[0], 'no token .* is of modality 1')

  def test_a_modality_of_other_tokens(self):
    stage = method(modalities=2)
    carry = {'x': inputs(), 'modality': jnp.zeros((8, 30), jnp.int32)}
    block, params = small_block()
    stats = stage_stats(stage, carry)
    with self.assertRaisesRegex(
      ValueError, 'modality of 30 tokens and 32 tokens at mlp/gate_proj/in'
    ):
      jax.eval_shape(lambda s: stage.apply(block, params, {}, s), stats)

  def test_tokens_that_make_no_clusters(self):
    """Scales of the kernel are NaN, which the driver turns into `failure`."""
    block, params = small_block()
    stage = method()
    x = jnp.broadcast_to(inputs()[:1, :1], (8, 32, planted.C))
    after, _ = testing.run(block, params, stage, x)
    scale = blocks.kernel_of(after, 'mlp/up_proj').scale
    self.assertTrue(bool(jnp.all(jnp.isnan(scale))))
    with self.assertRaisesRegex(
      ValueError,
      'blocks.0.mlp.*_proj.kernel got no terms; .* damping of 0.01 to 10, .* '
      'num_experts=2 clusters.*lower num_experts',
    ):
      checks.finite(after, 'blocks.0', stage.failure)

  def test_a_wrong_order_in_a_chain(self):
    block, params, (after, quant) = made()
    with self.assertRaisesRegex(
      ValueError, 'quant_experts: the kernel of .* is int4 already'
    ):
      testing.run(block, after, method(), inputs(), quant)
    tensor = QuantSpec(dtype='int8', granularity='tensor')
    static = linear.ActQuant(jnp.ones((1, 1)), None, tensor)
    with self.assertRaisesRegex(
      ValueError, 'quant_experts: .* input quantizer of .* is static'
    ):
      marks = {'mlp': {'up_proj': {'input': static}}}
      testing.run(block, params, method(), inputs(), marks)


if __name__ == '__main__':
  absltest.main()
