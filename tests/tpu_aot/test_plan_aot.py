"""A plan by the real TPU compiler, for a v5e slice of four that is not there.

Optimization level O1, as in test_calibration_aot: a third of the time.
"""

import jax
import pytest
from absl.testing import absltest, parameterized

from jaxq.calibrate import plan, plan_topology
from jaxq.numerics import spec as spec_lib
from jaxq.quant import gptq
from models import decoder, shapes

pytestmark = pytest.mark.slow

CONFIG = decoder.DecoderConfig(
  vocab_size=1024,
  hidden_size=256,
  intermediate_size=512,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=64,
)
W4 = spec_lib.QuantSpec(dtype='int4', granularity='group', group_size=64)


class PlanAotTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    level = jax.config.jax_optimization_level
    self.addCleanup(jax.config.update, 'jax_optimization_level', level)
    jax.config.update('jax_optimization_level', 'O1')

  def test_v5e(self):
    topology = plan_topology.parse('v5e:2x2')
    try:
      devices = plan_topology.devices(topology)
    except ValueError as e:
      print(f'skipped: {e}')
      self.skipTest(str(e))
    self.assertLen(devices, topology.num_devices)
    planner = plan.Planner(
      shapes.ShapeModel(config=CONFIG, name='small'),
      gptq.gptq(gptq.GptqConfig(weights=W4)),
      plan.Settings(samples=16, length=256),
    )
    made = planner.plan(topology, {'data': 2, 'model': 2})
    self.assertTrue(made.fits)
    self.assertGreater(made.seconds, 0)
    phases = {phase.name: phase for phase in made.phases}
    for name, phase in phases.items():
      if phase.program is not None:
        work, bound = phase.program.work, phase.bound
        print(
          f'{name}: {phase.total / 1e6:.1f} MB, {work.total_flops / 1e9:.2f} '
          f'GFLOP, {work.collective_bytes / 1e6:.2f} MB crossing, '
          f'{bound.by}, {work.unknown_loops} unknown loops'
        )
        # What crosses devices runs along axes of the mesh.
        for counted in work.collectives:
          self.assertNotEmpty(counted.collective.axes)
    # Half of x^T x and more, of the four taps and a shard's tokens; devices
    # that share a batch may share this work too.
    tokens, C, F = 4 * 256, CONFIG.hidden_size, CONFIG.intermediate_size
    gram = 1.25 * tokens * (3 * C**2 + F**2) / 2
    found = phases['observe_gptq'].program.work.total_flops
    self.assertGreater(found, gram)
    # The kernels of a forward pass are shared out over `model`.
    params = sum(
      a.size
      for a in jax.tree.leaves(
        shapes.ShapeModel(config=CONFIG, name='small').block_params(0)
      )
    )
    forward = phases['forward'].program.work.total_flops
    self.assertBetween(forward, 0.9 * tokens * params, 2 * tokens * params)
    self.assertGreater(phases['forward'].program.work.collective_bytes, 0)


if __name__ == '__main__':
  absltest.main()
