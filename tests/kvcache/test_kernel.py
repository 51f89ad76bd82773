"""Tests of kernel: stores as kernels read them, and caches that use one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.kvcache import interface, kernel, softmax, stores
from pallas_kernels import stored
from tests.kvcache import testing

SCORING = interface.Scoring(softcap=9.0)


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
