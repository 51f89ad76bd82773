"""The launchers as one starts them."""

import os
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import absltest, parameterized

from launch import cli
from tests.launch import fakes

ROOT = pathlib.Path(__file__).resolve().parents[2]
GPTQ = 'experiments/flags/smollm2_w4a16_gptq.flags'
COMMON = ('--topology=v5e:2x2', f'--image={fakes.IMAGE}', '--nocheck')
LAUNCHERS = {
  'gke': ('--bucket=gs://my-bucket',),
  'slurm': ('--topology=h100:8', '--bucket=/shared'),
  'tpu_vm': ('--bucket=gs://my-bucket', '--zone=us-west4-a'),
  'xpk': ('--bucket=gs://my-bucket', '--cluster=c'),
}
TOOLS = {
  'gke': 'kubectl',
  'slurm': 'sbatch',
  'tpu_vm': 'gcloud',
  'xpk': 'xpk',
}


def launch(name, *arguments, env=None):
  return subprocess.run(
    [sys.executable, '-m', f'launch.{name}', *arguments],
    cwd=ROOT,
    env={**os.environ, **(env or {})},
    capture_output=True,
    text=True,
    check=False,
  )


class LaunchersTest(parameterized.TestCase):
  @parameterized.parameters(*LAUNCHERS)
  def test_it_prints_and_runs_nothing(self, name):
    done = launch(name, f'--job={GPTQ}', *COMMON, *LAUNCHERS[name])
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn('smollm2-w4a16-gptq', done.stdout)
    self.assertIn('experiments.calibrate', done.stdout)
    self.assertIn('--group_size=64', done.stdout)

  @parameterized.parameters(*LAUNCHERS)
  def test_apply_needs_the_tool(self, name):
    done = launch(
      name,
      f'--job={GPTQ}',
      '--apply',
      *COMMON,
      *LAUNCHERS[name],
      env={'PATH': '/nowhere'},
    )
    self.assertEqual(done.returncode, 1)
    self.assertRegex(
      done.stderr,
      rf'^error: --apply needs {TOOLS[name]}, which is not on PATH; install ',
    )

  def test_help_shows_the_shared_flags(self):
    done = launch('gke', '--help')
    for flag in ('--topology', '--bucket', '--override', '--queue', '--apply'):
      self.assertIn(flag, done.stdout)

  def test_a_mistake_is_one_line(self):
    done = launch('gke', *COMMON, *LAUNCHERS['gke'])
    self.assertEqual(done.returncode, 1)
    self.assertRegex(done.stderr, r'^error: --job not given; a flagfile .*\n$')

  def test_a_fake_slurm_takes_the_batch_file(self):
    with tempfile.TemporaryDirectory() as folder:
      tools = fakes.Tools(pathlib.Path(folder))
      tools.add('sbatch', 'cat >submitted; echo Submitted batch job 17')
      done = launch(
        'slurm',
        f'--job={GPTQ}',
        '--apply',
        *COMMON,
        *LAUNCHERS['slurm'],
        env=dict(tools.env()),
      )
      self.assertEqual(done.returncode, 0, done.stderr)
      self.assertIn('Submitted batch job 17', done.stderr)
      submitted = (tools.folder / 'submitted').read_text()
      self.assertEqual(submitted, done.stdout)


class NameTest(parameterized.TestCase):
  @parameterized.parameters(
    ('SmolLM2_w4a16', 'smollm2-w4a16'),
    ('3bit', 'job-3bit'),
    ('_x_', 'x'),
    ('a' * 39 + '_b', 'a' * 39),
  )
  def test_a_name_that_every_platform_takes(self, stem, name):
    self.assertEqual(cli.default_name(stem), name)
    fakes.job(name=name)


if __name__ == '__main__':
  absltest.main()
