"""Tests of experiments.sensitivity, and of --bits_from behind it."""

import json
import pathlib
import tempfile

from absl.testing import absltest

import models
from experiments import recipe
from jaxq.calibrate import driver
from jaxq.data import pipeline
from jaxq.nn import blocks
from jaxq.numerics import qarray
from jaxq.quant import mixed, schemes
from tests.calibrate import testing as calibration
from tests.experiments import testing

NAME = 'blocks.1.mlp.down_proj'


def call(*args):
  """As `python -m experiments.sensitivity ARGS`, in this process."""
  return testing.call(*args, name='sensitivity')


class SensitivityTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.folder = pathlib.Path(folder)
    testing.write_inputs(cls.folder)
    cls.done = call(
      f'--model={cls.folder / "model"}',
      f'--output={cls.folder / "out"}',
      f'--data={cls.folder / "text.txt"}',
      '--choices=2,3,4,8,4g9',
      '--probes=3',
      # A scale per channel of 16 inputs costs two bits.
      '--target_bits=6.0',
      '--sequences=2',
      '--sequence_length=16',
      '--batch_size=2',
    )

  def test_the_two_files(self):
    self.assertEqual(self.done.code, 0, self.done.err)
    self.assertRegex(self.done.out, r'all 4 .*\n(.*\n)*.*searched')
    report = json.loads((self.folder / 'out/sensitivity.json').read_text())
    self.assertLen(report['units'], 14)
    row = next(row for row in report['layers'] if row['name'] == NAME)
    self.assertGreater(row['kl'], 0.0)
    self.assertEqual(row['scheme'], '3')
    allocation = mixed.load(self.folder / 'out/allocation.json')
    self.assertLen(allocation.linears, 14)
    self.assertLessEqual(allocation.bits, 6.0)
    self.assertGreater(allocation.bits, 5.0)
    self.assertGreater(len(set(allocation.linears.values())), 1)
    self.assertNotIn('4g9', allocation.linears.values())

  def test_another_target_without_measuring(self):
    args = (f'--measured={self.folder / "out/sensitivity.json"}',)
    less = call(*args, f'--output={self.folder / "less"}', '--target_bits=5')
    self.assertEqual(less.code, 0, less.err)
    allocation = mixed.load(self.folder / 'less/allocation.json')
    self.assertLessEqual(allocation.bits, 5.0)
    too_little = call(
      *args, f'--output={self.folder / "less"}', '--target_bits=2'
    )
    self.assertEqual(too_little.code, 1)
    self.assertRegex(too_little.err, 'error: .*Raise --target_bits')

  def test_the_allocation_is_calibrated(self):
    allocation = mixed.load(self.folder / 'out/allocation.json')
    scheme = schemes.parse('W4A16', group_size=-1)
    built = recipe.build(['gptq'], scheme, ['search=mse'], allocation)
    self.assertRegex(built.description['scheme'], r'W4A16, \d\.\d\d bits mixed')
    model = models.open_model(str(self.folder / 'model'))
    data = pipeline.DataConfig(
      source=str(self.folder / 'text.txt'), num_sequences=2, sequence_length=16
    )
    tokens = pipeline.calibration_tokens(data, model.tokenizer())
    labelled = mixed.LabelledModel(model, allocation)
    store = calibration.MemoryStore()
    driver.Calibrator(
      labelled, built.transform, driver.CalibrationConfig(batch_size=2)
    ).run(tokens, store)
    nbytes = size = 0
    for i in range(2):
      for lin in model.block_at(i).linears:
        q = blocks.kernel_of(store.blocks[i]['params'], lin.path)
        choice = allocation.linears[blocks.name_of(i, lin.path)]
        self.assertEqual(q.spec, allocation.specs[choice])
        nbytes, size = nbytes + qarray.nbytes(q), size + q.shape[0] * q.shape[1]
    self.assertAlmostEqual(8 * nbytes / size, allocation.bits, places=5)

  def test_messages(self):
    def error(*args):
      out = call(f'--output={self.folder / "bad"}', *args)
      self.assertEqual(out.code, 1)
      return out.err

    self.assertRegex(error(), '--model=None without --measured; give')
    model = f'--model={self.folder / "model"}'
    self.assertRegex(error(model, '--choices=12'), '--choices=12; allowed')
    wrong = self.folder / 'wrong.json'
    wrong.write_text('{}')
    self.assertRegex(
      error(f'--measured={wrong}'), "wrong.json: KeyError 'settings'; a sens"
    )

  def test_a_method_that_chooses_for_several_is_refused(self):
    allocation = mixed.load(self.folder / 'out/allocation.json')
    scheme = schemes.parse('W4A16', group_size=-1)
    with self.assertRaisesRegex(ValueError, '--method=awq with --bits_from;'):
      recipe.build(['awq'], scheme, (), allocation)


if __name__ == '__main__':
  absltest.main()
