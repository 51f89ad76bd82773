"""Tests of experiments.plan and of --plan: what is printed, and exit codes."""

import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from experiments import results
from jaxq.calibrate import plan_topology
from tests.experiments import testing


class PlanTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls._folder = tempfile.TemporaryDirectory()
    cls.addClassCleanup(cls._folder.cleanup)
    cls.folder = pathlib.Path(cls._folder.name)
    testing.write_inputs(cls.folder)
    cls.enterClassContext(testing.every_compilation_is_kept())

  def call(self, *args, name='plan', **memory):
    """A plan of the small model on one CPU device."""
    if name == 'plan':
      args = (
        f'--model={self.folder / "model"}',
        '--group_size=16',
        '--sequences=8',
        '--sequence_length=16',
        '--topology=cpu:1',
        *args,
      )
    return testing.call(*args, name=name)

  def test_fits(self):
    path = self.folder / 'plan.json'
    done = self.call(f'--plan_output={path}')
    self.assertEqual((done.code, done.errors), (0, []), done.err)
    for text in (
      'W4A16 with gptq, 8 x 16 tokens in batches of 8, float32',
      'cpu:1 (1 devices of ',
      "compiled by XLA's CPU backend for 1 simulated devices; nothing was run",
      'Memory of one device:',
      'Work of one device and call:',
      'fits: cpu:1 with --mesh=data:1,model:1 needs ',
    ):
      self.assertIn(text, done.out)
    saved = results.load(path)
    names = [row.name for row in saved.rows]
    self.assertEqual(
      names,
      [
        *('outside', 'embed', 'observe_gptq', 'apply_gptq', 'forward'),
        *('probe', 'evaluate', 'decode', 'plan'),
      ],
    )
    self.assertEqual(saved.rows[-1]['fits'].value, 1)
    self.assertEqual(saved.rows[-1]['fits'].conventions['topology'], 'cpu:1')
    self.assertEqual(saved.run.flags['group_size'], 16)
    self.assertGreater(saved.rows[2]['TFLOP'].value, 0)
    for row in saved.rows[:-1]:
      parts = ('arguments', 'outputs', 'temporaries', 'resident')
      total = sum(row[name].value for name in parts)
      self.assertAlmostEqual(row['total'].value, total)

  def test_does_not_fit(self):
    small = mock.patch.object(
      plan_topology.Topology, 'memory', new=property(lambda self: 1e5)
    )
    path = self.folder / 'small.json'
    with small:
      done = self.call('--steps=calibrate', f'--plan_output={path}')
    self.assertEqual((done.code, done.errors), (1, []), done.err)
    self.assertIn('does not fit: cpu:1 with --mesh=data:1,model:1', done.out)
    self.assertIn('no larger topology was found to fit', done.out)
    self.assertEqual(results.load(path).rows[-1]['fits'].value, 0)

  def test_a_gpu_has_bounds(self):
    with mock.patch('experiments.planning._SIMULATED', 1):
      done = self.call('--steps=calibrate', '--topology=h100:1')
    self.assertEqual(done.code, 0, done.err)
    self.assertIn(
      "whose temporaries are not a GPU's; nothing was run", done.out
    )
    self.assertIn('lower bounds, no time was measured', done.out)
    self.assertRegex(
      done.out, r'lower bound on the time of all calls: \S+ s \(roofline'
    )

  def test_plan_of_calibrate(self):
    done = self.call(
      *testing.arguments(self.folder),
      '--plan',
      '--topology=cpu:1',
      name='calibrate',
    )
    self.assertEqual((done.code, done.errors), (0, []), done.err)
    self.assertIn('4 x 16 tokens in batches of 4', done.out)
    self.assertRegex(done.out, r'\| evaluate +\|')
    self.assertNotIn('decode', done.out)
    self.assertFalse((self.folder / 'out').exists())
    self.assertFalse((self.folder / 'out.run').exists())

  def test_a_reproducible_run_is_not_planned(self):
    done = self.call(
      *testing.arguments(self.folder),
      *('--plan', '--topology=cpu:1', '--reproducible'),
      name='calibrate',
    )
    self.assertEqual(done.code, 1)
    self.assertRegex(done.err, '--reproducible --plan: .* Leave one of the two')

  @parameterized.parameters(
    ('evaluate', ('--window=32', '--tokens=128')),
    ('generate', ('--prompt=a b c', '--max_new_tokens=4')),
  )
  def test_plan_of_others(self, name, flags):
    done = self.call(
      f'--model={self.folder / "model"}',
      '--plan',
      '--topology=cpu:1',
      *flags,
      name=name,
    )
    self.assertEqual((done.code, done.errors), (0, []), done.err)
    step = {'evaluate': 'evaluate', 'generate': 'decode'}[name]
    self.assertRegex(done.out, rf'\| {step} +\|')
    self.assertIn('fits: cpu:1', done.out)

  @parameterized.parameters(
    (('--topology=v9:4x4',), '--topology=v9:4x4 is not known; known are v4:{'),
    (('--topology=',), '--topology not given; known are v4:.* Give one'),
    (('--mesh=data:2',), '--mesh=data:2: .* needs 2 devices and there are 1'),
    (('--steps=train',), r'--steps=train; allowed are \[.calibrate., .decode'),
    (('--scheme=W9A9',), '--scheme=W9A9; allowed are'),
    (('--method=magic',), '--method=magic; allowed'),
    (('--model=llama5',), 'shape by name: llama3-405b, llama3-70b'),
    (('--batch_size=3',), 'mesh data:1: batch_size=3 and sequences=8'),
  )
  def test_messages(self, flags, message):
    done = self.call(*flags)
    self.assertEqual(done.code, 1)
    self.assertLen(done.errors, 1)
    self.assertRegex(done.errors[0], message)

  def test_a_process_of_its_own_with_simulated_devices(self):
    done = subprocess.run(
      [
        *(sys.executable, '-m', 'experiments.plan'),
        f'--model={self.folder / "model"}',
        *('--group_size=16', '--sequences=8', '--sequence_length=16'),
        *('--topology=cpu:2', '--mesh=data:2', '--steps=calibrate'),
      ],
      cwd=testing.ROOT,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''},
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn('for 2 simulated devices', done.stdout)
    self.assertRegex(done.stdout, r'observe_gptq: \d+ all-reduce over data \(')


if __name__ == '__main__':
  absltest.main()
