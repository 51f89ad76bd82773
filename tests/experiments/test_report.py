"""Tests of the report: its figures against the files of the run."""

import json
import pathlib
import re
import struct
import subprocess
import sys
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from experiments import (
  report_charts,
  report_findings,
  report_page,
  reporting,
  results,
  run_folder,
)
from jaxq.calibrate import driver
from tests.experiments import testing

NUM_BLOCKS = 4
LINEARS = ('attention.q_proj', 'mlp.down_proj')
TAPS = ('attention/q_proj/in', 'mlp/down_proj/in')
MAX_BYTES = 1_500_000


def block_report(index, seed=0, probed=True):
  """A block whose channel 5 is an outlier that the method took away."""
  rng = np.random.default_rng([index, seed])
  channels = {}
  for tap in TAPS:
    before = rng.uniform(0.9, 1.1, 64)
    after = rng.uniform(0.9, 1.1, 64)
    before[5] = 40.0 + index
    channels[tap] = (before, after)
  return driver.BlockReport(
    index=index,
    output_sqnr_db=20.0 + 3 * index + float(rng.uniform()),
    seconds=1.0 + index,
    linears=tuple(
      driver.LinearReport(
        name=f'blocks.{index}.{name}',
        size=1000 * (i + 1),
        bits=4.5,
        sqnr_db=15.0 + index + i,
      )
      for i, name in enumerate(LINEARS)
    ),
    rtn_sqnr_db=18.0 + 3 * index if probed else None,
    stream_sqnr_db=19.0 - index if probed else None,
    channels=channels if probed else {},
  )


def metrics(**values):
  text = {'corpus': 'a <text> & more'}
  return tuple(
    results.Metric(
      name=name.replace('_', ' '),
      value=value,
      low=value * 0.9,
      high=value * 1.1,
      conventions=text,
    )
    for name, value in values.items()
  )


def write_run(folder, *, measured=True, blocks=NUM_BLOCKS, seed=0):
  """A run folder as experiments.calibrate leaves it."""
  folder.mkdir()
  flags = {'model': 'some/model', 'scheme': 'W4A16', 'method': ['gptq']}
  flags |= {'group_size': 64, 'set': ['gptq.damping=0.1'], 'ignore': []}
  info = results.RunInfo(
    jax='0.1',
    python='3.11',
    device='cpu x 1',
    commit='abc-dirty',
    command='python -m experiments.calibrate <b>',
    flags=flags,
  )
  (folder / 'resolved.flags').write_text('# python x\n--scheme=W4A16\n')
  run_folder.save_start(folder, info, 'some/model', NUM_BLOCKS)
  for i in range(blocks):
    run_folder.append_block(folder, block_report(i, seed))
  if measured:
    rows = (
      results.Row(name='some/model', metrics=metrics(token_perplexity=10.0)),
      results.Row(
        name='out',
        metrics=metrics(token_perplexity=12.5, perplexity_ratio=1.25, KL=0.125),
      ),
    )
    results.save(folder / 'results.json', results.Result(run=info, rows=rows))
  return folder


class Case(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    made = self.enterContext(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(made)

  def page(self, **how):
    return reporting.write(write_run(self.folder / 'out.run', **how))


class RunFolderTest(Case):
  def test_what_is_written_is_read(self):
    run = run_folder.load(write_run(self.folder / 'out.run'))
    self.assertEqual([b['index'] for b in run.blocks], [0, 1, 2, 3])
    self.assertEqual(run.num_blocks, NUM_BLOCKS)
    want = block_report(2)
    self.assertEqual(run.blocks[2]['output_sqnr_db'], want.output_sqnr_db)
    self.assertEqual(run.blocks[2]['rtn_sqnr_db'], want.rtn_sqnr_db)
    self.assertEqual(run.blocks[2]['linears'][1]['sqnr_db'], 18.0)
    self.assertNotIn('channels', run.blocks[2])
    for tap in TAPS:
      for got, expected in zip(
        run.channels[2][tap], want.channels[tap], strict=True
      ):
        np.testing.assert_array_equal(got, expected.astype(np.float32))
    self.assertEqual(run_folder.flag(run, 'method'), 'gptq')
    self.assertEqual(run_folder.load(self.folder / 'out').blocks, run.blocks)

  def test_keep_drops_later_blocks_and_what_was_made_of_them(self):
    folder = write_run(self.folder / 'out.run')
    reporting.write(folder)
    with open(folder / 'blocks.jsonl', 'a') as f:
      f.write('{"index": 4, "outp')
    run_folder.keep_blocks(folder, 2)
    run = run_folder.load(folder)
    self.assertEqual([b['index'] for b in run.blocks], [0, 1])
    self.assertEqual(sorted(run.channels), [0, 1])
    self.assertEqual(run.damaged, ())
    self.assertFalse((folder / 'results.json').exists())
    self.assertFalse((folder / 'report.html').exists())

  def test_a_run_that_goes_on_or_was_killed_is_read(self):
    folder = write_run(self.folder / 'out.run', measured=False, blocks=2)
    with open(folder / 'blocks.jsonl', 'a') as f:
      f.write('{"index": 2, "outp')
    (folder / 'channels/00001.npz').write_bytes(b'PK')
    run = run_folder.load(folder)
    self.assertLen(run.blocks, 2)
    self.assertEqual(sorted(run.channels), [0])
    page = report_page.render(run)
    self.assertIn('last line of blocks.jsonl is cut off', page)
    self.assertIn('channels/00001.npz cannot be read', page)
    self.assertIn('2 of 4 blocks are missing (2-3)', page)
    self.assertIn('was not measured', page)

  def test_an_older_run_has_fewer_sections(self):
    folder = self.folder / 'out.run'
    folder.mkdir()
    line = {
      'index': 0,
      'output_sqnr_db': 21.0,
      'seconds': 2.0,
      'linears': [
        {'name': 'blocks.0.mlp.up_proj', 'size': 8, 'bits': 4, 'sqnr_db': 9.0}
      ],
    }
    (folder / 'blocks.jsonl').write_text(json.dumps(line) + '\n')
    (folder / 'resolved.flags').write_text(
      '# python -m experiments.calibrate --method=gptq\n--noevaluate\n'
      '--method=gptq\n--model=m\n--scheme=W4A16\n--set=a=1\n--set=b=2\n'
    )
    run = run_folder.load(folder)
    self.assertEqual(run.flags['evaluate'], 'false')
    self.assertEqual(run.flags['set'], ['a=1', 'b=2'])
    page = report_page.render(run)
    self.assertIn('m, W4A16 by GPTQ', page)
    self.assertNotIn('Which channels are outliers', page)
    self.assertNotIn('round to nearest', page)
    self.assertIn('weakest block is 0, whose output SQNR is 21.0 dB', page)

  def test_messages(self):
    with self.assertRaisesRegex(FileNotFoundError, 'no such folder; a run'):
      run_folder.load(self.folder / 'absent')
    with self.assertRaisesRegex(ValueError, 'neither blocks.jsonl nor results'):
      run_folder.load(self.folder)
    path = self.folder / 'blocks.jsonl'
    path.write_text('{"index": 0}\n')
    with self.assertRaisesRegex(ValueError, r"line 1: fields .*'linears'.*Run"):
      run_folder.load(self.folder)
    path.write_text('?\n{}\n')
    with self.assertRaisesRegex(ValueError, 'line 1: not JSON .*Run the cal'):
      run_folder.load(self.folder)
    path.unlink()
    folder = write_run(self.folder / 'out.run')
    with self.assertRaisesRegex(FileNotFoundError, '--sensitivity=x: no such'):
      run_folder.load(folder, 'x')
    (folder / 'sensitivity.json').write_text('{}')
    with self.assertRaisesRegex(ValueError, 'not a sensitivity file .*layers'):
      run_folder.load(folder)
    with self.assertRaisesRegex(ValueError, 'given 4 times; at most 3 runs'):
      reporting.write(folder, ['a', 'b', 'c', 'd'])


class FindingsTest(Case):
  def setUp(self):
    super().setUp()
    self.run_ = run_folder.load(write_run(self.folder / 'out.run'))

  def test_the_summary_says_what_was_measured(self):
    said = report_findings.summary(self.run_)
    self.assertStartsWith(
      said,
      'GPTQ stores the linears of model in 4.50 bits per weight and takes '
      'token perplexity from 10.00 to 12.50, 1.250 times [1.125, 1.375].',
    )
    gains = [b['output_sqnr_db'] - b['rtn_sqnr_db'] for b in self.run_.blocks]
    self.assertIn(f'{np.mean(gains):.1f} dB less noise than rounding', said)
    self.assertIn('4 of 4 blocks are better', said)
    self.assertIn('weakest block is 0', said)

  def test_the_outlier_is_found_with_what_became_of_it(self):
    first = report_findings.outliers(self.run_, 10)
    self.assertLen(first, 2)
    row = first[0]
    self.assertEqual((row.channel, row.block), (5, 3))
    self.assertEqual(row.blocks, (0, 1, 2, 3))
    before, after = self.run_.channels[3][row.tap]
    self.assertAlmostEqual(row.before, before[5] / np.median(before), places=4)
    self.assertAlmostEqual(row.after, after[5] / np.median(after), places=4)

  def test_linears_add_up(self):
    kinds = {kind.name: kind for kind in report_findings.kinds(self.run_)}
    self.assertEqual(sorted(kinds), sorted(LINEARS))
    self.assertEqual(kinds['mlp.down_proj'].size, 2000 * NUM_BLOCKS)
    self.assertEqual(kinds['mlp.down_proj'].min_sqnr_db, 16.0)
    self.assertEqual(kinds['mlp.down_proj'].worst, 0)
    self.assertEqual(report_findings.bits(self.run_), (4.5, 12000))

  def test_experts_without_tokens_are_counted(self):
    with open(self.run_.path / 'blocks.jsonl', 'a') as f:
      f.write(json.dumps(dict(self.run_.blocks[2], expert_tokens=[4, 0])))
    said = report_findings.warnings(run_folder.load(self.run_.path))
    self.assertRegex(' '.join(said), '1 experts met no .* in block 2: .*Give')

  def test_a_dead_tap_has_no_ratio(self):
    self.assertTrue(np.all(np.isnan(report_findings.ratios(np.zeros(4)))))
    ratios = report_findings.ratios(np.array([0.0, 0, 0, 2, 4]))
    self.assertAlmostEqual(ratios[4], 4 / 3, places=5)

  def test_a_method_that_loses_is_named(self):
    with open(self.run_.path / 'blocks.jsonl', 'a') as f:
      line = dict(self.run_.blocks[1], output_sqnr_db=5.0)
      f.write(json.dumps(line) + '\n')
    said = report_findings.warnings(run_folder.load(self.run_.path))
    self.assertRegex(' '.join(said), 'below 10 dB in block 1; keep their')
    self.assertRegex(' '.join(said), 'Rounding to nearest .* in block 1[.]')
    self.assertRegex(' '.join(said), 'cannot be repeated from its commit')


class ChartsTest(parameterized.TestCase):
  @parameterized.parameters(
    ([0.2, 39.0],), ([21.5, 23.0],), ([5.0],), ([-4.0, 12.0],), ([1e-7, 3e-7],)
  )
  def test_ticks_enclose_the_values(self, values):
    ticks = report_charts.linear_ticks(values)
    self.assertBetween(len(ticks), 2, 8)
    self.assertLessEqual(ticks[0], min(values) + 1e-12)
    self.assertGreaterEqual(ticks[-1], max(values) - 1e-12)

  @parameterized.parameters(
    (1.5, 8.0), (1.0, 1.0), (3.0, 4e3), (1e-6, 1e6), (10.0, 100.0)
  )
  def test_logarithmic_ticks_enclose_the_values(self, low, high):
    ticks = report_charts.log_ticks(low, high)
    self.assertBetween(len(ticks), 2, 12)
    self.assertLessEqual(ticks[0], low * (1 + 1e-9))
    self.assertGreaterEqual(ticks[-1], high * (1 - 1e-9))

  def test_values_that_are_not_finite_leave_gaps(self):
    drawn = report_charts.lines(
      [
        report_charts.Series(
          name='a', kind='s1', values=[1.0, float('nan'), None, 2.0]
        )
      ],
      range(4),
      label='x',
      unit='dB',
    )
    self.assertEqual(drawn.count('<circle'), 2)
    self.assertNotIn('nan', drawn)
    nothing = report_charts.Series(name='a', kind='s1', values=[None])
    self.assertEqual(report_charts.lines([nothing], [0], label='', unit=''), '')

  def test_the_least_value_has_the_strongest_colour(self):
    shown = [1.0, 2.0, 3.0]
    self.assertEqual(report_charts.shade(1.0, shown), report_charts.STEPS - 1)
    self.assertEqual(report_charts.shade(3.0, shown), 0)
    self.assertEqual(report_charts.shade(2.0, [2.0]), 0)


class PageTest(Case):
  def test_it_is_small_and_fetches_nothing(self):
    page = self.page().read_text('utf-8')
    self.assertLess(len(page), MAX_BYTES)
    self.assertEmpty(re.findall(r'https?:|\burl\(|<link|<img|@import', page))
    self.assertNotIn('<text>', page.split('<svg')[0])
    self.assertIn('a &lt;text&gt; &amp; more', page)
    self.assertIn('experiments.calibrate &lt;b&gt;', page)

  def test_a_deep_and_wide_run_stays_small(self):
    folder = write_run(self.folder / 'out.run', blocks=0)
    rng = np.random.default_rng(0)
    for i in range(80):
      report = block_report(i)
      wide = {tap: (rng.random(8192), rng.random(8192)) for tap in 'abcd'}
      object.__setattr__(report, 'channels', wide)
      run_folder.append_block(folder, report)
    self.assertLess(reporting.write(folder).stat().st_size, MAX_BYTES)

  def test_experts_are_merged(self):
    folder = write_run(self.folder / 'out.run', blocks=0)
    report = block_report(0)
    linears = tuple(
      driver.LinearReport(
        name=f'blocks.0.experts.{i}.up', size=8, bits=4, sqnr_db=9.0 + i
      )
      for i in range(64)
    )
    object.__setattr__(report, 'linears', linears)
    run_folder.append_block(folder, report)
    page = reporting.write(folder).read_text('utf-8')
    cells = re.findall(r'<rect class="cell[^>]*data-value="([^"]*)"', page)
    self.assertEqual(cells, ['9'])

  def test_tokens_of_experts_are_counted(self):
    folder = write_run(self.folder / 'out.run', blocks=0)
    for i, counts in enumerate(((5, 0, 9, 2), (), (4, 4, 4, 4))):
      report = block_report(i)
      object.__setattr__(report, 'expert_tokens', counts)
      run_folder.append_block(folder, report)
    page = reporting.write(folder).read_text('utf-8')
    self.assertIn('Did every expert see enough tokens?', page)
    self.assertIn('data-chart="experts"', page)
    table = page.split('id="experts"')[1].split('</table>')[0]
    rows = re.findall(r'<tr><th>(\d+)</th>(.*?)</tr>', table)
    cells = {i: re.findall('<td>(.*?)</td>', row) for i, row in rows}
    self.assertEqual(
      cells, {'0': ['4', '0', '3.5', '9', '1'], '2': ['4', '4', '4', '4', '0']}
    )
    dense = self.folder / 'dense.run'
    self.assertNotIn(
      'every expert', reporting.write(write_run(dense)).read_text()
    )

  def test_another_run_stands_beside(self):
    other = write_run(self.folder / 'other.run', seed=1)
    page = reporting.write(write_run(self.folder / 'out.run'), [other])
    text = page.read_text('utf-8')
    self.assertEqual(text.count('data-metric="KL"'), 3)
    self.assertIn('data-series="GPTQ, W4A16 g64"', text)


class CalibrateTest(Case):
  """The entry points."""

  def test_a_run_ends_with_its_report(self):
    testing.write_inputs(self.folder)
    arguments = testing.arguments(self.folder)
    done = testing.call(*arguments)
    self.assertEqual(done.code, 0, done.err)
    self.assertIn('out.run/report.html', done.err)
    run = run_folder.load(self.folder / 'out.run')
    self.assertEqual((len(run.blocks), run.num_blocks), (2, 2))
    self.assertEqual([len(c) for c in run.channels.values()], [4, 4])
    for block in run.blocks:
      self.assertIsInstance(block['rtn_sqnr_db'], float)
      self.assertIsInstance(block['stream_sqnr_db'], float)
    page = (run.path / 'report.html').read_text('utf-8')
    ratio = run.rows[1]['perplexity ratio'].value
    self.assertIn(f'{ratio:.3f} times', page)

  def test_a_missing_tensorboard_is_told_before_the_work(self):
    testing.write_inputs(self.folder)
    arguments = testing.arguments(self.folder)
    with absltest.mock.patch.dict(sys.modules, {'tensorboardX': None}):
      done = testing.call(*arguments, '--tensorboard_dir=tb')
    self.assertEqual(done.code, 1)
    self.assertRegex(done.errors[0], 'tensorboardX, which is not installed')
    self.assertFalse((self.folder / 'out').exists())

  def test_the_report_alone(self):
    write_run(self.folder / 'out.run')

    def call(*args):
      return subprocess.run(
        [sys.executable, '-m', 'experiments.report', *args],
        cwd=testing.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
      )

    page = self.folder / 'page.html'
    done = call(f'--run={self.folder / "out"}', f'--output={page}')
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertEqual(done.stderr, f'report: {page}\n')
    self.assertIn('</html>', page.read_text('utf-8'))
    done = call()
    self.assertEqual(done.returncode, 1)
    self.assertRegex(done.stderr, '^error: --run not given; .*Add --run=OUTP')


class TensorBoardTest(Case):
  def test_every_figure_is_written(self):
    try:
      reporting.check_tensorboard()
    except ValueError as e:
      self.skipTest(str(e))
    run = write_run(self.folder / 'out.run')
    count = reporting.write_scalars(run, str(self.folder / 'tb'))
    found = read_scalars(next((self.folder / 'tb').iterdir()))
    self.assertLen(found, count)
    for i in range(NUM_BLOCKS):
      want = block_report(i)
      self.assertAlmostEqual(
        found['block/output_sqnr_db', i], want.output_sqnr_db, places=4
      )
      self.assertEqual(found['bits/mlp.down_proj', i], 4.5)
    self.assertEqual(found['results_quantized/KL', 0], 0.125)

  def test_a_missing_package_is_named(self):
    with absltest.mock.patch.object(
      reporting.importlib, 'import_module', side_effect=ImportError
    ):
      with self.assertRaisesRegex(
        ValueError, r'needs the package tensorboardX.*pip install jaxq\[tens'
      ):
        reporting.check_tensorboard()


def read_scalars(path):
  """{(tag, step): value} of an event file, read without the package."""
  found, data = {}, path.read_bytes()
  while data:
    (size,) = struct.unpack('<Q', data[:8])
    event = fields(data[12 : 12 + size])
    data = data[16 + size :]
    step = event.get(2, 0)
    if 5 in event:
      value = fields(fields(event[5])[1])
      found[value[1].decode(), step] = struct.unpack('<f', value[2])[0]
  return found


def fields(data):
  """{number: value} of a protocol buffer; the last one of a number."""

  def varint():
    nonlocal data
    value = shift = 0
    while True:
      byte, data = data[0], data[1:]
      value |= (byte & 127) << shift
      shift += 7
      if byte < 128:
        return value

  found = {}
  while data:
    key = varint()
    if key & 7 == 0:
      found[key >> 3] = varint()
      continue
    size = {1: 8, 5: 4}.get(key & 7) or varint()
    found[key >> 3], data = data[:size], data[size:]
  return found


if __name__ == '__main__':
  absltest.main()
