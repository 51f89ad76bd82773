"""Tests of experiments.interrupts: Ctrl-C while things are being imported."""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from experiments import interrupts
from tests.experiments import testing

SLOW = """
import time
print('importing', flush=True)
time.sleep(60)
"""


class InterruptsTest(parameterized.TestCase):
  @parameterized.parameters(
    ('calibrate', 'jax'), ('export', 'jax'), ('harness', 'lm_eval')
  )
  def test_one_line_while_importing(self, entry_point, library):
    with tempfile.TemporaryDirectory() as folder:
      (pathlib.Path(folder) / f'{library}.py').write_text(SLOW, 'utf-8')
      process = subprocess.Popen(
        [sys.executable, '-m', f'experiments.{entry_point}', '--model=x'],
        cwd=testing.ROOT,
        env={**os.environ, 'PYTHONPATH': folder},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      self.assertEqual(process.stdout.readline(), 'importing\n')
      process.send_signal(signal.SIGINT)
      outcome = testing.finish(process)
    self.assertEqual(
      outcome.err,
      'interrupted: stopped by Ctrl-C while starting; nothing was done.\n',
    )
    self.assertEqual(outcome.code, 1)

  @parameterized.parameters(
    (['-m'], signal.default_int_handler, True),
    (['-m'], signal.SIG_IGN, False),
    (['pytest'], signal.default_int_handler, False),
    ([], signal.default_int_handler, False),
  )
  def test_only_on_the_way_to_an_entry_point(self, argv, handler, taken):
    before = signal.signal(signal.SIGINT, handler)
    try:
      with mock.patch.object(sys, 'argv', argv):
        interrupts.begin()
      during = signal.getsignal(signal.SIGINT)
      self.assertEqual(during is not handler, taken)
      interrupts.end()
      self.assertIs(signal.getsignal(signal.SIGINT), handler)
    finally:
      signal.signal(signal.SIGINT, before)


if __name__ == '__main__':
  absltest.main()
