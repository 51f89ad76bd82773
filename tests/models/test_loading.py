"""Tests of models.loading: one call for every kind of checkpoint."""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import models
from jaxq.io import checkpoint
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from tests.decode import testing
from tests.io import model_files

TOKENS = jnp.array([[7, 65, 104, 200, 1, 0, 33, 12]])
W8 = spec_lib.QuantSpec(dtype='int8')
FINGERPRINT = {'data': 'of this test'}
EXTRA = {'quantization': {'scheme': 'W8A16'}}


def quantized(params):
  """All kernels of a block's parameters to int8 per channel."""
  return {
    group: {
      name: {'kernel': qarray.quantize(jnp.asarray(leaf['kernel']), W8)}
      for name, leaf in params[group].items()
    }
    if group in ('attention', 'mlp')
    else params[group]
    for group in params
  }


class LoadTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.made = testing.model()
    self.hf = testing.save(self.made, self.folder / 'hf')
    self.out = str(self.folder / 'jaxq')

  def write(self, blocks=2, finish=True):
    """A jaxq directory of the model, its kernels int8."""
    opened = models.open_model(self.hf)
    with checkpoint.Writer(self.out, FINGERPRINT) as writer:
      writer.save_outside(opened.outside())
      for i in range(blocks):
        params = jax.device_get(quantized(opened.block_params(i)))
        writer.save_block(i, {'params': params, 'quant': {}})
      if finish:
        model = {'model': opened.description()}
        writer.finish(EXTRA | model, opened.tokenizer().to_str())

  def logits(self, model):
    return model.module.apply(model.variables, TOKENS)[0]

  def test_hugging_face_directory(self):
    loaded = models.load(self.hf)
    self.assertEqual(loaded.config, testing.CONFIG)
    self.assertIsNone(loaded.quantization)
    self.assertEqual(loaded.name, self.hf)
    self.assertEqual(loaded.tokenizer.encode('ab').ids, [97, 98])
    np.testing.assert_array_equal(self.logits(loaded), self.logits(self.made))

  def test_gguf_and_hugging_face_are_the_same_model(self):
    gguf = model_files.write_gguf(self.folder / 'model.gguf')
    hf = model_files.write_hf(self.folder / 'other')
    a, b = models.load(str(gguf)), models.load(str(hf))
    for x, y in zip(
      jax.tree.leaves(a.variables), jax.tree.leaves(b.variables), strict=True
    ):
      np.testing.assert_array_equal(x, y)

  def test_jaxq_directory(self):
    self.write()
    loaded = models.load(self.out)
    self.assertEqual(loaded.quantization, {'scheme': 'W8A16'})
    kernel = loaded.variables['params']['blocks_0']['mlp']['up_proj']['kernel']
    self.assertIsInstance(kernel, qarray.QArray)
    self.assertEqual(kernel.qvalue.shape, (2, 16, 32))  # Blocks stacked.
    exact = self.logits(self.made)
    error = jnp.linalg.norm(self.logits(loaded) - exact)
    # Rounding to half of 1/127 of the largest: about half a percent a layer.
    self.assertLess(float(error / jnp.linalg.norm(exact)), 0.02)
    self.assertEqual(loaded.tokenizer.encode('ab').ids, [97, 98])

  @pytest.mark.loose_promotion  # jax.nn.dot_product_attention promotes.
  def test_bfloat16_casts_floats_and_leaves_scales(self):
    self.write()
    loaded = models.load(self.out, 'bfloat16')
    params = loaded.variables['params']
    self.assertEqual(params['embed']['embedding'].dtype, jnp.bfloat16)
    kernel = params['blocks_0']['mlp']['up_proj']['kernel']
    self.assertEqual(kernel.scale.dtype, jnp.float32)
    self.assertEqual(kernel.qvalue.dtype, jnp.int8)
    hidden, _ = loaded.module.apply(loaded.variables, TOKENS, method='hidden')
    self.assertEqual(hidden.dtype, jnp.bfloat16)
    exact = self.logits(self.made)
    error = jnp.linalg.norm(self.logits(loaded) - exact)
    # bfloat16 keeps 8 bits of a value.
    self.assertLess(float(error / jnp.linalg.norm(exact)), 0.05)

  def test_opening_reads_no_weights(self):
    path = self.folder / 'hf/model.safetensors'
    opened = models.open_model(self.hf)
    path.rename(path.with_suffix('.away'))
    self.assertEqual(opened.num_blocks, 2)
    self.assertEqual(opened.config, testing.CONFIG)

  def test_unfinished_directory_is_refused(self):
    self.write(blocks=1, finish=False)
    for f in (models.load, models.open_model):
      with self.assertRaisesRegex(
        ValueError, 'is unfinished; run the command that was writing it again'
      ):
        f(self.out)

  def test_quantized_source_is_refused_for_calibration(self):
    self.write()
    opened = models.open_model(self.out)
    with self.assertRaisesRegex(
      ValueError, r'quantized already \(W8A16\); .*Give the original source'
    ):
      opened.block_params(0)

  @parameterized.parameters(
    ('absent', FileNotFoundError, 'no such file or directory, and no packaged'),
    ('.', ValueError, 'neither config.json'),
  )
  def test_no_checkpoint(self, name, error, message):
    with self.assertRaisesRegex(error, message):
      models.load(str(self.folder / name))

  def test_unknown_dtype(self):
    with self.assertRaisesRegex(
      ValueError, "dtype='int8'; allowed are .*'bfloat16'"
    ):
      models.load(self.hf, 'int8')


if __name__ == '__main__':
  absltest.main()
