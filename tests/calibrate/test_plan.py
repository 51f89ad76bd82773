"""A plan holds what a run on eight simulated devices really takes.

tests.calibrate.planned_calibration, in a process with eight devices, says what
is compared with what.
"""

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from jaxq.calibrate import plan, plan_phases, plan_topology
from jaxq.numerics import spec as spec_lib
from jaxq.quant import gptq
from models import shapes
from tests import simulated
from tests.calibrate import planned_calibration

METHODS = ('gptq', 'w8a8')
TOLERANCE = 0.15
TINY = shapes.ShapeModel(config=planned_calibration.CONFIG, name='tiny')
W4 = spec_lib.QuantSpec(dtype='int4', granularity='group', group_size=32)


def planner(**settings):
  """Of a small calibration."""
  settings = {'samples': 16, 'length': 64} | settings
  transform = gptq.gptq(gptq.GptqConfig(weights=W4))
  return plan.Planner(TINY, transform, plan.Settings(**settings))


@pytest.mark.slow
class PlannedAgainstRunTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    lines = simulated.rows(planned_calibration, *METHODS)
    cls.runs = {line['method']: line for line in lines[: len(METHODS)]}
    cls.known, cls.searched = lines[len(METHODS) :]

  def check(self, what, planned, found):
    error = planned / found - 1
    print(f'{what}: planned {planned:,} bytes, found {found:,}: {error:+.1%}')
    self.assertLess(abs(error), TOLERANCE, what)

  @parameterized.parameters(*METHODS)
  def test_live_arrays(self, method):
    run = self.runs[method]
    # Whatever ran was planned.
    self.assertCountEqual(run['phases'], run['ran'])
    for name, row in run['phases'].items():
      self.check(f'{method} {name}', row['planned_live'], row['live'])

  def test_programs(self):
    for name, row in self.runs[METHODS[0]]['phases'].items():
      if name != 'probe':  # It is several programs.
        (known, temporaries), found = row['planned_program'], row['program']
        self.check(f'{name} arguments and outputs', known, found[0])
        self.check(f'{name} temporaries', temporaries + 1, found[1] + 1)

  def test_collectives_and_flops_of_a_known_program(self):
    self.assertEqual(self.known['unknown_loops'], 0)
    self.assertEqual(
      self.known['collectives'], [['all-reduce', ['model'], 4 * 64 * 4, 3]]
    )
    self.assertEqual(self.known['flops'], {'bf16': 3 * 2 * 4 * 16 * 64})

  def test_smallest_topology_that_fits(self):
    found = self.searched
    self.assertFalse(found['first'])
    self.assertTrue(found['fits'])
    self.assertLessEqual(found['peak'], 80e9)
    self.assertGreater(found['half'], 80e9)  # Half as many would not do.
    self.assertGreater(found['seconds'], 0)


class PlannerTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, None, 8), (4, None, 8), (16, None, 16), (4, 4, 4)
  )
  def test_batch_size(self, data, given, expected):
    found = planner(batch_size=given).batch_size({'data': data, 'model': 1})
    self.assertEqual(found, expected)

  @parameterized.parameters(
    (3, None, 'mesh data:3: sequences=16; data must divide'),
    (4, 6, 'mesh data:4: batch_size=6 and sequences=16; data must divide'),
    (2, 6, 'batch_size=6 and sequences=16'),
  )
  def test_batches_that_do_not_divide(self, data, given, message):
    with self.assertRaisesRegex(ValueError, message):
      planner(batch_size=given).batch_size({'data': data, 'model': 1})

  def test_best_mesh_needs_no_devices(self):
    shape, size = planner().best_mesh(plan_topology.parse('v5e:4x4'))
    self.assertEqual(shape['data'] * shape['model'], 16)
    _, alone = planner().best_mesh(plan_topology.parse('v5e:1x1'))
    self.assertLess(size, alone)

  def test_no_mesh_divides(self):
    # 256 devices: data up to 2, and 512 channels divide by no more than 512.
    with self.assertRaisesRegex(
      ValueError, 'v5p:12x12x12: none of its meshes can be used, for instance'
    ):
      planner(samples=2).best_mesh(plan_topology.parse('v5p:12x12x12'))

  def test_one_device_fits_and_says_why(self):
    topology = plan_topology.parse('cpu:1')
    made = planner(samples=8).plan(topology, {'data': 1, 'model': 1})
    self.assertTrue(made.fits)
    self.assertEqual(made.mesh_flag, 'data:1,model:1')
    self.assertEqual(made.batch_size, 8)
    self.assertIsNone(made.seconds)  # Of a CPU there are no peak figures.
    names = [phase.name for phase in made.phases]
    expected = 'outside embed observe_gptq apply_gptq forward probe'
    self.assertEqual(names, expected.split())
    flops = {p.name: p.program.work.total_flops for p in made.phases[2:5]}
    # Half of x^T x and more, of four taps: K = 128 three times and 512.
    gram = 1.25 * 8 * 64 * (3 * 128**2 + 512**2)
    self.assertGreater(flops['observe_gptq'], gram)
    self.assertEqual(made.phases[2].calls, 1)
    self.assertEmpty(made.phases[4].program.work.collectives)

  def test_steps_see_quantized_parts(self):
    seen = []

    def arguments(outside, runs, mesh):
      seen.append((sorted(outside), runs, dict(mesh.shape)))
      rows = jax.ShapeDtypeStruct((8, 4), jnp.float32)
      return (plan_phases.abstract_batch(rows, mesh),)

    step = plan.Step(
      name='more',
      calls=lambda mesh: 3,
      arguments=arguments,
      lower=lambda outside, runs, arguments: None,
    )
    transform = gptq.gptq(gptq.GptqConfig(weights=W4))
    settings = plan.Settings(samples=8, length=16)
    made = plan.Planner(TINY, transform, settings, [step], calibrates=False)
    mesh = plan_topology.abstract_mesh({'data': 2, 'model': 1})
    (phase,) = made.phases(mesh)
    self.assertEqual((phase.name, phase.calls), ('more', 3))
    self.assertEqual(phase.arguments, 8 * 4 * 4 // 2)
    outside, ((length, part),), shape = seen[0]
    self.assertEqual(length, 1)
    self.assertEqual(outside, ['embed', 'final_norm'])
    self.assertEqual(
      part['params']['mlp']['down_proj']['kernel'].qvalue.shape, (256, 128)
    )
    self.assertEqual(shape, {'data': 2, 'model': 1})


if __name__ == '__main__':
  absltest.main()
