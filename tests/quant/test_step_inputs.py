"""Inputs in steps (OutlierTune, MergeQuant): what a block no longer does.

The point of both papers is the absence of work at run time, which is counted
here over whole blocks; test_outliertune and test_mergequant look at one linear.
OutlierTune's equations are written out again, in float64 and by loops.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import blocks, linear, taps
from jaxq.numerics import qarray
from jaxq.quant import outliertune, transform
from tests.quant import planted, test_mergequant, test_outliertune, testing

# What takes a range of an input, and what applies its scale to it.
REDUCTIONS = ('argmax', 'argmin', 'reduce_max', 'reduce_min', 'reduce_sum')
METHODS = {
  'outliertune': lambda: test_outliertune.method(
    symmetrize='always', allow_new_bias=True, bmm=()
  ),
  'mergequant': lambda: test_mergequant.method(rest='dynamic'),
  'mergequant, all static': lambda: test_mergequant.method(rest='static'),
}


def counted(block, params, quant, x):
  """How often each primitive runs in a block."""

  def run(params, quant, x):
    return block.apply({'params': params, 'quant': quant}, x)

  jaxpr = jax.make_jaxpr(run)(params, quant, x)
  return collections.Counter(testing.primitives(jaxpr.jaxpr))


def with_inputs(paths, act):
  """`quant` of a float block whose linears at `paths` quantize their inputs."""
  quant = {}
  for path in paths:
    quant = taps.set_path(quant, f'{path}/input', act)
  return quant


class BlockTest(parameterized.TestCase):
  @parameterized.product(method=sorted(METHODS), kind=('layer', 'rms'))
  def test_migrated_sites_add_no_reduction_and_no_quotient(self, method, kind):
    """The block takes the ranges that its other linears take, and no more."""
    block, params = planted.block(kind, planted.SCALED)
    x = jax.ShapeDtypeStruct((2, 24, planted.C), jnp.float32)

    def make(params, x):
      return testing.run(block, params, METHODS[method](), x)

    # Shapes are enough: nothing is computed.
    made, quant = jax.eval_shape(
      make, params, jax.ShapeDtypeStruct((8, 24, planted.C), jnp.float32)
    )
    acts = {
      lin.path: taps.get_path(quant, f'{lin.path}/input')
      for lin in block.linears
    }
    dynamic = [p for p, a in acts.items() if isinstance(a, linear.ActQuant)]
    in_steps = [p for p, a in acts.items() if isinstance(a, linear.StepInput)]
    fed = [path for _, consumers in block.norms for path in consumers]
    self.assertContainsSubset(fed, in_steps)
    self.assertLen(acts, len(dynamic) + len(in_steps))
    ours = counted(block, made, quant, x)
    token = linear.ActQuant(None, None, test_outliertune.A6)
    others = with_inputs(dynamic, token)
    bare = counted(block, params, others, x)
    for name in (*REDUCTIONS, 'div', 'rsqrt', 'log', 'exp'):
      self.assertEqual(ours[name], bare[name], name)
    # The control: the same inputs taken per token are reduced and divided.
    every = with_inputs(acts, token)
    control = counted(block, params, every, x)
    self.assertGreater(control['div'], ours['div'])
    ranges = control['reduce_max'] + control['reduce_min']
    self.assertGreater(ranges, ours['reduce_max'] + ours['reduce_min'])


class OutlierTuneTest(parameterized.TestCase):
  def test_a_site_agrees_with_loops_in_numpy(self):
    """z, s, W', its codes and y, as the authors' code computes them."""
    block, params = planted.block('layer', planted.SHIFTED)
    x = planted.inputs()
    seen = np.asarray(
      test_outliertune.norm_inputs(block, params, x)['post_norm'], np.float64
    )  # (texts, tokens, K)
    w = np.asarray(blocks.kernel_of(params, 'mlp/fc1'), np.float64)
    bias = np.asarray(params['mlp']['fc1']['bias'], np.float64)
    z = np.mean([(t.max(0) + t.min(0)) / 2 for t in seen], axis=0)
    s = np.abs(seen - z).max((0, 1)) / 31
    folded = s[:, None] * w
    codes = np.zeros(w.shape)
    scale, zero = np.zeros(w.shape[1]), np.zeros(w.shape[1])
    for n, column in enumerate(folded.T):
      low, high = min(column.min(), 0), max(column.max(), 0)
      scale[n] = (high - low) / 63
      zero[n] = round(-low / scale[n])
      codes[:, n] = np.clip(np.round(column / scale[n]) + zero[n], 0, 63)
    q = np.clip(np.round((seen - z) / s), -32, 31)
    # The zero point is a correction by the token's sum of codes.
    y = (q @ codes - q.sum(-1, keepdims=True) * zero) * scale + bias + z @ w

    how = test_outliertune.method(weights=test_outliertune.W6_ASYM, bmm=())
    made, quant = testing.run(block, params, how, x)
    norm = made['post_norm']
    np.testing.assert_allclose(
      params['post_norm']['scale'] / norm['scale'], s, rtol=1e-4
    )
    np.testing.assert_allclose(
      norm['bias'] * s, params['post_norm']['bias'] - z, atol=1e-4
    )
    kernel = blocks.kernel_of(made, 'mlp/fc1')
    np.testing.assert_allclose(kernel.scale[0], scale, rtol=1e-4)
    found = np.asarray(qarray.codes(kernel)).astype(int)
    self.assertLess(np.mean(found != codes), 2e-3)  # Ties.
    layer = linear.QuantDense(planted.F)
    variables = {
      'params': made['mlp']['fc1'],
      'quant': {'input': taps.get_path(quant, 'mlp/fc1/input')},
    }
    steps = jnp.asarray((seen - z) / s, jnp.float32)
    got = layer.apply(variables, steps)
    error = np.linalg.norm(got - y) / np.linalg.norm(y)
    self.assertLess(error, 1e-3)

  def test_how_uneven_the_steps_are_is_logged(self):
    block, params = planted.block('layer', planted.SHIFTED)
    stage = transform.stages(test_outliertune.method())[1]
    x = planted.inputs()
    # 30 and a deviation of one: as yet nothing is symmetrized.
    stats = testing.observe(block, params, {}, stage, x)
    with self.assertLogs('absl', level='INFO') as logs:
      stage.check('blocks.2', stats)
    self.assertLen(logs.output, 2)
    self.assertRegex(
      logs.output[0],
      r'step at blocks.2/attention/q_proj/in is 1\d(\.\d)? times the median',
    )

  def test_defaults_are_the_papers(self):
    found = outliertune.OutlierTuneConfig(
      weights=test_outliertune.W8, inputs=test_outliertune.A8
    )
    self.assertEqual(
      (found.symmetrize, found.scale, found.clip, found.weight),
      ('auto', 'absmax', 1.0, 'rtn'),
    )
    self.assertIsNone(found.presmooth)
    self.assertEqual(found.bmm, ('q_proj', 'k_proj', 'v_proj'))
    self.assertEqual(outliertune.SATURATION_ALARM, 1e-3)

  def test_too_few_tokens_for_a_hessian(self):
    block, params = planted.block('layer')
    stage = transform.stages(test_outliertune.method(weight='gptq'))[-1]
    x = planted.inputs(batch=1)
    stats = testing.observe(block, params, {}, stage, x)
    with self.assertRaisesRegex(
      ValueError,
      'outliertune: the Hessian at blocks.0/.* is of 24 calibration tokens; '
      "K=.* as many.*or use weight='rtn'",
    ):
      stage.check('blocks.0', stats)
    outliertune.require_tokens('blocks.0', {})


if __name__ == '__main__':
  absltest.main()
