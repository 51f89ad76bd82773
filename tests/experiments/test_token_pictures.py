"""Tests of experiments.token_pictures."""

import base64
import io
import pathlib
import re
import tempfile

import numpy as np
import PIL.Image
from absl.testing import absltest

from experiments import token_pictures


class TokenPicturesTest(absltest.TestCase):
  def test_a_picture_by_hand(self):
    frames = np.zeros((2, 4, 4))
    frames[1, 0, 0] = 1.0
    # Two frames of 1 x 2 tokens: alone, dropped, and two in one slot.
    drawn = token_pictures.svg(frames, [0, -1, 1, 1], [0, 2], (2, 1, 2))
    self.assertIn('data-kept="3" data-slots="2"', drawn)
    self.assertEqual(
      re.findall('data-slot="(.*?)"', drawn), list('0') + ['-1', '1', '1']
    )
    self.assertEqual(drawn.count('hsl('), 4)  # Fill and line of two patches.
    self.assertIn('fill-opacity=".4"', drawn)  # The representative.
    images = re.findall('base64,(.*?)"', drawn)
    second = PIL.Image.open(io.BytesIO(base64.b64decode(images[1])))
    self.assertEqual(np.asarray(second)[0, 0], 255)
    self.assertEqual(np.asarray(second).sum(), 255)

  def test_a_section_of_a_report(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.assertEqual(token_pictures.section(folder), '')
    drawn = token_pictures.svg(np.zeros((1, 2, 2, 3)), [0], [0], (1, 1, 1))
    path = token_pictures.save(folder, 'tome:r=2/x', drawn)
    self.assertEqual(path.name, 'tome_r=2_x.svg')
    section = token_pictures.section(folder)
    self.assertIn(drawn, section)
    self.assertIn('Which tokens were kept?', section)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, r'grid=\(1, 2, 2\) for 1 frames'):
      token_pictures.svg(np.zeros((1, 4, 4)), [0], [0], (1, 2, 2))


if __name__ == '__main__':
  absltest.main()
