"""Calibration data that says nothing of a channel: no method may make a NaN.

A channel that is zero on all data has no range, and a row and a column of zeros
in every Gram matrix. A NaN is refused, in a sentence that says where.
"""

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from jaxq.calibrate import checks
from jaxq.nn import blocks
from jaxq.numerics import spec as spec_lib
from jaxq.quant import (
  llm_fp4,
  mergequant,
  os_plus,
  outliertune,
  ptq161,
  quant_experts,
  transform,
)
from tests.quant import planted, testing

QuantSpec = spec_lib.QuantSpec
W8 = QuantSpec(dtype='int8')
A8 = QuantSpec(dtype='int8', granularity='token')
A8_STATIC = QuantSpec(dtype='int8', granularity='tensor')
EXPERTS = {
  'weights': W8,
  'inputs': A8,
  'shared_rank': 2,
  'expert_rank': 1,
  'num_experts': 2,
  'share': 0.1,
}
# name: (method, relative squared error of what the block adds).
METHODS = {
  'llm_fp4': (
    lambda: llm_fp4.llm_fp4(
      llm_fp4.LlmFp4Config(weights=W8, inputs=A8, rounds=1, n_grid=2)
    ),
    1e-2,
  ),
  'mergequant': (
    lambda: mergequant.mergequant(
      mergequant.MergeQuantConfig(weights=W8, inputs=A8, multiple=16)
    ),
    1e-3,
  ),
  'os_plus': (
    lambda: os_plus.os_plus(
      os_plus.OsPlusConfig(weights=W8, inputs=A8_STATIC, n_grid=2, n_max=2)
    ),
    1e-3,
  ),
  'outliertune': (
    lambda: outliertune.outliertune(
      outliertune.OutlierTuneConfig(weights=W8, inputs=A8, weight='gptq')
    ),
    1e-3,
  ),
  'ptq161': (
    lambda: ptq161.ptq161(
      ptq161.PTQ161Config(weights=QuantSpec(dtype='binary'), epochs=1)
    ),
    0.5,
  ),
  'quant_experts': (
    lambda: quant_experts.quant_experts(
      quant_experts.QuantExpertsConfig(base='gptq', **EXPERTS)
    ),
    1e-2,
  ),
  'quant_experts_awq': (
    lambda: quant_experts.quant_experts(
      quant_experts.QuantExpertsConfig(base='awq', **EXPERTS)
    ),
    1e-2,
  ),
}
DEAD = 3


def dead_block():
  """A block of one linear, whose norm puts out nothing at one channel."""
  block, params = planted.block('layer', planted.SHIFTED)
  for leaf in ('scale', 'bias'):
    norm = params['post_norm']
    params['post_norm'] = {**norm, leaf: norm[leaf].at[DEAD].set(0.0)}
  return block.without(('re:attention', 'fc2'), 0), params


class DeadChannelTest(parameterized.TestCase):
  @parameterized.parameters(*sorted(METHODS))
  def test_a_channel_of_zeros_is_harmless(self, name):
    make, bound = METHODS[name]
    block, params = dead_block()
    x = planted.inputs(batch=6)
    made, quant = testing.run(block, params, make(), x)
    self.assertIsNot(
      blocks.kernel_of(made, 'mlp/fc1'), blocks.kernel_of(params, 'mlp/fc1')
    )
    exact = testing.output(block, params, {}, x)
    y = testing.output(block, made, quant, x)
    error = float(jnp.mean((y - exact) ** 2) / jnp.mean((exact - x) ** 2))
    self.assertLess(error, bound)  # And so no NaN.


class NotFiniteTest(parameterized.TestCase):
  @parameterized.parameters(
    ('mergequant', 'steps_migrate', 'the scales of'),
    ('os_plus', 'os_plus_migrate', 'no threshold gives a finite error at'),
    ('outliertune', 'outliertune_symmetrize', 'the shift or the scales of'),
    ('outliertune', 'outliertune_scale', 'the shift or the scales of'),
  )
  def test_statistics_with_nan_are_refused(self, name, stage, message):
    """Before apply, and behind it: it runs inside jit and cannot raise."""
    block, params = dead_block()
    stages = transform.stages(METHODS[name][0]())
    (method,) = (s for s in stages if s.name == stage)
    stats = testing.observe(block, params, {}, method, planted.inputs())
    stats = jax.tree.map(
      lambda a: a.at[..., 5].set(jnp.nan) if a.ndim else a, stats
    )
    with self.assertRaisesRegex(
      ValueError, 'blocks.3.mlp.fc1.in: .* of its activations is NaN or Inf'
    ):
      checks.finite_stats(stats, 3)
    apply = jax.jit(method.apply, static_argnums=0)
    made, _ = apply(block, params, {}, stats)
    with self.assertRaisesRegex(
      ValueError,
      rf'^{name}: {message} blocks.3.(mlp.fc1|post_norm).*calibration data',
    ) as caught:
      checks.finite(made, 'blocks.3', method.failure)
    self.assertNotIn('\n', str(caught.exception))


if __name__ == '__main__':
  absltest.main()
