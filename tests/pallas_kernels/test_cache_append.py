"""Tests of cache_append and select_topk, interpreted, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels.cache_append import api
from pallas_kernels.select_topk import api as topk

KERNEL = {'implementation': 'pallas_mosaic_tpu', 'chip': 'v5e'}


class CacheAppendTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('rows', (8, 128), 'bfloat16'),
    ('rows_bytes', (4, 128), 'uint8'),
    ('sublanes', (1, 128), 'bfloat16'),
    ('sublanes_bytes', (3, 128), 'uint8'),
    ('lanes', (2, 32), 'uint8'),
    ('lanes_of_floats', (2, 64), 'bfloat16'),
    ('groups', (2, 4), 'float16'),
    ('a_number_a_head', (4, 1), 'float16'),
    ('norms', (1, 1), 'float32'),
  )
  def test_one_token_a_row(self, sizes, dtype):
    rng = np.random.default_rng(0)
    cache = rng.integers(0, 200, size=(3, 256, *sizes)).astype(dtype)
    new = rng.integers(0, 200, size=(3, *sizes)).astype(dtype)
    slots = jnp.array([0, 200, 256])
    want = cache.copy()
    want[0, 0], want[1, 200] = new[0], new[1]
    for name in api.IMPLEMENTATIONS:
      f = functools.partial(
        api.cache_append, implementation=name, chip='v5e', interpret=True
      )
      got = jax.jit(f)(jnp.asarray(cache), jnp.asarray(new), slots)
      np.testing.assert_array_equal(np.asarray(got), want)

  def test_choice_and_messages(self):
    cache = jnp.zeros((2, 128, 1, 64), jnp.uint8)
    new, slots = cache[:, 0], jnp.zeros((2,), jnp.int32)
    self.assertEqual(api.choose(cache), 'xla')  # On a CPU.
    self.assertEqual(api.choose(cache, chip='v5e'), 'pallas_mosaic_tpu')
    with self.assertRaisesRegex(ValueError, r'new \(2, 1, 64\), slots \(1,\)'):
      api.cache_append(cache, new, slots[:1])
    with self.assertRaisesRegex(TypeError, 'new is float32, the cache uint8'):
      api.cache_append(cache, new.astype(jnp.float32), slots)
    with self.assertRaisesRegex(ValueError, "'triton'; allowed .*'xla'"):
      api.cache_append(cache, new, slots, implementation='triton')
    with self.assertRaisesRegex(NotImplementedError, "chip is 'v4'"):
      api.cache_append(cache, new, slots, **{**KERNEL, 'chip': 'v4'})
    with self.assertRaisesRegex(
      NotImplementedError, '100 slots of 1 heads and 64 channels'
    ):
      api.cache_append(cache[:, :100], new, slots, **KERNEL)
    wide = jnp.zeros((2, 128, 1, 64), jnp.complex64)
    with self.assertRaisesRegex(NotImplementedError, 'it takes 8 to 32 bits'):
      api.cache_append(wide, wide[:, 0], slots, **KERNEL)


class SelectTopkTest(parameterized.TestCase):
  @parameterized.parameters(1, 40)
  def test_is_a_stable_sort(self, k):
    rng = np.random.default_rng(k)
    scores = rng.integers(-4, 5, size=(2, 3, 300)).astype('float32')
    scores[0, 0, :3] = -np.inf, -0.0, 0.0
    lengths = np.array([[300, 2, 0], [17, 299, 300]])
    want = np.full((2, 3, k), -1)
    for at in np.ndindex(2, 3):
      row = scores[at][: lengths[at]]
      order = np.sort(np.argsort(-row, kind='stable')[:k])
      want[at][: len(order)] = order
    for name in topk.IMPLEMENTATIONS:
      got = topk.select_topk(
        jnp.asarray(scores),
        k,
        jnp.asarray(lengths),
        implementation=name,
        chip='v5e',
        interpret=True,
      )
      np.testing.assert_array_equal(got, want)

  def test_choice_and_messages(self):
    scores = jnp.zeros((2, 8))
    self.assertEqual(topk.choose(scores), 'xla')  # On a CPU.
    self.assertEqual(topk.choose(scores, chip='v5e'), 'pallas_mosaic_tpu')
    with self.assertRaisesRegex(ValueError, r'k=9 of 8 scores; allowed 1\.\.8'):
      topk.select_topk(scores, 9)
    with self.assertRaisesRegex(ValueError, r'lengths \(3,\) for scores'):
      topk.select_topk(scores, 2, jnp.zeros((3,), jnp.int32))
    with self.assertRaisesRegex(ValueError, "'triton'; allowed .*'xla'"):
      topk.select_topk(scores, 2, implementation='triton')
    with self.assertRaisesRegex(NotImplementedError, "chip is 'v4'"):
      topk.select_topk(scores, 2, **{**KERNEL, 'chip': 'v4'})
    with self.assertRaisesRegex(NotImplementedError, 'it takes 262144'):
      topk.select_topk(jnp.zeros((1, 2**18 + 1)), 2, **KERNEL)


if __name__ == '__main__':
  absltest.main()
