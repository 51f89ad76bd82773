"""The batch file starts a process per host and goes back into the queue."""

import pathlib
import tempfile

from absl.testing import absltest, parameterized

from launch import slurm
from tests.launch import fakes


def job(**fields):
  return fakes.job('h100:16', **{'bucket': '/shared/runs', **fields})


class SlurmTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.tools = fakes.Tools(pathlib.Path(folder.name))
    self.tools.add('scontrol')

  def run_batch(self, code, restarts):
    self.tools.add('srun', f'echo $JAX_LOCAL_DEVICE_IDS >devices; exit {code}')
    done = self.tools.bash(
      slurm.render(job()),
      SLURM_JOB_ID='17',
      SLURM_JOB_NODELIST='host[1-2]',
      SLURM_RESTART_COUNT=str(restarts),
    )
    return done, [call.split()[0] for call in self.tools.calls]

  def test_one_process_a_host_drives_all_of_its_gpus(self):
    text = slurm.render(job())
    for line in (
      '#SBATCH --nodes=2',
      '#SBATCH --ntasks-per-node=1',
      '#SBATCH --gpus-per-node=8',
      '#SBATCH --requeue',
      '#SBATCH --signal=TERM@25',
      '#SBATCH --output=/shared/runs/smollm2-w4.slurm.log',
    ):
      self.assertIn(f'\n{line}\n', text)
    self.run_batch(0, 0)
    devices = (self.tools.folder / 'devices').read_text().strip()
    self.assertEqual(devices, '0,1,2,3,4,5,6,7')

  @parameterized.parameters(
    (0, 0, ['srun']),
    (1, 0, ['srun', 'scontrol']),
    (143, 2, ['srun', 'scontrol']),
    (1, 3, ['srun']),  # max_restarts is 3.
  )
  def test_a_failure_goes_back_into_the_queue(self, code, restarts, calls):
    done, found = self.run_batch(code, restarts)
    self.assertEqual(done.returncode, code)
    self.assertEqual(found, calls)

  @parameterized.parameters(
    ('nvcr.io/a/jaxq:1', 'nvcr.io#a/jaxq:1'),
    ('jaxq:1', 'jaxq:1'),
    ('/shared/jaxq.sqsh', '/shared/jaxq.sqsh'),
  )
  def test_a_container_is_named_as_pyxis_does(self, image, name):
    text = slurm.render(job(image=image))
    self.assertRegex(text, f"--container-image='?{name}'? ")
    self.assertIn('--container-mounts=/shared/runs:/shared/runs', text)
    self.assertNotIn('container', slurm.render(job(image='')))

  def test_shellcheck_has_nothing_to_say(self):
    found = fakes.shellcheck(slurm.render(job(), partition='gpu', account='a'))
    if found is None:
      self.skipTest('shellcheck is not installed')
    self.assertEqual(found, '')

  def test_what_it_cannot_run_is_named(self):
    with self.assertRaisesRegex(
      NotImplementedError, 'v5e:4x4: launch.slurm is'
    ):
      slurm.render(fakes.job())
    with self.assertRaisesRegex(
      ValueError, '--bucket=gs://b-1: launch.slurm n'
    ):
      slurm.render(job(bucket='gs://b-1'))
    with self.assertRaisesRegex(
      ValueError, '--time=1 day: not a time of Slurm'
    ):
      slurm.render(job(), time='1 day')


if __name__ == '__main__':
  absltest.main()
