"""How a command runs: stopped by SIGTERM, and traced."""

import pathlib
import signal
import tempfile

from absl.testing import absltest, parameterized

from benchmarks import interrupted
from experiments import cli
from tests.experiments import testing


class JobTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def test_sigterm_saves_the_block_and_exits_with_143(self):
    testing.write_inputs(self.folder, num_layers=8)
    arguments = (*testing.arguments(self.folder), '--noevaluate')
    process = testing.start(*arguments)
    blocks = self.folder / 'out' / 'blocks'
    interrupted.wait_until(process, (blocks / '00000').exists)
    process.send_signal(signal.SIGTERM)
    done = testing.finish(process)
    saved = len(list(blocks.iterdir()))
    self.assertEqual(done.code, 143, done.err)
    self.assertLess(saved, 8)
    self.assertIn(
      f'stopped: stopped by SIGTERM; {saved} of 8 blocks are saved; run the '
      'same command again to go on.\n',
      done.err,
    )
    done = testing.call(*arguments)
    self.assertEqual(done.code, 0, done.err)
    self.assertIn(f'resuming: {saved} of 8 blocks are done', done.err)

  def test_a_trace_has_the_scopes_of_the_steps(self):
    testing.write_inputs(self.folder)
    trace = self.folder / 'trace'
    process = testing.start(
      *testing.arguments(self.folder),
      *('--noevaluate', '--method=rtn', f'--profile={trace}'),
      JAX_ENABLE_COMPILATION_CACHE='false',  # It keeps no names.
    )
    done = testing.finish(process)
    self.assertEqual(done.code, 0, done.err)
    (file,) = trace.rglob('*.xplane.pb')
    content = file.read_bytes()
    for scope in (b'/forward/', b'/apply_round_to_nearest/', b'block'):
      self.assertTrue(scope in content, scope)

  def test_a_trace_that_cannot_be_written_is_refused_at_once(self):
    (self.folder / 'file').touch()
    done = testing.call(
      *testing.arguments(self.folder), f'--profile={self.folder / "file"}'
    )
    self.assertEqual(done.code, 1)
    self.assertRegex(done.errors[0], 'file: File exists; give a path that is')

  @parameterized.parameters(
    ('--num_processes=2', 'without --coordinator_address; the processes of a'),
    ('--coordinator_address=here', 'HOST:PORT of process 0 is needed'),
  )
  def test_flags_that_make_no_job_are_one_line(self, flag, message):
    done = testing.call(*testing.arguments(self.folder), flag)
    self.assertEqual(done.code, 1)
    self.assertRegex(done.errors[0], message)

  def test_how_a_command_runs_is_no_part_of_what_it_computes(self):
    flags = cli.resolved_flags(['experiments.job'])
    self.assertIn('process_id', flags)
    self.assertEmpty(set(flags) & set(cli.resolved_flags()))


if __name__ == '__main__':
  absltest.main()
