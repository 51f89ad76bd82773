"""Tests of jaxq.quant.awq."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import blocks, linear, mlp, taps
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import awq, gptq, rotate, round_to_nearest, transform
from tests.quant import testing


def _spec(bits=3, group=8, symmetric=True):
  if group == -1:
    return spec_lib.QuantSpec(dtype=f'int{bits}', symmetric=symmetric)
  return spec_lib.QuantSpec(
    dtype=f'int{bits}',
    granularity='group',
    group_size=group,
    symmetric=symmetric,
  )


def _config(weights=None, **fields):
  weights = _spec() if weights is None else weights
  return awq.AwqConfig(weights=weights, **fields)


def _rtn(weights):
  config = round_to_nearest.RoundToNearestConfig(weights=weights)
  return round_to_nearest.round_to_nearest(config)


def _mlp_block():
  """testing.small_block with only the MLP to quantize: half the compiling."""
  block, params = testing.small_block()
  return block.without(('re:attention',), 0), params


def _run(block, params, method, x, quant=None):
  """testing.run with every stage compiled, as the driver does it."""
  stages = [
    stage._replace(apply=jax.jit(stage.apply, static_argnums=0))
    for stage in transform.stages(method)
  ]
  return testing.run(block, params, transform.chain(*stages), x, quant)


def _error(block, params, method, x):
  """Mean squared error of the block's output after `method`."""
  reference = testing.output(block, params, {}, x)
  quantized = testing.run(block, params, method, x)
  return float(
    jnp.mean((testing.output(block, *quantized, x) - reference) ** 2)
  )


class AwqTest(parameterized.TestCase):
  def test_salient_channel_by_hand(self):
    # One column, one group, 2 bits: the step is absmax = 1, so 0.4 rounds to 0
    # and costs (10 * 0.4)^2. Scaled by s0 / s1 >= 1.25 it rounds to 1 instead.
    block, site, params = _one_linear(jnp.array([[0.4], [1.0]]))
    x = jnp.array([[[10.0, 0.0], [0.0, 0.1]]])
    weights = spec_lib.QuantSpec(dtype='int2', narrow=True)
    mean_abs = jnp.mean(jnp.abs(x[0]), axis=0)  # (5, 0.05): ratio 100.
    s, losses = awq.search_scale(
      block, site, params, mean_abs, x, _config(weights, grid=4)
    )
    np.testing.assert_allclose(losses[0], 16.0 / 2, rtol=1e-5)
    # r = 1/4: s0 / s1 = sqrt(10); s W ~ (1.26, 1): both codes 1, step 0.4 s0,
    # so W = (0.4, 1.26): only 0.1 * 0.265 is left.
    step = 0.4 * np.sqrt(10)
    expected = (0.1 * (step - 1)) ** 2 / 2
    np.testing.assert_allclose(losses[1], expected, rtol=1e-4)
    np.testing.assert_allclose(s[0] / s[1], 10**0.5, rtol=1e-5)
    np.testing.assert_allclose(jnp.max(s) * jnp.min(s), 1.0, rtol=1e-5)

  def test_folds_leave_the_block_as_it_was(self):
    block, params = testing.small_block()
    x = testing.inputs()
    reference = testing.output(block, params, {}, x)
    method = awq.awq(_config(quantize=False))
    folded, quant = _run(block, params, method, x)
    np.testing.assert_allclose(
      testing.output(block, folded, quant, x),
      reference,
      atol=1e-5 * float(jnp.max(jnp.abs(reference))),
    )
    for path in ('input_norm/scale', 'mlp/up_proj/kernel'):
      moved = taps.get_path(folded, path) - taps.get_path(params, path)
      self.assertGreater(float(jnp.max(jnp.abs(moved))), 0.01)

  @parameterized.parameters((3, 8, True), (4, -1, True), (3, 8, False))
  def test_beats_rtn_on_salient_channels(self, bits, group, symmetric):
    block, params = testing.small_block()
    x = testing.inputs()
    for norm in ('input_norm', 'post_norm'):  # Few channels carry the signal.
      scale = params[norm]['scale'].at[jnp.array([3, 9])].multiply(8.0)
      params = taps.set_path(params, f'{norm}/scale', scale)
    weights = _spec(bits, group, symmetric)
    error = _error(block, params, awq.awq(_config(weights)), x)
    self.assertLess(error, 0.7 * _error(block, params, _rtn(weights), x))

  def test_losses_start_at_rtn_and_the_best_is_kept(self):
    block, params = testing.small_block()
    config = _config()
    method = awq.awq(config)
    stats = testing.observe(block, params, {}, method, testing.inputs())
    rtn, _ = _rtn(config.weights).apply(block, params, {}, {})
    for site in block.sites:
      tap = block.linear(site.consumers[0]).tap
      x = stats[tap]['sample'].x
      _, losses = awq.search_scale(
        block,
        site,
        {'params': params, 'quant': {}},
        stats[tap]['mean_abs'].mean,
        x,
        config,
      )
      rounded = params
      for path in site.consumers:
        kernel = qarray.dequantize(blocks.kernel_of(rtn, path))
        rounded = taps.set_path(rounded, f'{path}/kernel', kernel)
      outputs = [
        block.output(site, {'params': p, 'quant': {}}, x)
        for p in (rounded, params)
      ]
      loss = jnp.mean((outputs[0] - outputs[1]) ** 2)
      np.testing.assert_allclose(losses[0], loss, rtol=1e-3)
      self.assertLessEqual(float(jnp.min(losses)), float(losses[0]))
      self.assertEqual(losses.shape, (config.grid,))

  @parameterized.product(tokens=(5, 40), group=(8, -1))
  def test_clip_search_equals_loops(self, tokens, group):
    # 5 tokens: the direct product; 40: the Gram matrix.
    config = _config(_spec(3, group))
    key_w, key_x = jax.random.split(jax.random.key(0))
    kernel = jax.random.t(key_w, 3.0, (32, 6))
    x = jax.random.normal(key_x, (tokens, 32))
    got = awq.clip_kernel(kernel, x, config)
    G = 32 if group == -1 else group
    for g in range(0, 32, G):
      for n in range(6):
        w, x_g = kernel[g : g + G, n : n + 1], x[:, g : g + G]
        absmax = jnp.max(jnp.abs(w))

        def error(c, w=w, x_g=x_g):
          spec = _spec(3, -1)
          q = qarray.fake_quant(jnp.clip(w, -c, c), spec)
          return float(jnp.sum((x_g @ (q - w)) ** 2))

        bounds = [absmax * (1 - i / 20) for i in range(10)]
        best = min(bounds, key=error)
        mine = jnp.max(jnp.abs(got[g : g + G, n]))
        # By error, not by bound: two bounds may tie in exact arithmetic.
        self.assertLessEqual(error(mine), error(best) * 1.0001)
        self.assertLessEqual(error(mine), error(absmax) * 1.0001)

  def test_clip_search_does_not_see_its_chunks(self):
    kernel = jax.random.normal(jax.random.key(0), (8, 515))  # 2 x 258 padded.
    x = jax.random.normal(jax.random.key(1), (20, 8))
    got = awq.clip_kernel(kernel, x, _config())
    self.assertEqual(got.shape, kernel.shape)
    alone = awq.clip_kernel(kernel[:, -3:], x, _config())
    np.testing.assert_allclose(got[:, -3:], alone, rtol=1e-6)

  def test_queries_and_keys_are_not_clipped(self):
    block, params = testing.small_block()
    x = testing.inputs()
    clipped, _ = _run(block, params, awq.awq(_config()), x)
    method = awq.awq(_config(clip=False))
    plain, _ = _run(block, params, method, x)
    scale = lambda p, path: blocks.kernel_of(p, path).scale
    for path in ('attention/q_proj', 'attention/k_proj'):
      np.testing.assert_array_equal(scale(clipped, path), scale(plain, path))
    smaller = scale(clipped, 'mlp/up_proj') < scale(plain, 'mlp/up_proj')
    self.assertGreater(int(jnp.sum(smaller)), 0)

  def test_jit_equals_eager(self):
    block, params = _mlp_block()
    x = testing.inputs()
    method = awq.awq(_config())
    eager, _ = _run(block, params, method, x)
    jitted = params
    for stage in transform.stages(method):
      stats = testing.observe(block, jitted, {}, stage, x)
      jitted, _ = jax.jit(stage.apply, static_argnums=0)(
        block, jitted, {}, stats
      )
    self.assertEqual(jax.tree.structure(eager), jax.tree.structure(jitted))
    for lin in block.linears:
      a, b = (
        qarray.dequantize(blocks.kernel_of(p, lin.path))
        for p in (eager, jitted)
      )
      # A weight that ties between two codes may go either way.
      self.assertGreater(float(jnp.mean(jnp.abs(a - b) < 1e-4)), 0.99)

  def test_ignored_linears_stay_float_and_exact(self):
    block, params = testing.small_block()
    x = testing.inputs()
    only_v = block.without(('q_proj', 'k_proj', 're:mlp', 'o_proj'), 0)
    method = awq.awq(_config())
    self.assertEqual(set(method.observe(only_v)), {'attention/q_proj/in'})
    out, _ = _run(only_v, params, method, x)
    self.assertIsInstance(out['attention']['v_proj']['kernel'], qarray.QArray)
    np.testing.assert_array_equal(
      out['mlp']['up_proj']['kernel'], params['mlp']['up_proj']['kernel']
    )
    # The queries' kernel took what the norm's scale gave: the same product.
    before, after = (
      p['input_norm']['scale'][:, None]
      * blocks.kernel_of(p, 'attention/q_proj')
      for p in (params, out)
    )
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)

  def test_no_scale_moves_through_an_online_rotation(self):
    block, params = testing.small_block()
    x = testing.inputs()
    turn = rotate.rotate(rotate.RotateConfig())
    turned, quant = turn.apply(block, params, {}, {})
    x_turned = rotate.residual_rotation(x, 0)
    reference = testing.output(block, turned, quant, x_turned)
    method = awq.awq(_config(quantize=False))
    folded, quant = _run(block, turned, method, x_turned, quant)
    np.testing.assert_allclose(
      testing.output(block, folded, quant, x_turned),
      reference,
      atol=1e-5 * float(jnp.max(jnp.abs(reference))),
    )
    for path in ('mlp/down_proj', 'attention/o_proj'):
      np.testing.assert_array_equal(
        blocks.kernel_of(folded, path), blocks.kernel_of(turned, path)
      )

  def test_composes_with_a_method_that_rounds(self):
    block, params = _mlp_block()
    x = testing.inputs()
    weights = _spec()
    method = transform.chain(
      awq.awq(_config(weights, quantize=False)), _rtn(weights)
    )
    one = awq.awq(_config(weights, clip=False))
    a, _ = _run(block, params, method, x)
    b, _ = _run(block, params, one, x)
    jax.tree.map(np.testing.assert_array_equal, a, b)

  def test_gptq_after_the_folds_beats_gptq(self):
    block, params = _mlp_block()
    x = testing.inputs(batch=8)
    weights = _spec()
    rounding = gptq.gptq(gptq.GptqConfig(weights=weights))
    scaling = awq.awq(_config(weights, quantize=False))
    both = _error(block, params, transform.chain(scaling, rounding), x)
    self.assertLess(both, _error(block, params, rounding, x))

  def test_inputs_quantized_per_token_are_scaled_too(self):
    block, params = _mlp_block()
    x = testing.inputs()
    act = linear.ActQuant(
      None, None, spec_lib.QuantSpec(dtype='int4', granularity='token')
    )
    quant = {}
    for lin in block.linears:
      quant = taps.set_path(quant, f'{lin.path}/input', act)
    weights = _spec(8)
    reference = testing.output(block, params, {}, x)

    def error(grid):
      method = awq.awq(_config(weights, grid=grid, clip=False))
      out = _run(block, params, method, x, quant)
      return float(jnp.mean((testing.output(block, *out, x) - reference) ** 2))

    # Weights are nearly exact: what is gained, the inputs' scale gained.
    self.assertLess(error(20), 0.9 * error(1))

  def test_grid_of_one_without_clip_is_rtn(self):
    block, params = _mlp_block()
    x = testing.inputs()
    method = awq.awq(_config(grid=1, clip=False))
    out, _ = _run(block, params, method, x)
    rtn, _ = _run(block, params, _rtn(_spec()), x)
    jax.tree.map(np.testing.assert_array_equal, out, rtn)

  def test_messages(self):
    tensor = spec_lib.QuantSpec(dtype='int8', granularity='tensor')
    with self.assertRaisesRegex(ValueError, "'tensor'; allowed .'channel'"):
      awq.AwqConfig(weights=tensor)
    for name in ('grid', 'clip_grid', 'sample_sequences', 'clip_tokens'):
      with self.assertRaisesRegex(ValueError, f'{name}=0; allowed 1 or more'):
        _config(**{name: 0})
    block, params = testing.small_block()
    x = testing.inputs()
    method = awq.awq(_config())
    stats = testing.observe(block, params, {}, method, x)
    rounded, _ = _rtn(_spec()).apply(block, params, {}, {})
    with self.assertRaisesRegex(
      ValueError, 'awq: the kernel of .* is int3 already.*before the method'
    ):
      method.apply(block, rounded, {}, stats)
    act = linear.ActQuant(jnp.ones((1, 1)), None, tensor)
    static = {'mlp': {'up_proj': {'input': act}}}
    with self.assertRaisesRegex(ValueError, 'mlp/up_proj is static'):
      method.apply(block, params, static, stats)


def _one_linear(kernel):
  """A block whose only site is producer 'norm' -> consumer 'dense'."""
  site = blocks.Site(producer='norm', consumers=('dense',))
  block = blocks.BlockSpec(
    module=mlp.MLP(1),  # Not called: the site compares the linear alone.
    linears=(blocks.Linear(path='dense', tap='dense/in'),),
    sites=(site,),
  )
  params = {
    'norm': {'scale': jnp.ones(kernel.shape[0])},
    'dense': {'kernel': kernel},
  }
  return block, site, {'params': params, 'quant': {}}


if __name__ == '__main__':
  absltest.main()
