"""`kill -9` at random moments and the same command again: the same bytes."""

import os
import pathlib
import sys
import tempfile

import pytest
from absl.testing import absltest

from benchmarks import interrupted
from tests.experiments import testing

NUM_BLOCKS, KILLS = 12, 3


class KillTest(absltest.TestCase):
  @pytest.mark.slow
  def test_killed_runs_end_with_the_bytes_of_an_uninterrupted_one(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.enterContext(testing.every_compilation_is_kept())
    testing.write_inputs(folder, NUM_BLOCKS)
    log = self.enterContext(open(folder / 'log', 'w'))
    how = {
      'cwd': testing.ROOT,
      'env': {**os.environ, 'JAX_PLATFORMS': 'cpu'},
      'stdout': log,
      'stderr': log,
    }
    command = [sys.executable, '-m', 'experiments.calibrate']
    command += [*testing.arguments(folder), '--noevaluate']
    whole, part = folder / 'whole', folder / 'part'
    interrupted.run([*command, f'--output={whole}'], **how)
    kills = interrupted.run_with_kills(
      [*command, f'--output={part}'],
      part,
      num_blocks=NUM_BLOCKS,
      kills=KILLS,
      block_seconds=0.2,
      **how,
    )
    self.assertLen(kills, KILLS)
    saved = [kill.blocks for kill in kills]
    self.assertEqual(saved, sorted(saved))
    self.assertBetween(saved[-1], 1, NUM_BLOCKS)
    self.assertEqual(interrupted.digest(part), interrupted.digest(whole))
    self.assertFalse((folder / 'part.lock').exists())


if __name__ == '__main__':
  absltest.main()
