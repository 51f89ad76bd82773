"""Tests of jaxq.parallel.distributed that need no second process."""

import jax
from absl.testing import absltest, parameterized

from benchmarks import local_job
from jaxq.parallel import distributed

ADDRESS = '10.0.0.2:1234'


class JobConfigTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'num_processes': 2}, '--num_processes without --coordinator_address'),
    ({'process_id': 1}, '--process_id without .*Give HOST:PORT of process 0'),
    ({'coordinator_address': 'host'}, 'address=host; HOST:PORT .* as in 10'),
    ({'coordinator_address': 'host:x'}, 'HOST:PORT of process 0 is needed'),
    ({'coordinator_address': 'host:99999'}, 'HOST:PORT of process 0'),
    (
      {'coordinator_address': ADDRESS, 'num_processes': 2, 'process_id': 2},
      '--num_processes=2 --process_id=2; process_id must be in 0..num_proc',
    ),
  )
  def test_flags_that_make_no_job_are_refused(self, flags, message):
    with self.assertRaisesRegex(ValueError, message):
      distributed.JobConfig(**flags)

  def test_what_is_complete_needs_no_platform(self):
    config = distributed.JobConfig(coordinator_address=ADDRESS)
    self.assertFalse(config.is_explicit)
    config = distributed.JobConfig(
      coordinator_address=ADDRESS, num_processes=2, process_id=0
    )
    self.assertTrue(config.is_explicit)


class AloneTest(parameterized.TestCase):
  def test_a_process_alone_agrees_with_itself(self):
    jax.devices()  # Computing already, as in a notebook.
    self.assertFalse(distributed.start(distributed.JobConfig()))
    self.assertTrue(distributed.is_first())
    self.assertEqual(distributed.on_first(lambda: [1, 'a']), [1, 'a'])
    distributed.check_same('flags', {'--x': '1'})
    distributed.barrier()

  def test_a_coordinator_that_does_not_answer_is_named(self):
    address = f'127.0.0.1:{local_job.free_port()}'
    config = distributed.JobConfig(
      coordinator_address=address,
      num_processes=2,
      process_id=1,
      start_timeout=1,
    )
    with self.assertRaisesRegex(
      OSError, f'{address} does not answer within 1 s.*process 0 must run there'
    ):
      distributed.start(config)


class DifferenceTest(parameterized.TestCase):
  def test_names_the_first_process_that_differs(self):
    found = {
      0: ('a', {'--x': '1', '--y': '2'}),
      1: ('b', {'--x': '1', '--y': '2'}),
      3: ('d', {'--x': '2', '--y': '2'}),
      2: ('c', {'--x': '1'}),
    }
    self.assertEqual(
      distributed.difference('flags', found),
      'process 2 (c) runs other flags: --y=nothing there, 2 on process 0',
    )
    del found[2], found[3]
    self.assertEqual(distributed.difference('flags', found), '')

  def test_long_values_are_cut(self):
    found = {0: ('a', {'jaxq': '0' * 64}), 1: ('b', {'jaxq': '1' * 65})}
    message = distributed.difference('code', found)
    self.assertRegex(
      message, r'other code: jaxq=1{24}\.\.1{12} there, 0{64} on'
    )


if __name__ == '__main__':
  absltest.main()
