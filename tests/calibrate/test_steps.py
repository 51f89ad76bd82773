"""Tests of jaxq.calibrate.steps."""

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from jaxq.calibrate import steps
from jaxq.numerics import spec as spec_lib
from jaxq.parallel import mesh as mesh_lib
from jaxq.quant import gptq, rotate
from jaxq.quant import transform as transform_lib
from models import decoder
from tests.calibrate import testing
from tests.models import test_decoder

CONFIG = test_decoder.CONFIG
BLOCK = decoder.block_spec(CONFIG)
CARRY = jax.ShapeDtypeStruct((2, 8, CONFIG.hidden_size), jnp.float32)


def make(group_size=16, mesh=None):
  weights = spec_lib.QuantSpec(
    dtype='int4', granularity='group', group_size=group_size
  )
  chain = transform_lib.chain(
    rotate.rotate(rotate.RotateConfig()),
    gptq.gptq(gptq.GptqConfig(weights=weights)),
  )
  rules = () if mesh is None else decoder.sharding_rules(CONFIG, 1)
  return steps.Steps(
    transform_lib.stages(chain),
    testing.small_model().embed,
    rules=rules,
    mesh=mesh,
  )


class StepsTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_lowers_from_shapes_what_runs(self, on_mesh):
    mesh = mesh_lib.make_mesh('', jax.devices()[:1]) if on_mesh else None
    params = testing.small_model().block_params(0)
    lowered = make(mesh=mesh).lower(BLOCK, params, CARRY)
    self.assertEqual(
      list(lowered),
      [
        'forward_float',
        'apply_rotate',
        'observe_gptq',
        'apply_gptq',
        'forward',
      ],
    )
    x, finite = lowered['forward'].out_info
    self.assertEqual((x.shape, finite.shape), ((2, 8, 32), ()))
    self.assertGreater(lowered['forward'].compile().cost_analysis()['flops'], 0)

  def test_trace_raises_what_a_method_says_and_compiles_nothing(self):
    made = make(group_size=24)
    params = testing.small_model().block_params(0)
    with self.assertRaisesRegex(ValueError, 'K=32, group_size=24'):
      made.trace(BLOCK, params, CARRY)
    made = make()
    made.trace(BLOCK, params, CARRY)
    self.assertEqual(set(made.compilations.values()), {0})

  def test_initial_states_are_as_wide_as_the_kernels(self):
    made = make()
    params = testing.small_model().block_params(0)
    states = steps.initial_states(
      BLOCK, made.stages[1].observe(BLOCK), {'params': params}, CARRY
    )
    upper = states['mlp']['down_proj']['in']['hessian'].upper
    self.assertEqual(upper.shape, (64, 64))
    self.assertEqual(jnp.sum(upper), 0)


if __name__ == '__main__':
  absltest.main()
