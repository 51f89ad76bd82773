"""Tests of jaxq.kvcache.stores and softmax."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies

from jaxq.kvcache import interface, softmax, stores
from tests.kvcache import testing

GRIDS = {
  'per_token': stores.Grid(bits=4),
  'symmetric': stores.Grid(bits=8, mode='symmetric'),
  'per_channel': stores.Grid(bits=2, tokens=8, channels=1),
  'integer': stores.Grid(bits=2, tokens=8, channels=1, mode='integer'),
  'channel_groups': stores.Grid(bits=2, channels=8),
  'blocks': stores.Grid(bits=3, tokens=4, channels=4),
}
NAMED = tuple((name, name) for name in GRIDS)


@functools.partial(jax.jit, static_argnums=0)
def fill(grid, x):
  T = x.shape[1]
  store = stores.int_store(testing.shape(capacity=T), T, grid)
  slots = jnp.broadcast_to(jnp.arange(T)[None], (testing.B, T))
  return store.put(store.encode(x), slots)


def filled(grid):
  """A store of 32 random tokens, and the tokens."""
  _, x, _ = testing.qkv(32)
  return fill(grid, x), x


quantize = jax.jit(stores.quantize, static_argnums=1)


@functools.partial(jax.jit, static_argnums=4)
def read(store, q, p, first, size):
  """Scores, output and values of a run of slots; both folded and not."""
  x = store.values(first, size)
  return (
    (store.scores(q, first, size), jnp.einsum('bkgtd,bskd->bkgts', q, x)),
    (store.combine(p, first, size), jnp.einsum('bkgts,bskd->bkgtd', p, x)),
  )


class QuantizeTest(parameterized.TestCase):
  def test_by_hand(self):
    # One token, one head, four channels: 0..3 on a grid of 2 bits.
    x = jnp.array([1.0, 2.0, 4.0, 7.0]).reshape(1, 1, 1, 4)
    codes, scale, offset = quantize(x, stores.Grid(bits=2))
    self.assertEqual(
      (float(scale[0, 0, 0, 0]), float(offset[0, 0, 0, 0])), (2, 1)
    )
    np.testing.assert_array_equal(codes[0, 0, 0], [0, 0, 2, 3])  # 0.5: even.
    # Integer zero point: z = round(-1 / 2) = 0, so the offset is 0.
    grid = stores.Grid(bits=2, mode='integer')
    codes, scale, offset = quantize(x, grid)
    self.assertEqual(float(offset[0, 0, 0, 0]), 0)
    np.testing.assert_array_equal(codes[0, 0, 0], [0, 1, 2, 3])
    # Symmetric, absmax 7 on 4 bits: the codes are counted from 7.
    grid = stores.Grid(bits=4, mode='symmetric')
    codes, scale, offset = quantize(-x, grid)
    self.assertIsNone(offset)
    self.assertEqual(float(scale[0, 0, 0, 0]), 1)
    np.testing.assert_array_equal(codes[0, 0, 0], [6, 5, 3, 0])

  def test_a_clipped_range_by_hand(self):
    # Of -4..4, half is -2..2 in steps of 4/3; what is past it goes to the end.
    x = jnp.array([-4.0, -2.0, 1.9, 4.0]).reshape(1, 1, 1, 4)
    grid = stores.Grid(bits=2, clip=0.5, scale_dtype='float32')
    codes, scale, offset = quantize(x, grid)
    self.assertAlmostEqual(float(scale[0, 0, 0, 0]), 4 / 3, places=6)
    self.assertEqual(float(offset[0, 0, 0, 0]), -2)
    np.testing.assert_array_equal(codes[0, 0, 0], [0, 0, 3, 3])

  def test_zero_point_far_from_the_group_is_kept(self):
    # All of it on one side of zero: z = -30, outside 0..3.
    x = jnp.array([10.0, 10.33, 10.67, 11.0]).reshape(1, 4, 1, 1)
    grid = stores.Grid(bits=2, tokens=4, mode='integer', scale_dtype='float32')
    codes, scale, offset = quantize(x, grid)
    decoded = codes.astype(jnp.float32) * scale + offset
    np.testing.assert_allclose(decoded, x, atol=1 / 6 + 1e-6)

  @parameterized.parameters('minimum', 'integer', 'symmetric')
  def test_constant_groups(self, mode):
    grid = stores.Grid(bits=4, mode=mode, scale_dtype='float32')
    for value in (0.0, 0.75, -3.0):
      x = jnp.full((1, 2, 1, 4), value)
      codes, scale, offset = quantize(x, grid)
      decoded = codes.astype(jnp.float32)
      if mode == 'symmetric':
        decoded = decoded - 7
      decoded = decoded * scale + (0.0 if offset is None else offset)
      np.testing.assert_allclose(decoded, x, atol=1e-6)

  @hypothesis.given(
    bits=strategies.sampled_from((1, 2, 3, 4, 8)),
    size=strategies.floats(1e-3, 1e3),
    shift=strategies.floats(-10, 10),
    seed=strategies.integers(0, 99),
  )
  @hypothesis.settings(max_examples=20)
  def test_error_is_half_a_step(self, bits, size, shift, seed):
    x = np.random.default_rng(seed).normal(size=(1, 4, 2, 8)) + shift
    x = jnp.asarray(x * size, jnp.float32)
    grid = stores.Grid(bits=bits, tokens=4, scale_dtype='float32')
    codes, scale, offset = quantize(x, grid)
    decoded = codes.astype(jnp.float32) * scale + offset
    # Beside half a step, the rounding of values of this size.
    slack = 1e-5 * float(jnp.max(jnp.abs(x)))
    self.assertTrue(bool(jnp.all(jnp.abs(decoded - x) <= scale / 2 + slack)))

  @parameterized.parameters(1, 2, 3, 4, 5, 6, 7, 8)
  def test_packing_is_a_bijection(self, bits):
    codes = jnp.arange(2**bits * 16, dtype=jnp.int32) % 2**bits
    codes = codes.reshape(1, -1, 1, 16).astype(jnp.uint8)
    packed = stores.pack(codes, bits)
    self.assertEqual(packed.shape[-1], 16 * bits // 8)
    np.testing.assert_array_equal(stores.unpack(packed, bits, 16), codes)


class IntStoreTest(parameterized.TestCase):
  @parameterized.named_parameters(*NAMED)
  def test_folded_is_dequantized(self, name):
    store, _ = filled(GRIDS[name])
    q = jax.random.normal(
      jax.random.key(1), (testing.B, testing.HKV, 2, 3, testing.D)
    )
    p = jax.random.uniform(
      jax.random.key(2), (testing.B, testing.HKV, 2, 3, 16)
    )
    for first in (0, 8, 16):
      for folded, plain in read(store, q, p, first, 16):
        np.testing.assert_allclose(folded, plain, atol=1e-4)

  @parameterized.named_parameters(*NAMED)
  def test_values_are_near(self, name):
    store, x = filled(GRIDS[name])
    step = float(jnp.max(store.scale.astype(jnp.float32)))
    # Half a step of the coarsest group, and float16 of the offset.
    values = jax.jit(lambda store: store.values(0, 32))(store)
    np.testing.assert_allclose(values, x, atol=step * 0.5 + 0.02)

  def test_slots_past_the_end_write_nothing(self):
    store, x = filled(GRIDS['per_channel'])
    slots = jnp.full((testing.B, 8), store.slots)
    again = store.put(store.encode(x[:, :8] + 1), slots)
    self.assertTrue(testing.same(store, again))

  def test_runs_are_written_whole_or_not(self):
    # Two runs of 4 a row; of the first row the second is past the end.
    a = jnp.zeros((2, 16, 1, 1))
    new = jnp.arange(1.0, 17.0).reshape(2, 8, 1, 1)
    slots = jnp.array([[8, 9, 10, 11, *[16] * 4], [0, 1, 2, 3, 12, 13, 14, 15]])
    runs = jax.jit(stores.write, static_argnums=3)
    got = runs(a, new, slots, 4)
    np.testing.assert_array_equal(got, stores.scatter(a, new, slots))
    self.assertEqual(got[0, :, 0, 0].tolist(), [0] * 8 + [1, 2, 3, 4] + [0] * 4)
    none = runs(a, new, jnp.full((2, 8), 16), 4)
    np.testing.assert_array_equal(none, a)

  def test_bits_per_element(self):
    # 4 + 32 / 16 at D = 16, and 2 + 32 / 8: packed and counted.
    for name, bits in (('per_token', 6.0), ('per_channel', 6.0)):
      store, _ = filled(GRIDS[name])
      elements = testing.B * 32 * testing.HKV * testing.D
      self.assertEqual(8 * interface.nbytes(store) / elements, bits)

  def test_token_norms(self):
    _, x, _ = testing.qkv(6)
    unit, norm = stores.scale_tokens(x)
    self.assertEqual(norm.shape, (testing.B, 6, 1, 1))
    np.testing.assert_allclose(
      jnp.sum(unit**2, axis=(2, 3)), jnp.ones((testing.B, 6)), rtol=1e-5
    )
    _, norm = stores.scale_tokens(x, per_head=True)
    self.assertEqual(norm.shape, (testing.B, 6, testing.HKV, 1))
    _, norm = stores.scale_tokens(jnp.zeros((1, 1, 2, 4)))
    self.assertEqual(float(norm[0, 0, 0, 0]), 1.0)
    # 300 channels of 300 overflow float16.
    _, norm = stores.scale_tokens(jnp.full((1, 1, 1, 300), 300, jnp.float16))
    np.testing.assert_allclose(norm[0, 0, 0, 0], 300 * 300**0.5, rtol=1e-5)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, 'bits=9; allowed .1, 2'):
      stores.Grid(bits=9)
    with self.assertRaisesRegex(ValueError, "mode='other'; allowed .'integer'"):
      stores.Grid(bits=4, mode='other')
    with self.assertRaisesRegex(ValueError, "bits=1 with mode='symmetric'"):
      stores.Grid(bits=1, mode='symmetric')
    shape = testing.shape()
    with self.assertRaisesRegex(ValueError, 'groups of 5 channels; .* divide'):
      stores.int_store(shape, 8, stores.Grid(bits=4, channels=5))
    with self.assertRaisesRegex(ValueError, '9 slots, groups of 8 tokens'):
      stores.int_store(shape, 9, stores.Grid(bits=4, tokens=8))
    with self.assertRaisesRegex(ValueError, 'head_dim=10 at 2 bits; .* of 4'):
      stores.check_packable(10, 2)


class SoftmaxTest(parameterized.TestCase):
  def test_parts_merge_to_one_pass(self):
    (q, k, v), scoring = testing.qkv(30), testing.PLAIN
    q = softmax.group(q[:, -1:], testing.HKV, None)
    store = lambda a: stores.FloatStore(a)
    positions = jnp.full((testing.B, 1), 29)

    def attend(first, last, block=512):
      return softmax.attend_store(
        q,
        positions,
        store(k[:, first:last]),
        store(v[:, first:last]),
        lambda slots: jnp.broadcast_to(
          slots[None, :, None], (testing.B, slots.shape[0], 1)
        ),
        jnp.int32(last - first),
        scoring,
        block=block,
      )

    whole = softmax.finish(attend(0, 30), jnp.float32)
    parts = [attend(0, 7), attend(7, 8), attend(8, 30)]
    merged = softmax.merge(softmax.merge(*parts[:2]), parts[2])
    np.testing.assert_allclose(
      softmax.finish(merged, jnp.float32), whole, atol=1e-6
    )
    for block in (7, 29):  # The last block overlaps the one before.
      np.testing.assert_allclose(
        softmax.finish(attend(0, 30, block), jnp.float32), whole, atol=1e-6
      )

  def test_nothing_seen_is_zero_and_never_nan(self):
    q = jnp.ones((1, 1, 1, 2, 4))
    state = softmax.empty(q)
    garbage = jnp.full((1, 1, 1, 2, 3), 1e30)
    state = softmax.add(
      state,
      garbage,
      jnp.zeros((1, 1, 1, 2, 3), bool),
      lambda p: jnp.einsum('bkgts,sd->bkgtd', p, jnp.ones((3, 4))),
    )
    out = softmax.finish(softmax.merge(state, softmax.empty(q)), jnp.float32)
    np.testing.assert_array_equal(out, jnp.zeros((1, 2, 1, 4)))
    self.assertLess(float(jnp.max(softmax.log_sum_exp(state))), -1e37)

  def test_garbage_in_unused_slots_does_not_leak(self):
    config = testing.CACHES['contiguous']
    data = testing.qkv(9)
    expected, _ = testing.run(config, data, (8, 1))
    _, cache = testing.run(config, jax.tree.map(lambda x: x[:, :8], data), (8,))
    dirty = cache.replace(k=cache.k.at[:, 8:].set(1e30))
    last = jax.tree.map(lambda x: x[:, 8:], data)
    out, _ = testing.run(config, last, (1,), cache=dirty)
    np.testing.assert_array_equal(out, expected[:, 8:])


if __name__ == '__main__':
  absltest.main()
