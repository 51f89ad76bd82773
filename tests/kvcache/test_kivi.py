"""Tests of jaxq.kvcache.kivi and oscar."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.kvcache import interface, kivi, oscar, per_token, rotation
from models import decoder
from tests.kvcache import testing

PLAIN = kivi.KiviConfig(group_size=32, residual=128, scale_dtype='float32')
TURNED = dataclasses.replace(PLAIN, rotate=True)
SCALED = dataclasses.replace(PLAIN, token_scale=True)
BOTH = dataclasses.replace(PLAIN, rotate=True, token_scale=True)


def imbalanced(r, seed, T=1024, D=128):
  """Keys of one head with outlier channels; 1/64 of the tokens times r."""
  rng = np.random.default_rng(seed)
  k = rng.normal(size=(1, T, 1, D))
  k[..., [3, 40, 77]] += (12.0, -9.0, 15.0)
  k[:, rng.choice(T, T // 64, replace=False)] *= r
  return jnp.asarray(k, jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def errors(config, k):
  """Relative error of the keys (N, T, 1, D) that a cache gives back: (N,)."""
  N, T, _, D = k.shape
  shape = interface.CacheShape(batch=N, capacity=T, kv_heads=1, head_dim=D)
  turned = rotation.turn(rotation.Rotation() if config.rotate else None, k)
  store, slots = (
    config.init(shape).k,
    jnp.arange(T)[None] + jnp.zeros((N, 1), int),
  )
  got = store.put(store.encode(turned), slots).values(0, T)
  norm = lambda x: jnp.sqrt(jnp.sum(x**2, axis=(1, 2, 3)))
  return norm(got - turned) / norm(k)


def mean_error(config, r):
  keys = [imbalanced(r, seed) for seed in range(3)]
  return float(jnp.mean(errors(config, jnp.concatenate(keys))))


def numpy_codes(x, bits, group, axis, mode):
  """Codes, scale and offset of x (T, C) by loops, groups along `axis`."""
  x = np.asarray(x, np.float32)
  x = x if axis == 0 else x.T
  codes = np.zeros(x.shape, np.int32)
  scales = np.zeros((x.shape[0] // group, x.shape[1]), np.float32)
  offsets = np.zeros_like(scales)
  qmax = np.float32(2**bits - 1)
  for i in range(0, x.shape[0], group):
    for j in range(x.shape[1]):
      part = x[i : i + group, j]
      low, high = part.min(), part.max()
      s = (high - low) / qmax
      if mode == 'integer':
        z = np.round(-low / s)
        codes[i : i + group, j] = np.clip(np.round(part / s) + z, 0, qmax)
        offset = -z * s
      else:
        codes[i : i + group, j] = np.clip(np.round((part - low) / s), 0, qmax)
        offset = low
      scales[i // group, j], offsets[i // group, j] = s, offset
  if axis == 1:
    codes, scales, offsets = codes.T, scales.T, offsets.T
  return codes, scales, offsets


class KiviTest(parameterized.TestCase):
  @parameterized.parameters(('minimum', 2), ('integer', 2), ('integer', 4))
  def test_codes_are_those_of_loops(self, mode, bits):
    config = kivi.KiviConfig(
      bits=bits, group_size=8, residual=16, mode=mode, scale_dtype='float32'
    )
    data = testing.qkv(48)
    _, cache = testing.run(config, data, (48,))
    read = jax.jit(lambda store: store.values(0, 48))
    data = jax.tree.map(np.asarray, data)
    stored = [np.asarray(read(store)) for store in (cache.k, cache.v)]
    for row in range(testing.B):
      for head in range(testing.HKV):
        for found, x, axis in (
          (stored[0], data[1], 0),
          (stored[1], data[2], 1),
        ):
          values = found[row, :, head]
          codes, scale, offset = numpy_codes(
            x[row, :, head], bits, 8, axis, mode
          )
          expected = codes * np.repeat(scale, 8, axis) + np.repeat(
            offset, 8, axis
          )
          np.testing.assert_allclose(values, expected, atol=1e-5)

  def test_committed_tokens_are_whole_windows(self):
    data = testing.qkv(60)
    for T, committed in ((20, 16), (40, 32), (60, 48)):
      part = jax.tree.map(lambda x, T=T: x[:, :T], data)
      _, cache = testing.run(testing.KIVI, part, (20,) * (T // 20))
      written = jnp.any(cache.k.scale[0] != 0, axis=(1, 2))  # (S / g,)
      self.assertEqual(int(jnp.sum(written)) * 8, committed)

  def test_the_residual_is_exact(self):
    # Of 20 tokens the last 4 are in full precision, as float keys.
    data = testing.qkv(20)
    _, cache = testing.run(testing.KIVI, data, (20,))
    np.testing.assert_array_equal(cache.k_residual[:, :4], data[1][:, 16:])
    np.testing.assert_array_equal(cache.v_residual[:, :4], data[2][:, 16:])

  def test_keys_per_channel_beat_keys_per_token(self):
    # At equal bytes, on keys with an outlier channel; values gain nothing.
    data = testing.qkv(64)
    q, k, v = data
    expected = testing.attention(data)

    def loss(config):
      out, cache = testing.run(config, data, (20, 20, 20) + (1,) * 4)
      return float(jnp.mean((out - expected)[:, 20:] ** 2)), cache

    per_channel, a = loss(testing.KIVI)
    per_token_loss, b = loss(per_token.PerTokenConfig(bits=2, group_size=8))
    self.assertEqual(
      interface.stored_bits_per_element(a) // 1,
      interface.stored_bits_per_element(b) // 1,
    )
    self.assertLess(per_channel, 0.5 * per_token_loss)

  def test_bits_per_element(self):
    shape = interface.CacheShape(
      batch=1, capacity=4096, kv_heads=8, head_dim=128
    )
    for config, bits in (
      (kivi.KiviConfig(bits=2), 3.0),
      (kivi.KiviConfig(bits=4), 5.0),
      (kivi.KiviConfig(bits=2, group_size=64), 2.5),
      # Half of 32 / (8 * 128): a norm per token, of keys only.
      (oscar.CONFIG, 3.0 + 32 / 1024 / 2),
      (dataclasses.replace(oscar.CONFIG, norm_scope='head'), 3.0 + 0.125),
    ):
      cache = jax.eval_shape(lambda config=config: config.init(shape))
      got = interface.stored_bits_per_element(cache)
      # The lengths: one int32.
      self.assertAlmostEqual(got, bits, delta=1e-4)
      residual = 2 * 128 * 8 * 128 * 32 / (2 * 4096 * 8 * 128)
      self.assertAlmostEqual(
        interface.bits_per_element(cache), got + residual, places=6
      )

  @parameterized.parameters(
    (dict(bits=5), r"bits=5; allowed \['1', '16'"),
    (dict(value_bits=7), 'value_bits=7; allowed'),
    (dict(residual=100), 'residual=100, group_size=32; .* multiple of 32'),
    (dict(group_size=0), 'group_size=0; it must be at least 1'),
    (dict(norm_scope='row'), "norm_scope='row'; allowed .'head', 'token'"),
    (dict(value_rotation='on'), "value_rotation='on'; allowed .'folded'"),
    (dict(mode='symmetric'), "mode='symmetric'; allowed .'integer', 'mini"),
    (dict(scale_dtype='int8'), "scale_dtype='int8'; allowed"),
  )
  def test_messages(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      kivi.KiviConfig(**fields)

  def test_heads_that_cannot_be_rotated(self):
    shape = dataclasses.replace(testing.shape(), head_dim=72 + 4)
    with self.assertRaisesRegex(ValueError, 'head_dim=76 with a rotation; the'):
      dataclasses.replace(TURNED, value_group_size=4).init(shape)


class OscarTest(parameterized.TestCase):
  def test_rotation_keeps_products_and_undoes_itself(self):
    q, k, _ = testing.qkv(12)
    turned = oscar.canalized_rotation(k)
    np.testing.assert_allclose(
      oscar.canalized_rotation(turned), k, atol=1e-5
    )  # Symmetric at powers of two.
    product = jnp.einsum('bthd,bshd->bhts', q[:, :, :2], k)
    np.testing.assert_allclose(
      jnp.einsum(
        'bthd,bshd->bhts', oscar.canalized_rotation(q[:, :, :2]), turned
      ),
      product,
      atol=1e-4,
    )
    for D in (80, 128):
      x = jax.random.normal(jax.random.key(0), (3, D))
      for turn in (rotation.Rotation(), rotation.Rotation(seed=3)):
        np.testing.assert_allclose(turn.undo(turn.apply(x)), x, atol=1e-5)

  def test_scores_with_norms_are_scores_of_restored_keys(self):
    for scope in kivi.NORM_SCOPES:
      config = dataclasses.replace(testing.OSCAR, norm_scope=scope)
      _, cache = testing.run(config, testing.qkv(40), (20, 20))
      q = jax.random.normal(
        jax.random.key(1), (testing.B, testing.HKV, 2, 1, testing.D)
      )
      np.testing.assert_allclose(
        cache.k.scores(q, 0, 32),
        jnp.einsum('bkgtd,bskd->bkgts', q, cache.k.values(0, 32)),
        rtol=1e-5,
        atol=1e-5,
      )

  def test_token_norm_imbalance_is_repaired(self):
    # Bounds of the specification: tokens 8 and 0.1 times as large, and alike.
    self.assertLess(mean_error(BOTH, 8.0), 0.75 * mean_error(PLAIN, 8.0))
    self.assertLess(mean_error(BOTH, 0.1), 0.95 * mean_error(PLAIN, 0.1))
    self.assertBetween(
      mean_error(BOTH, 1.0) / mean_error(PLAIN, 1.0), 0.99, 1.01
    )
    self.assertLess(mean_error(BOTH, 8.0), 1.01 * mean_error(SCALED, 8.0))

  def test_norm_imbalance(self):
    _, k, _ = testing.qkv(32)
    k = k / jnp.linalg.norm(k, axis=(2, 3), keepdims=True)
    k = k.at[:, 5].multiply(8.0)
    to_least, to_median = oscar.norm_imbalance(k, 16)
    np.testing.assert_allclose(to_least[0], [8, 1], rtol=1e-5)
    np.testing.assert_allclose(to_median[0], [8, 1], rtol=1e-5)

  def test_folded_value_rotation_keeps_the_logits(self):
    config = decoder.DecoderConfig(
      vocab_size=32,
      hidden_size=24,
      intermediate_size=32,
      num_layers=2,
      num_heads=4,
      num_kv_heads=2,
      head_dim=8,
      qkv_bias=True,
    )
    module = decoder.Decoder(config)
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 32)
    params = module.init(jax.random.key(1), tokens)['params']
    bias = params['blocks_0']['attention']['v_proj']['bias']
    params['blocks_0']['attention']['v_proj']['bias'] = bias + 0.5
    variables = {'params': params, 'quant': {'blocks_0': {}}}
    folded = oscar.fold_value_rotation(variables, 2, 8)
    expected, _ = module.apply(variables, tokens)
    got, _ = module.apply(folded, tokens)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    self.assertFalse(
      np.allclose(
        folded['params']['blocks_0']['attention']['v_proj']['kernel'],
        params['blocks_0']['attention']['v_proj']['kernel'],
      )
    )
    with self.assertRaisesRegex(ValueError, 'rotated already; fold once'):
      oscar.fold_value_rotation(folded, 2, 8)
    with self.assertRaisesRegex(ValueError, '16 outputs; 3 heads of 8'):
      oscar.fold_value_rotation(variables, 3, 8)
    kernel = {'kernel': 'packed'}
    block = {'attention': {'v_proj': kernel, 'o_proj': kernel}}
    with self.assertRaisesRegex(TypeError, "v_proj is a str; .*'online'"):
      oscar.fold_value_rotation({'params': block}, 2, 8)

  def test_online_is_folded(self):
    # The same cache, with the values turned before it or within.
    q, k, v = testing.qkv(40)
    online = dataclasses.replace(testing.OSCAR, bits=4)
    folded = dataclasses.replace(online, value_rotation='folded')
    turn = oscar.canalized_rotation
    a, _ = testing.run(online, (q, k, v), (20, 20))
    b, _ = testing.run(folded, (q, k, turn(v)), (20, 20))
    np.testing.assert_allclose(a, turn(b), atol=1e-4)

  def test_unknown_scope(self):
    with self.assertRaisesRegex(ValueError, "norm_scope='all'; allowed"):
      oscar.omni_token_scale(jnp.ones((1, 1, 1, 4)), 'all')


if __name__ == '__main__':
  absltest.main()
