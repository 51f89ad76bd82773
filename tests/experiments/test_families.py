"""`experiments.calibrate` on encoders and vision transformers, end to end."""

import pathlib
import tempfile
from unittest import mock

import numpy as np
import PIL.Image
from absl.testing import absltest, parameterized

import models
from experiments import families, results
from jaxq.eval import bootstrap
from tests.experiments import testing
from tests.io import encoder_files

TEXT = '\n'.join(
  f'The cat sat on the mat with {"a dog, " * i} the cat and the other dog. '
  f'A dog ran on {"the mat and " * i} a cat sat on the dog and ran and sat on.'
  for i in range(1, 9)
)


class FamiliesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def inputs(self, family):
    """Writes a model and data; returns the flags that name them."""
    if family == 'encoder':
      encoder_files.write_bert(self.folder / 'model')
      data = self.folder / 'text.txt'
      data.write_text(TEXT)
      sizes = ['--sequence_length=16', '--eval_window=24', '--eval_samples=6']
    else:
      encoder_files.write_dinov2(self.folder / 'model')
      data = self.folder / 'photos'
      data.mkdir()
      rng = np.random.default_rng(0)
      for i in range(2):
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(data / f'{i}.png')
      sizes = ['--image_size=16', '--eval_samples=6']
    return [
      f'--model={self.folder / "model"}',
      f'--output={self.folder / "out"}',
      f'--data={data}',
      f'--eval_data={data}',
      '--scheme=W4A16',
      '--group_size=16',
      '--sequences=4',
      '--batch_size=4',
      *sizes,
    ]

  @parameterized.parameters(
    ('encoder', 'retrieval top-1', 'same best match', '4 x 16 tokens'),
    ('vit', '1-NN same photo', '1-NN agreement', '4 x 16 x 16 x 3 pixels'),
  )
  def test_calibrate_prints_the_family_s_own_metric(
    self, family, alone, compared, described
  ):
    done = testing.call(*self.inputs(family))
    self.assertEqual(done.code, 0, done.err)
    self.assertIn(described, done.err)
    saved = results.load(self.folder / 'out.run/results.json')
    reference, row = saved.rows
    self.assertBetween(reference[alone].value, 0.0, 1.0)
    self.assertGreater(row['cosine to float'].value, 0.8)
    self.assertLess(row['cosine to float'].value, 1.0)
    self.assertBetween(row[compared].value, 0.0, 1.0)
    self.assertIn('6', row[compared].conventions['data'])

  def test_a_model_alone_and_equal_models(self):
    flags = self.inputs('vit')
    del flags
    model = models.load(str(self.folder / 'model'))
    choice = families.Choice(
      source=str(self.folder / 'photos'), samples=6, image_size=16
    )
    samples = families.evaluation_data(model, choice)
    compare = families.of(model).compare
    how = {'config': bootstrap.BootstrapConfig(resamples=10)}
    (alone,) = compare(None, model, samples, **how)
    self.assertEqual([m.name for m in alone.metrics], ['1-NN same photo'])
    _, row = compare(model, model, samples, **how)
    self.assertAlmostEqual(row['cosine to float'].value, 1.0, places=6)
    self.assertEqual(row['1-NN agreement'].value, 1.0)

  @parameterized.parameters(
    ('vit', '--image_size=18', 'multiples of 4. Give --image_size=16'),
    ('vit', '--image_size=48', '40 x 40 pixels; crops of 48 need'),
    ('vit', '--data=nothing', 'no such file or folder; images are'),
    ('encoder', '--sequence_length=64', 'at most 40 tokens. Give --seq'),
    ('encoder', '--eval_samples=99', 'has 8 passages.*99 were asked'),
    ('encoder', '--method=rotate', 'Leave rotate out for this model'),
  )
  def test_mistakes_are_one_line(self, family, flag, message):
    done = testing.call(*self.inputs(family), flag)
    self.assertEqual(done.code, 1)
    self.assertLen(done.errors, 1)
    self.assertRegex(done.errors[0], message)

  def test_a_family_without_a_measure(self):
    model = mock.Mock(family='radio', name='model')
    with self.assertRaisesRegex(NotImplementedError, "allowed are.*'encoder'"):
      families.of(model)


if __name__ == '__main__':
  absltest.main()
