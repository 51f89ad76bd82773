"""Tests of jaxq.parallel.watch: several watches over one table, as threads."""

import contextlib
import io
import queue
import sys
import threading
import time
from unittest import mock

import jax
from absl.testing import absltest, parameterized

from jaxq.parallel import watch


class Service:
  """What the coordination service's client does with keys."""

  def __init__(self):
    self.table = {}
    self.gone = False
    self._lock = threading.Lock()

  def key_value_set(self, key, value, allow_overwrite):
    del allow_overwrite
    self._check()
    with self._lock:
      self.table[key] = value

  def key_value_dir_get(self, key):
    self._check()
    with self._lock:
      return [(k, v) for k, v in self.table.items() if k.startswith(key)]

  def _check(self):
    if self.gone:
      raise jax.errors.JaxRuntimeError('UNAVAILABLE: connection refused')


BAR = '\rcalibrate:  50%|#####     |'  # A progress bar of the main thread.


class WatchTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.service = Service()
    self.ended = queue.Queue()
    self.watches = []
    self.err = io.StringIO()
    self.err.write(BAR)
    self.enterContext(mock.patch.object(sys, '__stderr__', self.err))
    self.enterContext(mock.patch.object(watch, '_PERIOD', 0.02))
    self.enterContext(mock.patch.object(watch, '_UNREACHABLE', 0.1))

  def start(self, index, count=3, timeout=0.5):
    def end(code):
      made._over.set()
      self.ended.put((index, code))

    with contextlib.ExitStack() as stack:
      for module, name, value in (
        (jax, 'process_index', index),
        (jax, 'process_count', count),
        (watch.distributed, 'client', self.service),
      ):
        patch = mock.patch.object(module, name, return_value=value)
        stack.enter_context(patch)
      made = watch.Watch(timeout, end)
    self.addCleanup(made._over.set)
    self.watches.append(made)
    return made

  def ends(self, count):
    return sorted(self.ended.get(timeout=30) for _ in range(count))

  def said(self):
    """What was written behind the bar: lines of their own."""
    bar, _, said = self.err.getvalue().partition('\n')
    self.assertEqual(bar, BAR)
    return said

  def test_living_processes_are_left_alone(self):
    made = [self.start(i, timeout=0.3) for i in range(3)]
    time.sleep(0.8)
    for one in made:
      one.stop()
    self.assertTrue(self.ended.empty())
    self.assertEqual(self.err.getvalue(), BAR)

  def test_a_silent_process_ends_the_job_with_a_reason_on_process_0(self):
    self.start(0)
    self.start(1)
    self.start(2)._over.set()  # Its thread stops; it says nothing.
    self.assertEqual(self.ends(2), [(0, 1), (1, 1)])
    self.assertRegex(
      self.said(),
      r'^error: process 2 \(.*\) gave no sign of life for 0 s: killed, or its '
      r'host is gone. Run the same command again on all hosts to go on.\n$',
    )

  def test_a_process_that_was_never_seen_counts_as_silent(self):
    self.start(0, count=2)
    self.assertEqual(self.ends(1), [(0, 1)])
    self.assertRegex(self.said(), r'^error: process 1 \(never seen\) gave no')

  def test_the_error_of_one_process_is_printed_by_process_0(self):
    made = [self.start(i) for i in range(3)]
    made[2].leave('error', 'the disk\n  is full.')
    self.assertEqual(self.ends(3), [(0, 1), (1, 1), (2, 1)])
    self.assertRegex(
      self.said(), r'^error: process 2 \(.*\): the disk is full.\n$'
    )

  def test_the_error_of_process_0_is_its_own_and_its_code_that_of_all(self):
    made = [self.start(i) for i in range(3)]
    made[0].leave('stopped', 'by SIGTERM.', 143)
    self.assertEqual(self.ends(3), [(0, 143), (1, 143), (2, 143)])
    self.assertEqual(self.said(), 'stopped: by SIGTERM.\n')

  def test_without_process_0_the_others_say_so_themselves(self):
    self.start(1)
    time.sleep(0.1)
    self.service.gone = True
    self.assertEqual(self.ends(1), [(1, 1)])
    self.assertRegex(
      self.said(),
      '^error: .*: process 0, which coordinates the job, is',
    )

  def test_a_failed_computation_waits_for_the_reason_but_not_forever(self):
    made = self.start(1, timeout=0.1)
    start = time.monotonic()
    made.verdict()
    self.assertLess(time.monotonic() - start, 5)


if __name__ == '__main__':
  absltest.main()
