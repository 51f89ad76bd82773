"""Tests of models.encoder."""

import dataclasses
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import models
from jaxq.nn import taps
from jaxq.quant import equivalence
from models import encoder
from tests.io import encoder_files

CONFIG = encoder.EncoderConfig.from_hf(encoder_files.BERT)


def batch(seed=0, lengths=(9, 5, 1)):
  """Three sequences of tokens, the rest padding."""
  tokens = jax.random.randint(jax.random.key(seed), (3, 9), 1, 32)
  mask = jnp.arange(9)[None] < jnp.array(lengths)[:, None]
  return {'tokens': tokens, 'mask': mask}


class EncoderTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.folder = str(encoder_files.write_bert(folder))

  def test_scan_equals_block_by_block(self):
    model = models.load(self.folder)
    self.assertEqual(model.family, 'encoder')
    opened = models.open_model(self.folder)
    outside = opened.outside()
    carry = opened.embed(outside, batch())
    for i in range(opened.num_blocks):
      variables = {'params': opened.block_params(i), 'quant': {}}
      carry = opened.block_at(i).apply(variables, carry)
    got = model.module.apply(model.variables, batch(), method='hidden')
    norm = outside['final_norm']
    x = carry['x'] - carry['x'].mean(axis=-1, keepdims=True)
    x = x / jnp.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-12)
    expected = x * norm['scale'][None, None] + norm['bias'][None, None]
    np.testing.assert_allclose(got, expected, atol=1e-5)

  def test_padding_changes_nothing(self):
    model = models.load(self.folder)
    embed = jax.jit(model.module.apply)
    long = embed(model.variables, batch())
    np.testing.assert_allclose(jnp.linalg.norm(long, axis=1), 1.0, atol=1e-6)
    other = batch()
    other['tokens'] = jnp.where(other['mask'], other['tokens'], 7)
    np.testing.assert_allclose(embed(model.variables, other), long, atol=1e-6)
    short = {name: a[1:2, :5] for name, a in batch().items()}
    np.testing.assert_allclose(
      embed(model.variables, short), long[1:2], atol=1e-6
    )

  def test_types_count(self):
    model = models.load(self.folder)
    zeros = {**batch(), 'types': jnp.zeros((3, 9), jnp.int32)}
    apply = model.module.apply
    same = apply(model.variables, zeros)
    np.testing.assert_array_equal(apply(model.variables, batch()), same)
    ones = {**batch(), 'types': jnp.ones((3, 9), jnp.int32)}
    self.assertGreater(
      float(jnp.abs(apply(model.variables, ones) - same).max()), 1e-3
    )

  def test_scales_move_at_every_site(self):
    opened = models.open_model(self.folder)
    spec = opened.block_at(1)
    params = opened.block_params(1)
    carry = opened.embed(opened.outside(), batch())
    expected = spec.apply({'params': params}, carry)['x']
    self.assertLen(spec.sites, 3)
    for i, site in enumerate(spec.sites):
      s = jax.random.uniform(jax.random.key(i), (16,), minval=0.3, maxval=3.0)
      params = equivalence.divide_producer(params, site, s)
    got = spec.apply({'params': params}, carry)['x']
    np.testing.assert_allclose(got, expected, atol=1e-5)
    scale = taps.get_path(params, 'mlp_shortcut/scale')
    self.assertGreater(float(jnp.abs(scale - 1).max()), 0.1)

  def test_a_search_sees_the_mask(self):
    opened = models.open_model(self.folder)
    spec = opened.block_at(0)
    variables = {'params': opened.block_params(0)}
    carry = opened.embed(opened.outside(), batch())
    tapped = spec.tapped(variables, carry)
    site = spec.sites[0]
    x = taps.get_path(tapped, 'attention/q_proj/in')
    mask = batch()['mask'][..., None]
    got = spec.output(site, variables, x)
    h = spec.module.apply(
      variables, carry['x'], method=lambda m, x: m.input_norm(x)
    )
    expected = spec.module.apply(
      variables,
      h,
      batch()['mask'],
      method=lambda m, x, mask: m.attention(x, mask),
    )
    np.testing.assert_allclose(
      jnp.where(mask, got, 0.0), jnp.where(mask, expected, 0.0), atol=1e-6
    )

  def test_messages(self):
    replace = dataclasses.replace
    with self.assertRaisesRegex(ValueError, 'num_layers=0; it must be at'):
      replace(CONFIG, num_layers=0)
    with self.assertRaisesRegex(ValueError, 'hidden_size=16, num_heads=3'):
      replace(CONFIG, num_heads=3)
    with self.assertRaisesRegex(ValueError, "activation='swish'; allowed"):
      replace(CONFIG, activation='swish')
    opened = models.open_model(self.folder)
    tokens = jnp.ones((1, 41), jnp.int32)
    with self.assertRaisesRegex(ValueError, '41 tokens; the model has 40'):
      opened.embed(opened.outside(), {'tokens': tokens, 'mask': tokens > 0})


if __name__ == '__main__':
  absltest.main()
