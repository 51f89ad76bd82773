"""experiments.benchmark by two processes that share a model and its cache."""

import pathlib
import sys
import tempfile

import pytest
from absl.testing import absltest

from benchmarks import local_job
from experiments import results
from tests.experiments import testing

pytestmark = pytest.mark.slow


class BenchmarkTest(absltest.TestCase):
  def test_two_processes_time_one_model(self):
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    path = pathlib.Path(folder.name)
    testing.write_inputs(path)
    job = local_job.LocalJob(
      [
        *(sys.executable, '-m', 'experiments.benchmark'),
        *(f'--model={path / "model"}', '--mesh=model:2'),
        *('--context=16', '--steps=3', '--kv_cache=int8'),
        f'--output={path / "out.json"}',
      ],
      path / 'log',
      processes=2,
      devices=1,
      env={'PYTHONPATH': str(testing.ROOT)},
    )
    self.assertEqual(job.wait(150), [0, 0], job.err(0) + job.err(1))
    self.assertEqual(job.out(1) + job.err(1), '')  # Only process 0 prints.
    self.assertIn('decode per step', job.out(0))
    (row,) = results.load(path / 'out.json').rows
    found = {metric.name: metric.value for metric in row.metrics}
    self.assertGreater(found['decode per step'], 0.0)
    # Of all shards: 8 bits, a scale of 16 to 8 channels, and free slots.
    self.assertBetween(found['bits per key or value'], 10.0, 16.0)


if __name__ == '__main__':
  absltest.main()
