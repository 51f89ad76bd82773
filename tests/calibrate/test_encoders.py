"""Every method on an encoder and on a vision transformer, by the driver."""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import models
from experiments import recipe
from jaxq.calibrate import driver, run
from jaxq.numerics import qarray
from jaxq.quant import schemes
from tests.calibrate import testing
from tests.io import encoder_files


def encoder_data():
  """Passages, padded."""
  rng = np.random.default_rng(0)
  lengths = rng.integers(4, 13, (8, 1))
  return {
    'tokens': rng.integers(4, 32, (8, 12)).astype(np.int32),
    'mask': np.arange(12)[None] < lengths,
  }


def vit_data():
  """Images of another size than the positions are for."""
  rng = np.random.default_rng(0)
  return rng.normal(size=(8, 12, 16, 3)).astype(np.float32)


FAMILIES = {
  'encoder': (encoder_files.write_bert, encoder_data),
  'vit': (encoder_files.write_dinov2, vit_data),
}


class EncodersTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def open(self, family):
    write, data = FAMILIES[family]
    return models.open_model(str(write(self.folder / family))), data()

  def build(self, methods, scheme):
    parsed = schemes.parse(scheme, group_size=16 if 'A16' in scheme else None)
    return recipe.build(methods, parsed, []).transform

  @parameterized.product(
    family=sorted(FAMILIES),
    recipe=(
      ('W4A16',),
      ('W4A16', 'gptq'),
      ('W4A16', 'awq'),
      ('W8A8', 'smoothquant'),
      ('W8A8_STATIC', 'smoothquant', 'gptq'),
    ),
  )
  def test_methods_run(self, family, recipe):
    scheme, *methods = recipe
    model, data = self.open(family)
    transform = self.build(methods, scheme)
    store, reports = testing.MemoryStore(), []
    config = driver.CalibrationConfig(batch_size=4)
    calibrator = driver.Calibrator(model, transform, config)
    calibrator.run(data, store, reports.append)
    self.assertLen(reports, 2)
    self.assertLen(reports[0].linears, 6)
    least = 10.0 if scheme == 'W4A16' else 25.0
    self.assertGreater(min(r.output_sqnr_db for r in reports), least)
    # Blocks are alike: each function is compiled once.
    self.assertLessEqual(max(calibrator.compilations.values()), 1)

  @parameterized.parameters(*sorted(FAMILIES))
  def test_gptq_beats_rounding_on_the_output(self, family):
    model, data = self.open(family)
    errors = {}
    for method in ('rtn', 'gptq'):
      store, reports = testing.MemoryStore(), []
      config = driver.CalibrationConfig(batch_size=4)
      driver.Calibrator(model, self.build([method], 'W3A16'), config).run(
        data, store, reports.append
      )
      errors[method] = reports[-1].output_sqnr_db
    self.assertGreater(errors['gptq'], errors['rtn'] + 1.0)

  @parameterized.parameters(*sorted(FAMILIES))
  def test_a_quantized_directory_loads(self, family):
    model, data = self.open(family)
    output = self.folder / 'out'
    self.assertTrue(
      run.calibrate(
        model,
        self.build(['rtn'], 'W4A16'),
        data,
        output,
        config=driver.CalibrationConfig(batch_size=4),
      )
    )
    quantized = models.load(str(output))
    self.assertEqual(quantized.family, family)
    kernel = quantized.variables['params']['blocks_0']['mlp']['up_proj'][
      'kernel'
    ]
    self.assertIsInstance(kernel, qarray.QArray)
    batch = jax.tree.map(jnp.asarray, data)
    got = quantized.module.apply(quantized.variables, batch)
    float_ = models.load(model.name)
    expected = float_.module.apply(float_.variables, batch)
    self.assertEqual(got.shape, expected.shape)
    error = float(jnp.abs(got - expected).mean() / jnp.abs(expected).mean())
    self.assertBetween(error, 1e-4, 0.5)

  def test_padding_does_not_count(self):
    model, data = self.open('encoder')
    other = dict(data, tokens=np.where(data['mask'], data['tokens'], 9))
    kernels = []
    for batch in (data, other):
      store = testing.MemoryStore()
      config = driver.CalibrationConfig(batch_size=4)
      calibrator = driver.Calibrator(
        model, self.build(['gptq'], 'W4A16'), config
      )
      calibrator.run(batch, store)
      kernels.append(store.blocks[1]['params']['mlp']['down_proj']['kernel'])
    np.testing.assert_array_equal(kernels[0].qvalue, kernels[1].qvalue)

  @parameterized.parameters(*sorted(FAMILIES))
  def test_rotate_is_refused(self, family):
    model, data = self.open(family)
    calibrator = driver.Calibrator(
      model,
      self.build(['rotate'], 'W4A16'),
      driver.CalibrationConfig(batch_size=4),
    )
    with self.assertRaisesRegex(NotImplementedError, 'rotate: .*Leave rotate'):
      calibrator.run(data, testing.MemoryStore())


if __name__ == '__main__':
  absltest.main()
