"""A W8A8 decoder block compiled for a TPU that is not there.

Norms and rotations give codes, and no float norm is made beside them.
"""

import collections
import re
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from jaxq.nn import linear, taps
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from models import decoder
from pallas_kernels import ahead_of_time, targets
from pallas_kernels.norm_quantize import api as norm_api

pytestmark = pytest.mark.slow
CONFIG = decoder.DecoderConfig(
  vocab_size=1024,
  hidden_size=512,
  intermediate_size=1024,
  num_layers=1,
  num_heads=4,
  num_kv_heads=2,
  head_dim=128,
)
W8 = spec_lib.QuantSpec(dtype='int8')
TOKEN = spec_lib.QuantSpec(dtype='int8', granularity='token')
KERNEL = re.compile(r'%(\w+)\.\d+ = \S+ .*target="tpu_custom_call"')


def w8a8_variables():
  """Of block 0, with o and down rotated whole, over 512 and 1024 channels."""
  block = decoder.block_spec(CONFIG)
  x = jnp.zeros((1, 2, CONFIG.hidden_size))
  params = block.module.init(jax.random.key(0), x)['params']
  variables = {'params': params, 'quant': {}}
  for lin in block.linears:
    q = qarray.quantize(taps.get_path(params, f'{lin.path}/kernel'), W8)
    variables = taps.set_path(variables, f'params/{lin.path}/kernel', q)
    entries: dict[str, Any] = {'input': linear.ActQuant(None, None, TOKEN)}
    if lin.path in block.rotated:
      entries['hadamard'] = linear.OnlineHadamard(q.shape[0])
    variables = taps.set_path(variables, f'quant/{lin.path}', entries)
  return variables


class KernelInputsAotTest(parameterized.TestCase):
  def compile(self, chip, f, shapes):
    try:
      return ahead_of_time.compile_for(chip, f, shapes)
    except NotImplementedError as e:
      self.skipTest(str(e))

  @parameterized.parameters('v5e', 'v6e')
  def test_w8a8_block(self, chip):
    block = decoder.block_spec(CONFIG)
    leaves, structure = jax.tree.flatten(jax.eval_shape(w8a8_variables))

    def f(x, *leaves):
      return block.apply(jax.tree.unflatten(structure, leaves), x)

    shapes = [((1, 256, CONFIG.hidden_size), jnp.bfloat16)]
    shapes += [(leaf.shape, leaf.dtype) for leaf in leaves]
    with mock.patch.object(targets, 'current', lambda: chip):
      text = self.compile(chip, f, shapes).as_text()
    kernels = collections.Counter(KERNEL.findall(text))
    counts = {'norm_quantize': 2, 'hadamard_quantize': 2, 'quantized_w8': 7}
    self.assertEqual(counts, {name: kernels[name] for name in counts})
    # No norm and no rotation is left to XLA, whose values would be floats.
    self.assertNotIn('rsqrt(', text)
    self.assertNotIn(' convolution(', text)
    # A norm reads the residual stream, and its codes feed all that read it.
    self.assertRegex(text, r'norm_quantize\.\d+ = \(s8\[256,512\]')
    self.assertNotRegex(text, r'f32\[(1,)?256,512\]\S* fusion')

  @parameterized.parameters('v5e', 'tpu7x')
  def test_copies(self, chip):
    K, S = 1024, 256

    def f(x, weight, gather, offset):
      return norm_api.norm_quantize(
        x,
        weight,
        scale=jnp.ones((1,)),
        gather=gather,
        offset=offset,
        implementation='pallas_mosaic_tpu',
        chip=chip,
      )[0]

    for x in (((300, K), jnp.bfloat16), ((16, K), jnp.float32)):
      rest = [((K,), jnp.float32), ((S,), jnp.int32), ((K + S,), jnp.float32)]
      text = self.compile(chip, f, [x, *rest]).as_text()
      self.assertIn('tpu_custom_call', text)
      self.assertNotIn('rsqrt', text)


if __name__ == '__main__':
  absltest.main()
