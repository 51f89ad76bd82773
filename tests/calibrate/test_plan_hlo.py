"""Tests of jaxq.calibrate.plan_hlo."""

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized
from jax import lax
from jax.sharding import AbstractMesh

from jaxq.calibrate import plan_hlo

MESH = AbstractMesh((2, 4), ('data', 'model'))
ONE = AbstractMesh((1, 1), ('data', 'model'))
# A loop of five turns that reduces twice, once in pieces; %cold is a branch.
LOOP = """HloModule jit_f, is_scheduled=true, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%cold (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  ROOT %dot.9 = f32[4,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x.1 = f32[4,8]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %w = f32[8,8]{1,0} constant({...})
  %dot.1 = f32[4,8]{1,0:T(8,128)S(1)} dot(%x.1, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %ar = f32[4,8]{1,0} all-reduce(%dot.1), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%sum
  %ags = (f32[4,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%ar), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
  %agd = f32[16,8]{1,0} all-gather-done(%ags), channel_id=2
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i, %ar)
}

%condition (q: (s32[], f32[4,8])) -> pred[] {
  %q = (s32[], f32[4,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (x.0: f32[4,8], c: pred[]) -> f32[4,8] {
  %x.0 = f32[4,8]{1,0} parameter(0)
  %c = pred[] parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,8]{1,0}) tuple(%zero, %x.0)
  %while.1 = (s32[], f32[4,8]{1,0}) while(%start), condition=%condition, body=%bodyTURNS
  %maybe = f32[4,8]{1,0} conditional(%c, %x.0, %x.0), branch_computations={%cold, %cold}
  ROOT %out = f32[4,8]{1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501

# TPU7x: a sum that a SparseCore does; a custom call names its computation.
OFFLOADED = """HloModule jit_f, is_scheduled=true, num_partitions=8

%called (p.0: f32[4,8]) -> f32[4,8] {
  %p.0 = f32[4,8]{1,0:T(8,128)} parameter(0)
  %tuple.7 = (f32[4,8]{1,0:T(8,128)}) tuple(%p.0)
  %gte.2 = f32[4,8]{1,0:T(8,128)} get-tuple-element(%tuple.7), index=0
  ROOT %all-reduce.8 = f32[4,8]{1,0:T(8,128)} all-reduce(%gte.2), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, use_global_device_ids=true, to_apply=%add.1
}, execution_thread="sparsecore"

ENTRY %main (x.0: f32[4,8]) -> f32[4,8] {
  %x.0 = f32[4,8]{1,0} parameter(0)
  %c.call-start = ((), (), (s32[1058816]{0:T(1024)}, s32[3]{0:S(10)})) custom-call-start(), async_execution_thread="sparsecore", custom_call_target="offload", called_computations={%called}
  %c.call-update = ((f32[4,8]{1,0}), f32[4,8]{1,0}, (s32[1058816]{0:T(1024)})) custom-call-update(%c.call-start, %x.0), output_to_operand_aliasing={{2,0}: (0, {2,0})}
  ROOT %c.call-done = f32[4,8]{1,0} custom-call-done(%c.call-update)
}
"""  # noqa: E501


def compiled_text(function, *shapes):
  shapes = [
    s if hasattr(s, 'dtype') else jax.ShapeDtypeStruct(s, jnp.float32)
    for s in shapes
  ]
  return jax.jit(function).lower(*shapes).compile().as_text()


class WorkTest(parameterized.TestCase):
  @parameterized.parameters(
    # The count beside the loop wins, then that of its condition.
    ('', 5),
    (', backend_config={"known_trip_count":{"n":"7"}}', 7),
    (', backend_config="{\\"known_trip_count\\":{\\"n\\":\\"7\\"}}"', 7),
  )
  def test_a_loop_by_hand(self, beside, turns):
    work = plan_hlo.work(LOOP.replace('TURNS', beside), MESH)
    self.assertEqual(work.flops, {'bf16': turns * 2 * 4 * 8 * 8})
    self.assertEqual(work.unknown_loops, 0)
    found = [
      (c.collective.kind, c.collective.axes, c.collective.nbytes, c.count)
      for c in work.collectives
    ]
    self.assertEqual(
      found,
      [
        ('all-reduce', ('model',), 128, turns),
        ('all-gather', ('model',), 512, turns),
      ],
    )
    self.assertEqual(work.collective_bytes, turns * (128 + 512))

  @parameterized.parameters(
    # What was merged into one is summed; a scatter's operand is the larger.
    ('%m = (f32[4,8]{1,0}, f32[2]{0}) all-reduce(%x.0, %v)', 128 + 8),
    ('%m = f32[1,8]{1,0} reduce-scatter(%x.0), dimensions={0}', 128),
    ('%m = f32[4,8]{1,0} all-reduce-start(%x.0)', 128),
    (
      '%m = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[], u32[]) '
      'collective-permute-start(%x.0)',
      128,
    ),
  )
  def test_bytes(self, line, nbytes):
    text = LOOP.replace('TURNS', '').replace(
      '  %zero = s32[] constant(0)\n',
      '  %v = f32[2]{0} constant({1, 2})\n'
      f'  {line}, channel_id=9, replica_groups=[2,4]<=[8]\n',
    )
    found = plan_hlo.work(text, MESH).collectives[-1]
    self.assertEqual((found.collective.nbytes, found.count), (nbytes, 1))

  def test_what_a_sparse_core_does_counts(self):
    (found,) = plan_hlo.work(OFFLOADED, MESH).collectives
    self.assertEqual(found.collective.kind, 'all-reduce')
    self.assertEqual(found.collective.axes, ('data',))
    self.assertEqual((found.collective.nbytes, found.count), (128, 1))

  def test_an_unknown_loop_counts_once_and_is_told(self):
    text = LOOP.replace('TURNS', '').replace('direction=LT', 'direction=NE')
    work = plan_hlo.work(text, MESH)
    self.assertEqual(work.total_flops, 2 * 4 * 8 * 8)
    self.assertEqual(work.unknown_loops, 1)

  def test_formats(self):
    text = LOOP.replace('TURNS', '').replace('f32', 's8')
    self.assertEqual(plan_hlo.work(text, MESH).flops, {'int8': 5 * 512})
    text = LOOP.replace('TURNS', '').replace('f32', 'f8e4m3fn')
    self.assertEqual(plan_hlo.work(text, MESH).flops, {'fp8': 5 * 512})

  @parameterized.parameters(
    # (batch, channels, height, width), kernel (out, in, h, w), padding, flops.
    ((2, 3, 8, 8), (5, 3, 1, 1), 'VALID', 2 * 2 * 64 * 3 * 5),
    ((2, 3, 8, 8), (5, 3, 3, 3), 'VALID', 2 * 2 * 36 * 9 * 3 * 5),
    # Same size: of 3 x 3 places the outer ones meet padding; 22 pairs a side.
    ((1, 3, 8, 8), (5, 3, 3, 3), 'SAME', 2 * 22 * 22 * 3 * 5),
  )
  def test_convolutions(self, x, w, padding, flops):
    text = compiled_text(
      lambda x, w: lax.conv_general_dilated(x, w, (1, 1), padding), x, w
    )
    self.assertEqual(plan_hlo.work(text, ONE).total_flops, flops)

  def test_compiled_matmuls_and_loops(self):
    def function(x, w):
      body = lambda x, w: (jnp.tanh(x @ w), None)
      x, _ = lax.scan(body, x, w)
      return x @ w[0]

    text = compiled_text(function, (32, 64), (6, 64, 64))
    work = plan_hlo.work(text, ONE)
    self.assertEqual(work.total_flops, 7 * 2 * 32 * 64 * 64)
    self.assertEmpty(work.collectives)

  def test_factorizations(self):
    text = compiled_text(jnp.linalg.cholesky, (64, 64))
    self.assertAlmostEqual(
      plan_hlo.work(text, ONE).total_flops, 64**3 / 3, delta=1
    )

  def test_no_module(self):
    with self.assertRaisesRegex(ValueError, 'no ENTRY in a text of 5 char'):
      plan_hlo.work('hello', MESH)


if __name__ == '__main__':
  absltest.main()
