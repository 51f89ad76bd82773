"""Tests of jaxq.parallel.preemption in one process."""

import contextlib
import io
import os
import signal
import threading
import time
from unittest import mock

from absl.testing import absltest, parameterized

from jaxq.parallel import preemption


def terminate():
  os.kill(os.getpid(), signal.SIGTERM)


class PreemptionTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.late = threading.Event()
    self.reason = ''

  def cut_off(self, reason):
    self.reason = reason
    self.late.set()

  def listening(self, seconds=60.0):
    return preemption.listening(seconds, self.cut_off)

  def test_a_notice_stops_at_once_where_nothing_is_to_be_finished(self):
    with self.listening():
      with self.assertRaisesRegex(
        preemption.Preempted, '^stopped by SIGTERM; run the same command again'
      ):
        terminate()
        time.sleep(10)

  def test_a_notice_waits_for_the_next_check(self):
    done = []
    err = io.StringIO()
    with self.listening(), contextlib.redirect_stderr(err):
      with self.assertRaisesRegex(
        preemption.Preempted, 'stopped by SIGTERM; 2 of 3 blocks are saved; run'
      ):
        with preemption.finishing():
          preemption.check('1 of 3 blocks are saved')
          terminate()
          time.sleep(0.05)
          done.append('second')
          preemption.check('2 of 3 blocks are saved')
          done.append('third')
    self.assertEqual(done, ['second'])
    self.assertIn('SIGTERM: stopping when this step is saved', err.getvalue())

  def test_what_takes_longer_than_the_grace_period_is_cut_off(self):
    with (
      self.listening(0.3),
      mock.patch.object(preemption, '_MARGIN', 0.1),
      contextlib.redirect_stderr(io.StringIO()),
      preemption.finishing(),
    ):
      terminate()
      self.assertTrue(self.late.wait(30))
    self.assertRegex(
      self.reason, 'not done within 0.3 s; it will be done again'
    )

  def test_the_clock_starts_though_the_main_thread_computes(self):
    # As in XLA: handlers do not run, the byte in the pipe is there.
    with (
      self.listening(0.2),
      mock.patch.object(preemption, '_MARGIN', 0.1),
      contextlib.redirect_stderr(io.StringIO()),
      preemption.finishing(),
    ):
      os.write(signal.set_wakeup_fd(-1), bytes([signal.SIGTERM]))
      self.assertTrue(self.late.wait(30))

  def test_nothing_happens_where_nobody_listens(self):
    preemption.check('nothing')
    with preemption.finishing():
      pass

  def test_the_handler_that_was_there_is_there_again(self):
    before = signal.getsignal(signal.SIGTERM)
    with self.listening():
      self.assertNotEqual(signal.getsignal(signal.SIGTERM), before)
    self.assertEqual(signal.getsignal(signal.SIGTERM), before)


if __name__ == '__main__':
  absltest.main()
