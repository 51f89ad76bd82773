"""Tests of kernel: stores as kernels read them, and caches that use one."""

import contextlib
import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.kvcache import (
  evict,
  interface,
  kernel,
  kivi,
  ring,
  softmax,
  stores,
  zipcache,
)
from pallas_kernels import compat, stored, targets
from tests.kvcache import testing

SCORING = interface.Scoring(softcap=9.0)
WINDOWED = interface.Scoring(window=100)
T = 128  # The fewest new tokens that a kernel takes.
SHAPE = interface.CacheShape(
  batch=2,
  capacity=256,
  kv_heads=1,
  head_dim=64,
  dtype=jnp.bfloat16,
  heads=2,
)
# Some without a kernel for what they store: their own tokens still have one.
CONFIGS = {
  'contiguous': testing.CACHES['contiguous'],
  'ring': ring.RingConfig(window=128),
  'int8': testing.CACHES['int8'],
  'kivi': kivi.KiviConfig(),
  'zipcache': zipcache.ZipCacheConfig(),
  'h2o': evict.EvictConfig(policy='h2o'),
}
# Interpreted kernels are long programs of small work: compile time is all.
FAST = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}


@contextlib.contextmanager
def a_tpu(interpreted=True):
  """What is traced inside picks as on a TPU, and runs here."""
  with (
    mock.patch.object(targets, 'current', return_value='v5e'),
    mock.patch.object(compat, 'interpret_mode', lambda _: interpreted),
  ):
    yield


def jitted(f):
  """A new function, so that nothing traced before stands in for it."""
  return jax.jit(lambda *args: f(*args), compiler_options=FAST)


def new_tokens(size, seed):
  rng = np.random.default_rng(seed)
  return [
    jnp.asarray(rng.normal(size=(2, size, n, 64)), jnp.bfloat16)
    for n in (2, 1, 1)
  ]


def attend(cache, q, k, v, counts):
  positions = testing.positions_of(cache.length, q.shape[1], counts)
  return cache.attend(q, k, v, positions, WINDOWED)


def update_of(size):
  """Of `size` new tokens."""
  _, k, v = new_tokens(size, 5)
  return interface.Update(k=k, v=v)


class KernelTest(parameterized.TestCase):
  @parameterized.parameters('contiguous', 'int8', 'int2', 'kivi', 'oscar')
  def test_a_store_is_read_as_it_reads_itself(self, name):
    _, cache = testing.run(testing.CACHES[name], testing.qkv(40), (20,))
    for part in (cache.k, cache.v):
      store = stores.FloatStore(part) if name == 'contiguous' else part
      found = kernel.as_stored(store)
      np.testing.assert_allclose(
        stored.values(found), store.values(0, store.slots), atol=1e-6
      )

  def test_others_are_left_to_the_plain_path(self):
    shape = testing.shape()
    self.assertIsNone(kernel.as_stored(testing.CACHES['fp8'].init(shape).k))
    grid = stores.Grid(bits=3)
    self.assertIsNone(kernel.as_stored(stores.int_store(shape, 8, grid)))

  def test_the_kernel_gives_the_part_of_the_plain_path(self):
    shape = interface.CacheShape(
      batch=3, capacity=128, kv_heads=1, head_dim=64, dtype=jnp.bfloat16
    )
    store = stores.int_store(shape, 128, stores.Grid(bits=4))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 128, 1, 64)), jnp.float32)
    slots = jnp.tile(jnp.arange(128), (3, 1))
    store = jax.jit(lambda s, x: s.put(s.encode(x), slots))(store, x)
    q = jnp.asarray(rng.normal(size=(3, 1, 2, 64)), jnp.bfloat16)
    length = jnp.array([0, 100, 128])

    def both(q, store, length):
      plain = lambda: softmax.attend_store(
        softmax.group(q, 1, None),
        length[:, None],
        store,
        store,
        lambda s: jnp.where(s[None] < length[:, None], s[None], -1)[..., None],
        jnp.max(length),
        SCORING,
      )
      part = lambda **options: kernel.attend(
        q, length[:, None], store, store, length, SCORING, plain, **options
      )
      options = {'implementation': 'pallas_mosaic_tpu', 'chip': 'v5e'}
      return part(), part(**options, interpret=True)

    want, got = jax.jit(both)(q, store, length)
    np.testing.assert_array_equal(want.total[0], 0.0)
    np.testing.assert_array_equal(got.total[0], 0.0)
    for a, b in zip(
      (softmax.finish(want, jnp.float32), softmax.log_sum_exp(want)),
      (softmax.finish(got, jnp.float32), softmax.log_sum_exp(got)),
      strict=True,
    ):
      # Probabilities times scales are rounded to bfloat16.
      np.testing.assert_allclose(b[1:], a[1:], atol=0.01)

  @parameterized.parameters('contiguous', 'int8', 'zipcache', 'h2o')
  def test_a_prompt_in_chunks(self, name):
    # Rows of unlike lengths, padded; the second chunk sees what was stored.
    plain = jitted(attend)
    append = jitted(interface.append)
    cache = CONFIGS[name].init(SHAPE)
    with a_tpu():
      kernels = jitted(attend)
      for counts in (jnp.array([40, 128]), jnp.array([128, 70])):
        data = new_tokens(T, int(counts[0]))
        got, scored = kernels(cache, *data, counts)
        with mock.patch.object(targets, 'current', return_value='cpu'):
          want, update = plain(cache, *data, counts)
          cache = append(cache, update, counts)
        valid = np.arange(T)[None] < counts[:, None]
        # The kernel rounds probabilities to bfloat16.
        np.testing.assert_allclose(
          np.asarray(got, np.float32)[valid],
          np.asarray(want, np.float32)[valid],
          atol=0.03,
        )
        if name in ('zipcache', 'h2o'):
          np.testing.assert_allclose(
            scored.scores, update.scores, rtol=0.01, atol=0.01
          )

  @parameterized.parameters('contiguous', 'ring', 'int8', 'kivi')
  def test_a_token_is_written_as_it_was(self, name):
    # Two layers; one row is full of padding. Bit for bit.
    cache = CONFIGS[name].init(SHAPE)
    prefill = jitted(lambda c, n: interface.append(c, update_of(T), n))
    cache = prefill(cache, jnp.array([9, 128]))
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), cache)
    update = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), update_of(1))
    counts = jnp.array([1, 0])
    want = jitted(interface.append)(stacked, update, counts)
    with a_tpu():
      got = jitted(interface.append)(stacked, update, counts)
    self.assertTrue(testing.same(want, got))

  @parameterized.named_parameters(*((name, name) for name in CONFIGS))
  def test_a_kernel_only_where_there_is_a_tpu(self, name):
    cache = CONFIGS[name].init(SHAPE)

    def program(size):
      def step(cache, q, k, v, counts):
        out, update = attend(cache, q, k, v, counts)
        return out, interface.append(cache, update, counts)

      counts = jnp.array([1, 1])
      return str(jax.make_jaxpr(step)(cache, *new_tokens(size, 0), counts))

    self.assertNotIn('pallas_call', program(1) + program(T))
    with a_tpu(interpreted=False):
      self.assertIn('name=prefill_attention', program(T))
      choosing = name in ('zipcache', 'h2o')
      self.assertEqual('name=received_attention' in program(T), choosing)
      # Evicting caches write each head to a place of its own.
      self.assertEqual('name=cache_append' in program(1), name != 'h2o')

  def test_an_empty_part_merges_to_nothing(self):
    out, lse = jnp.zeros((1, 1, 2, 8)), jnp.full((1, 1, 2), -jnp.inf)
    nothing = kernel.from_log_sum_exp(out, lse, 1)
    some = dataclasses.replace(
      nothing,
      out=nothing.out + 3.0,
      largest=nothing.total,
      total=nothing.total + 1,
    )
    merged = softmax.finish(softmax.merge(nothing, some), jnp.float32)
    np.testing.assert_array_equal(merged, jnp.full((1, 1, 2, 8), 3.0))


if __name__ == '__main__':
  absltest.main()
