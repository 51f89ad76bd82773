"""Tests of jaxq.kvcache.dont_waste_bits."""

import dataclasses
import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.kvcache import dont_waste_bits, interface, registry, storage
from tests.kvcache import test_models, testing

LOSSLESS = dataclasses.replace(testing.BITS, shares='0/0/0/1')


@functools.partial(jax.jit, static_argnums=0)
def step(scoring, caches, q, k, v, tokens, counts):
  """Attends, appends and decides, in one layer."""
  cache = jax.tree.map(lambda a: a[0], caches)
  positions = testing.positions_of(cache.length, q.shape[1], counts)
  out, update = cache.attend(q, k, v, positions, scoring)
  stacked = jax.tree.map(lambda a: a[None], update)
  made = interface.append(caches, stacked, counts)
  said = jnp.zeros(tokens.shape)
  return out, dont_waste_bits.decide((made,), tokens, said, said)[0]


def run(config, data, sizes, counts=None):
  """Feeds pieces; outputs (B, sum, H, D) and the cache of the layer."""
  q, k, v = data
  cache = config.init(testing.shape(batch=q.shape[0]))
  caches = jax.tree.map(lambda a: a[None], cache)
  outs, start = [], 0
  for i, size in enumerate(sizes):
    piece = slice(start, start + size)
    tokens = jnp.broadcast_to(jnp.arange(size)[None] % 7, (q.shape[0], size))
    own = jnp.full((q.shape[0],), size) if counts is None else counts[i]
    out, caches = step(
      testing.PLAIN, caches, q[:, piece], k[:, piece], v[:, piece], tokens, own
    )
    outs.append(out)
    start += size
  return jnp.concatenate(outs, axis=1), jax.tree.map(lambda a: a[0], caches)


class DontWasteBitsTest(parameterized.TestCase):
  def test_sixteen_bits_are_plain_attention(self):
    data = testing.qkv(40)
    out, cache = run(LOSSLESS, data, (20,) + (1,) * 20)
    np.testing.assert_allclose(out, testing.attention(data), atol=1e-5)
    self.assertEqual(cache.used.tolist(), [[0, 0, 0, 40]] * 2)

  def test_every_token_is_in_one_pool(self):
    data = testing.qkv(40)
    out, cache = run(testing.BITS, data, (20,) + (1,) * 20)
    error = float(jnp.std(out - testing.attention(data)))
    self.assertLess(error, 0.5)
    sizes = dont_waste_bits.pool_sizes(testing.BITS.parts(), 64)
    self.assertEqual(sizes, [22, 22, 12, 8])
    for row in range(testing.B):
      held = []
      for pool, used, size in zip(
        cache.pools, cache.used[row], sizes, strict=True
      ):
        own = np.asarray(pool.positions)[row, :, 0, 0]
        self.assertLen(own, size)
        self.assertEqual((own >= 0).sum(), int(used))
        held += own[own >= 0].tolist()
      self.assertEqual(sorted(held), list(range(40)))

  def test_tokens_are_encoded_once(self):
    data = testing.qkv(40)
    first = tuple(x[:, :20] for x in data)
    _, before = run(testing.BITS, first, (20,))
    _, after = run(testing.BITS, data, (20,) + (1,) * 20)
    for old, new in zip(before.pools, after.pools, strict=True):
      held = np.asarray(old.positions)[..., 0, 0] >= 0  # (B, slots)
      for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        np.testing.assert_array_equal(
          np.asarray(a, np.float32)[held], np.asarray(b, np.float32)[held]
        )

  def test_average_bits_are_those_of_the_shares(self):
    cache = testing.BITS.init(testing.shape(dtype=jnp.bfloat16))
    elements = 2 * testing.B * testing.HKV * testing.D
    for pool, size, bits in zip(
      cache.pools, (22, 22, 12, 8), dont_waste_bits.CLASSES, strict=True
    ):
      # Below 16 bits a scale and a minimum of 16 bits per token and head.
      params = 0 if bits == 16 else 32 / testing.D
      got = 8 * (interface.nbytes(pool.k) + interface.nbytes(pool.v))
      self.assertEqual(got, size * elements * (bits + params))

  def test_pools_are_attended_to_like_their_values_in_order(self):
    q, k, v = testing.qkv(40)
    first = tuple(x[:, :39] for x in (q, k, v))
    _, cache = run(testing.BITS, first, (20,) + (1,) * 19)
    keys, values = np.array(k), np.array(v)
    for pool in cache.pools:
      n = pool.k.slots
      for own, made in ((keys, pool.k), (values, pool.v)):
        x = np.asarray(made.values(0, n))
        for row in range(testing.B):
          for slot, at in enumerate(np.asarray(pool.positions)[row, :, 0, 0]):
            if at >= 0:
              own[row, at] = x[row, slot]
    last = tuple(x[:, 39:] for x in (q, k, v))
    positions = jnp.full((testing.B, 1), 39)
    out, _ = jax.jit(lambda c, *x: c.attend(*x, positions, testing.PLAIN))(
      cache, *last
    )
    want = testing.attention((q, jnp.asarray(keys), jnp.asarray(values)))
    np.testing.assert_allclose(out[:, 0], want[:, 39], atol=1e-5)

  def test_rows_of_a_ragged_batch(self):
    data = testing.qkv(40)
    counts = [jnp.array([20, 7]), jnp.array([20, 20])]
    _, cache = run(testing.BITS, data, (20, 20), counts)
    self.assertEqual(np.asarray(cache.used).sum(axis=1).tolist(), [40, 27])
    self.assertEqual(cache.length.tolist(), [40, 27])

  def test_full_classes_give_way_and_are_counted(self):
    classes = jnp.array([[0, 0, 0, 1, 3, 3, 2, 0]])
    there = jnp.array([[True] * 7 + [False]])
    taken, slots, used, moved = dont_waste_bits.assign(
      classes, there, jnp.zeros((1, 4), jnp.int32), [2, 2, 1, 2]
    )
    # The third of class 0 goes up to 1; then 2 is free for the seventh.
    self.assertEqual(taken[0, :7].tolist(), [0, 0, 1, 1, 3, 3, 2])
    self.assertEqual(slots[0, :7].tolist(), [0, 1, 0, 1, 0, 1, 0])
    self.assertEqual(used.tolist(), [[2, 2, 1, 2]])
    self.assertEqual(moved.tolist(), [[1, 0]])
    taken, _, _, moved = dont_waste_bits.assign(
      jnp.array([[3, 3]]),
      jnp.ones((1, 2), bool),
      jnp.zeros((1, 4), jnp.int32),
      [1, 1, 1, 1],
    )
    self.assertEqual(taken.tolist(), [[3, 2]])  # No higher one: lower.
    self.assertEqual(moved.tolist(), [[0, 1]])

  def test_variance_is_that_of_the_rows(self):
    data = testing.qkv(20)
    cache = testing.BITS.init(testing.shape())
    positions = testing.positions_of(cache.length, 20)
    _, update = jax.jit(lambda c, *x: c.attend(*x, positions, testing.PLAIN))(
      cache, *data
    )
    q, k, _ = (np.asarray(x, np.float64) for x in data)
    for t in (3, 19):
      rows = []
      for head in range(testing.H):
        s = k[1, : t + 1, head // 2] @ q[1, t, head] / np.sqrt(testing.D)
        p = np.exp(s - s.max())
        rows.append((p / p.sum()).var() * (t + 1) ** 2)
      self.assertAlmostEqual(float(update.state[1, t]), np.mean(rows), places=3)

  def test_random_has_the_shares(self):
    features = jnp.zeros((1, 4000, 4))
    classes = dont_waste_bits.choose(
      testing.BITS, features, jnp.zeros((1,), jnp.int32)
    )
    share = np.bincount(np.asarray(classes[0]), minlength=4) / 4000
    np.testing.assert_allclose(share, [0.35, 0.35, 0.2, 0.1], atol=0.03)

  def test_a_model_generates(self):
    got = test_models.generate(LOSSLESS)
    want = test_models.generate(None)
    np.testing.assert_array_equal(got.tokens, want.tokens)

  def test_bytes_and_storage(self):
    cache = testing.BITS.init(testing.shape(dtype=jnp.bfloat16))
    total = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(cache))
    self.assertEqual(interface.nbytes(cache), total)
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / 'cache.npz'
      storage.save(path, cache, testing.BITS)
      loaded, _ = storage.load(path, cache, testing.BITS)
    self.assertTrue(testing.same(cache, loaded))

  @parameterized.parameters(
    ({'policy': 'x'}, r"policy='x'; allowed \['argmax', 'budget'\]"),
    ({'shares': '0.5/0.5'}, r'shares=0.5/0.5; one for each of \(2, 4, 8, 16\)'),
    ({'shares': '1/1/1/1'}, 'summing to 1'),
    ({'shares': 'many'}, 'shares=many; one for each'),
    (
      {'policy': 'argmax', 'controller': 'random'},
      "policy='argmax' with controller='random', which has no classes",
    ),
  )
  def test_messages(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      dont_waste_bits.DontWasteBitsConfig(**fields)

  def test_messages_of_steps(self):
    cache = testing.BITS.init(testing.shape())
    q, k, v = testing.qkv(1)
    positions = jnp.zeros((2, 1), jnp.int32)
    waiting = interface.append(cache, interface.Update(k=k, v=v))
    with self.assertRaisesRegex(ValueError, 'the last tokens have no bits yet'):
      waiting.attend(q, k, v, positions, testing.PLAIN)
    _, k, v = testing.qkv(65)
    with self.assertRaisesRegex(ValueError, 'row 0 would hold 65 tokens; the'):
      interface.append(cache, interface.Update(k=k, v=v))
    with self.assertRaises(FileNotFoundError):
      registry.parse('dont_waste_bits:controller=none.json').init(
        testing.shape()
      )


if __name__ == '__main__':
  absltest.main()
