"""Caches that select tokens of a pool of pages: what is read, and only that."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.kvcache import interface, paged, quest, softmax
from tests.kvcache import test_contract, testing

DATA = testing.qkv(30)
SIZES = (8, 8, 8) + (1,) * 6
PAGED = {
  'quest': dataclasses.replace(testing.SELECTING['quest'], inner='paged'),
  'tokenselect': dataclasses.replace(
    testing.TOKENSELECT, inner='paged', page_size=4
  ),
}
NAMES = tuple((name, name) for name in PAGED)


class PagedSelectionTest(parameterized.TestCase):
  @parameterized.named_parameters(*NAMES)
  def test_pages_in_any_order_are_rows(self, name):
    want, rows = testing.run(testing.SELECTING[name], DATA, SIZES)
    cache = PAGED[name].init(testing.shape())
    order = np.random.default_rng(0).permutation(32) + 1
    cache = paged.with_table(cache, jnp.asarray(order.reshape(2, 16)))
    got, cache = testing.run(None, DATA, SIZES, cache=cache)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(cache.length, rows.length)
    np.testing.assert_array_equal(cache.k.values(0, 30), rows.k.values(0, 30))
    if name == 'tokenselect':
      np.testing.assert_array_equal(cache.index, rows.index)

  def test_a_pool_smaller_than_all_rows(self):
    config = dataclasses.replace(PAGED['quest'], pages=13)
    cache = config.init(testing.shape())
    self.assertFalse(bool(jnp.any(cache.k.table)))
    table = np.zeros((2, 16), np.int32)
    table[0, :8], table[1, :4] = range(1, 9), range(9, 13)
    cache = paged.with_table(cache, jnp.asarray(table))
    positions = testing.positions_of(cache.length, 20, (20, 9))
    new = jax.tree.map(lambda x: x[:, :20], DATA)
    _, cache = testing.step(testing.PLAIN, cache, *new, positions)
    np.testing.assert_array_equal(cache.k.values(0, 20)[0], new[1][0])
    np.testing.assert_array_equal(cache.k.values(0, 9)[1], new[1][1, :9])
    np.testing.assert_array_equal(cache.k.pool[0], jnp.zeros((4, 2, 16)))

  @parameterized.named_parameters(*NAMES)
  def test_no_array_of_the_caches_size_is_made(self, name):
    S = 8192
    config = dataclasses.replace(PAGED[name], page_size=64)
    cache = jax.eval_shape(lambda: config.init(testing.shape(capacity=S)))

    def attend(cache, q, k, v):
      positions = cache.length[:, None]
      return cache.attend(q, k, v, positions, testing.PLAIN)[0]

    jaxpr = jax.make_jaxpr(attend)(cache, *testing.qkv(1)).jaxpr
    elements = testing.B * S * testing.HKV * testing.D
    self.assertLess(test_contract.largest_float(jaxpr), elements / 4)

  def test_long_runs_are_those_of_one_block(self):
    rng = np.random.default_rng(0)
    pool = jnp.asarray(rng.normal(size=(150, 8, 2, 4)), jnp.float32)
    table = jnp.asarray(rng.permutation(149)[:148].reshape(1, 148) + 1)
    store = paged.PagedStore(pool, table.astype(jnp.int32))
    flat = pool[table].reshape(1, 148 * 8, 2, 4)
    q = jnp.asarray(rng.normal(size=(1, 2, 3, 1, 4)), jnp.float32)
    scores = store.scores(q, 8, 1160)  # Two blocks, and a rest.
    want = jnp.einsum('bkgtd,bskd->bkgts', q, flat[:, 8:1168])
    np.testing.assert_allclose(scores, want, atol=1e-5)
    np.testing.assert_allclose(
      store.combine(scores, 8, 1160),
      jnp.einsum('bkgts,bskd->bkgtd', want, flat[:, 8:1168]),
      rtol=1e-4,
      atol=1e-3,
    )

  def test_the_kernel_reads_the_pages_that_were_chosen(self):
    shape = interface.CacheShape(
      batch=2, capacity=96, kv_heads=2, head_dim=128, dtype=jnp.bfloat16
    )
    config = quest.QuestConfig(
      budget=48, dense_layers=0, group_by='all', inner='paged'
    )
    rng = np.random.default_rng(0)
    draw = lambda T, H: jnp.asarray(rng.normal(size=(2, T, H, 128)), 'bfloat16')
    cache = config.init(shape)
    cache = paged.with_table(
      cache, jnp.asarray(rng.permutation(12).reshape(2, 6) + 1)
    )
    update = interface.Update(k=draw(80, 2), v=draw(80, 2))
    cache = jax.jit(interface.append)(cache, update, jnp.array([80, 37]))
    q = draw(1, 4)

    @functools.partial(jax.jit, static_argnums=0)
    def attend(implementation, cache, q):
      queries = softmax.group(q, 2, None)
      index, some = cache.select(queries[:, :, :, 0])
      part = quest.attend_pages(
        cache,
        q,
        cache.length[:, None],
        index,
        some,
        testing.PLAIN,
        implementation=implementation,
        chip='v5e',
        interpret=True,
      )
      return index, softmax.finish(part, jnp.float32)

    index, got = attend('pallas_mosaic_tpu', cache, q)
    self.assertEqual(index.shape, (2, 1, 3))
    # bfloat16: the kernel multiplies rounded probabilities.
    np.testing.assert_allclose(got, attend('xla', cache, q)[1], atol=2e-2)

  def test_messages(self):
    cache = PAGED['tokenselect'].init(testing.shape())
    with self.assertRaisesRegex(ValueError, r'a table \(2, 3\) for 2 rows of'):
      paged.with_table(cache, jnp.zeros((2, 3), jnp.int32))
    cache = testing.TOKENSELECT.init(testing.shape())
    with self.assertRaisesRegex(
      ValueError, 'FloatStore; a table is for inner='
    ):
      paged.with_table(cache, jnp.zeros((2, 16), jnp.int32))


if __name__ == '__main__':
  absltest.main()
