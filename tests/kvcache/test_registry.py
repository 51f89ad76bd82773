"""Tests of jaxq.kvcache.registry and storage."""

import dataclasses
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.kvcache import fp8, kivi, registry, ring, storage
from tests.kvcache import testing


class ParseTest(parameterized.TestCase):
  @parameterized.parameters(*registry.CACHES)
  def test_a_name_is_its_defaults(self, name):
    config = registry.parse(name)
    self.assertEqual(config, registry.CACHES[name])
    self.assertEqual(registry.parse(registry.text_of(config)), config)
    json.dumps(registry.describe(config))

  def test_fields(self):
    config = registry.parse(
      'oscar:bits=4,value_bits=2,rotate=false,clip=0.9,norm_scope=head'
    )
    self.assertEqual(
      config,
      dataclasses.replace(
        registry.CACHES['oscar'],
        bits=4,
        value_bits=2,
        rotate=False,
        clip=0.9,
        norm_scope='head',
      ),
    )
    self.assertIsInstance(config, kivi.KiviConfig)
    self.assertEqual(registry.parse('ring:window=512').window, 512)
    self.assertIsNone(registry.parse('kivi:value_bits=none').value_bits)

  def test_text_is_the_shortest(self):
    config = dataclasses.replace(registry.CACHES['oscar'], bits=4)
    self.assertEqual(registry.text_of(config), 'oscar:bits=4')
    self.assertEqual(registry.text_of(registry.CACHES['int2']), 'int2')
    self.assertEqual(
      registry.text_of(ring.RingConfig(window=9)), 'ring:window=9'
    )

  @parameterized.parameters(
    ('h2o', r"'h2o' is no cache; allowed \['contiguous', 'dont_waste"),
    ('', "'' is no cache"),
    ('kivi:bit=2', "cannot read 'bit=2'; kivi has the fields .'bits'"),
    ('kivi:bits', "cannot read 'bits'"),
    ('kivi:', "cannot read ''"),
    ('kivi:bits=two', 'bits=two; a whole number is needed'),
    ('kivi:rotate=1', 'rotate=1; true or false is needed'),
    ('kivi:clip=x', 'clip=x; a number is needed'),
    ('kivi:bits=7', 'bits=7; allowed'),
    ('contiguous:bits=2', "cannot read 'bits=2'; contiguous has no fields"),
  )
  def test_messages(self, text, message):
    with self.assertRaisesRegex(ValueError, message):
      registry.parse(text)

  def test_only_a_folded_rotation_touches_the_weights(self):
    variables = {'params': {'blocks_0': {}}}
    for config in registry.CACHES.values():
      self.assertIs(registry.prepare(config, variables, 1, 8), variables)


class StorageTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.path = pathlib.Path(folder) / 'cache.npz'

  @parameterized.parameters(*testing.CACHES)
  def test_every_bit_comes_back(self, name):
    config = testing.CACHES[name]
    if name == 'fp8':
      config = fp8.Fp8Config(v_dtype='e5m2')
    shapes = jax.eval_shape(
      lambda: config.init(testing.shape(dtype=jnp.bfloat16))
    )
    rng = np.random.default_rng(0)
    cache = jax.tree.map(  # Any bytes, those of NaNs too.
      lambda a: jnp.asarray(
        rng.integers(0, 256, a.size * a.dtype.itemsize, np.uint8)
        .view(a.dtype)
        .reshape(a.shape)
      ),
      shapes,
    )
    storage.save(self.path, (cache,), config, {'tokens': [1, 2]})
    (loaded,), extra = storage.load(self.path, (shapes,), config)
    self.assertTrue(testing.same(cache, loaded))
    self.assertEqual(extra, {'tokens': [1, 2]})

  def test_decoding_goes_on_as_if_never_stored(self):
    config, data = testing.OSCAR, testing.qkv(24)
    first = jax.tree.map(lambda x: x[:, :20], data)
    _, cache = testing.run(config, first, (20,))
    storage.save(self.path, cache, config)
    loaded, _ = storage.load(self.path, config.init(testing.shape()), config)
    rest = jax.tree.map(lambda x: x[:, 20:], data)
    expected, _ = testing.run(None, rest, (1,) * 4, cache=cache)
    got, _ = testing.run(None, rest, (1,) * 4, cache=loaded)
    np.testing.assert_array_equal(got, expected)

  def test_incompatible_files(self):
    config = testing.KIVI
    cache = config.init(testing.shape())
    storage.save(self.path, cache, config)
    self.assertEqual(
      [p.name for p in self.path.parent.iterdir()], ['cache.npz']
    )
    other = dataclasses.replace(config, bits=4)
    with self.assertRaisesRegex(ValueError, "'bits': 2.*'bits': 4.*settings"):
      storage.load(self.path, other.init(testing.shape()), other)
    with self.assertRaisesRegex(ValueError, r'codes is .*64.*batch and capaci'):
      storage.load(self.path, config.init(testing.shape(capacity=128)), config)
    with self.assertRaisesRegex(
      ValueError, 'model, batch and capacity must be'
    ):
      storage.load(self.path, config.init(testing.shape(batch=3)), config)
    with self.assertRaises(FileNotFoundError):
      storage.load(self.path.with_name('none'), cache, config)

  def test_damaged_and_newer_files(self):
    config = testing.KIVI
    cache = config.init(testing.shape())
    storage.save(self.path, cache, config)
    whole = self.path.read_bytes()
    for damaged in (b'', b'text', whole[: len(whole) // 2]):
      self.path.write_bytes(damaged)
      with self.assertRaisesRegex(ValueError, 'is no cache file, or a damaged'):
        storage.load(self.path, cache, config)
    header = {'format': storage.FORMAT, 'version': 99}
    np.savez(
      self.path, header=np.frombuffer(json.dumps(header).encode(), np.uint8)
    )
    with self.assertRaisesRegex(ValueError, 'version 99; this jaxq reads'):
      storage.load(self.path, cache, config)


if __name__ == '__main__':
  absltest.main()
