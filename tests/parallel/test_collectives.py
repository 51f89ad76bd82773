"""Tests of jaxq.parallel.collectives."""

import jax
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import AbstractMesh

from jaxq.parallel import collectives

MESH = AbstractMesh((2, 4), ('data', 'model'))
LINE = (
  '  %x.1 = f32[4,8]{{1,0}} {call}(%y), channel_id={channel}, {groups}, '
  'metadata={{op_name="jit(f)/dot_general"}}'
)


def line(call, groups, channel=1):
  return LINE.format(call=call, groups=groups, channel=channel)


class CollectivesTest(parameterized.TestCase):
  @parameterized.parameters(
    ('replica_groups={{0,1,2,3},{4,5,6,7}}', ('model',)),
    ('replica_groups={{0,4},{1,5},{2,6},{3,7}}', ('data',)),
    ('replica_groups={}', ('data', 'model')),
    ('replica_groups=[2,4]<=[8]', ('model',)),
    ('replica_groups=[4,2]<=[2,4]T(1,0)', ('data',)),
    ('replica_groups=[1,8]<=[8]', ('data', 'model')),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", ('model',)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ('data',)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", ('data', 'model')),
    (
      "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}",
      ('model',),
    ),
    (
      "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
      ('data',),
    ),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=([8]) {'b'}", ('model',)),
    ('source_target_pairs={{0,1},{1,2},{2,3},{3,0}}', ('model',)),
  )
  def test_axes(self, groups, axes):
    (found,) = collectives.collectives(line('all-reduce', groups), MESH)
    self.assertEqual(
      found,
      collectives.Collective(
        kind='all-reduce', axes=axes, nbytes=128, where='jit(f)/dot_general'
      ),
    )

  def test_a_channel_counts_once_and_other_calls_do_not(self):
    groups = 'replica_groups=[2,4]<=[8]'
    text = '\n'.join(
      [
        line('all-gather-start', groups),
        line('all-gather-done', groups),
        line('all-gather', groups),
        line('collective-permute-start', groups, channel=2),
        line('fusion', groups, channel=3),
      ]
    )
    kinds = [c.kind for c in collectives.collectives(text, MESH)]
    self.assertEqual(kinds, ['all-gather', 'collective-permute'])

  @parameterized.parameters(
    ('f32', 128), ('bf16', 64), ('f8e4m3fn', 32), ('pred', 1)
  )
  def test_dtypes(self, dtype, nbytes):
    text = line('all-reduce', 'replica_groups=[2,4]<=[8]')
    (found,) = collectives.collectives(text.replace('f32', dtype), MESH)
    self.assertEqual(found.nbytes, nbytes)

  def test_a_program_without(self):
    text = jax.jit(lambda x: x + 1).lower(np.ones(3)).compile().as_text()
    self.assertEmpty(collectives.collectives(text, MESH))

  def test_groups_that_cannot_be_read(self):
    with self.assertRaisesRegex(ValueError, 'cannot read the groups of.*list'):
      collectives.collectives(line('all-reduce', 'groups=?'), MESH)


if __name__ == '__main__':
  absltest.main()
