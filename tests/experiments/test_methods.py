"""Every method on a block of every kind: it runs, or says why it does not.

By shapes: each stage is traced, and the quantized block behind it, on experts
(Mixtral), LayerNorms with biases (OPT), norms on the stream (BERT), layer
scales (DINOv2), and both halves of Whisper. By numbers, where the tests of a
method and of a family have none.
"""

import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import models
from experiments import recipe
from jaxq.calibrate import steps
from jaxq.nn import blocks, taps
from jaxq.quant import schemes
from jaxq.quant import transform as transform_lib
from tests.calibrate import test_decoders, test_encoders
from tests.io import encoder_files, whisper_files
from tests.models import test_whisper

# Other schemes than W4A16, and fields that small blocks need.
SCHEMES = {
  'activations': 'W8A8_STATIC',
  'llm_fp4': 'W4A4',
  'mergequant': 'W4A4',
  'os_plus': 'W8A8_STATIC',
  'outliertune': 'W8A8',
  'ptq161': 'W1A16',
  'quant_experts': 'W4A8',
  'smoothquant': 'W8A8',
}
SETTINGS = {
  'awq': ('grid=2', 'clip_grid=2'),
  'llm_fp4': ('n_grid=2', 'rounds=1'),
  'mergequant': ('multiple=8', 'rank=2'),
  'os_plus': ('n_grid=2', 'n_max=2'),
  'outliertune': ('weight=gptq',),
  'ptq161': ('epochs=1', 'samples=2'),
  'quant_experts': ('shared_rank=2', 'expert_rank=1', 'num_experts=2'),
}
# Of a block's output, in dB: what these few bits and steps leave. One or two
# bits give no more than a part of it.
NUMBERS = {
  ('llm_fp4', 'vit'): 5.0,
  ('mergequant', 'vit'): 5.0,
  ('os_plus', 'whisper'): 25.0,  # A block of its decoder.
  ('outliertune', 'vit'): 20.0,
  ('ptq161', 'vit'): 2.0,
  ('quant_experts', 'vit'): 10.0,
}
REFUSALS = {
  ('rotate', family): 'rotate: .* Leave rotate'
  for family in ('opt', 'bert', 'vit', 'whisper')
}


@functools.cache
def kinds_of_block(family):
  """[(block, its params, the carry in front of it)], one of each kind."""
  with tempfile.TemporaryDirectory() as folder:
    if family in ('mixtral', 'opt'):
      model, data = test_decoders.open_model(family), test_decoders.TOKENS
    else:
      write, make = {
        'bert': (encoder_files.write_bert, test_encoders.encoder_data),
        'vit': (encoder_files.write_dinov2, test_encoders.vit_data),
        'whisper': (whisper_files.write_hf, test_whisper.batch),
      }[family]
      model = models.open_model(str(write(pathlib.Path(folder) / family)))
      data = make()
    outside = model.outside()
    carry = jax.eval_shape(model.embed, outside, data)
    found = []
    for i in range(model.num_blocks):
      if i in model.bridges:
        bridge = functools.partial(model.bridge, i)
        carry = jax.eval_shape(bridge, outside, carry)
      block = model.block_at(i)
      if not any(block == other for other, _, _ in found):
        found.append((block, model.block_params(i), carry))
  return found


class MethodsTest(parameterized.TestCase):
  @parameterized.product(
    method=sorted(recipe.METHODS),
    family=('bert', 'mixtral', 'opt', 'vit', 'whisper'),
  )
  def test_it_runs_or_says_why_not(self, method, family):
    transform = self.build(method)
    message = REFUSALS.get((method, family))
    for block, params, carry in kinds_of_block(family):
      if message is None:
        y = jax.eval_shape(self.run_all(block, transform), params, carry)
        self.assertEqual(y.shape, blocks.stream(carry).shape)
        continue
      with self.assertRaisesRegex(NotImplementedError, message) as caught:
        jax.eval_shape(self.run_all(block, transform), params, carry)
      text = str(caught.exception)
      self.assertNotIn('\n', text)
      self.assertTrue(text.endswith('.'), text)

  @pytest.mark.slow
  @parameterized.parameters(*sorted(NUMBERS))
  def test_the_output_is_near_the_float_one(self, method, family):
    block, params, carry = kinds_of_block(family)[-1]
    rng = np.random.default_rng(0)

    def fill(leaf):
      if leaf.dtype == bool:
        return jnp.ones(leaf.shape, bool)
      return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    carry = jax.tree.map(fill, carry)
    want = blocks.stream(block.apply({'params': params, 'quant': {}}, carry))
    transform = self.build(method)
    got = jax.jit(self.run_all(block, transform))(params, carry)
    error = jnp.sum((got - want) ** 2) / jnp.sum(want**2)
    decibels = float(-10 * jnp.log10(error))
    self.assertGreater(decibels, NUMBERS[method, family])
    self.assertLess(decibels, 60)  # Something was rounded.

  def build(self, method):
    """The method with its scheme and settings."""
    scheme = schemes.parse(SCHEMES.get(method, 'W4A16'), group_size=-1)
    settings = [f'{method}.{text}' for text in SETTINGS.get(method, ())]
    return recipe.build([method], scheme, settings).transform

  def run_all(self, block, transform):
    """(params, carry) -> the quantized block's output."""

    def run(params, carry):
      quant = {}
      for stage in transform_lib.stages(transform):
        variables, stats = {'params': params, 'quant': quant}, {}
        requests = stage.observe(block)
        if requests:
          states = steps.initial_states(block, requests, variables, carry)
          _, seen = block.observe({**variables, 'taps': states}, carry)
          stats = {tap: dict(taps.get_path(seen, tap)) for tap in requests}
        stats = steps.with_streams(stage, stats, [carry], None)
        params, quant = stage.apply(block, params, quant, stats)
      out = block.apply({'params': params, 'quant': quant}, carry)
      return blocks.stream(out)

    return run

  def test_the_tables_name_methods(self):
    named = {*SCHEMES, *SETTINGS}
    named |= {method for method, _ in (*REFUSALS, *NUMBERS)}
    self.assertContainsSubset(named, recipe.METHODS)


if __name__ == '__main__':
  absltest.main()
