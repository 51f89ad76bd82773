"""Tests of jaxq.calibrate.plan_program."""

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized
from jax.sharding import AbstractMesh

from jaxq.calibrate import plan_hlo, plan_program
from jaxq.numerics import chip_specs
from jaxq.parallel import collectives
from jaxq.parallel import mesh as mesh_lib

MESH = AbstractMesh((2, 4), ('data', 'model'))
CHIP = chip_specs.ChipSpec(
  memory=1e9, bandwidth=100.0, peak={'bf16': 10.0, 'int8': 20.0}, interconnect=5
)
REFUSED = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of
memory in memory space hbm. Used 21.95G of 15.48G hbm. Exceeded hbm capacity by
6.47G.

Total hbm usage >= 22.47G:
    reserved        530.00M
    program          21.95G
    arguments        {}

Output size 0B; shares 0B with arguments.
"""


def counted(kind, axes, count=1):
  """A collective of 80 bytes."""
  return plan_hlo.Counted(
    collective=collectives.Collective(
      kind=kind, axes=axes, nbytes=80, where=''
    ),
    count=count,
  )


def program(flops=None, found=(), arguments=0, outputs=0):
  """A program with this work."""
  work = plan_hlo.Work(flops=flops or {}, collectives=found, unknown_loops=0)
  return plan_program.Program(
    arguments=arguments, outputs=outputs, temporaries=7, work=work
  )


class BoundTest(parameterized.TestCase):
  @parameterized.parameters(
    # Of 4 devices each sends 3/4, twice for a sum.
    ('all-reduce', ('model',), 1, 2 * 80 * 3 / 4),
    ('all-gather', ('model',), 2, 2 * 80 * 3 / 4),
    ('reduce-scatter', ('data',), 1, 40),
    ('all-to-all', ('data', 'model'), 1, 70),
    ('collective-permute', ('model',), 3, 240),
    ('all-reduce', (), 1, 0),  # Groups of one device.
    ('collective-permute', (), 1, 0),
  )
  def test_sent_bytes(self, kind, axes, count, expected):
    sent = plan_program.sent_bytes(counted(kind, axes, count), MESH)
    self.assertAlmostEqual(sent, expected)

  @parameterized.parameters(
    ({'bf16': 50.0}, (), 100, 'compute', 5.0),
    ({'bf16': 50.0, 'int8': 40.0}, (), 100, 'compute', 7.0),
    ({'int4': 40.0}, (), 10, 'compute', 2.0),  # As fast as int8 at least.
    ({'fp8': 40.0}, (), 10, 'compute', 4.0),  # It has none: as bf16.
    ({'bf16': 1.0}, (), 300, 'memory', 3.0),
    ({}, (counted('all-reduce', ('model',)),), 100, 'links', 24.0),
  )
  def test_the_largest_of_three(self, flops, found, arguments, by, seconds):
    bound = plan_program.bound(program(flops, found, arguments), CHIP, MESH)
    self.assertEqual(bound.by, by)
    self.assertAlmostEqual(bound.seconds, seconds)

  def test_outputs_count_as_traffic_and_temporaries_do_not(self):
    made = program(arguments=100, outputs=50)
    self.assertAlmostEqual(plan_program.bound(made, CHIP, MESH).memory, 1.5)
    self.assertEqual(made.total, 157)

  def test_no_bound_of_a_refused_program(self):
    refused = plan_program.Program(
      arguments=1, outputs=0, temporaries=1, work=None
    )
    with self.assertRaisesRegex(
      ValueError, 'was refused, or cannot be read.*larger topology'
    ):
      plan_program.bound(refused, CHIP, MESH)


class MeasureTest(parameterized.TestCase):
  def test_a_matmul_by_hand(self):
    mesh = mesh_lib.make_mesh('', jax.devices()[:1])
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 4), (4, 16))]
    lowered = {'f': jax.jit(jnp.matmul).lower(*shapes)}
    made = plan_program.compile_all(lowered, {'f': 0}, mesh)['f']
    self.assertEqual(made.arguments, 4 * (8 * 4 + 4 * 16))
    self.assertEqual(made.outputs, 4 * 8 * 16)
    self.assertEqual(made.work.flops, {'bf16': 2 * 8 * 4 * 16})

  def test_what_is_written_over_an_argument_counts_once(self):
    mesh = mesh_lib.make_mesh('', jax.devices()[:1])
    x = jax.ShapeDtypeStruct((64,), jnp.float32)
    lowered = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x)
    made = plan_program.measure(lowered, 0, mesh)
    self.assertEqual((made.arguments, made.outputs), (256, 0))

  @parameterized.parameters(
    ('3.00G', 21.95 + 3.0), ('0B', 21.95 + 2.0), ('512.00M', 21.95 + 0.5)
  )
  def test_refused_bytes(self, listed, gigabytes):
    found = plan_program.refused_bytes(REFUSED.format(listed), 2 * 2**30)
    self.assertAlmostEqual(found / 2**30, gigabytes, places=2)

  def test_refused_bytes_of_a_short_message(self):
    text = 'Ran out of memory in memory space hbm. Used 18.00G of 15.75G hbm.'
    found = plan_program.refused_bytes(text, 2**30)
    self.assertEqual(found, 19 * 2**30)

  def test_refused_without_a_figure(self):
    with self.assertRaisesRegex(
      ValueError, "'hbm is full'; a line such as 'program 21.95G' is needed"
    ):
      plan_program.refused_bytes('hbm is full', 0)

  def test_a_refused_program_is_measured_by_its_message(self):
    class Lowered:
      def compile(self):
        raise jax.errors.JaxRuntimeError(REFUSED.format('1.00G'))

    made = plan_program.measure(Lowered(), 2**30, MESH)
    self.assertIsNone(made.work)
    self.assertTrue(made.refused)
    self.assertAlmostEqual(made.total / 2**30, 22.95, places=2)

  @parameterized.parameters((True, 128), (False, None))
  def test_a_program_that_jaxlib_cannot_read(self, otherwise, flops):
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    real = jax.jit(jnp.matmul).lower(x, x).compile()

    class Compiled:
      def memory_analysis(self):
        return real.memory_analysis()

      def as_text(self):
        raise jax.errors.JaxRuntimeError('INTERNAL: async-update')

    class Lowered:
      def compile(self, compiler_options=None):
        return real if otherwise and compiler_options else Compiled()

    made = plan_program.measure(Lowered(), 0, MESH)
    self.assertEqual(made.arguments, 2 * 64)
    self.assertFalse(made.refused)
    self.assertEqual(made.work and made.work.total_flops, flops)

  def test_an_option_that_libtpu_does_not_know_is_passed_over(self):
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    real = jax.jit(jnp.matmul).lower(x, x).compile()
    tried = []

    class Compiled:
      memory_analysis = real.memory_analysis

      def as_text(self):
        raise jax.errors.JaxRuntimeError('INTERNAL: async-update')

    class Lowered:
      def compile(self, compiler_options=None):
        if compiler_options is None:
          return Compiled()
        tried.append(compiler_options)
        if any('sparse_core' in name for name in compiler_options):
          raise jax.errors.JaxRuntimeError('INVALID_ARGUMENT: No such option')
        return real

    made = plan_program.measure(Lowered(), 0, MESH)
    self.assertEqual(made.work.total_flops, 128)
    self.assertLen(tried, 2)

  def test_other_errors_pass(self):
    class Lowered:
      def compile(self):
        raise jax.errors.JaxRuntimeError('INTERNAL: a bug')

    with self.assertRaisesRegex(jax.errors.JaxRuntimeError, 'INTERNAL'):
      plan_program.measure(Lowered(), 0, MESH)


if __name__ == '__main__':
  absltest.main()
