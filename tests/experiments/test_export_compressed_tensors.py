"""`--format=compressed-tensors` of experiments.export, called in process."""

import pathlib
import tempfile

import numpy as np
from absl.testing import absltest

import models
from jaxq.io import hf_quantized
from tests.experiments import testing
from tests.io import model_files, test_hf_quantized


class ExportTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.write = testing.entry_point('export').FORMATS['compressed-tensors']

  def test_awq_in_compressed_tensors_out(self):
    codes, zeros, scales = test_hf_quantized.write(self.folder / 'awq', 'awq')
    out = self.folder / 'out'
    printed = self.write(models.open_model(str(self.folder / 'awq')), out)
    self.assertEqual(printed, str(out))
    source = hf_quantized.open_directory(out)
    self.assertEqual(source.quantization['format'], 'pack-quantized')
    kernel = source.block(1)['params']['mlp']['down_proj']['kernel']
    np.testing.assert_array_equal(kernel.zero_point, zeros)
    np.testing.assert_array_equal(kernel.scale, scales)
    self.assertEqual(kernel.shape, codes.shape)

  def test_a_float_model_is_refused(self):
    model_files.write_hf(self.folder / 'hf')
    with self.assertRaisesRegex(ValueError, 'is float; compressed-tensors'):
      self.write(
        models.open_model(str(self.folder / 'hf')), self.folder / 'out'
      )


if __name__ == '__main__':
  absltest.main()
