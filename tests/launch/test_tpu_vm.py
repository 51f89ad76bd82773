"""The script sees a job through losses, and so does each host."""

import pathlib
import shlex
import tempfile

from absl.testing import absltest, parameterized

from launch import tpu_vm
from tests.launch import fakes

# The state of each `describe`; the job is over after the last of them.
GCLOUD = """
case "$*" in
  *describe*)
    echo >>described
    state="$(head -n "$(wc -l <described)" states | tail -n 1)"
    case "$state" in
      '') echo 'ERROR: NOT_FOUND: no such resource' >&2; exit 1 ;;
      OFFLINE) echo 'ERROR: no network' >&2; exit 1 ;;
    esac
    echo "$state"
    ;;
  *"queued-resources create"*)
    for word in "$@"; do
      case "$word" in *startup-script=*) cp "${word#*script=}" startup ;; esac
    done
    ;;
  "storage cat"*)
    [ "$(wc -l <described)" -ge "$(wc -l <states)" ] && cat code
    ;;
esac
"""


class TpuVmTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)
    self.tools = fakes.Tools(self.folder)
    self.tools.add('sleep')

  def see_through(self, states, code):
    self.tools.add('gcloud', GCLOUD)
    (self.folder / 'described').touch()
    (self.folder / 'states').write_text('\n'.join([*states, '']))
    (self.folder / 'code').write_text(f'{code}\n')
    done = self.tools.bash(
      tpu_vm.render(fakes.job(), zone='us-west4-a', project='p', spot=True)
    )
    verbs = ('queued-resources create', 'queued-resources delete', 'storage rm')
    found = [
      verb for call in self.tools.calls for verb in verbs if verb in call
    ]
    return done, [verb.split()[1] for verb in found]

  def test_a_lost_slice_is_asked_for_again_and_deleted_at_the_end(self):
    states = ['', 'PROVISIONING', 'OFFLINE', 'SUSPENDED', '', 'ACTIVE']
    done, verbs = self.see_through(states, 0)
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertEqual(verbs, ['create', 'delete', 'create', 'delete'])

  def test_a_job_that_is_over_already_asks_for_nothing(self):
    done, verbs = self.see_through([], 0)
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertEmpty(verbs)

  def test_a_failed_job_ends_with_its_code_and_may_be_started_again(self):
    done, verbs = self.see_through(['', 'ACTIVE', 'ACTIVE'], 1)
    self.assertEqual(done.returncode, 1)
    self.assertIn('rm', verbs)
    self.assertIn('error: smollm2-w4 failed; its logs are beside', done.stderr)

  def test_a_slice_that_is_lost_too_often_is_given_up(self):
    done, verbs = self.see_through(['FAILED'] * 9 + [''], 0)
    self.assertEqual(done.returncode, 1)
    self.assertEqual(verbs, ['delete'] * 4)
    self.assertIn('lost 4 times; run this again to go on', done.stderr)

  def test_the_request_names_slice_and_place(self):
    self.see_through(['', 'ACTIVE'], 0)
    (create,) = [c for c in self.tools.calls if 'resources create' in c]
    for word in (
      'smollm2-w4 --zone=us-west4-a --project=p',
      '--accelerator-type=v5litepod-16',
      '--runtime-version=v2-alpha-tpuv5-lite',
      '--spot',
    ):
      self.assertIn(word, create)
    self.assertEqual(
      (self.folder / 'startup').read_text(), tpu_vm.startup(fakes.job())
    )

  def run_host(self, docker, worker=0):
    """Runs the startup script with its paths in a folder of the test."""
    self.tools.add('curl', f'echo {worker}')
    self.tools.add('gcloud')
    self.tools.add('gcsfuse')
    self.tools.add('mountpoint', 'exit 1')
    self.tools.add('docker', docker)
    script = tpu_vm.startup(fakes.job())
    script = script.replace('mount=/bucket', f'mount={self.folder}/bucket')
    script = script.replace('folder=/bucket', f'folder={self.folder}/bucket')
    script = script.replace('/var/log', str(self.folder))
    done = self.tools.bash(script)
    self.assertEqual(done.returncode, 0, done.stderr)
    return self.folder / 'bucket' / 'runs'

  def exit_code(self, folder):
    (path,) = folder.glob('smollm2-w4.*.exit_code')
    return path.read_text().strip()

  def test_a_host_starts_the_container_again_after_a_failure(self):
    folder = self.run_host(
      '[[ "$1" != run ]] || { echo hello; echo >>runs; '
      '[ "$(wc -l <runs)" = 3 ]; }'
    )
    self.assertEqual(self.exit_code(folder), '0')
    log = (folder / 'smollm2-w4.host0.log').read_text()
    self.assertIn('jaxq: failure 2 on host 0', log)
    self.assertEqual(log.count('hello'), 3)
    (last,) = {c for c in self.tools.calls if c.startswith('docker run')}
    self.assertIn(f'--stop-timeout=25 --volume={self.folder}/bucket', last)
    self.assertIn('--output=/bucket/runs/smollm2-w4', last)

  def test_a_host_gives_up_in_the_end(self):
    folder = self.run_host('[[ "$1" != run ]]')
    self.assertEqual(self.exit_code(folder), '1')
    runs = [c for c in self.tools.calls if c.startswith('docker run')]
    self.assertLen(runs, 1 + fakes.job().max_restarts)

  def test_only_the_first_host_says_that_it_is_over(self):
    folder = self.run_host('', worker=3)
    self.assertEmpty(list(folder.glob('*.exit_code')))
    self.assertTrue((folder / 'smollm2-w4.host3.log').exists())

  def test_the_command_arrives_as_it_is(self):
    tail = tpu_vm.startup(fakes.job()).split(fakes.IMAGE)[-1]
    words = shlex.split(tail[: tail.index('}')].replace('\\\n', ' '))
    self.assertEqual(tuple(words), fakes.job().command)

  def test_shellcheck_has_nothing_to_say(self):
    for script in (
      tpu_vm.render(fakes.job(), zone='us-west4-a', project='p', spot=True),
      tpu_vm.startup(fakes.job()),
    ):
      found = fakes.shellcheck(script)
      if found is None:
        self.skipTest('shellcheck is not installed')
      self.assertEqual(found, '')

  def test_chips_that_the_api_does_not_serve(self):
    message = 'tpu7x:2x2x1: the Cloud TPU API does not serve this chip; use'
    with self.assertRaisesRegex(NotImplementedError, message):
      tpu_vm.render(fakes.job('tpu7x:2x2x1'), zone='us-central1-c')


if __name__ == '__main__':
  absltest.main()
