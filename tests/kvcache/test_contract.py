"""What every cache must do: one table, one row per cache.

All tests feed 20 tokens, or one, or pieces of 20: a cache is compiled twice.
"""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.kvcache import interface, registry
from tests.kvcache import testing

NAMES = tuple((name, name) for name in testing.CACHES)
QUANTIZED = tuple(
  (name, name)
  for name in testing.CACHES
  if name not in ('contiguous', 'ring', 'paged')
)
LOSSLESS = tuple((name, name) for name in testing.LOSSLESS)
DATA = testing.qkv(40)


def largest_float(jaxpr):
  """Elements of the largest floating array made anywhere in a jaxpr."""
  largest = 0
  for equation in jaxpr.eqns:
    for var in equation.outvars:
      if jnp.issubdtype(var.aval.dtype, jnp.floating):
        largest = max(largest, var.aval.size)
    for value in equation.params.values():
      for inner in value if isinstance(value, list | tuple) else (value,):
        if isinstance(inner, jax.extend.core.ClosedJaxpr):
          inner = inner.jaxpr
        if isinstance(inner, jax.extend.core.Jaxpr):
          largest = max(largest, largest_float(inner))
  return largest


def leaves(cache):
  """(path, array) of every leaf."""
  found, _ = jax.tree_util.tree_flatten_with_path(cache)
  return [(jax.tree_util.keystr(path), leaf) for path, leaf in found]


def ragged(config, counts, rows):
  """Feeds counts[i][row] tokens to the chosen rows; outputs and the cache."""
  cache, outs = config.init(testing.shape()), []
  for step in counts:
    step = [count if row in rows else 0 for row, count in enumerate(step)]
    T = 20 if max(step) > 1 else 1
    index = jnp.minimum(cache.length[:, None] + jnp.arange(T)[None], 39)
    new = [
      jnp.take_along_axis(x, index[:, :, None, None], axis=1) for x in DATA
    ]
    positions = testing.positions_of(cache.length, T, jnp.array(step))
    out, cache = testing.step(testing.PLAIN, cache, *new, positions)
    outs.append([out[row, :count] for row, count in enumerate(step)])
  return outs, cache


class ContractTest(parameterized.TestCase):
  def test_the_table_has_every_member(self):
    tables = testing.CACHES | testing.SELECTING
    types = {type(config) for config in tables.values()}
    types.add(type(testing.BITS))
    self.assertEqual(types, {type(c) for c in registry.CACHES.values()})

  @parameterized.named_parameters(*LOSSLESS)
  def test_lossless_settings_are_plain_attention(self, name):
    scoring = interface.Scoring(scale=0.3, window=9, softcap=5.0)
    out, cache = testing.run(
      testing.LOSSLESS[name], DATA, (20,) + (1,) * 20, scoring=scoring
    )
    expected = testing.attention(DATA, scoring)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_array_equal(cache.length, [40, 40])

  @parameterized.named_parameters(*NAMES)
  def test_is_near_plain_attention_in_one_program(self, name):
    prefill = jax.tree.map(lambda x: x[:, :20], DATA)
    rest = jax.tree.map(lambda x: x[:, 20:], DATA)
    config = testing.CACHES[name]
    _, cache = testing.run(config, prefill, (20,))
    before = testing.step._cache_size()
    out, _ = testing.run(config, rest, (1,) * 20, cache=cache)
    self.assertLessEqual(testing.step._cache_size() - before, 1)
    # 1 in the output is one standard deviation of a value.
    error = float(jnp.std(out - testing.attention(DATA)[:, 20:]))
    self.assertLess(error, 0.3)

  @parameterized.named_parameters(*NAMES)
  def test_a_row_of_a_ragged_batch_is_as_alone(self, name):
    counts = ((20, 7), (1, 1), (0, 1), (13, 18))
    config = testing.CACHES[name]
    together, cache = ragged(config, counts, (0, 1))
    np.testing.assert_array_equal(cache.length, [34, 27])
    alone, _ = ragged(config, counts, (1,))
    for a, b in zip(together, alone, strict=True):
      np.testing.assert_allclose(a[1], b[1], atol=1e-5)

  @parameterized.named_parameters(*NAMES)
  def test_tokens_are_encoded_once(self, name):
    config = testing.CACHES[name]
    _, before = testing.run(config, DATA, (20,) + (1,) * 12)
    later = jax.tree.map(lambda x: x[:, 32:], DATA)
    _, after = testing.run(config, later, (1,) * 8, cache=before)
    # Of 32 tokens two blocks are committed; nothing of them may change.
    for (path, a), (_, b) in zip(leaves(before), leaves(after), strict=True):
      if 'residual' in path or a.ndim != 4 or a.shape[0] == 1:
        continue
      if name == 'paged':
        a, b = a[1:5], b[1:5]  # The first row's 32 tokens.
      else:
        held = a.shape[1] * 32 // 64
        a, b = a[:, :held], b[:, :held]
      self.assertTrue(testing.same(a, b), path)

  @parameterized.named_parameters(*NAMES)
  def test_what_is_past_the_capacity_overwrites_nothing(self, name):
    if name == 'ring':
      self.skipTest('a ring keeps the newest of any number')
    # Inside jit, where nothing can be raised.
    config, data = testing.CACHES[name], testing.qkv(65, seed=1)
    full = jax.tree.map(lambda x: x[:, :64], data)
    _, before = testing.run(config, full, (20, 20, 20) + (1,) * 4)
    rest = jax.tree.map(lambda x: x[:, 64:], data)
    _, after = testing.run(config, rest, (1,), cache=before)
    np.testing.assert_array_equal(after.length, [65, 65])
    for (path, a), (_, b) in zip(leaves(before), leaves(after), strict=True):
      # All 64 are committed: the window begins a new block.
      if 'residual' not in path and a.ndim == 4:
        self.assertTrue(testing.same(a, b), path)

  @parameterized.named_parameters(*NAMES)
  def test_decoding_leaves_what_prefill_leaves(self, name):
    if name == 'zipcache':
      self.skipTest('a block is split by the queries of the step it ends in')
    config = testing.CACHES[name]
    _, prefilled = testing.run(config, DATA, (20, 20))
    _, decoded = testing.run(config, DATA, (1,) * 40)
    for (path, a), (_, b) in zip(
      leaves(prefilled), leaves(decoded), strict=True
    ):
      if 'residual' in path:
        a, b = a[:, : 40 % testing.R], b[:, : 40 % testing.R]
      a, b = (np.asarray(x).astype(np.float32) for x in (a, b))
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6, err_msg=path)

  @parameterized.named_parameters(*NAMES)
  def test_nbytes_is_the_sum_of_the_leaves(self, name):
    cache = testing.CACHES[name].init(testing.shape())
    total = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(cache))
    self.assertEqual(interface.nbytes(cache), total)
    bits = 8 * total / (2 * testing.B * 64 * testing.HKV * testing.D)
    self.assertAlmostEqual(interface.bits_per_element(cache), bits)

  @parameterized.named_parameters(
    (name, name)
    for name in ('contiguous', 'paged', 'int4', 'oscar', 'zipcache')
  )
  def test_a_donated_cache_is_not_copied(self, name):
    def stacked(tree):  # Three layers.
      return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((3, *a.shape), a.dtype), tree
      )

    config = testing.CACHES[name]
    cache = jax.eval_shape(lambda: config.init(testing.shape(capacity=8192)))
    attend = lambda c, *new: c.attend(
      *new, testing.positions_of(c.length, 1), testing.PLAIN
    )
    update = jax.eval_shape(attend, cache, *testing.qkv(1))[1]
    counts = jax.ShapeDtypeStruct((testing.B,), jnp.int32)
    append = jax.jit(interface.append, donate_argnums=0)
    compiled = append.lower(stacked(cache), stacked(update), counts).compile()
    memory = compiled.memory_analysis()
    leaves = jax.tree.leaves(cache)
    # A CPU copies what it writes as bits (stores.scatter), and nothing else.
    short = [
      a
      for a in leaves
      if jnp.issubdtype(a.dtype, jnp.floating) and a.dtype.itemsize < 4
    ]
    size, copied = (
      3 * sum(a.size * a.dtype.itemsize for a in of) for of in (leaves, short)
    )
    self.assertGreaterEqual(memory.alias_size_in_bytes, 0.99 * size)
    self.assertLess(memory.temp_size_in_bytes, copied + 0.1 * size)

  @parameterized.named_parameters(*QUANTIZED)
  def test_attend_makes_no_float_array_of_the_caches_size(self, name):
    S, config = 8192, testing.CACHES[name]
    cache = jax.eval_shape(lambda: config.init(testing.shape(capacity=S)))

    def attend(cache, q, k, v):
      positions = cache.length[:, None]
      return cache.attend(q, k, v, positions, testing.PLAIN)[0]

    data = testing.qkv(1)
    elements = testing.B * S * testing.HKV * testing.D
    jaxpr = jax.make_jaxpr(attend)(cache, *data)
    self.assertLess(largest_float(jaxpr.jaxpr), elements / 4)
    if name in ('int4', 'oscar'):  # Compiled ones: what XLA really allocates.
      memory = jax.jit(attend).lower(cache, *data).compile().memory_analysis()
      self.assertLess(memory.temp_size_in_bytes, 4 * elements / 2)


class VariationsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    (name, name) for name in ('kivi', 'oscar', 'oscar_head')
  )
  def test_chunks_of_a_block_are_token_by_token(self, name):
    # What experiments.evaluate --kv_cache counts on.
    config = testing.CACHES[name]
    data = jax.tree.map(lambda x: x[:, :33], DATA)
    chunked, _ = testing.run(config, data, (16, 16, 1))
    single, _ = testing.run(config, data, (1,) * 33)
    np.testing.assert_allclose(chunked, single, atol=2e-5)

  def test_jit_is_eager(self):
    q, k, v = testing.qkv(1)
    cache = testing.CACHES['int8'].init(testing.shape())
    positions = testing.positions_of(cache.length, 1)
    out, update = cache.attend(q, k, v, positions, testing.PLAIN)
    eager = interface.append(cache, update)
    jitted, made = testing.step(testing.PLAIN, cache, q, k, v, positions)
    np.testing.assert_allclose(out, jitted, atol=1e-5)
    for (path, a), (_, b) in zip(leaves(eager), leaves(made), strict=True):
      a, b = (np.asarray(x).astype(np.float32) for x in (a, b))
      np.testing.assert_allclose(a, b, atol=1e-2, err_msg=path)

  @parameterized.named_parameters(*NAMES)
  def test_bfloat16(self, name):
    config, shape = testing.CACHES[name], testing.shape(dtype=jnp.bfloat16)
    data = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in testing.qkv(1)]

    def step(q, k, v):
      cache = config.init(shape)
      positions = testing.positions_of(cache.length, 1)
      return cache, testing.step(testing.PLAIN, cache, q, k, v, positions)

    before, (out, after) = jax.eval_shape(step, *data)
    self.assertEqual(out.dtype, jnp.bfloat16)
    dtypes = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
    self.assertEqual(dtypes(before), dtypes(after))
    self.assertNotIn(jnp.float32, dtypes(getattr(before, 'k_residual', None)))


class MessagesTest(parameterized.TestCase):
  @parameterized.named_parameters(*NAMES)
  def test_overflow_is_told_before_anything_is_written(self, name):
    if name == 'ring':
      self.skipTest('a ring keeps the newest of any number')
    cache = testing.CACHES[name].init(testing.shape())
    _, k, v = testing.qkv(65)
    with self.assertRaisesRegex(
      ValueError, 'row 0 would hold 65 tokens; the capacity is 64.*ring'
    ):
      interface.append(cache, interface.Update(k=k, v=v))
    np.testing.assert_array_equal(cache.length, [0, 0])

  @parameterized.named_parameters(*NAMES)
  def test_batch_and_heads_must_be_the_caches(self, name):
    cache = testing.CACHES[name].init(testing.shape(batch=3))
    q, k, v = testing.qkv(1)
    positions = jnp.zeros((2, 1), jnp.int32)
    with self.assertRaisesRegex(ValueError, 'for a cache of 3 rows; the batch'):
      cache.attend(q, k, v, positions, testing.PLAIN)
    cache = testing.CACHES[name].init(testing.shape())
    with self.assertRaisesRegex(ValueError, '4 query and 1 key heads for a ca'):
      cache.attend(q, k[:, :, :1], v[:, :, :1], positions, testing.PLAIN)
    short = (x[..., :8] for x in (q, k, v))
    with self.assertRaisesRegex(ValueError, 'for heads of 16; every new token'):
      cache.attend(*short, positions, testing.PLAIN)
    with self.assertRaisesRegex(
      ValueError, r'k \(2, 2, 2, 16\) for heads of 1'
    ):
      twice = (jnp.repeat(x, 2, axis=1) for x in (k, v))
      cache.attend(q, *twice, positions, testing.PLAIN)

  def test_an_update_is_of_the_caches_rows(self):
    cache = testing.CACHES['contiguous'].init(testing.shape(batch=3))
    _, k, v = testing.qkv(2)
    update = interface.Update(k=k, v=v)
    with self.assertRaisesRegex(ValueError, 'an update of 2 rows .* of 3 rows'):
      interface.append(cache, update)
    cache = testing.CACHES['contiguous'].init(testing.shape())
    with self.assertRaisesRegex(ValueError, r'counts \(3,\) for a cache of 2'):
      interface.append(cache, update, jnp.array([1, 1, 1]))
    for counts in ([3, 1], [1, -1]):
      with self.assertRaisesRegex(ValueError, r'of 2 tokens; allowed 0\.\.2'):
        interface.append(cache, update, jnp.array(counts))

  def test_shapes_are_positive(self):
    with self.assertRaisesRegex(ValueError, 'CacheShape: capacity=0; it must'):
      testing.shape(capacity=0)

  @parameterized.parameters('int4', 'kivi', 'zipcache', 'int2')
  def test_heads_that_cannot_be_packed(self, name):
    shape = dataclasses.replace(testing.shape(), head_dim=9)
    with self.assertRaisesRegex(
      ValueError, 'head_dim=9.*(multiple of|must divide)'
    ):
      testing.CACHES[name].init(shape)


if __name__ == '__main__':
  absltest.main()
