"""experiments.calibrate by several processes: equal, killed, stopped, refused.

The same on a real model, round after round: benchmarks.multihost_check.
"""

import pathlib
import signal
import sys
import tempfile
import time

import pytest
from absl.testing import absltest, parameterized

from benchmarks import interrupted, local_job, multihost_check
from tests.experiments import testing

pytestmark = pytest.mark.slow

BLOCKS = 8
FLAGS = ('--peer_timeout=5', '--start_timeout=60')


class CalibrateTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = tempfile.TemporaryDirectory()
    cls.addClassCleanup(folder.cleanup)
    cls.folder = pathlib.Path(folder.name)
    testing.write_inputs(cls.folder, num_layers=BLOCKS)

  def job(self, name, *flags, processes=2, own=None, cwds=(testing.ROOT,)):
    return local_job.LocalJob(
      [
        *(sys.executable, '-m', 'experiments.calibrate'),
        *testing.arguments(self.folder),
        *(f'--output={self.folder / name}', *FLAGS, *flags),
      ],
      self.folder / f'{name}.log',
      processes=processes,
      own=own,
      env={'PYTHONPATH': str(testing.ROOT)},
      cwds=cwds,
    )

  def finish(self, job):
    codes = job.wait(150)
    logs = '\n'.join(job.err(i) for i in range(len(codes)))
    self.assertEqual(codes, [0] * len(codes), logs)
    for i in range(1, len(codes)):
      self.assertEqual(job.out(i) + job.err(i), '')  # Only process 0 prints.

  def test_four_processes_do_what_one_does(self):
    # Float inputs: a tie in one block does not reach those above.
    alone = testing.call(
      *testing.arguments(self.folder),
      *(f'--output={self.folder / "alone"}', '--inputs=float'),
    )
    self.assertEqual(alone.code, 0, alone.err)
    job = self.job('four', '--inputs=float', processes=4)
    self.finish(job)
    outputs = self.folder / 'alone', self.folder / 'four'
    count, different = multihost_check.codes_differ(*outputs)
    self.assertGreater(count, 0)
    self.assertLessEqual(different, multihost_check.TIES * count)
    one, many = map(multihost_check.perplexity, outputs)
    self.assertLess(abs(many / one - 1), multihost_check.PERPLEXITY)
    self.assertIn('token perplexity', job.out(0))
    self.assertLen(
      (self.folder / 'four.run/blocks.jsonl').read_text().splitlines(), BLOCKS
    )

  def test_a_stopped_and_a_killed_job_end_with_the_same_bytes(self):
    self.finish(self.job('whole', '--noevaluate'))
    # A notice to one process stops all of them, with what they have saved.
    job = self.job('part', '--noevaluate')
    self.stop(job, 'part', 1, signal.SIGTERM)
    self.assertEqual(job.wait(60), [143, 143], job.err(0) + job.err(1))
    saved = len(list((self.folder / 'part' / 'blocks').iterdir()))
    self.assertLess(saved, BLOCKS)
    self.assertLen(job.reasons(), 1)
    self.assertRegex(
      job.reasons()[0],
      rf'^stopped: stopped by SIGTERM; {saved} of {BLOCKS} blocks are saved; '
      'run the same command again to go on',
    )
    # A process that dies takes the others with it, and soon.
    job = self.job('part', '--noevaluate')
    self.stop(job, 'part', saved + 1, signal.SIGKILL)
    start = time.monotonic()
    codes = job.wait(60)
    self.assertLess(time.monotonic() - start, 60)
    self.assertNotIn(0, codes)
    self.assertLen(job.reasons(), 1)
    self.assertRegex(
      job.reasons()[0],
      r'^error: process 1 \(.*\) gave no sign of life for 5 s: killed, .* Run '
      'the same command again on all hosts to go on.',
    )
    self.assertFalse((self.folder / 'part' / 'manifest.json').exists())
    job = self.job('part', '--noevaluate')
    self.finish(job)
    self.assertRegex(job.err(0), r'resuming: \d of 8 blocks are done')
    self.assertEqual(
      interrupted.digest(self.folder / 'part'),
      interrupted.digest(self.folder / 'whole'),
    )

  def stop(self, job, name, blocks, number):
    """Signals process 1 when so many blocks are saved."""
    last = self.folder / name / 'blocks' / f'{blocks - 1:05d}'
    try:
      interrupted.wait_until(job.processes[1], last.exists)
    except ValueError:
      self.fail(job.err(0) + job.err(1))
    job.processes[1].send_signal(number)

  @parameterized.named_parameters(
    (
      'other_flags',
      {1: ('--sequences=2',)},
      (),
      r'process 1 \(.*\) runs other flags: --sequences=2 there, 4 on process 0',
    ),
    (
      # As of a bucket that is mounted without the right to write.
      'output_that_process_0_may_not_write',
      {},
      ('--output=/sys/out',),
      r'/sys/out\S*: (Operation not permitted|Permission denied|Read-only file '
      r'system); give a path ',
    ),
  )
  def test_a_job_that_cannot_be_ends_with_one_line(self, own, flags, message):
    self.assert_refused(self.job('refused', *flags, own=own), message)

  def test_a_host_with_stale_data_is_named(self):
    cwds = [self.folder / name for name in ('fresh', 'stale')]
    for path in cwds:
      path.mkdir()
      text = testing.TEXT.replace('Five', path.name)
      (path / 'text.txt').write_text(text, 'utf-8')
    self.assert_refused(
      self.job('other', '--data=text.txt', cwds=cwds),
      r'process 1 \(.*\) runs other data: data=.* The cache of that host may',
    )

  def test_a_process_that_nobody_joins_gives_up(self):
    flags = ('--num_processes=2', '--start_timeout=2')
    job = self.job('alone', processes=1, own={0: flags})
    self.assertEqual(job.wait(60), [1])
    self.assertRegex(
      job.err(0),
      '^error: not all of the 2 processes came to 127.0.0.1:.* within 2 s; .* '
      'raise --start_timeout.\n$',
    )

  def assert_refused(self, job, message):
    self.assertEqual(job.wait(100), [1, 1], job.err(0) + job.err(1))
    self.assertRegex(job.err(0), f'error: {message}')
    self.assertLen(job.reasons(), 1)
    self.assertEqual(job.out(1) + job.err(1), '')


if __name__ == '__main__':
  absltest.main()
