"""Tests of jaxq.data.images."""

import pathlib
import tempfile
from unittest import mock

import numpy as np
import PIL.Image
from absl.testing import absltest, parameterized

from jaxq.data import images, packaged, packages


class ImagesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    rng = np.random.default_rng(0)
    for name, height, width in (('a.png', 40, 60), ('b.png', 32, 32)):
      pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
      PIL.Image.fromarray(pixels).save(self.folder / name)

  def config(self, **fields):
    return images.ImageConfig(
      **{'source': str(self.folder), 'num_images': 5, 'size': 16, **fields}
    )

  def test_crops(self):
    crops = images.load(self.config())
    self.assertEqual(crops.images.shape, (5, 16, 16, 3))
    self.assertEqual(crops.images.dtype, np.float32)
    np.testing.assert_array_equal(crops.photo, [0, 1, 0, 1, 0])
    again = images.load(self.config(num_images=3))
    np.testing.assert_array_equal(again.images, crops.images[:3])
    other = images.load(self.config(seed=1))
    self.assertGreater(np.abs(other.images - crops.images).max(), 0.1)

  def test_a_whole_image_is_not_touched(self):
    crops = images.load(
      self.config(source=str(self.folder / 'b.png'), num_images=1, size=32)
    )
    pixels = images.read(self.folder / 'b.png')
    np.testing.assert_array_equal(crops.images, images.normalise(pixels[None]))

  def test_normalise_by_hand(self):
    white = np.full((1, 1, 1, 3), 255, np.uint8)
    expected = (1 - np.array(images.MEAN)) / np.array(images.STD)
    got = images.normalise(white)[0, 0, 0]
    np.testing.assert_allclose(got, expected, rtol=1e-6)

  def test_no_photo_is_in_both_splits(self):
    calibration, evaluation = images.SPLITS.values()
    self.assertEmpty(set(calibration) & set(evaluation))
    members = {m.file for m in packages.PACKAGES['photos'].members}
    self.assertEqual(members, {*calibration, *evaluation})
    with mock.patch.object(packaged, 'fetch', return_value=self.folder):
      found = images.paths('photos:evaluation')
    self.assertEqual(found[0], self.folder / evaluation[0])

  def test_messages(self):
    for name in ('num_images', 'size'):
      with self.assertRaisesRegex(ValueError, f'{name}=0; it must be at least'):
        self.config(**{name: 0})
    with self.assertRaisesRegex(ValueError, "'test'; allowed.*'calibration'"):
      images.paths('photos:test')
    with self.assertRaisesRegex(FileNotFoundError, 'no such file or folder'):
      images.load(self.config(source='nothing.png'))
    with self.assertRaisesRegex(ValueError, r'32 x 32 pixels; crops of 36'):
      images.load(self.config(size=36))
    empty = self.folder / 'empty'
    empty.mkdir()
    with self.assertRaisesRegex(ValueError, 'holds no image ending in'):
      images.paths(str(empty))
    grey = self.folder / 'grey.png'
    PIL.Image.new('L', (4, 4)).save(grey)
    with self.assertRaisesRegex(ValueError, 'is L with 1 channels.*be RGB'):
      images.read(grey)
    grey.write_bytes(b'no image')
    with self.assertRaisesRegex(ValueError, 'cannot be read as an image'):
      images.read(grey)
    with self.assertRaisesRegex(ValueError, r'shape \(4, 4, 3\).*to RGB'):
      images.normalise(np.zeros((4, 4, 3), np.uint8))
    with self.assertRaisesRegex(TypeError, 'are float64; pixels must be uint8'):
      images.normalise(np.zeros((1, 4, 4, 3)))


if __name__ == '__main__':
  absltest.main()
