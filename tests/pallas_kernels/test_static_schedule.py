"""Tests of static_schedule and schedule_dump, on dumps written by hand."""

import json
import pathlib
import tempfile

from absl.testing import absltest, parameterized

from pallas_kernels import schedule_dump, static_schedule
from pallas_kernels.quantized_matmul import pallas_mosaic_tpu as quantized_tpu
from pallas_kernels.weight_only_matmul import pallas_mosaic_tpu as weight_tpu

# Of five bundles the second feeds the matrix unit and the last takes from it.
DUMP = """== CAPACTIY:
UNITS
    4     4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
0 0 0 0 0 0 3 0 1 0 2
0 4 0 4 0 0 0 0 0 0 0
0 0 0 2 0 0 0 0 0 1 0
4 0 0 0 0 0 0 0 0 0 0
0 0 0 4 2 0 0 0 1 0 0
""".replace('UNITS', ', '.join(schedule_dump.UNITS))
BLOCK = (('bk', 8192), ('bn', 512), ('body', 'post'), ('unpack', 'words'))


def case(**changed):
  fields = {
    'chip': 'v5e',
    'op': 'weight_only',
    'M': 16,
    'bits': 4,
    'group_size': 128,
    'block': BLOCK,
  }
  return static_schedule.Case(**{**fields, **changed})


def row(name, bundles, spills=0, bn=512):
  return {
    'case': name,
    'block': {'bk': 8192, 'bn': bn},
    'bundles': bundles,
    'inner': bundles,
    'byte_cycles': 100,
    'mxu_cycles': 50,
    'mxu': 0.5,
    'push': 0.5,
    'valu': 0.5,
    'spills': spills,
    'bound': 'bundles',
    'floor_to_roofline': 2.0,
  }


class ScheduleDumpTest(parameterized.TestCase):
  def test_counts(self):
    counts = schedule_dump.parse(DUMP)
    self.assertEqual((counts.bundles, counts.inner, counts.spills), (5, 4, 1))
    self.assertEqual(counts.used['VALU'], 10)
    self.assertAlmostEqual(counts.occupancy('MATPUSH'), 4 / 16)

  def test_finds_the_program(self):
    made = tempfile.TemporaryDirectory()
    self.addCleanup(made.cleanup)
    folder = pathlib.Path(made.name)
    name = '17-weight_only_w4.1-69-final_hlo-static-per-bundle-utilization.txt'
    with self.assertRaisesRegex(ValueError, '0 programs named weight_only'):
      schedule_dump.read(folder, 'weight_only')
    (folder / name).write_text(DUMP, encoding='utf-8')
    self.assertEqual(schedule_dump.read(folder, 'weight_only').bundles, 5)

  @parameterized.parameters(
    ('', '0 lines; it needs capacities'),
    (DUMP.replace('XLU', 'YLU'), "units .*'YLU'.*allowed .*'XLU'"),
  )
  def test_messages(self, text, message):
    with self.assertRaisesRegex(ValueError, message):
      schedule_dump.parse(text)


class StaticScheduleTest(parameterized.TestCase):
  def test_a_row_worked_by_hand(self):
    counts = schedule_dump.Counts(
      bundles=2206,
      inner=2000,
      used=dict.fromkeys(schedule_dump.UNITS, 0),
      capacity=dict.fromkeys(schedule_dump.UNITS, 4),
    )
    found = static_schedule.row_of(case(), counts)
    # 8192 * 512 / 2 codes, 64 * 512 scales of 4, 16 * 512 outputs of 2 bytes.
    self.assertEqual(found['bytes'], 2097152 + 131072 + 16384)
    self.assertEqual(found['byte_cycles'], 4106)  # 2244608 * 1.5 / 820.
    self.assertEqual(found['mxu_cycles'], 1024)  # 16 * 8192 * 512 / 65536.
    self.assertEqual(found['mxu'], 0.512)
    self.assertEqual((found['bound'], found['floor_to_roofline']), ('bytes', 1))

  def test_names(self):
    self.assertEqual(case().name, 'v5e/w4g128/m16')
    self.assertEqual(case(symmetric=False).name, 'v5e/w4g128z/m16')
    wide = case(op='quantized', x_format='int8', group_size=-1, M=512)
    self.assertEqual(wide.name, 'v5e/w4a8/m512')
    fp8 = case(op='quantized', x_format='float8_e4m3fn', bits=8, dynamic=True)
    self.assertEqual(fp8.name, 'v5e/w8f8g128+/m16')

  def test_best_is_the_least_floor_without_spills(self):
    rows = [row('a', 300), row('a', 200, spills=1), row('a', 500, bn=1024)]
    self.assertEqual(static_schedule.best(rows)['a']['bundles'], 500)
    refused = {'case': 'b', 'block': {}, 'error': 'no'}
    self.assertEqual(list(static_schedule.best([*rows, refused])), ['a'])

  def test_page(self):
    refused = {'case': 'v6e/x', 'block': {'bk': 1}, 'error': 'too large'}
    text = static_schedule.page([row('v5e/w4/m16', 300), refused], '1.2')
    self.assertIn('no figure is a time', text)
    self.assertIn('| `w4/m16` | bk=8192 bn=512 | 300 |', text)
    self.assertIn('- `v6e/x` {"bk": 1}: too large', text)

  def test_stored_page_and_blocks_are_of_the_stored_rows(self):
    stored = json.loads(static_schedule.DATA.read_text(encoding='utf-8'))
    rows = stored['rows']
    self.assertEqual(
      static_schedule.PAGE.read_text(encoding='utf-8'),
      static_schedule.page(rows, stored['libtpu']),
    )
    for op, module in (
      ('weight_only', weight_tpu),
      ('quantized', quantized_tpu),
    ):
      blocks = json.loads(module.TUNED.read_text(encoding='utf-8'))['blocks']
      self.assertEqual(blocks, static_schedule.tuned(rows, op))
      for fields in blocks.values():
        module.Block(bm=512, **fields)


if __name__ == '__main__':
  absltest.main()
