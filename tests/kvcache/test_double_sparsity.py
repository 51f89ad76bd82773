"""Tests of jaxq.kvcache.double_sparsity and label_channels."""

import dataclasses
import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import models
from experiments import label_statistics
from jaxq.kvcache import double_sparsity, label_channels, softmax
from jaxq.nn import rope as rope_lib
from jaxq.nn import taps
from models import decoder
from tests.decode import testing as decode_testing
from tests.kvcache import testing

EXACT = dataclasses.replace(testing.SPARSE, group_factor=1, label_bits=16)


step = functools.partial(testing.step, testing.PLAIN)
select = jax.jit(double_sparsity.DoubleSparseCache.select)


def filled(config, T=20):
  _, cache = testing.run(config, testing.qkv(T), (T,))
  return cache


class DoubleSparsityTest(parameterized.TestCase):
  def test_all_channels_choose_the_true_best(self):
    config = dataclasses.replace(EXACT, group_by='q_head')
    cache, (_, k, _) = filled(config), testing.qkv(20)
    q = testing.qkv(1, seed=3)[0]
    index, held = select(cache, softmax.group(q, testing.HKV, None)[:, :, :, 0])
    self.assertTrue(np.asarray(held).all())
    for row in range(testing.B):
      for head in range(testing.H):
        s = np.asarray(k)[row, :, head // 2] @ np.asarray(q)[row, 0, head]
        want = set(np.argsort(-s)[: config.heavy_tokens])
        self.assertEqual(set(np.asarray(index)[row, head]), want)

  @parameterized.parameters(('kv_head',), ('q_head',))
  def test_picking_is_masking(self, group_by):
    config = dataclasses.replace(
      testing.SPARSE, group_by=group_by, dense_prefill=False
    )
    cache = filled(config)
    one = tuple(x[:, -1:] for x in testing.qkv(21, seed=1))
    twice = tuple(jnp.repeat(x, 2, axis=1) for x in one)
    positions = testing.positions_of(cache.length, 1)
    picked, _ = step(cache, *one, positions)
    masked, _ = step(
      cache, *twice, jnp.concatenate([positions, positions + 1], 1)
    )
    np.testing.assert_allclose(picked[:, 0], masked[:, 0], atol=1e-5)

  def test_short_rows_read_everything(self):
    short = dataclasses.replace(testing.SPARSE, min_length=21)
    one = tuple(x[:, -1:] for x in testing.qkv(21, seed=1))
    positions = jnp.full((testing.B, 1), 20)
    cache = filled(short)
    got, _ = step(cache, *one, positions)
    dense = dataclasses.replace(cache, sparse=jnp.array(False))
    want, _ = step(dense, *one, positions)
    np.testing.assert_allclose(got, want, atol=1e-5)
    other, _ = step(filled(testing.SPARSE), *one, positions)
    self.assertGreater(float(jnp.abs(other - want).max()), 1e-4)

  def test_labels_are_the_keys_channels(self):
    config = dataclasses.replace(testing.SPARSE, label_bits=16)
    data = testing.qkv(40)
    for sizes in ((20, 20), (20,) + (1,) * 20):
      _, cache = testing.run(config, data, sizes)
      for head in range(testing.HKV):
        np.testing.assert_array_equal(
          cache.label.x[:, :40, head],
          data[1][:, :, head, np.asarray(cache.channels)[head]],
        )

  def test_the_first_and_newest_are_read(self):
    config = dataclasses.replace(testing.SPARSE, sinks=2, recent=3)
    q = testing.qkv(1, seed=3)[0]
    index, _ = select(
      filled(config), softmax.group(q, testing.HKV, None)[:, :, :, 0]
    )
    for row in np.asarray(index).reshape(-1, config.heavy_tokens):
      self.assertContainsSubset([0, 1, 17, 18, 19], row.tolist())

  def test_labels_cost_their_bits(self):
    config = dataclasses.replace(testing.SPARSE, label_bits=4)
    cache = config.init(testing.shape())
    # 4 of 16 channels: 2 bytes of codes, 4 of scale and minimum.
    tokens = testing.B * 64 * testing.HKV
    got = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.label))
    self.assertEqual(got, tokens * 6)

  @parameterized.parameters(
    ({'label_bits': 3}, r'label_bits=3; allowed \[2, 4, 8, 16\]'),
    ({'heavy_tokens': 0}, 'heavy_tokens=0; it must be at least 1'),
    ({'group_by': 'x'}, "double_sparsity: group_by='x'; allowed"),
    ({'recent': 300}, 'sinks=0 and recent=300 of heavy_tokens=256'),
  )
  def test_messages(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      double_sparsity.DoubleSparsityConfig(**fields)

  def test_messages_of_init(self):
    with self.assertRaisesRegex(ValueError, "channels=''; a label needs chan"):
      dataclasses.replace(testing.SPARSE, channels='').init(testing.shape())
    with self.assertRaisesRegex(ValueError, 'head_dim=16, group_factor=3; a l'):
      dataclasses.replace(testing.SPARSE, group_factor=3).init(testing.shape())


class LabelChannelsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.path = pathlib.Path(folder) / 'channels.json'

  def test_files(self):
    found = np.random.default_rng(0).random((3, testing.HKV, testing.D))
    label_channels.save(self.path, found, {'stat': 'qk'})
    config = dataclasses.replace(testing.SPARSE, channels=str(self.path))
    cache = config.init(testing.shape())
    stacked = jax.tree.map(lambda a: jnp.stack([a] * 2), cache)
    channels = stacked.of_layers(range(1, 3)).channels
    for layer in range(2):
      for head in range(testing.HKV):
        want = np.argsort(-found[layer + 1, head])[:4]
        np.testing.assert_array_equal(channels[layer, head], want)
    with self.assertRaisesRegex(ValueError, 'channels of 3 layers, 2 key hea'):
      config.order(4, 2, 16)
    with self.assertRaisesRegex(
      ValueError, 'the model has 1 layers or more, 3'
    ):
      config.order(1, 3, 16)
    self.path.write_text('{}')
    with self.assertRaisesRegex(ValueError, 'is no file of label channels'):
      config.init(testing.shape())
    with self.assertRaises(FileNotFoundError):
      label_channels.load(self.path.with_name('none'))
    with self.assertRaisesRegex(
      ValueError, r"stat='v'; allowed \['k', 'q', 'q"
    ):
      label_channels.observe('v')

  @parameterized.parameters('qk', 'k')
  def test_the_driver_finds_what_a_loop_finds(self, stat):
    model = decode_testing.model()
    c = model.config
    tokens = np.random.default_rng(0).integers(0, 256, (2, 12), np.int32)
    folder = decode_testing.save(model, self.path.parent / 'model')
    found = label_statistics.statistics(
      models.open_model(folder), tokens, stat=stat, batch_size=1
    )
    self.assertEqual(found.shape, (c.num_layers, c.num_kv_heads, c.head_dim))
    x = model.module.apply(
      model.variables, jnp.asarray(tokens), method='embed_tokens'
    )
    block = decoder.Block(c)
    for i in range(c.num_layers):
      params = jax.tree.map(
        lambda a, i=i: a[i], model.variables['params']['blocks_0']
      )
      (x, _), seen = block.apply({'params': params}, x, mutable=['tapped'])
      k = np.asarray(taps.get_path(seen['tapped'], 'attention/k_proj/out'))
      k = k.reshape(2, 12, c.num_kv_heads, c.head_dim)
      if stat == 'k':
        mean = np.abs(k).mean((0, 1))
        pairs = mean[:, : c.head_dim // 2] + mean[:, c.head_dim // 2 :]
        want = np.concatenate([pairs, pairs], -1)
        np.testing.assert_allclose(found[i], want, rtol=1e-4)
      else:
        q = np.asarray(taps.get_path(seen['tapped'], 'attention/q_proj/out'))
        q = q.reshape(2, 12, c.num_heads, c.head_dim)
        at = jnp.broadcast_to(jnp.arange(12)[None], (2, 12))
        q, k = (
          np.asarray(rope_lib.rotate(jnp.asarray(a), at, c.rope(c.kind(i))))
          for a in (q, k)
        )
        G = c.num_heads // c.num_kv_heads
        mean = np.abs(q * np.repeat(k, G, axis=2)).mean((0, 1))
        want = mean.reshape(c.num_kv_heads, G, c.head_dim).sum(1)
        np.testing.assert_allclose(found[i], want, rtol=1e-4)


if __name__ == '__main__':
  absltest.main()
