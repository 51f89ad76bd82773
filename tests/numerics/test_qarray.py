"""Tests of jaxq.numerics.qarray."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from jaxq.numerics import qarray, ranges, spec

QuantSpec = spec.QuantSpec


def int4_groups(**fields):
  return QuantSpec(dtype='int4', granularity='group', **fields)


@st.composite
def specs(draw):
  """Any spec that fits K = 32."""
  dtype = draw(
    st.sampled_from(
      [f'int{bits}' for bits in range(2, 9)]
      + ['binary', 'fp8_e4m3', 'fp8_e5m2', 'fp4_e2m1', 'e3m2', 'e2m2']
      + ['mxfp4', 'mxfp8', 'mxfp8_e5m2', 'nvfp4', 'nf4']
    )
  )
  if dtype.startswith(('mx', 'nv')):
    rules = ['ceil', 'floor'] + ['round'] * dtype.startswith('mx')
    rule = draw(st.sampled_from(rules))
    return QuantSpec(dtype=dtype, scale_rule=rule)
  granularity = draw(st.sampled_from(spec.GRANULARITIES))
  symmetric = not dtype.startswith('int') or draw(st.booleans())
  narrow = dtype.startswith('int') and symmetric and draw(st.booleans())
  half = dtype.startswith('int') and symmetric and draw(st.booleans())
  return QuantSpec(
    dtype=dtype,
    granularity=granularity,
    group_size=16 if granularity == 'group' else -1,
    symmetric=symmetric,
    narrow=narrow,
    clip=draw(st.sampled_from([1.0, 0.9])),
    scale_dtype=draw(st.sampled_from(spec.SCALE_DTYPES)),
    scale_rule='half' if half else 'floor',
  )


def assert_trees_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    bits_x, bits_y = np.asarray(x).tobytes(), np.asarray(y).tobytes()
    assert bits_x == bits_y, (x, y)


class ContractTest(parameterized.TestCase):
  @hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
  @hypothesis.given(
    s=specs(), seed=st.integers(0, 9), exponent=st.sampled_from([-30, 0, 8])
  )
  def test_fake_quant_is_dequantize_of_quantize(self, s, seed, exponent):
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, (32, 4)).astype(np.float32) * 2.0**exponent
    x[:, 1] = 0
    x = jnp.asarray(x, jnp.float32)
    q = qarray.quantize(x, s)
    qarray.validate(q)
    y = qarray.fake_quant(x, s)
    assert_trees_equal(y, qarray.dequantize(q))
    self.assertTrue(np.all(np.isfinite(y)))
    np.testing.assert_array_equal(y[:, 1], 0.0 * x[:, 1])

  @parameterized.parameters(
    dict(dtype='int4', granularity='group', group_size=16, symmetric=False),
    dict(dtype='int8', granularity='token', scale_dtype='bfloat16'),
    dict(dtype='nvfp4'),
  )
  def test_jit_stack_vmap_and_loop_agree(self, **fields):
    s = QuantSpec(**fields)
    x = jax.random.normal(jax.random.key(0), (2, 3, 32, 4))
    stacked = qarray.quantize(x, s)
    qarray.validate(stacked)
    run = lambda x: qarray.quantize(x, s)
    assert_trees_equal(jax.jit(run)(x), stacked)
    assert_trees_equal(jax.vmap(jax.vmap(run))(x), stacked)
    loop = [jax.tree.map(lambda a: a[None], run(m)) for m in x[0]]
    loop = jax.tree.map(lambda *a: jnp.concatenate(a), *loop)
    assert_trees_equal(loop, jax.tree.map(lambda a: a[0], stacked))
    y = qarray.dequantize(stacked)
    self.assertEqual(y.shape, x.shape)
    assert_trees_equal(jax.vmap(qarray.dequantize)(stacked), y)
    fused = jax.jit(lambda x: qarray.dequantize(run(x)))(x)
    assert_trees_equal(fused, y)

  def test_eager_equals_jit(self):
    s = int4_groups(group_size=16, symmetric=False)
    x = jax.random.normal(jax.random.key(9), (32, 4))
    with jax.disable_jit():
      eager = qarray.quantize(x, s)
      y = qarray.dequantize(eager)
    assert_trees_equal(qarray.quantize(x, s), eager)
    assert_trees_equal(qarray.fake_quant(x, s), y)

  def test_search_keeps_the_contract(self):
    x = jax.random.t(jax.random.key(1), 3.0, (32, 4))
    search = ranges.RangeSearch(grid=10)
    for s in (int4_groups(group_size=16), QuantSpec(dtype='nvfp4')):
      q = qarray.quantize(x, s, search=search)
      y = qarray.fake_quant(x, s, search=search)
      assert_trees_equal(y, qarray.dequantize(q))

  def test_bfloat16_in_and_out(self):
    x = jax.random.normal(jax.random.key(2), (16, 4), jnp.bfloat16)
    s = QuantSpec(dtype='int4')
    y = qarray.fake_quant(x, s)
    assert_trees_equal(y, qarray.dequantize(qarray.quantize(x, s), x.dtype))

  def test_straight_through_gradient(self):
    x = jax.random.normal(jax.random.key(3), (16, 2))
    s = QuantSpec(dtype='int4')
    loss = lambda x, ste: jnp.sum(3 * qarray.fake_quant(x, s, ste=ste))
    np.testing.assert_array_equal(jax.grad(loss)(x, True), 3 * np.ones((16, 2)))
    np.testing.assert_array_equal(jax.grad(loss)(x, False), np.zeros((16, 2)))
    assert_trees_equal(
      qarray.fake_quant(x, s, ste=True), qarray.fake_quant(x, s)
    )

  def test_pytree_keeps_spec_and_shape(self):
    q = qarray.quantize(jnp.ones((32, 2)), int4_groups(group_size=16))
    leaves, tree = jax.tree.flatten(q)
    self.assertLen(leaves, 2)
    back = jax.tree.unflatten(tree, leaves)
    self.assertEqual((back.spec, back.shape), (q.spec, (32, 2)))
    shapes = jax.eval_shape(lambda q: q, q)
    self.assertEqual(qarray.nbytes(shapes), qarray.nbytes(q))

  @parameterized.parameters(
    (dict(dtype='int4', granularity='group', group_size=64), 4.5),
    (dict(dtype='int3', granularity='group', group_size=64), 3.5),
    (
      dict(dtype='int4', granularity='group', group_size=64, symmetric=False),
      4.625,
    ),
    (dict(dtype='mxfp4'), 4.25),
    (dict(dtype='mxfp8'), 8.25),
    (dict(dtype='nvfp4'), 4.5 + 32 / 512),
    (dict(dtype='binary', scale_dtype='float16'), 1 + 16 / 128),
    (dict(dtype='int8', granularity='tensor'), 8 + 32 / 512),
  )
  def test_bits_per_weight_counts_metadata(self, fields, bits):
    s = QuantSpec(**fields)
    q = jax.eval_shape(lambda x: qarray.quantize(x, s), jnp.ones((128, 4)))
    self.assertEqual(qarray.bits_per_weight(q), bits)

  def test_codes_that_fill_no_byte_stay_unpacked(self):
    x = jax.random.normal(jax.random.key(4), (7, 2))
    q = qarray.quantize(x, QuantSpec(dtype='int4'))
    self.assertFalse(q.is_packed)
    self.assertEqual((q.qvalue.shape, q.qvalue.dtype), ((7, 2), jnp.int8))
    qarray.validate(q)


class RowByRowTest(parameterized.TestCase):
  @parameterized.parameters(
    dict(dtype='int4', granularity='group', group_size=16, symmetric=False),
    dict(dtype='int3', granularity='channel'),
    dict(dtype='fp8_e4m3', granularity='group', group_size=16),
    dict(dtype='mxfp4'),
    dict(dtype='nvfp4'),
  )
  def test_rows_and_slabs_equal_the_whole(self, **fields):
    s = QuantSpec(**fields)
    K, N = 32, 3
    x = jax.random.normal(jax.random.key(6), (K, N))
    slab = s.group_size if s.granularity == 'group' else K
    outer = qarray.tensor_scale(x, s)
    codes, scales, zeros = [], [], []
    for start in range(0, K, slab):
      scale, zero = qarray.find_params(
        x[start : start + slab], s, tensor_scale=outer
      )
      self.assertEqual(scale.shape, (1, N))
      row_zero = None if zero is None else zero[0]
      rows = range(start, start + slab)
      codes += [qarray.encode(x[k], scale[0], row_zero, s) for k in rows]
      y = qarray.decode(codes[-1], scale[0], row_zero, s)
      self.assertEqual((y.shape, y.dtype), ((N,), jnp.float32))
      scales.append(scale)
      zeros.append(zero)
    zeros = None if s.symmetric else jnp.concatenate(zeros)
    q = qarray.from_codes(
      jnp.stack(codes), jnp.concatenate(scales), zeros, s, tensor_scale=outer
    )
    whole = qarray.quantize(x, s)
    assert_trees_equal(q, whole)
    np.testing.assert_array_equal(y, qarray.dequantize(whole)[-1])

  def test_given_scales_are_used_as_stored(self):
    x = jax.random.normal(jax.random.key(7), (32, 2))
    scale = jnp.array([[0.3, 0.1]])
    zero = jnp.array([[3, 5]], jnp.uint8)
    s = QuantSpec(dtype='int4', symmetric=False, scale_dtype='bfloat16')
    q = qarray.quantize(x, s, scale=scale, zero_point=zero)
    np.testing.assert_array_equal(q.scale, scale.astype(jnp.bfloat16))
    np.testing.assert_array_equal(q.zero_point, zero)
    y = qarray.fake_quant(x, s, scale=scale, zero_point=zero)
    assert_trees_equal(y, qarray.dequantize(q))
    np.testing.assert_array_equal(
      qarray.effective_scale(q), scale.astype(jnp.bfloat16).astype(jnp.float32)
    )

  def test_nvfp4_scales_split_again_without_the_tensor_scale(self):
    x = jax.random.normal(jax.random.key(8), (32, 2))
    s = QuantSpec(dtype='nvfp4')
    scale, _ = qarray.find_params(x, s)
    q = qarray.from_codes(qarray.encode(x, scale, None, s), scale, None, s)
    assert_trees_equal(q, qarray.quantize(x, s))


class MessageTest(parameterized.TestCase):
  @parameterized.parameters(
    (576, 128, 'K=576, group_size=128; .*multiple of group_size. Use 64, or pad'
     ' K to 640'),
    (100, 32, 'K=100, group_size=32; .* Pad K to 128'),
  )  # fmt: skip
  def test_indivisible_groups_name_the_fix(self, K, size, message):
    with self.assertRaisesRegex(ValueError, message):
      qarray.quantize(jnp.zeros((K, 2)), int4_groups(group_size=size))

  def test_inputs(self):
    s = QuantSpec(dtype='int4')
    with self.assertRaisesRegex(TypeError, 'x is int32; .*Cast it to float32'):
      qarray.quantize(jnp.ones((8, 2), jnp.int32), s)
    with self.assertRaisesRegex(ValueError, r'shape \(8,\); .*\(K, N\). Add'):
      qarray.find_params(jnp.ones(8), s)
    with self.assertRaisesRegex(ValueError, "search='mse' with dtype='binary'"):
      qarray.find_params(
        jnp.ones((8, 2)), QuantSpec(dtype='binary'), ranges.RangeSearch()
      )

  def test_parameters(self):
    x, s = jnp.ones((32, 2)), QuantSpec(dtype='int4')
    uint = QuantSpec(dtype='int4', symmetric=False)
    scale, zero = qarray.find_params(x, uint)
    with self.assertRaisesRegex(
      ValueError, r"scale has shape \(2,\), .*'channel' needs \(1, 2\). Resh"
    ):
      qarray.quantize(x, s, scale=scale[0])
    with self.assertRaisesRegex(ValueError, r'needs \(2, 2\)'):
      qarray.from_codes(
        jnp.zeros((32, 2), jnp.int8), scale, None, int4_groups(group_size=16)
      )
    with self.assertRaisesRegex(ValueError, 'no zero_point for .*False.*Give'):
      qarray.encode(x, scale, None, uint)
    with self.assertRaisesRegex(ValueError, 'a zero_point for .*True.*Leave'):
      qarray.decode(jnp.zeros((32, 2), jnp.int8), scale, zero, s)
    with self.assertRaisesRegex(ValueError, 'zero_point without scale.*both'):
      qarray.fake_quant(x, uint, zero_point=zero)
    with self.assertRaisesRegex(
      ValueError, r'scale has shape \(1, 2\), the array \(32, 3\); .*find_par'
    ):
      qarray.encode(jnp.ones((32, 3)), scale, None, s)

  @parameterized.parameters(
    ('scale', jnp.ones((1, 3)), r'scale is float32 \(1, 3\).*float32 \(1, 2\)'),
    ('qvalue', jnp.ones((32, 2), jnp.int8), r'must be uint8 \(16, 2\). Build'),
    ('zero_point', jnp.ones((1, 2), jnp.uint8), 'must be None'),
    ('tensor_scale', jnp.ones((1, 1)), r'float32 \(1, 1\).*must be None'),
    ('spec', QuantSpec(dtype='int4', symmetric=False), 'zero_point is None; .*'
     r'must be uint8 \(1, 2\)'),
  )  # fmt: skip
  def test_validate(self, field, value, message):
    q = qarray.quantize(jnp.ones((32, 2)), QuantSpec(dtype='int4'))
    qarray.validate(q)
    with self.assertRaisesRegex(ValueError, message):
      qarray.validate(dataclasses.replace(q, **{field: value}))


if __name__ == '__main__':
  absltest.main()
