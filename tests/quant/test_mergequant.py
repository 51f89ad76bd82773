"""Tests of jaxq.quant.mergequant."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import blocks, linear, matmul, taps
from jaxq.numerics import qarray, ranges
from jaxq.numerics import spec as spec_lib
from jaxq.quant import (
  activations,
  gptq,
  mergequant,
  outliertune,
  rotate,
  round_to_nearest,
  transform,
)
from tests.quant import planted, testing

QuantSpec = spec_lib.QuantSpec
W4 = QuantSpec(dtype='int4')
W8 = QuantSpec(dtype='int8')
A4 = QuantSpec(dtype='int4', granularity='token')
A8 = QuantSpec(dtype='int8', granularity='token')
QMAX = 7
GROWN = 80  # K' of C = 64.
# Rows that read an outlier keep a seventh of its size: s W has them 7 times
# the others, x 50 times.
PLANT = planted.SCALED


def config(weights=W4, inputs=A4, **fields):
  fields = {'multiple': 16, 'max_share': 0.05, **fields}
  return mergequant.MergeQuantConfig(weights=weights, inputs=inputs, **fields)


def method(**fields):
  return mergequant.mergequant(config(**fields))


@functools.cache
def inputs():
  return planted.inputs(PLANT, batch=8)


@functools.cache
def made(kind='rms', **fields):
  """The planted block, its float params, and (params, quant) of the method."""
  block, params = planted.block(kind, PLANT)
  return block, params, testing.run(block, params, method(**fields), inputs())


@functools.cache
def error(kind='rms', **fields):
  """Relative squared error of what the block adds."""
  return error_of(*made(kind, **fields))


def error_of(block, params, result):
  x = inputs()
  exact = testing.output(block, params, {}, x)
  y = testing.output(block, *result, x)
  return float(jnp.mean((y - exact) ** 2) / jnp.mean((exact - x) ** 2))


def run(chain, kind='rms'):
  block, params = planted.block(kind, PLANT)
  return block, params, testing.run(block, params, chain, inputs())


def rounding(mode):
  """Round to nearest, inputs static per tensor or dynamic per token."""
  spec = QuantSpec(
    dtype='int4', granularity='tensor' if mode == 'static' else 'token'
  )
  return transform.chain(
    round_to_nearest.round_to_nearest(
      round_to_nearest.RoundToNearestConfig(
        weights=W4, search=ranges.RangeSearch()
      )
    ),
    activations.activations(
      activations.ActivationsConfig(inputs=spec, mode=mode)
    ),
  )


def tapped(block, result, path):
  params, quant = result
  found = block.tapped({'params': params, 'quant': quant}, inputs())
  return taps.get_path(found, f'{path}/in')


class ExactTest(parameterized.TestCase):
  def test_codes_are_integers_that_sum_to_the_channel(self):
    block, params, result = made()
    quant = result[1]
    for norm, consumers in block.norms:
      split = taps.get_path(quant, f'{consumers[0]}/split')
      codes = np.asarray(tapped(block, result, consumers[0]))
      self.assertEqual(codes.shape[-1], GROWN)
      np.testing.assert_array_equal(codes, np.round(codes))
      self.assertLessEqual(np.abs(codes).max(), QMAX)
      self.assertIsInstance(
        taps.get_path(quant, f'{consumers[0]}/input'), linear.StepInput
      )
      # Both outliers are split, 12 or 13 fold for 50 times the median ..
      src = np.asarray(split.src)
      self.assertEqual(set(src) - {planted.C}, set(PLANT.channels), norm)
      # .. as far as the places go; those left over hold 0 and weigh nothing.
      empty = planted.C + np.flatnonzero(src == planted.C)
      self.assertTrue(np.all(codes[..., empty] == 0))
      w = qarray.dequantize(blocks.kernel_of(result[0], consumers[0]))
      self.assertTrue(bool(jnp.all(w[empty] == 0)))
    self.assertEqual(params['input_norm']['scale'].shape, (planted.C,))

  @parameterized.parameters('mlp/up_proj', 'attention/q_proj')
  def test_integers_equal_floats_to_the_bit(self, path):
    block, _, result = made()
    codes = tapped(block, result, path)
    w = blocks.kernel_of(result[0], path)
    act = taps.get_path(result[1], f'{path}/input')

    def multiply(implementation):
      return jax.jit(
        lambda x: matmul.matmul(x, w, act, implementation=implementation)
      )(codes)

    np.testing.assert_array_equal(multiply('integer'), multiply('float'))
    np.testing.assert_allclose(
      multiply('integer'), codes @ qarray.dequantize(w), rtol=1e-4, atol=1e-3
    )

  def test_without_its_own_parts_it_is_outliertune(self):
    """Identical codes and rows: the authors' earlier code is the reference."""
    _, _, ours = run(
      method(
        clip='none',
        skip_tokens=0,
        reconstruct=False,
        rest='dynamic',
        weight='none',
      )
    )
    narrow = dataclasses.replace(A4, narrow=True)  # -7 .. 7, as here.
    theirs_config = outliertune.OutlierTuneConfig(
      weights=W4, inputs=narrow, symmetrize='never', weight='none', bmm=()
    )
    block, _, theirs = run(outliertune.outliertune(theirs_config))
    jax.tree.map(np.testing.assert_array_equal, ours[0], theirs[0])
    for _, consumers in block.norms:
      codes = [
        taps.get_path(r[1], f'{consumers[0]}/input').codes(
          tapped(block, r, consumers[0])
        )
        for r in (ours, theirs)
      ]
      np.testing.assert_array_equal(*codes)
    for lin in block.linears:
      a, b = (taps.get_path(r[1], f'{lin.path}/input') for r in (ours, theirs))
      self.assertEqual(type(a), type(b))

  def test_at_eight_bits_it_is_near_float(self):
    block, params, result = run(method(weights=W8, inputs=A8, weight='rtn'))
    self.assertLess(error_of(block, params, result), 2e-3)

  def test_nothing_runs_on_the_activations_but_rounding(self):
    """No reduction, no product, no quotient at a migrated site."""
    block, _, (params, quant) = made()
    path = 'mlp/up_proj'
    leaves, marks = taps.get_path(params, path), taps.get_path(quant, path)
    layer = linear.QuantDense(planted.F)

    def primitives(marks, kernel, implementation=None):
      layer_ = layer.clone(implementation=implementation)
      variables = {'params': {'kernel': kernel}, 'quant': marks}
      jaxpr = jax.make_jaxpr(lambda x: layer_.apply(variables, x))(inputs())
      return _on_activations(jaxpr.jaxpr, {planted.C, GROWN})

    harmless = {
      'add',
      'clamp',
      'concatenate',
      'convert_element_type',
      'dot_general',
      'gather',
      'lt',
      'max',
      'min',
      'reshape',
      'round',
      'select_n',
      'slice',
    }
    for implementation in ('float', 'integer'):
      used = primitives(marks, leaves['kernel'], implementation)
      self.assertLessEqual(used, harmless)
      self.assertLessEqual({'round', 'gather', 'dot_general'}, used)
    # The control: an input taken per token is reduced and divided.
    dynamic = {'input': linear.ActQuant(None, None, A4)}
    used = primitives(dynamic, jnp.ones((planted.C, 8)))
    self.assertIn('div', used)
    self.assertTrue({'reduce_max', 'reduce_min'} & used)


class GainTest(parameterized.TestCase):
  def test_splitting_gains(self):
    self.assertLess(error(clip='none'), 0.5 * error_unsplit())

  def test_ablation_full_unclipped_unsplit(self):
    self.assertLess(error(), 0.95 * error(clip='none'))
    self.assertLess(error(clip='none'), 0.5 * error_unsplit())

  def test_clipping_gains_on_heavy_tails(self):
    """Beside split channels as well, whose own range it leaves alone."""
    block, params = planted.block('rms', PLANT)
    block = block.without(('re:attention',), 0)  # Half the compilation.
    x = jax.random.t(jax.random.key(1), 2.5, (8, 48, planted.C))
    clipped, whole = (
      planted.error(block, params, method(clip=clip), x)
      for clip in ('adaptive', 'none')
    )
    self.assertLess(clipped, 0.8 * whole)

  def test_w4a4_order_mergequant_outliertune_static(self):
    theirs = outliertune.OutlierTuneConfig(
      weights=W4, inputs=A4, symmetrize='never', weight='gptq', bmm=()
    )
    tuned = error_of(*run(outliertune.outliertune(theirs)))
    static = error_of(*run(rounding('static')))
    self.assertLess(error(), 0.6 * tuned)
    self.assertLess(tuned, 0.8 * static)

  def test_near_inputs_taken_per_token(self):
    """At the same bits, with the same rest: within 15 %, and here far below."""
    _, turn = (
      planted.block('rms'),
      transform.Transform(name='rest', apply=mergequant._rotate_rest),
    )
    dynamic = error_of(*run(transform.chain(turn, rounding('dynamic'))))
    self.assertLess(error(), 1.15 * dynamic)

  def test_rotating_the_rest_gains(self):
    """One large hidden channel, rounded per token before down."""
    block, params = planted.large_hidden_channel()
    block = block.without(('re:attention', 're:gate|up'), 0)
    rotated, plain = (
      planted.error(
        block, params, method(weights=W8, weight='rtn', rest=rest), inputs()
      )
      for rest in ('dynamic_hadamard', 'dynamic')
    )
    self.assertLess(rotated, 0.3 * plain)

  def test_constant_width_lies_between(self):
    obs = error(clip='none', width='constant')
    self.assertLess(obs, error_unsplit())
    self.assertGreater(obs, error(clip='none'))
    block, _, result = made(clip='none', width='constant')
    w = blocks.kernel_of(result[0], 'mlp/up_proj')
    self.assertEqual(w.shape, (planted.C, planted.F))
    split = taps.get_path(result[1], 'mlp/up_proj/split')
    self.assertEqual(split.kept, 0)
    self.assertEqual(tapped(block, result, 'mlp/up_proj').shape[-1], planted.C)

  def test_kept_terms_gain(self):
    self.assertLess(
      error(clip='none', rank=8, compensate='keep', sample_sequences=2),
      0.97 * error(clip='none'),
    )


def error_unsplit():
  return error(clip='none', reconstruct=False)


class ContractTest(parameterized.TestCase):
  def test_what_each_linear_gets(self):
    block, _, (params, quant) = made()
    for lin in block.linears:
      marks = taps.get_path(quant, lin.path)
      name = lin.path.rpartition('/')[2]
      if name in ('o_proj', 'down_proj'):
        self.assertEqual(set(marks), {'hadamard', 'input'})
        self.assertEqual(marks['input'], linear.ActQuant(None, None, A4))
      else:
        self.assertEqual(set(marks), {'split', 'input'})
      self.assertIsInstance(blocks.kernel_of(params, lin.path), qarray.QArray)
    self.assertEqual(set(quant), {'attention', 'mlp'})

  def test_a_static_rest_takes_steps_from_v_and_up(self):
    block, params, result = made(rest='static', weight='rtn')
    for lin in block.linears:
      act = taps.get_path(result[1], f'{lin.path}/input')
      self.assertIsInstance(act, linear.StepInput)
    self.assertLess(error_of(block, params, result), 0.5)

  def test_a_rotated_model_keeps_its_rotation(self):
    chain = transform.chain(
      rotate.rotate(rotate.RotateConfig()), method(weight='none')
    )
    block, _ = planted.block('rms', PLANT)
    _, params, result = run(chain)
    self.assertIsInstance(
      taps.get_path(result[1], 'mlp/down_proj/hadamard'), linear.OnlineHadamard
    )
    # The block works on a rotated stream: x Q -> (x + f(x)) Q.
    x = inputs()
    turned = rotate.residual_rotation(x, 0)
    y = testing.output(block, *result, turned) - turned
    exact = rotate.residual_rotation(
      testing.output(block, params, {}, x) - x, 0
    )
    # Int4 inputs, float weights.
    self.assertLess(
      float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact)), 0.4
    )

  def test_a_method_may_follow(self):
    solver = gptq.GptqConfig(weights=W4, search=ranges.RangeSearch(kind='mse'))
    chained = run(transform.chain(method(weight='none'), gptq.gptq(solver)))
    # Its Hessian is of the integers too: they pass the tap.
    for path in ('attention/q_proj', 'mlp/down_proj'):
      a, b = (
        qarray.codes(blocks.kernel_of(r[2][0], path)) for r in (chained, made())
      )
      self.assertLess(float(jnp.mean((a != b).astype(jnp.float32))), 1e-2)

  def test_an_ignored_reader_stays_float(self):
    block, params = planted.block('rms', PLANT)
    fewer = block.without(('k_proj',), 0)
    result = testing.run(fewer, params, method(weight='none'), inputs())
    self.assertIsNone(taps.get_path(result[1], 'attention/k_proj'))
    k = blocks.kernel_of(result[0], 'attention/k_proj')
    self.assertEqual(k.shape[0], planted.C)
    self.assertLess(error_of(block, params, result), 0.2)

  def test_defaults(self):
    found = mergequant.MergeQuantConfig(weights=W4, inputs=A4)
    self.assertEqual(
      (found.clip, found.rest, found.weight, found.rank, found.compensate),
      ('adaptive', 'dynamic_hadamard', 'gptq', 0, 'merge'),
    )
    self.assertEqual(
      (found.theta, found.max_share, found.split, found.width, found.multiple),
      (4.0, 0.02, 'hermite', 'grow', 128),
    )
    self.assertEqual((found.skip_tokens, found.steps.qmin), (1, -7))
    self.assertEqual((found.solver.damping, found.solver.act_order), (0.01, 1))
    self.assertEqual(found.search.norm, 2.4)


class MessagesTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(rest='float'), r"rest='float'; allowed \['dynamic', 'dynamic_had"),
    (dict(weight='awq'), r"weight='awq'; allowed \['gptq', 'none', 'rtn'\]"),
    (dict(clip='mse'), r"clip='mse'; allowed \['adaptive', 'none'\]"),
    (dict(theta=0.1), 'theta=0.1; allowed 1.0 to'),
    (dict(rank=-4), 'rank=-4; allowed 0 to'),
    (dict(rank=4, weight='none'), "rank=4 with weight='none'; there is no"),
    (
      dict(inputs=QuantSpec(dtype='int3', granularity='token')),
      'inputs are int3.*allowed symmetric int4..int8',
    ),
    (
      dict(inputs=QuantSpec(dtype='fp8_e4m3', granularity='token')),
      'inputs are fp8_e4m3',
    ),
    (
      dict(weights=QuantSpec(dtype='int4', granularity='group', group_size=32)),
      'weights are int4 per group; allowed int2..int8 per channel',
    ),
  )
  def test_config(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      config(**fields)

  def test_a_width_above_the_largest(self):
    block, params = planted.block('layer')
    with self.assertRaisesRegex(
      ValueError, "K=64 .* to K'=128.*max_growth=1.5"
    ):
      testing.run(
        block, params, method(multiple=128, clip='none'), planted.inputs()
      )

  def test_too_few_tokens_for_a_hessian(self):
    block, params = planted.block('layer')
    x = planted.inputs(batch=1)
    # What rounds, and what makes up for channels that go.
    for stage in transform.stages(method(width='constant'))[-2:]:
      stats = testing.observe(block, params, {}, stage, x)
      with self.assertRaisesRegex(
        ValueError,
        'Hessian at blocks.0/.* is of 24 calibration tokens; K=.* as many',
      ):
        stage.check('blocks.0', stats)
      stage.check('blocks.0', {})

  def test_a_rank_larger_than_the_layer(self):
    block, params = planted.block('layer')
    stage = transform.stages(method(rank=100, sample_sequences=1))[-1]
    x = planted.inputs(batch=1)
    stats = testing.observe(block, params, {}, stage, x)
    with self.assertRaisesRegex(ValueError, 'rank=100 is larger than a layer'):
      jax.eval_shape(lambda s: stage.apply(block, params, {}, s), stats)


def _on_activations(jaxpr, widths):
  """Primitives that read an array (B, .., width) or (tokens, width)."""
  used = set()
  for equation in jaxpr.eqns:
    inner = [
      getattr(p, 'jaxpr', p)
      for p in jax.tree.leaves(
        list(equation.params.values()),
        is_leaf=lambda p: hasattr(p, 'eqns') or hasattr(p, 'jaxpr'),
      )
      if hasattr(p, 'eqns') or hasattr(p, 'jaxpr')
    ]
    if inner:
      for sub in inner:
        used |= _on_activations(sub, widths)
      continue
    for v in equation.invars:
      shape = getattr(getattr(v, 'aval', None), 'shape', ())
      # Kernels have their width first.
      if len(shape) >= 2 and shape[-1] in widths:
        used.add(equation.primitive.name)
  return used


if __name__ == '__main__':
  absltest.main()
