"""Tests of jaxq.nn.kernel_inputs: who is fed codes, and that they are right.

The kernels run in Pallas's interpreter, chosen as they would be on a v6e.
"""

import contextlib
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import linen as nn

from jaxq.nn import kernel_inputs, linear, mlp, moe, norms, taps
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from models import decoder
from pallas_kernels import compat, rows, targets

TOKEN = spec_lib.QuantSpec(dtype='int8', granularity='token')
STEPS = spec_lib.QuantSpec(dtype='int8', granularity='tensor')
NARROW = spec_lib.QuantSpec(dtype='int4', granularity='tensor', narrow=True)
W8 = spec_lib.QuantSpec(dtype='int8')
DYNAMIC = linear.ActQuant(None, None, TOKEN)
STEP = np.full((1,), 0.03, np.float32)
STATIC = linear.ActQuant(jnp.asarray(STEP[None]), None, STEPS)
K = 128
CONFIG = decoder.DecoderConfig(
  vocab_size=32,
  hidden_size=K,
  intermediate_size=K,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=64,
  gated=False,
  activation='relu',
)


@contextlib.contextmanager
def as_on_v6e(fused=True):
  """Choices of a TPU, kernels interpreted; not fused: each op by itself."""
  with contextlib.ExitStack() as stack:
    set_ = lambda *a: stack.enter_context(mock.patch.object(*a))
    set_(targets, 'current', lambda: 'v6e')
    set_(compat, 'interpret_mode', lambda interpret: True)
    if not fused:
      for name in ('why_not_fed', 'why_not_rotated'):
        set_(kernel_inputs, name, lambda *a: 'not in this test')
    yield


class Branch(nn.Module):
  """mlp(norm(x))."""

  norm: nn.Module = norms.RMSNorm()
  mlp: nn.Module = mlp.MLP(K)

  def __call__(self, x):
    return self.mlp(kernel_inputs.feed(self.norm, x, self.mlp))


class Asks(nn.Module):
  """Why `Branch` is not fed codes."""

  norm: nn.Module = norms.RMSNorm()
  mlp: nn.Module = mlp.MLP(K)

  def __call__(self, x):
    return kernel_inputs.why_not_fed(self.norm, x, self.mlp)


def draw(*shape, dtype='float32', seed=0):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def quantized(w, seed=0):
  """(K, N) kernel of int8."""
  return qarray.quantize(draw(*w, seed=seed) / w[0] ** 0.5, W8)


def branch(rows_=K, **entries):
  """Variables of a gated Branch; entries are those of gate and up."""
  linears = ('gate_proj', 'up_proj')
  kernels = {
    name: {'kernel': quantized((rows_, K), i)} for i, name in enumerate(linears)
  }
  kernels['down_proj'] = {'kernel': draw(K, K, seed=2) / K**0.5}
  scale = 1.0 + 0.1 * draw(K)
  return {
    'params': {'norm': {'scale': scale}, 'mlp': kernels},
    'quant': {'mlp': {name: dict(entries) for name in linears}},
  }


def change(variables, path, leaf):
  """Variables with another leaf."""
  return taps.set_path(variables, path, leaf)


def variables_of(params, paths, quantize):
  """Variables with those linears quantized, on both sides."""
  variables = {'params': params, 'quant': {}}
  for path in paths:
    q = quantize(taps.get_path(params, f'{path}/kernel'))
    variables = change(variables, f'params/{path}/kernel', q)
    variables = change(variables, f'quant/{path}/input', DYNAMIC)
  return variables


def count_ties(got, want, share):
  """Codes that differ, each by one; no more than that share of all."""
  differ = np.abs(np.asarray(got, np.int32) - np.asarray(want, np.int32))
  assert differ.max() <= 1, differ.max()
  assert differ.mean() <= share, differ.mean()
  return int(differ.sum())


class DecoderTest(parameterized.TestCase):
  def test_codes_of_norms_give_the_logits_of_stored_norms(self):
    """In float32, where both round the same values but for ties."""
    model = decoder.Decoder(CONFIG, (2,))
    tokens = jnp.arange(6).reshape(1, 6)
    fed = [
      path for _, paths in decoder.block_spec(CONFIG).norms for path in paths
    ]

    @jax.jit
    def make():
      params = model.init(jax.random.key(0), tokens)['params']
      quantize = jax.vmap(lambda w: qarray.quantize(w, W8))
      return variables_of(
        params, [f'blocks_0/{path}' for path in fed], quantize
      )

    variables = make()

    def logits(fused):
      with as_on_v6e(fused):
        traced = jax.jit(lambda v, t: model.apply(v, t)[0]).trace(
          variables, tokens
        )
        text = str(traced.jaxpr)
        self.assertEqual(text.count('name=norm_quantize'), 2 if fused else 0)
        return traced.lower().compile()(variables, tokens)

    # A tie in one code moves a logit by a step of one product.
    np.testing.assert_allclose(logits(True), logits(False), atol=5e-3)

  def test_on_a_cpu_nothing_changes(self):
    block = decoder.block_spec(CONFIG)
    x = jax.ShapeDtypeStruct((1, 3, K), jnp.bfloat16)

    def make():
      params = block.module.init(jax.random.key(0), draw(1, 3, K))['params']
      paths = [lin.path for lin in block.linears]
      made = variables_of(params, paths, lambda w: qarray.quantize(w, W8))
      turn = linear.OnlineHadamard(64)
      return change(made, 'quant/mlp/down_proj/hadamard', turn)

    variables = jax.eval_shape(make)

    def program():  # A new function each: jax keeps what it traced.
      f = lambda v, x: block.apply(v, x)
      return str(jax.make_jaxpr(f)(variables, x))

    as_is = program()
    plain = lambda norm, x, reader: norm(x)
    with (
      mock.patch.object(kernel_inputs, 'feed', plain),
      mock.patch.object(kernel_inputs, 'why_not_rotated', lambda *a: 'no'),
    ):
      self.assertEqual(as_is, program())
    self.assertNotIn('pallas_call', as_is)


class FeedTest(parameterized.TestCase):
  def inputs(self, variables, x, module=None):
    """What gate and up get; the MLP's own `__call__` does not run."""
    with as_on_v6e(), mock.patch.object(mlp.MLP, '__call__', lambda s, x: x):
      return (module or Branch()).apply(variables, x)

  @parameterized.named_parameters(
    ('rms', norms.RMSNorm()), ('layer', norms.LayerNorm())
  )
  def test_one_pass_per_token_serves_all(self, norm):
    x = draw(2, 5, K)
    variables = branch(input=DYNAMIC)
    variables = change(variables, 'params/norm/bias', 0.1 * draw(K, seed=3))
    made = self.inputs(variables, x, Branch(norm=norm))
    self.assertIs(made['gate_proj'], made['up_proj'])
    self.assertEqual((made.shape, made.dtype), (x.shape, x.dtype))
    y: Any = norm.apply({'params': variables['params']['norm']}, x)
    np.testing.assert_array_equal(made['up_proj'].value, y)
    want, scale = rows.quantize(y.reshape(-1, K), 'int8')
    ties = count_ties(made['up_proj'].codes.reshape(-1, K), want, 2e-3)
    print(f'{type(norm).__name__}: {ties} ties of {want.size} codes')
    np.testing.assert_allclose(
      made['up_proj'].scale.reshape(-1, 1), scale, rtol=1e-6
    )

  def test_steps_are_shared_and_reach_the_least_code(self):
    steps = linear.StepInput(STEPS)
    variables = branch(input=steps)
    variables = change(variables, 'params/norm/scale', 60 + 5 * draw(K))
    x = draw(2, 5, K)
    made = self.inputs(variables, x)
    self.assertIs(made['gate_proj'], made['up_proj'])
    y: Any = norms.RMSNorm().apply({'params': variables['params']['norm']}, x)
    want = steps.codes(y)
    count_ties(made['up_proj'].codes, want, 2e-3)
    self.assertEqual(int(jnp.min(want)), -128)
    self.assertEqual(int(jnp.min(made['up_proj'].codes)), -128)

  def test_a_static_scale_is_taken_for_one_reader(self):
    variables = branch(input=STATIC)
    del variables['params']['mlp']['gate_proj']
    module = Branch(mlp=mlp.MLP(K, gated=False))
    x = draw(2, 5, K)
    made = self.inputs(variables, x, module)
    self.assertEqual(list(made.by_name), ['up_proj'])
    y: Any = norms.RMSNorm().apply({'params': variables['params']['norm']}, x)
    want = qarray.encode(y.reshape(-1, K), STATIC.scale, None, STEPS)
    count_ties(made['up_proj'].codes.reshape(-1, K), want, 2e-3)
    np.testing.assert_array_equal(made['up_proj'].scale, [[STEP]])

  def test_split_channels_are_gathered_for_each_reader(self):
    """MergeQuant's: the whole branch equals its unfused form."""
    src = jnp.full((K,), K).at[:5].set(jnp.array([3, 3, 77, 9, 120]))
    offset = (
      jnp.zeros((2 * K,))
      .at[jnp.array([3, K, K + 1])]
      .set(jnp.array([-1 / 3, 0.0, 1 / 3]))
    )
    split = linear.SplitInput(src, offset, NARROW)
    variables = branch(2 * K, input=linear.StepInput(NARROW), split=split)
    copy = jax.tree.map(jnp.copy, split)  # As loaded, or traced.
    variables = change(variables, 'quant/mlp/up_proj/split', copy)
    variables = change(variables, 'params/norm/scale', 3 + draw(K))
    x = draw(2, 5, K)
    made = self.inputs(variables, x)
    self.assertIsNot(made['gate_proj'], made['up_proj'])
    y: Any = norms.RMSNorm().apply({'params': variables['params']['norm']}, x)
    for name in ('gate_proj', 'up_proj'):
      count_ties(made[name].codes, split(y), 2e-3)
    got = self.run_branch(variables, x, True)
    np.testing.assert_allclose(
      got, self.run_branch(variables, x, False), atol=1e-3
    )

  def run_branch(self, variables, x, fused):
    with as_on_v6e(fused):
      return jax.jit(lambda v, x: Branch().apply(v, x))(variables, x)

  def test_gradients_pass_straight_through(self):
    """As where the product quantizes: to x and to the norm's scale."""
    variables, x = branch(input=DYNAMIC), draw(2, 5, K)

    def gradients(fused):
      def loss(scale, x):
        changed = change(variables, 'params/norm/scale', scale)
        y: Any = Branch().apply(changed, x)
        return jnp.sum(y**2)

      with as_on_v6e(fused):
        grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
        return grad(variables['params']['norm']['scale'], x)

    for got, want in zip(gradients(True), gradients(False), strict=True):
      self.assertGreater(float(jnp.max(jnp.abs(want))), 0.1)
      np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-2)

  def test_gradients_of_copies_are_summed(self):
    src = jnp.full((K,), K).at[:3].set(jnp.array([2, 2, 5]))
    split = linear.SplitInput(src, jnp.zeros(2 * K), NARROW)
    w = quantized((2 * K, K))

    def product(value):
      x = kernel_inputs.QuantizedInput(
        jnp.ones((1, 2 * K), jnp.int8), jnp.ones((1, 1)), value, src
      )
      return jnp.sum(kernel_inputs.matmul(x, w))

    with as_on_v6e():
      got = jax.grad(product)(jnp.ones((1, K)))
    want = split.gather(qarray.dequantize(w), K) @ jnp.ones(K)
    np.testing.assert_allclose(got[0], want, atol=1e-5)

  @parameterized.named_parameters(
    ('float', {'quant/mlp/up_proj': {}}, 'up_proj: x is not quantized'),
    (
      'kernel',
      {'params/mlp/up_proj/kernel': jnp.ones((K, K))},
      'up_proj: w must be a QArray',
    ),
    (
      'taps',
      {'taps/mlp/gate_proj/in': {'absmax': jnp.zeros(K)}},
      'gate_proj: its taps read x',
    ),
    (
      'low_rank',
      {'quant/mlp/up_proj/low_rank': linear.LowRank(1, 1)},
      r"up_proj: \['low_rank'\] of its layer read x",
    ),
    (
      'formats',
      {
        'quant/mlp/up_proj/input': linear.ActQuant(
          None, None, spec_lib.QuantSpec(dtype='int4', granularity='token')
        )
      },
      'may quantize it in different ways',
    ),
    (
      'static',
      {
        f'quant/mlp/{name}_proj/input': jax.tree.map(jnp.copy, STATIC)
        for name in ('gate', 'up')
      },
      'may quantize it in different ways',
    ),
    (
      'asymmetric',
      {
        'quant/mlp/up_proj/input': linear.ActQuant(
          None,
          None,
          spec_lib.QuantSpec(
            dtype='int8', granularity='token', symmetric=False
          ),
        )
      },
      'up_proj: x is int8, symmetric=False',
    ),
    (
      'constant_width',
      {
        'quant/mlp/up_proj': {
          'input': linear.StepInput(NARROW),
          'split': linear.SplitInput(
            jnp.zeros(K, jnp.int32), jnp.zeros(K), NARROW
          ),
        }
      },
      'up_proj: its split keeps 0 channels of 128',
    ),
  )
  def test_reasons(self, changes, message):
    variables = branch(input=DYNAMIC)
    for path, leaf in changes.items():
      variables = change(variables, path, leaf)
    with as_on_v6e():
      self.assertRegex(Asks().apply(variables, draw(2, K)), message)

  def test_reasons_of_modules_and_shapes(self):
    x, variables = draw(2, K), branch(input=DYNAMIC)
    with as_on_v6e():
      ask = lambda asks, x: asks.apply(variables, x)
      self.assertEqual(ask(Asks(), x), '')
      named = mlp.MLP(K, implementation='float')
      self.assertRegex(ask(Asks(mlp=named), x), "='float' was asked for")
      sparse = moe.SparseMLP(2, 1, K)
      self.assertRegex(ask(Asks(mlp=sparse), x), 'not only linears read.*Spar')
      other = Asks(norm=nn.RMSNorm())
      self.assertRegex(ask(other, x), 'a RMSNorm is none of the norms')
      self.assertRegex(ask(Asks(), x[0]), r'x has shape \(128,\)')
      self.assertRegex(ask(Asks(), x.astype('float16')), 'leaves x float16')
      reason, _ = Asks().apply(variables, x, mutable=['tapped'])
      self.assertRegex(reason, 'its taps read x')
      reason, _ = Asks().init_with_output(jax.random.key(0), x)
      self.assertRegex(reason, 'have no parameters yet')
    with mock.patch.object(targets, 'current', lambda: 'tpu7x'):
      self.assertRegex(ask(Asks(), x), 'no kernel multiplies int8')  # No unit.
    self.assertRegex(ask(Asks(), x), 'norm_quantize leaves x')  # On a CPU.


class RotatedTest(parameterized.TestCase):
  def test_codes_are_those_of_the_rotation_in_float32(self):
    x, turn = draw(2, 5, K, dtype='bfloat16'), linear.OnlineHadamard(64)
    with as_on_v6e():
      made = kernel_inputs.rotated(x, turn, DYNAMIC)
    y = turn(x.astype(jnp.float32)).reshape(-1, K)
    want, scale = rows.quantize(y, 'int8')
    ties = count_ties(made.codes.reshape(-1, K), want, 2e-3)
    print(f'rotated: {ties} ties of {want.size} codes')
    np.testing.assert_allclose(made.scale.reshape(-1, 1), scale, rtol=1e-6)

  def test_a_layer_takes_it(self):
    x = draw(2, 5, K, dtype='bfloat16')
    variables = {
      'params': {'kernel': quantized((K, K))},
      'quant': {'input': DYNAMIC, 'hadamard': linear.OnlineHadamard(64)},
    }

    def run(fused):
      f = lambda x: linear.QuantDense(K).apply(variables, x)
      with as_on_v6e(fused):
        self.assertEqual('hadamard' in str(jax.make_jaxpr(f)(x)), fused)
        y, pull = jax.vjp(jax.jit(f), x)
        return y, pull(jnp.ones_like(y))[0]

    for got, want in zip(run(True), run(False), strict=True):
      # Unfused, the rotation is rounded to bfloat16, 2^-9, before its codes.
      np.testing.assert_allclose(
        got.astype(jnp.float32), want.astype(jnp.float32), atol=0.05
      )

  @parameterized.named_parameters(
    ('taps', {'taps/in': {'absmax': jnp.zeros(K)}}, 'its taps read x'),
    ('float', {'quant': {'hadamard': linear.OnlineHadamard(64)}}, 'x is not q'),
    ('static', {'quant/input': STATIC}, 'x has a static scale'),
    ('order', {'quant/permute': jnp.arange(K)}, r"\['permute'\] of its layer"),
    ('w', {'params/kernel': jnp.ones((K, K))}, 'w must be a QArray'),
    (
      'block',
      {'quant/hadamard': linear.OnlineHadamard(12)},
      'blocks have 12 channels, no power of two',
    ),
  )
  def test_reasons(self, changes, message):
    variables = {
      'params': {'kernel': quantized((K, K))},
      'quant': {'input': DYNAMIC, 'hadamard': linear.OnlineHadamard(64)},
    }
    for path, leaf in changes.items():
      variables = change(variables, path, leaf)
    with as_on_v6e():
      self.assertRegex(self.ask(variables, draw(2, K)), message)

  def ask(self, variables, x, **fields):
    layer = linear.QuantDense(K, **fields).bind(variables)
    kernel = variables['params']['kernel']
    return kernel_inputs.why_not_rotated(layer, x, kernel)

  def test_reasons_of_shapes_and_choices(self):
    variables = {
      'params': {'kernel': quantized((K, K))},
      'quant': {'input': DYNAMIC, 'hadamard': linear.OnlineHadamard(64)},
    }
    x = draw(2, K, dtype='bfloat16')
    with as_on_v6e():
      self.assertEqual(self.ask(variables, x), '')
      reason = self.ask(variables, x, implementation='kernel')
      self.assertRegex(reason, "='kernel' was asked for")
      self.assertRegex(self.ask(variables, x[0]), r'x has shape \(128,\)')
      reason = self.ask(variables, x.astype('float32'))
      self.assertRegex(reason, 'hadamard_quantize leaves x float32')
    self.assertRegex(self.ask(variables, x), 'leaves x bfloat16')  # On a CPU.


if __name__ == '__main__':
  absltest.main()
