"""What processes do together: arrays, agreement, one directory, one model."""

import pathlib
import sys
import tempfile

from absl.testing import absltest

from benchmarks import local_job
from tests.experiments import testing
from tests.multihost import worker


class WorkerTest(absltest.TestCase):
  def test_every_property_of_the_worker_holds(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    testing.write_inputs(folder)
    job = local_job.LocalJob(
      [sys.executable, '-m', worker.__name__, f'--folder={folder}'],
      folder / 'log',
      processes=2,
      cwds=[testing.ROOT],
    )
    self.assertEqual(job.wait(300), [0, 0], job.err(0) + job.err(1))
    self.assertEqual(
      job.out(0).splitlines(),
      ['put and fetch', 'agree', 'write', 'load', 'evaluate', 'generate'],
    )
    self.assertEqual(job.out(1) + job.err(1), '')  # Only process 0 prints.


if __name__ == '__main__':
  absltest.main()
