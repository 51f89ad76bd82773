"""Tests of jaxq.kvcache.tokenselect."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.kvcache import interface, stores, tokenselect
from jaxq.nn import rope as rope_lib
from tests.kvcache import testing

CONFIG = testing.TOKENSELECT  # 2 first, 8 chosen, 8 last.
ROPE = rope_lib.Rope()


read = jax.jit(tokenselect.TokenSelectCache._listed)


def turned(data, start=0):
  """q, k with positions; v as it is."""
  q, k, v = data
  at = start + jnp.arange(q.shape[1])[None]
  at = jnp.broadcast_to(at, q.shape[:2])
  return rope_lib.rotate(q, at, ROPE), rope_lib.rotate(k, at, ROPE), v


@functools.partial(jax.jit, static_argnums=2)
def votes(query, k, config=CONFIG):
  """Of all tokens, (B, S)."""
  may = jnp.ones(k.shape[:2], bool)
  return tokenselect.soft_vote(query, stores.FloatStore(k), may, config)


class VoteTest(parameterized.TestCase):
  def test_every_head_has_one_vote(self):
    q, k, _ = testing.qkv(20)
    found = votes(q[:, 0], k)
    np.testing.assert_allclose(
      jnp.sum(found, axis=1), [testing.H] * 2, rtol=1e-4
    )
    # A head that shouts changes the sum of logits, and its own vote only.
    loud = votes(q[:, 0], k.at[:, :, 0].multiply(10.0))
    self.assertLessEqual(float(jnp.abs(loud - found).max()), testing.H // 2)
    np.testing.assert_allclose(
      jnp.sum(loud, axis=1), [testing.H] * 2, rtol=1e-4
    )

  def test_one_head_is_plain_top_k(self):
    q, k, _ = testing.qkv(20)
    config = dataclasses.replace(CONFIG, budget=5)
    found = votes(q[:, 0, :1], k[:, :, :1], config)
    index = tokenselect.select(found, config)
    logits = jnp.einsum('bd,bsd->bs', q[:, 0, 0], k[:, :, 0])
    want = np.sort(np.argsort(-logits, axis=-1)[:, :5])
    np.testing.assert_array_equal(index, want)

  def test_head_maps(self):
    # 4 query heads, 2 key heads: grouped 0 0 1 1, mod 0 1 0 1.
    q, k, _ = testing.qkv(20)
    mod = votes(q[:, 0], k, dataclasses.replace(CONFIG, gqa_map='mod'))
    grouped = votes(q[:, 0][:, jnp.array([0, 2, 1, 3])], k)
    np.testing.assert_allclose(mod, grouped, atol=1e-6)

  def test_pooling_takes_the_largest_neighbour(self):
    q, k, _ = testing.qkv(20)
    found = np.asarray(votes(q[:, 0], k))
    pooled = votes(q[:, 0], k, dataclasses.replace(CONFIG, pool=3))
    padded = np.pad(found, [(0, 0), (1, 1)])
    want = np.max([padded[:, i : i + 20] for i in range(3)], axis=0)
    np.testing.assert_allclose(pooled, want, rtol=1e-6)

  def test_sharded_heads_sum_to_the_whole(self):
    q, k, _ = testing.qkv(20)
    parts = [
      votes(q[:, 0, 2 * h : 2 * h + 2], k[:, :, h : h + 1]) for h in range(2)
    ]
    np.testing.assert_allclose(sum(parts), votes(q[:, 0], k), rtol=1e-5)


class TokenSelectTest(parameterized.TestCase):
  def listed(self, cache, T, q=None):
    """What a step of T tokens reads, besides its own."""
    q = testing.qkv(T, seed=4)[0] if q is None else q
    positions = testing.positions_of(cache.length, T)
    counts = jnp.full((testing.B,), T, jnp.int32)
    _, listed, held = read(cache, q, positions, counts)
    return [np.asarray(a[b]) for a, b in zip(listed, held, strict=True)]

  def test_the_list(self):
    _, cache = testing.run(CONFIG, turned(testing.qkv(40)), (20, 20))
    for T in (1, 4):
      for row in self.listed(cache, T):
        chosen = row[2:10]
        self.assertLen(row, 2 + 8 + 8 - T)
        self.assertEqual(row[:2].tolist(), [0, 1])
        last = list(range(40 + T - 8, 40))
        self.assertEqual(row[10:].tolist(), last)
        self.assertEqual(sorted(set(chosen)), chosen.tolist())
        self.assertGreaterEqual(chosen.min(), 2)
        self.assertLess(chosen.max(), 40 + T - 8)

  def test_a_list_is_a_short_text(self):
    # Attention over the list equals attention over a text of just these.
    q, k, v = testing.qkv(41)
    first = tuple(x[:, :40] for x in (q, k, v))
    _, cache = testing.run(CONFIG, turned(first), (20, 20))
    rows = self.listed(cache, 1, turned((q, k, v))[0][:, 40:])
    last = turned(tuple(x[:, 40:] for x in (q, k, v)), 40)
    positions = jnp.full((testing.B, 1), 40)
    out, _ = testing.step(testing.PLAIN, cache, *last, positions)
    for row, at in enumerate(rows):
      at = [*at, 40]
      short = turned(tuple(x[row : row + 1, jnp.array(at)] for x in (q, k, v)))
      want = testing.attention(short)[0, -1]
      np.testing.assert_allclose(out[row, 0], want, atol=1e-5)

  def test_chunks_of_one_call_are_calls(self):
    data = turned(testing.qkv(40))
    one, a = testing.run(CONFIG, data, (40,))
    many, b = testing.run(CONFIG, data, (8,) * 5)
    np.testing.assert_allclose(one, many, atol=1e-5)
    np.testing.assert_allclose(a.k.x, b.k.x, atol=1e-5)
    np.testing.assert_array_equal(a.length, b.length)

  @parameterized.parameters((2.0, 0), (-1.0, 10))
  def test_reuse(self, theta, hits):
    config = dataclasses.replace(CONFIG, theta=theta)
    data = turned(testing.qkv(40))
    _, cache = testing.run(config, data, (28,) + (1,) * 12)
    # Of 12 steps one votes, and again after local / 2 = 4 tokens.
    got = cache.hits.tolist()
    self.assertEqual(got, [0, 0] if not hits else [9, 9])

  def test_a_reused_list_keeps_what_left_the_window(self):
    config = dataclasses.replace(CONFIG, theta=-1.0)
    data = turned(testing.qkv(40))
    _, cache = testing.run(config, data, (28, 1, 1, 1))
    row = self.listed(cache, 1)[0]
    self.assertEqual(row[10:].tolist(), list(range(29 - 8, 31)))

  @parameterized.parameters(
    ({'budget': 0}, 'tokenselect: budget=0; it must be at least 1'),
    ({'local': 100}, 'local=100, chunk=512; the new tokens are the last'),
    ({'pool': 4}, 'pool=4; it must be odd.*Use 5'),
    ({'theta': -2.0}, 'theta=-2.0; a cosine is needed'),
    ({'inner': 'int8'}, r"inner='int8'; allowed \['contiguous', 'paged'\]"),
    ({'inner': 'paged', 'page_size': 12}, 'tokenselect: page_size=12; it must'),
    ({'pages': 9}, "tokenselect: pages=9, inner='contiguous'; there is a po"),
    ({'gqa_map': 'x'}, r"gqa_map='x'; allowed \['grouped', 'mod'\]"),
  )
  def test_messages(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      tokenselect.TokenSelectConfig(**fields)

  def test_messages_of_init(self):
    shape = dataclasses.replace(testing.shape(), heads=None)
    with self.assertRaisesRegex(ValueError, 'keeps a query; CacheShape.heads'):
      CONFIG.init(shape)
    shape = dataclasses.replace(testing.shape(), rope=None)
    with self.assertRaisesRegex(ValueError, 'tokenselect: the keys have no ro'):
      CONFIG.init(shape)
    fixed = dataclasses.replace(CONFIG, reposition=False).init(shape)
    _, k, v = testing.qkv(1)
    with self.assertRaisesRegex(ValueError, 'without the state of its vote'):
      interface.append(fixed, interface.Update(k=k, v=v))


if __name__ == '__main__':
  absltest.main()
