"""The command lines are ones that xpk takes.

xpk pins versions that other packages of the environment do not allow, so it is
looked for where it may be by itself: as the program `xpk` on PATH, or as the
one that $JAXQ_XPK names.
"""

import os
import shlex
import shutil
import subprocess
import tempfile

from absl.testing import absltest, parameterized

from launch import xpk
from tests.launch import fakes


def xpk_program():
  """The program, or None."""
  return shutil.which(os.environ.get('JAXQ_XPK', 'xpk'))


class XpkTest(parameterized.TestCase):
  def test_the_command_names_slice_image_and_job(self):
    words = xpk.create(fakes.job(), cluster='c', zone='us-west4-a')
    self.assertEqual(words[:3], ('xpk', 'workload', 'create'))
    for word in (
      '--workload=smollm2-w4',
      '--cluster=c',
      '--zone=us-west4-a',
      '--tpu-type=v5litepod-16',
      f'--docker-image={fakes.IMAGE}',
      '--max-restarts=3',
      '--restart-on-exit-codes=1',
    ):
      self.assertIn(word, words)
    self.assertNotIn('--project=', ' '.join(words))
    command = words[-1].removeprefix('--command=')
    self.assertEqual(tuple(shlex.split(command)), fakes.job().command)

  def test_the_script_says_the_same_as_the_words(self):
    words = xpk.create(fakes.job(), cluster='c')
    script = xpk.render([words])
    lines = script.partition('\n\n')[2].replace('\\\n', ' ')
    self.assertEqual(tuple(shlex.split(lines)), words)

  def test_shellcheck_has_nothing_to_say(self):
    job = fakes.job()
    commands = [xpk.attach(job, cluster='c'), xpk.create(job, cluster='c')]
    found = fakes.shellcheck(xpk.render(commands))
    if found is None:
      self.skipTest('shellcheck is not installed')
    self.assertEqual(found, '')

  @parameterized.parameters('v5e:2x4', 'v5e:4x4', 'v5p:2x2x2', 'tpu7x:2x2x1')
  def test_its_own_parser_and_dry_run_take_it(self, name):
    program = xpk_program()
    if program is None:
      self.skipTest('xpk is not on PATH and $JAXQ_XPK does not name it')
    words = xpk.create(
      fakes.job(name), cluster='c', project='p', zone='us-west4-a'
    )
    with tempfile.TemporaryDirectory() as home:
      done = subprocess.run(
        [program, *words[1:], '--dry-run', '--skip-validation'],
        env={**os.environ, 'HOME': home},
        capture_output=True,
        text=True,
        check=False,
      )
    self.assertEqual(done.returncode, 0, done.stdout[-3000:] + done.stderr)
    self.assertIn('smollm2-w4', done.stdout)

  def test_its_own_parser_takes_the_storage(self):
    program = xpk_program()
    if program is None:
      self.skipTest('xpk is not on PATH and $JAXQ_XPK does not name it')
    words = xpk.attach(fakes.job(), cluster='c', project='p', zone='us-west4-a')
    with tempfile.TemporaryDirectory() as home:
      done = subprocess.run(
        [program, *words[1:], '--dry-run', '--skip-validation'],
        env={**os.environ, 'HOME': home},
        capture_output=True,
        text=True,
        check=False,
      )
    # Its dry run wants a cluster all the same; 2 is the parser's exit code.
    self.assertNotEqual(done.returncode, 2, done.stderr)
    self.assertNotIn('unrecognized arguments', done.stderr)

  def test_gpus_are_refused(self):
    with self.assertRaisesRegex(NotImplementedError, 'launch.xpk is for TPUs'):
      xpk.create(fakes.job('h100:8'), cluster='c')


if __name__ == '__main__':
  absltest.main()
