"""Tests of models.vit."""

import dataclasses
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import models
from jaxq.quant import equivalence
from models import vit
from tests.io import encoder_files

CONFIG = vit.VitConfig.from_hf(encoder_files.DINOV2)


def images(height=20, width=20, seed=0):
  return jax.random.normal(jax.random.key(seed), (2, height, width, 3))


class VitTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.folder = str(encoder_files.write_dinov2(folder))

  def test_bicubic_by_hand(self):
    # Halving: every weight row is that of the middle between two pixels.
    row = [-0.09375, 0.59375, 0.59375, -0.09375]
    np.testing.assert_allclose(vit.bicubic(8, 4)[1, 1:5], row)
    np.testing.assert_allclose(vit.bicubic(5, 5), np.eye(5))
    np.testing.assert_allclose(vit.bicubic(37, 16).sum(axis=1), 1.0)
    first = vit.bicubic(8, 4)[0]  # The pixel before the edge is the edge.
    np.testing.assert_allclose(first[:3], [row[0] + row[1], row[2], row[3]])

  @parameterized.parameters((20, 20), (12, 28))
  def test_scan_equals_block_by_block(self, height, width):
    model = models.load(self.folder)
    self.assertEqual(model.family, 'vit')
    self.assertIsNone(model.tokenizer)
    opened = models.open_model(self.folder)
    x = opened.embed(opened.outside(), images(height, width))
    self.assertEqual(x.shape, (2, 1 + height * width // 16, 16))
    for i in range(opened.num_blocks):
      variables = {'params': opened.block_params(i), 'quant': {}}
      x = opened.block_at(i).apply(variables, x)
    got = model.module.apply(
      model.variables, images(height, width), method='hidden'
    )
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / jnp.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)
    norm = opened.outside()['final_norm']
    expected = x * norm['scale'][None, None] + norm['bias'][None, None]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    features = model.module.apply(model.variables, images(height, width))
    np.testing.assert_allclose(features, got[:, 0], atol=1e-6)

  def test_scales_move_at_every_site(self):
    opened = models.open_model(self.folder)
    spec, params = opened.block_at(0), opened.block_params(0)
    x = opened.embed(opened.outside(), images())
    expected = spec.apply({'params': params}, x)
    for i, site in enumerate(spec.sites):
      s = jax.random.uniform(jax.random.key(i), (16,), minval=0.3, maxval=3.0)
      params = equivalence.divide_producer(params, site, s)
    got = spec.apply({'params': params}, x)
    np.testing.assert_allclose(got, expected, atol=1e-5)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, 'image_size=18, patch_size=4'):
      dataclasses.replace(CONFIG, image_size=18)
    opened = models.open_model(self.folder)
    with self.assertRaisesRegex(ValueError, r'images of 18 x 20.*of 4'):
      opened.embed(opened.outside(), images(18))
    with self.assertRaisesRegex(ValueError, r'\(2, 20, 20, 1\).*to RGB'):
      opened.embed(opened.outside(), images()[..., :1])


if __name__ == '__main__':
  absltest.main()
