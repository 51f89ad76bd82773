"""Tests of offload: Double Sparsity with its tokens in host memory."""

import dataclasses
import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from experiments import adapters
from jaxq.decode import autoregressive
from jaxq.kvcache import (
  contiguous,
  double_sparsity,
  interface,
  labels,
  offload,
  registry,
  softmax,
  storage,
)
from models import decoder, query_prediction
from tests.decode import testing as decode_testing
from tests.kvcache import testing

LAYERS, CAPACITY = 5, 64
CONFIG = dataclasses.replace(
  decode_testing.CONFIG, head_dim=testing.D, num_layers=LAYERS
)
KEPT = dataclasses.replace(testing.SPARSE, heavy_tokens=6, dense_layers=1)
OFFLOADED = dataclasses.replace(KEPT, offload=True)
PREDICTED = dataclasses.replace(OFFLOADED, predict=True)
MODULE = decoder.Decoder(CONFIG)
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 48), np.int32)
apply = jax.jit(MODULE.apply, donate_argnums=3)


@functools.cache
def variables():
  """A model whose attention is not flat."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = jax.jit(MODULE.init)(jax.random.key(0), tokens)['params']
  params = {**params, 'embed': jax.tree.map(lambda e: e * 50, params['embed'])}
  return {'params': params, 'quant': {'blocks_0': {}}}


def empty(config, dtype=jnp.float32):
  """Caches of the model."""
  make = lambda: decoder.init_caches(CONFIG, (), 2, CAPACITY, dtype, config)
  return jax.jit(make)()


@functools.cache
def read(config, steps=6):
  """Logits of a ragged prompt in two chunks, and of `steps` tokens.

  Both chunks are 20 wide, so that a config is compiled twice.
  """
  caches, outs, start = empty(config), [], 0
  for T, counts in ((20, (20, 13)), (20, (8, 8)), *(((1, (1, 1)),) * steps)):
    length = caches[0].length[0]
    positions = testing.positions_of(length, T, counts)
    tokens = jnp.asarray(TOKENS[:, start : start + T])
    logits, caches = apply(variables(), tokens, positions, caches)
    valid = positions[..., None] >= 0
    outs.append(np.asarray(jnp.where(valid, logits, 0.0)))
    start += T
  return outs, caches


class OffloadTest(parameterized.TestCase):
  def test_where_tokens_lie_changes_nothing(self):
    want, kept = read(KEPT)
    got, caches = read(OFFLOADED)
    for a, b in zip(want, got, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5)
    cache = caches[0]
    np.testing.assert_array_equal(cache.length, kept[0].length)
    np.testing.assert_array_equal(cache.label.codes, kept[0].label.codes)
    tokens = cache.tokens
    for name in 'kv':
      near, far = (getattr(tokens, f'{at}_{name}') for at in ('near', 'far'))
      stored = np.concatenate([near, far])  # (L, B, S, Hkv, D)
      own = np.asarray(getattr(kept[0], name).x)
      for row, length in enumerate(cache.length[0]):
        np.testing.assert_array_equal(
          stored[:, row, :length], own[:, row, :length]
        )

  def test_what_the_device_holds(self):
    _, kept = read(KEPT)
    _, caches = read(OFFLOADED)
    cache = caches[0]
    self.assertLen(cache.tokens.near_k, 1)
    self.assertLen(cache.tokens.far_k, 4)
    for leaf in jax.tree.leaves(cache):
      far = leaf.ndim == 5 and leaf.shape[0] == 4
      kind = 'pinned_host' if far else 'device'
      self.assertEqual(leaf.sharding.memory_kind, kind)
    # Of each of 4 layers: 2 rows of 64 tokens, 2 heads, 16 channels, k and v.
    far = 4 * 2 * (2 * CAPACITY * testing.HKV * testing.D * 4)
    extra = LAYERS * 5  # A number and a flag of each layer,
    sparse = LAYERS  # in the place of a flag.
    self.assertEqual(
      offload.device_nbytes(cache), interface.nbytes(cache) - far
    )
    self.assertEqual(
      offload.device_nbytes(cache),
      interface.nbytes(kept[0]) - far + extra - sparse,
    )

  def test_a_prediction_that_takes_all_is_exact(self):
    # 40 of 34 tokens: whatever was asked, all of them come.
    got, _ = read(dataclasses.replace(PREDICTED, heavy_tokens=40))
    want, _ = read(contiguous.ContiguousConfig())
    for a, b in zip(want, got, strict=True):
      np.testing.assert_allclose(a, b, atol=2e-5)

  def test_which_layers_are_predicted(self):
    def predicted(**fields):
      config = dataclasses.replace(PREDICTED, **fields)
      return empty(config)[0].predicted.tolist()

    # Not the dense one, not 0 and 1, not the last.
    self.assertEqual(predicted(), [False, False, True, True, False])
    self.assertEqual(
      predicted(exact_layers=(3,)), [False, False, True, False, False]
    )
    self.assertEqual(
      predicted(dense_layers=3), [False, False, False, True, False]
    )
    self.assertEqual(predicted(predict=False), [False] * 5)

  def test_rows_of_a_layer(self):
    _, caches = read(OFFLOADED)
    layers, shared = interface.split(caches[0])
    q = testing.qkv(1, seed=3)[0]
    queries = softmax.group(q, testing.HKV, None)[:, :, :, 0]

    @jax.jit
    def fetch(layers, shared, i):
      one = jax.tree.map(lambda a: a[i], layers).joined(shared, None)
      return one.fetch(queries), labels.select(one, queries)

    for layer in (1, 4):
      rows, (index, some) = fetch(layers, shared, layer)
      self.assertTrue(np.asarray(some).all())
      far = np.asarray(caches[0].tokens.far_v[layer - 1])
      for row, head in np.ndindex(2, testing.HKV):
        at = np.asarray(index[row, head])
        np.testing.assert_array_equal(rows.at[row, :, head], at)
        np.testing.assert_array_equal(rows.v[row, :, head], far[row, at, head])

  def test_a_query_of_the_same_layer_is_the_query(self):
    block = decoder.Block(CONFIG)
    params = jax.tree.map(lambda a: a[2], variables()['params']['blocks_0'])
    x = jax.random.normal(jax.random.key(1), (2, 3, CONFIG.hidden_size))
    at = jnp.broadcast_to(jnp.arange(3)[None], (2, 3))

    def ask(m, x):
      own = {'params': params['attention']}
      return query_prediction.queries(m.attention, own, m.input_norm(x), at)

    got = block.apply({'params': params}, x, method=ask)
    _, seen = block.apply({'params': params}, x, mutable=['heads'])
    want = seen['heads']['attention']['q'][0]
    np.testing.assert_allclose(got, want, atol=1e-6)

  def test_generation(self):
    prompts = ([5, 200, 7], list(range(40, 57)))
    texts = [
      autoregressive.generate(
        adapters.language_model(MODULE, config),
        variables(),
        prompts,
        max_new_tokens=12,
        prefill_chunk=8,
      ).tokens
      for config in (KEPT, OFFLOADED)
    ]
    np.testing.assert_array_equal(*texts)

  def test_one_layer_alone(self):
    outs = [
      testing.run(
        dataclasses.replace(config, heavy_tokens=3), testing.qkv(8), (1,) * 8
      )[0]
      for config in (KEPT, OFFLOADED)
    ]
    np.testing.assert_allclose(*outs, atol=1e-5)

  def test_a_run_of_dense_layers_stays(self):
    config = dataclasses.replace(
      PREDICTED, dense_layers=LAYERS, exact_layers=(4,)
    )
    (cache,) = decoder.init_caches(CONFIG, (), 2, CAPACITY, kv_cache=config)
    self.assertIsInstance(cache, double_sparsity.DoubleSparseCache)
    self.assertFalse(bool(cache.sparse.any()))

  def test_storage_puts_it_back(self):
    _, caches = read(OFFLOADED)
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / 'cache.npz'
      storage.save(path, caches, OFFLOADED)
      loaded, _ = storage.load(path, caches, OFFLOADED)
    self.assertTrue(testing.same(caches, loaded))
    far = loaded[0].tokens.far_k
    self.assertEqual(far.sharding.memory_kind, 'pinned_host')

  def test_messages(self):
    for fields, message in (
      ({'inner': 'int8'}, "offload=True, inner='int8'; allowed 'contiguous'"),
      ({'min_length': 9}, 'offload=True, min_length=9; allowed 0: reading'),
      ({'dense_prefill': False}, 'dense_prefill=False; allowed True: masking'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        dataclasses.replace(OFFLOADED, **fields)
    with self.assertRaisesRegex(
      ValueError, 'predict=True, offload=False; a pr'
    ):
      dataclasses.replace(KEPT, predict=True)
    with self.assertRaisesRegex(ValueError, r'exact_layers=\(3,\), predict=Fa'):
      dataclasses.replace(OFFLOADED, exact_layers=(3,))
    text = 'double_sparsity:channels=random,offload=true,predict=true'
    config = registry.parse(text + ',exact_layers=3/7')
    self.assertEqual(config.exact_layers, (3, 7))
    self.assertEqual(registry.parse(registry.text_of(config)), config)


if __name__ == '__main__':
  absltest.main()
