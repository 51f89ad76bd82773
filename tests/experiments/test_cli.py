"""Entry points fail in one line, with exit code 1, and explain themselves."""

import contextlib
import errno
import io
import os
import pathlib
import queue
import signal
import subprocess
import sys
import tempfile
import types
from unittest import mock

import jax
from absl.testing import absltest, parameterized

from experiments import cli

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENTRY_POINT = '''"""Doubles a number.

A second paragraph.
"""

import json
import time

from absl import flags

from experiments import cli

NUMBER = flags.DEFINE_integer('number', None, 'What to double.')
MODE = flags.DEFINE_enum('mode', 'add', ['add', 'mul'], 'How to double it.')
WORDS = flags.DEFINE_multi_string('word', [], 'Words to print.')
flags.mark_flag_as_required('number')


def main(argv):
  del argv
  if NUMBER.value == 0:
    print('ready', flush=True)
    time.sleep(60)
  if NUMBER.value < 0:
    raise ValueError(f'number={NUMBER.value};\\n  allowed is 0 or more.')
  if MODE.value == 'mul':
    cli.write_flagfile('resolved.flags')
  print(json.dumps(cli.resolved_flags()))


if __name__ == '__main__':
  cli.run(main)
'''


class EntryPointTest(parameterized.TestCase):
  """Whole processes: what a user sees."""

  def setUp(self):
    super().setUp()
    self.folder = tempfile.TemporaryDirectory()
    self.addCleanup(self.folder.cleanup)
    self.script = pathlib.Path(self.folder.name) / 'double.py'
    self.script.write_text(ENTRY_POINT)

  def start(self, *args):
    return subprocess.Popen(
      [sys.executable, str(self.script), *args],
      cwd=self.folder.name,
      env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def finish(self, *args):
    process = self.start(*args)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err

  def test_help_shows_the_docstring_and_only_the_flags_of_the_entry_point(self):
    code, out, err = self.finish('--help')
    self.assertEqual((code, err), (0, ''))
    self.assertStartsWith(out, 'Doubles a number.\n\nA second paragraph.\n')
    self.assertIn('--mode=add|mul\n      How to double it. (default: add)', out)
    self.assertIn('What to double. (required)', out)
    self.assertIn('Words to print. (repeatable)', out)
    self.assertIn('--[no]traceback', out)
    self.assertNotIn('--jax', out)
    self.assertNotIn('verbosity', out)
    self.assertLess(out.index('--mode'), out.index('--number'))
    self.assertLessEqual(max(map(len, out.splitlines())), 80)

  def test_an_error_is_one_line_and_the_traceback_is_shown_if_asked_for(self):
    code, out, err = self.finish('--number=-1')
    self.assertEqual((code, out), (1, ''))
    self.assertEqual(err, 'error: number=-1; allowed is 0 or more.\n')
    code, out, err = self.finish('--number=-1', '--traceback')
    self.assertEqual(code, 1)
    self.assertRegex(err, r'(?s)^Traceback .*main.*\nerror: number=-1; allowed')

  @parameterized.parameters(
    (('--nubmer=1',), 'error: unknown flag --nubmer; did you mean --number?'),
    (('--number=x',), 'error: flag --number=x: a whole number is needed;'),
    (('--mode=sub',), r'error: flag --mode=sub: .*<add\|mul>'),
    ((), 'error: --number not given; a value is required. Add --number=VALUE'),
    (('--number=1', 'two'), "error: unexpected argument 'two'; options are"),
    (('--flagfile=no.flags',), 'error: --flagfile=no.flags: No such file'),
  )
  def test_a_wrong_flag_is_one_line(self, args, message):
    code, out, err = self.finish(*args)
    self.assertEqual((code, out), (1, ''))
    self.assertRegex(err, f'^{message}')
    self.assertEqual(err.count('\n'), 1)

  def test_ctrl_c_says_how_to_go_on(self):
    process = self.start('--number=0')
    self.assertEqual(process.stdout.readline(), 'ready\n')
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    self.assertEqual(process.returncode, 1)
    self.assertRegex(err, r'^interrupted: .*; run the same command again')
    self.assertEqual(err.count('\n'), 1)

  def test_the_written_flagfile_repeats_the_run(self):
    args = ('--number=3', '--mode=mul', '--word=a b', '--word=c=d')
    code, first, err = self.finish(*args)
    self.assertEqual((code, err), (0, ''))
    self.assertIn('"word": ["a b", "c=d"]', first)
    code, second, err = self.finish('--flagfile=resolved.flags')
    self.assertEqual((code, err, second), (0, '', first))


class CallTest(parameterized.TestCase):
  """Which exceptions are the user's, and how they read."""

  def call(self, error):
    def main(argv):
      del argv
      raise error

    err = io.StringIO()
    with contextlib.redirect_stderr(err), self.assertRaises(SystemExit) as done:
      cli._call(main, ['program'])
    self.assertEqual(done.exception.code, 1)
    self.assertEqual(err.getvalue().count('\n'), 1)
    return err.getvalue()

  @parameterized.parameters(
    (ValueError('bits=9; allowed 2..8.'), 'error: bits=9; allowed 2..8.'),
    (ValueError('one\n  two'), 'error: one two'),
    (TypeError('no array'), 'error: no array'),
    (NotImplementedError('not here'), 'error: not here'),
    (NotImplementedError(), 'error: NotImplementedError'),
    (FileNotFoundError('w.gguf: no such file'), 'error: w.gguf: no such file'),
    (
      OSError(errno.ENOSPC, 'No space left on device', '/out/a'),
      'error: /out/a: No space left on device; free some space, then run',
    ),
    (PermissionError(errno.EACCES, 'Denied', '/a'), 'error: /a: Denied; give'),
    (OSError(errno.EIO, 'Input/output error'), 'error: Input/output error.'),
    (MemoryError(), 'error: out of host memory; use a smaller batch'),
    (
      jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory: 9 GB.\nx'),
      r'error: out of device memory \(RESOURCE_EXHAUSTED: .* 9 GB.\); use',
    ),
    (KeyboardInterrupt(), 'interrupted: stopped by Ctrl-C; run the same'),
  )
  def test_an_error_of_the_user_is_one_line(self, error, message):
    self.assertRegex(self.call(error), f'^{message}')

  @parameterized.parameters(
    KeyError('a'),
    AssertionError('ours'),
    jax.errors.JaxRuntimeError('INTERNAL: bug'),
  )
  def test_a_bug_keeps_its_traceback(self, error):
    def main(argv):
      del argv
      raise error

    with self.assertRaises(type(error)):
      cli._call(main, ['program'])

  def test_misuse_of_jax_is_a_bug_although_it_is_a_type_error(self):
    def main(argv):
      del argv
      jax.jit(lambda x: 1 if x else 2)(True)

    with self.assertRaises(jax.errors.TracerBoolConversionError):
      cli._call(main, ['program'])

  def test_a_ctrl_c_that_python_had_to_ignore_is_sent_again(self):
    sent = queue.Queue()
    with mock.patch.object(os, 'kill', lambda *args: sent.put(args)):
      cli._unraisable(types.SimpleNamespace(exc_value=KeyboardInterrupt()))
      self.assertEqual(sent.get(timeout=30), (os.getpid(), signal.SIGINT))

  def test_the_exit_code_of_main_is_passed_on(self):
    self.assertIsNone(cli._call(lambda argv: None, ['program']))
    self.assertEqual(cli._call(lambda argv: len(argv) + 2, ['program']), 3)


if __name__ == '__main__':
  absltest.main()
