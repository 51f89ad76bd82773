"""The driver holds one block at a time, however deep the model is."""

import dataclasses
import gc
import weakref

import jax
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.calibrate import driver
from jaxq.numerics import spec as spec_lib
from jaxq.quant import gptq, rotate
from jaxq.quant import transform as transform_lib
from models import loading
from tests.calibrate import testing
from tests.models import test_decoder

W4 = spec_lib.QuantSpec(dtype='int4', granularity='group', group_size=16)
NUM_BLOCKS = 5


class Watched:
  """Hands out fresh blocks and counts what is held when one is asked for.

  host: arrays handed out before that somebody still holds.
  device: bytes of the live JAX arrays.
  """

  def __init__(self, source):
    self._source = source
    self._handed: list[weakref.ref] = []
    self.host: list[int] = []
    self.device: list[int] = []

  def __getattr__(self, name):
    return getattr(self._source, name)

  def block(self, i):
    gc.collect()
    self.host.append(sum(ref() is not None for ref in self._handed))
    self.device.append(sum(a.nbytes for a in jax.live_arrays()))
    params = jax.tree.map(np.array, self._source.block(i))
    self._handed += [weakref.ref(leaf) for leaf in jax.tree.leaves(params)]
    return params


class Forgetful(testing.MemoryStore):
  """Takes blocks and keeps none."""

  def save_block(self, i, tree):
    pass


class MemoryTest(parameterized.TestCase):
  @parameterized.parameters('quantized', 'float')
  def test_no_block_is_held_when_the_next_is_read(self, inputs):
    config = dataclasses.replace(test_decoder.CONFIG, num_layers=NUM_BLOCKS)
    source = Watched(testing.small_model(config).source)
    model = loading.OpenModel(config, source, 'watched')
    method = transform_lib.chain(
      rotate.rotate(rotate.RotateConfig()),
      gptq.gptq(gptq.GptqConfig(weights=W4)),
    )
    calibrator = driver.Calibrator(
      model, method, driver.CalibrationConfig(batch_size=4, inputs=inputs)
    )
    tokens = testing.tokens()
    gc.collect()
    before = sum(a.nbytes for a in jax.live_arrays())
    calibrator.run(tokens, Forgetful())
    self.assertEqual(source.host, [0] * NUM_BLOCKS)
    block = sum(a.nbytes for a in jax.tree.leaves(source.block(0)))
    # The stream of all samples, and the two that the probe follows.
    activations = (tokens.size + tokens[:2].size) * config.hidden_size * 4
    held = np.array(source.device) - before - activations
    # Constants of the compiled functions; a tenth of a block.
    self.assertLess(max(held), block / 10, held)


if __name__ == '__main__':
  absltest.main()
