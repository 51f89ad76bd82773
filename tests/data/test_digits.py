"""Tests of jaxq.data.digits."""

import gzip
import pathlib
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest

from jaxq.data import digits, packaged, packages


class DigitsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.path = folder / 'digits.csv.gz'
    self.enterContext(
      mock.patch.object(packaged, 'fetch', return_value=self.path)
    )

  def write(self, table):
    with gzip.open(self.path, 'wt') as f:
      np.savetxt(f, table, fmt='%d', delimiter=',')

  def test_the_splits(self):
    table = np.zeros((1797, 65), int)
    table[:, 64] = np.arange(1797) % 10
    table[0, 1] = 16  # Row 0, column 1 of the first digit, white.
    self.write(table)
    train, test = digits.load('train'), digits.load('test')
    self.assertEqual(train.images.shape, (digits.NUM_TRAIN, 8, 8))
    self.assertLen(test.images, 500)
    self.assertEqual(train.images[0, 0, 1], 1.0)
    self.assertEqual(train.images.sum(), 1.0)
    self.assertEqual(test.classes[0], 1297 % 10)
    np.testing.assert_array_equal(train.of_class(3)[:2], [3, 13])

  def test_a_row_of_the_table_of_packages(self):
    package = packages.PACKAGES['digits']
    (photos,) = (
      wheel
      for wheel in packages.PACKAGES['photos'].wheels
      if wheel.project == 'scikit-learn'
    )
    self.assertEqual(package.wheels[0].sha256, photos.sha256)
    self.assertEqual(package.file, package.members[0].file)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, "split='all'; allowed are"):
      digits.load('all')
    self.write(np.zeros((3, 65), int))
    with self.assertRaisesRegex(ValueError, r'\(3, 65\).*\(1797, 65\).*again'):
      digits.load('train')


if __name__ == '__main__':
  absltest.main()
