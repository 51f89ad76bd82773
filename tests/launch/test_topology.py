"""One table says what a topology name stands for."""

from absl.testing import absltest, parameterized

from jaxq.calibrate import plan_topology
from launch import topology


class TopologyTest(parameterized.TestCase):
  @parameterized.parameters(
    ('v5e:1x1', 1, 1, 'v5litepod-1', 'ct5lp-hightpu-1t'),
    ('v5e:2x4', 8, 1, 'v5litepod-8', 'ct5lp-hightpu-8t'),
    ('v5e:4x4', 16, 4, 'v5litepod-16', 'ct5lp-hightpu-4t'),
    ('v5e:16x16', 256, 64, 'v5litepod-256', 'ct5lp-hightpu-4t'),
    ('v4:2x2x2', 8, 2, 'v4-16', 'ct4p-hightpu-4t'),
    ('v5p:2x2x1', 4, 1, 'v5p-8', 'ct5p-hightpu-4t'),
    ('v6e:4x4', 16, 4, 'v6e-16', 'ct6e-standard-4t'),
    ('tpu7x:4x4x4', 64, 16, 'tpu7x-128', 'tpu7x-standard-4t'),
    ('h100:16', 16, 2, '', 'a3-highgpu-8g'),
    ('a100:2', 2, 1, '', 'a2-ultragpu-2g'),
  )
  def test_chips_hosts_and_names(self, name, chips, hosts, accelerator, host):
    found = topology.parse(name)
    self.assertEqual((found.chips, found.hosts), (chips, hosts))
    self.assertEqual(found.accelerator_type, accelerator)
    self.assertEqual(found.machine_type, host)

  def test_every_slice_fills_its_hosts(self):
    for name, chip in topology.CHIPS.items():
      for shape in chip.shapes:
        found = topology.parse(f'{name}:{shape}')
        self.assertEqual(found.hosts * found.chips_per_host, found.chips)

  def test_a_chip_of_two_devices_counts_twice_in_the_mesh(self):
    self.assertEqual(topology.parse('tpu7x:2x2x1').devices, 8)
    self.assertEqual(topology.parse('v6e:2x4').devices, 8)

  def test_what_can_be_planned_can_be_launched(self):
    for name, sizes in plan_topology.KNOWN.items():
      for size in sizes if name in plan_topology.TPUS else ():
        planned = plan_topology.parse(f'{name}:{size}')
        found = topology.parse(f'{name}:{size}')
        self.assertEqual(found.chips, planned.num_chips)
        self.assertEqual(found.devices, planned.num_devices)

  @parameterized.parameters('v9:2x2', 'v5e', 'v5e:3x3', 'v5e:2x2x1', 'h100:x')
  def test_an_unknown_one_lists_the_known(self, name):
    message = rf'--topology={name}: not known; known are .*v5e:1x1\|2x2.*h100'
    with self.assertRaisesRegex(ValueError, message):
      topology.parse(name)

  @parameterized.parameters('h100:12', 'h100:3', 'h200:2x2')
  def test_gpus_must_fill_their_hosts(self, name):
    with self.assertRaisesRegex(
      ValueError, f'{name}: hosts have 8 GPUs; allow'
    ):
      topology.parse(name)


if __name__ == '__main__':
  absltest.main()
