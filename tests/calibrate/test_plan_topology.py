"""Tests of jaxq.calibrate.plan_topology."""

import re
from unittest import mock

from absl.testing import absltest, parameterized

from jaxq.calibrate import plan_topology


class ParseTest(parameterized.TestCase):
  @parameterized.parameters(
    ('v5e:16x16', 'v5e', 256, 256, 16e9),
    ('V5P:8x8x8', 'v5p', 512, 512, 95e9),
    ('tpu7x:2x2x1', 'tpu7x', 4, 8, 96e9),  # Two devices a chip.
    ('v5e:3x5', 'v5e', 15, 15, 16e9),  # Not listed: libtpu decides.
    ('h100:8', 'h100', 8, 8, 80e9),
    ('t4:1', 't4', 1, 1, 16e9),
  )
  def test_names(self, name, chip, num_chips, num_devices, memory):
    topology = plan_topology.parse(name)
    self.assertEqual(topology.chip, chip)
    self.assertEqual(topology.name, name.lower())
    self.assertEqual(topology.num_chips, num_chips)
    self.assertEqual(topology.num_devices, num_devices)
    self.assertEqual(topology.memory, memory)

  @parameterized.parameters(
    'v9:2x2', 'v5e', 'v5e:2x2x2', 'v5p:2x2', 'h100:2x4', 'h100:0', 'h100:', ''
  )
  def test_unknown_names_list_the_known(self, name):
    with self.assertRaisesRegex(
      ValueError,
      f'--topology={name} is not known; known are v4:{{2x2x1,.*'
      r'v5e:{1x1,.*16x16}.*tpu7x.*h100:COUNT.*as in --topology=v5e:4x4',
    ):
      plan_topology.parse(name)

  def test_a_device_has_its_share_of_the_chip(self):
    device = plan_topology.parse('tpu7x:2x2x1').device
    self.assertEqual(device.peak['bf16'], 2307e12 / 2)
    self.assertEqual(device.bandwidth, 7380e9 / 2)

  def test_simulated_devices_share_the_host(self):
    one, two = (plan_topology.parse(f'cpu:{n}') for n in (1, 2))
    self.assertEqual(one.memory, 2 * two.memory)
    self.assertIsNone(one.device)

  def test_what_compiles_is_said(self):
    self.assertRegex(plan_topology.parse('v5e:1x1').compiler, 'libtpu')
    self.assertRegex(
      plan_topology.parse('h100:8').compiler,
      "CPU backend for 8 simulated devices, whose .* not a GPU's",
    )


class DevicesTest(parameterized.TestCase):
  def test_more_simulated_devices_than_there_are(self):
    with self.assertRaisesRegex(
      ValueError, 'cpu:4096 needs 4096 simulated devices and this process has '
    ):
      plan_topology.devices(plan_topology.parse('cpu:4096'))

  def test_libtpu_is_missing(self):
    with (
      mock.patch.object(
        plan_topology.importlib.util, 'find_spec', return_value=None
      ),
      self.assertRaisesRegex(
        ValueError, r"not installed; install it with pip install 'jaxq\[tpu-aot"
      ),
    ):
      plan_topology.devices(plan_topology.parse('v5e:1x1'))

  @parameterized.parameters(
    ('v5e:3x5', 'is not known; known are'),
    (
      'v5e:4x8',
      r'libtpu does not give it \(no such thing\); see that no other',
    ),
  )
  def test_libtpu_refuses(self, name, message):
    with (
      mock.patch.object(
        plan_topology.importlib.util, 'find_spec', return_value=True
      ),
      mock.patch.object(
        plan_topology.topologies,
        'get_topology_desc',
        side_effect=RuntimeError('no such thing\nat all'),
      ),
      self.assertRaisesRegex(ValueError, f'{re.escape(name)}:? {message}'),
    ):
      plan_topology.devices(plan_topology.parse(name))


class CandidatesTest(parameterized.TestCase):
  def test_meshes(self):
    self.assertEqual(
      list(plan_topology.meshes(4)),
      [
        {'data': 4, 'model': 1},
        {'data': 2, 'model': 2},
        {'data': 1, 'model': 4},
      ],
    )

  @parameterized.parameters(
    ('v5e:4x4', 'v5e:1x1', plan_topology.TPUS),
    ('h100:8', 'h100:1', ('a100', 'h100', 'h200', 't4')),
    ('cpu:8', 'cpu:1', ('cpu',)),
  )
  def test_own_chip_first_then_the_smallest(self, name, first, chips):
    found = plan_topology.candidates(plan_topology.parse(name))
    self.assertEqual(found[0].name, first)
    self.assertEqual({t.chip for t in found}, set(chips))
    own = [t for t in found if t.chip == found[0].chip]
    self.assertEqual(found[: len(own)], own)
    for part in (own, found[len(own) :]):
      counts = [t.num_chips for t in part]
      self.assertEqual(counts, sorted(counts))


if __name__ == '__main__':
  absltest.main()
