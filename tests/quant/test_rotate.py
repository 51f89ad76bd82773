"""Tests of jaxq.quant.rotate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import blocks, linear, taps
from jaxq.numerics import hadamard, qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import rotate, transform
from models import decoder
from tests.quant import testing

_INT4 = spec_lib.QuantSpec(dtype='int4', granularity='channel')
_TOKEN4 = spec_lib.QuantSpec(dtype='int4', granularity='token')


def _config(**fields):
  defaults = dict(
    vocab_size=40,
    hidden_size=24,  # 2 * 12: not a power of two.
    intermediate_size=40,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=8,
  )
  return decoder.DecoderConfig(**(defaults | fields))


def _model(config, seed=0):
  """(outside, list of block params), every leaf random, norm scales too."""
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  init = decoder.Decoder(config).init
  shapes = jax.eval_shape(init, jax.random.key(0), tokens)['params']
  rng = np.random.default_rng(seed)

  def leaf(shape):
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.float32(np.sqrt(shape[-2])) if len(shape) > 2 else x + 0.5

  params = dict(jax.tree.map(lambda a: leaf(a.shape), shapes))
  stacked = params.pop('blocks_0')
  return params, [
    jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(config.num_layers)
  ]


def _logits(config, outside, block_variables, tokens):
  config = dataclasses.replace(config, tie_embeddings='head' not in outside)
  variables, runs = decoder.stack(outside, block_variables)
  return jax.jit(decoder.Decoder(config, runs).apply)(variables, tokens)[0]


def _rotated(config, method, outside, block_params):
  """The model after `method`, in the order of the driver."""
  block = decoder.block_spec(config)
  apply = jax.jit(lambda params: method.apply(block, params, {}, {}))
  variables = []
  for params in block_params:
    params, quant = apply(params)
    variables.append({'params': params, 'quant': quant})
  return jax.jit(method.outside)(outside), variables


def _run(block, params, method, x):
  """testing.run with every stage compiled, as the driver does it."""
  stages = [
    stage._replace(apply=jax.jit(stage.apply, static_argnums=0))
    for stage in transform.stages(method)
  ]
  return testing.run(block, params, transform.chain(*stages), x)


def _relative(y, reference):
  return float(jnp.linalg.norm(y - reference) / jnp.linalg.norm(reference))


def _rtn(inputs=None):
  """Round-to-nearest of every linear, as a Transform."""

  def apply(block, params, quant, stats):
    del stats
    for lin in block.linears:
      kernel = qarray.quantize(blocks.kernel_of(params, lin.path), _INT4)
      params = taps.set_path(params, f'{lin.path}/kernel', kernel)
      if inputs is not None:
        act = linear.ActQuant(None, None, inputs)
        quant = taps.set_path(quant, f'{lin.path}/input', act)
    return params, quant

  return transform.Transform(name='rtn', apply=apply)


class RotateTest(parameterized.TestCase):
  def test_two_channels_by_hand(self):
    # H / sqrt(2) = [[1, 1], [1, -1]] / sqrt(2); signs multiply its rows.
    w = jnp.array([[3.0], [1.0]])
    s0, s1 = np.asarray(hadamard.signs(2, jax.random.key(0)))
    expected = np.array([[3 * s0 + s1], [3 * s0 - s1]]) / np.sqrt(2)
    got = rotate.residual_rotation(w, 0, axis=0)
    np.testing.assert_allclose(got, expected, rtol=1e-6)

  @parameterized.named_parameters(
    ('tied', dict(tie_embeddings=True), True),
    ('untied', dict(tie_embeddings=False), True),
    ('gqa_1', dict(num_heads=2, num_kv_heads=2), True),
    ('gqa_4', dict(num_heads=4, num_kv_heads=1), True),
    ('heads_of_9', dict(num_heads=9, num_kv_heads=3, head_dim=4), True),
    ('divisors', dict(hidden_size=18, intermediate_size=30), True),
    ('offline', dict(), False),
    ('offline_gqa_1', dict(num_heads=2, num_kv_heads=2), False),
  )
  def test_logits_stay(self, fields, online):
    config = _config(**fields)
    outside, block_params = _model(config)
    tokens = jax.random.randint(jax.random.key(5), (2, 7), 0, config.vocab_size)
    reference = _logits(
      config, outside, [{'params': p} for p in block_params], tokens
    )
    method = rotate.rotate(rotate.RotateConfig(online=online))
    rotated = _rotated(config, method, outside, block_params)
    logits = _logits(config, *rotated, tokens)
    self.assertLess(_relative(logits, reference), 1e-4)
    kernel = block_params[0]['mlp']['gate_proj']['kernel']
    turned = rotated[1][0]['params']['mlp']['gate_proj']['kernel']
    self.assertGreater(_relative(turned, kernel), 0.5)  # It did something.

  def test_online_rotations_are_where_the_block_says(self):
    block, params = testing.small_block()
    method = rotate.rotate(rotate.RotateConfig())
    params, quant = method.apply(block, params, {}, {})
    found = {path: node.size for path, node in taps.leaves(quant)}
    self.assertEqual(
      found,
      {
        'attention/o_proj/hadamard': testing.H * testing.D,
        'mlp/down_proj/hadamard': testing.F,
      },
    )
    for norm in ('input_norm', 'post_norm'):
      np.testing.assert_array_equal(params[norm]['scale'], 1.0)
    # Rotating o's input needs nothing of v: its columns are not mixed.
    ignoring = block.without(('o_proj',), 0)
    _, quant = method.apply(ignoring, testing.small_block()[1], {}, {})
    self.assertEqual(
      [path for path, _ in taps.leaves(quant)], ['mlp/down_proj/hadamard']
    )

  def test_biases_of_writers_turn(self):
    block, params = testing.small_block()
    bias = jax.random.normal(jax.random.key(1), (testing.C,))
    params = taps.set_path(params, 'mlp/down_proj/bias', bias)
    method = rotate.rotate(rotate.RotateConfig())
    turned, _ = _run(block, params, method, testing.inputs())
    np.testing.assert_allclose(
      turned['mlp']['down_proj']['bias'],
      rotate.residual_rotation(bias, 0),
      rtol=1e-6,
    )

  def test_outliers_of_the_residual_stream_flatten(self):
    config = _config(hidden_size=32)
    outside, block_params = _model(config)
    table = jnp.asarray(outside['embed']['embedding']).at[:, 5].multiply(50.0)
    outside = taps.set_path(outside, 'embed/embedding', table)
    method = rotate.rotate(rotate.RotateConfig())
    rotated, _ = _rotated(config, method, outside, block_params)

    def peak(x):
      return float(jnp.max(jnp.abs(x)) / jnp.sqrt(jnp.mean(x * x)))

    before, after = peak(table), peak(rotated['embed']['embedding'])
    self.assertGreater(before, 5.0)
    self.assertLess(after, 0.5 * before)

  def test_w4a4_output_error_falls(self):
    block, params = testing.small_block()
    x = testing.inputs()  # Channels 3 and 7 are outliers.
    reference = testing.output(block, params, {}, x) - x
    plain, quant = _run(block, params, _rtn(_TOKEN4), x)
    error = _relative(testing.output(block, plain, quant, x) - x, reference)
    method = transform.chain(
      rotate.rotate(rotate.RotateConfig()), _rtn(_TOKEN4)
    )
    turned, quant = _run(block, params, method, x)
    x_turned = rotate.residual_rotation(x, 0)
    out = testing.output(block, turned, quant, x_turned) - x_turned
    target = rotate.residual_rotation(reference, 0)
    self.assertLess(_relative(out, target), 0.8 * error)

  @parameterized.parameters(576, 1536)
  def test_rounding_stays_below_its_bound(self, C):
    w = jax.random.normal(jax.random.key(0), (C, 8)).at[3].multiply(1000.0)
    signs = np.asarray(hadamard.signs(C, jax.random.key(0)), np.float64)
    Q = signs[:, None] * hadamard.matrix(C).astype(np.float64) / np.sqrt(C)
    exact = Q.T @ np.asarray(w, np.float64)
    error = np.asarray(rotate.residual_rotation(w, 0, axis=0)) - exact
    self.assertLess(np.linalg.norm(error), 1e-6 * np.linalg.norm(exact))

  @parameterized.parameters(True, False)
  def test_jit_equals_eager(self, online):
    block, params = testing.small_block()
    method = rotate.rotate(rotate.RotateConfig(online=online))
    eager = method.apply(block, params, {}, {})
    jitted = jax.jit(lambda p: method.apply(block, p, {}, {}))(params)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), eager, jitted
    )

  def test_seed_picks_the_rotation_and_nothing_else(self):
    block, params = testing.small_block()
    kernels = []
    for seed in (0, 0, 1):
      method = rotate.rotate(rotate.RotateConfig(seed=seed))
      turned, _ = method.apply(block, params, {}, {})
      kernels.append(turned['attention']['q_proj']['kernel'])
    np.testing.assert_array_equal(kernels[0], kernels[1])
    self.assertGreater(_relative(kernels[2], kernels[0]), 0.5)

  @parameterized.parameters((24, 24), (30, 2), (7, 1), (576, 576), (96, 96))
  def test_block_size(self, n, expected):
    self.assertEqual(rotate.block_size(n), expected)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, 'seed=-1; allowed 0 or more'):
      rotate.RotateConfig(seed=-1)
    block, params = testing.small_block()
    method = rotate.rotate(rotate.RotateConfig())
    biased = taps.set_path(params, 'post_norm/bias', jnp.zeros(testing.C))
    with self.assertRaisesRegex(NotImplementedError, 'post_norm has a bias'):
      method.apply(block, biased, {}, {})
    rounded, _ = _rtn().apply(block, params, {}, {})
    with self.assertRaisesRegex(
      ValueError, 'rotate: the kernel of attention/q_proj is int4 already'
    ):
      method.apply(block, rounded, {}, {})
    turned, quant = method.apply(block, params, {}, {})
    with self.assertRaisesRegex(ValueError, 'o_proj is rotated already'):
      method.apply(block, turned, quant, {})
    act = linear.ActQuant(jnp.ones((1, 1)), None, _INT4)
    static = {'mlp': {'up_proj': {'input': act}}}
    with self.assertRaisesRegex(ValueError, 'up_proj is static.*per token'):
      method.apply(block, params, static, {})
    with self.assertRaisesRegex(
      NotImplementedError, r"\['positions'\] outside"
    ):
      method.outside({'embed': {}, 'positions': {}})


if __name__ == '__main__':
  absltest.main()
