"""Tests of jaxq.data.videos."""

import pathlib
import sys
import tempfile
from unittest import mock

import av
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.data import images, packaged, packages, videos


def write(path, frames, rate=25):
  """Frames (T, height, width, 3) uint8 as a lossless video."""
  with av.open(str(path), 'w') as container:
    stream = container.add_stream('ffv1', rate=rate)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = 'bgr0'
    for frame in frames:
      picture = av.VideoFrame.from_ndarray(frame, format='rgb24')
      container.mux(stream.encode(picture))
    container.mux(stream.encode())


def grey(values, height=32, width=48):
  """One frame of each value, of one colour."""
  shape = (len(values), height, width, 3)
  return np.broadcast_to(np.uint8(values)[:, None, None, None], shape)


class VideosTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    write(self.folder / 'a.mkv', grey(range(0, 110, 10)))
    write(self.folder / 'b.mkv', grey(range(100, 140, 10)))

  def config(self, **fields):
    fields = {'source': str(self.folder), 'num_frames': 2, **fields}
    return videos.VideoConfig(**{'every': 2, 'size': 16, **fields})

  def test_windows_follow_each_other_and_the_rest_is_left_out(self):
    windows = videos.load(self.config())
    self.assertEqual(windows.frames.shape, (4, 2, 16, 16, 3))
    self.assertEqual(windows.frames.dtype, np.float32)
    np.testing.assert_array_equal(windows.video, [0, 0, 0, 1])
    self.assertEqual(windows.names, ('a', 'b'))
    shown = [[0, 20], [40, 60], [80, 100], [100, 120]]
    expected = images.normalise(grey(np.ravel(shown), 16, 16))
    np.testing.assert_allclose(
      windows.frames.reshape(8, 16, 16, 3), expected, atol=1e-6
    )

  def test_the_middle_is_shown(self):
    frame = grey([7], 16, 48).copy()
    frame[:, :, 16:32] = 200
    write(self.folder / 'middle.mkv', frame)
    config = self.config(
      source=str(self.folder / 'middle.mkv'), num_frames=1, every=1
    )
    got = videos.load(config).frames[0]
    np.testing.assert_allclose(got, images.normalise(grey([200], 16, 16)))

  def test_packaged_clips(self):
    members = {m.file for m in packages.PACKAGES['clips'].members}
    self.assertEqual(members, {f'{clip}.mp4' for clip in videos.CLIPS})
    with mock.patch.object(packaged, 'fetch', return_value=self.folder):
      self.assertEqual(videos.paths('clips:bunny'), [self.folder / 'bunny.mp4'])
      self.assertLen(videos.paths('clips'), 3)

  def test_messages(self):
    (self.folder / 'text.mp4').write_text('no video')
    empty = self.enterContext(tempfile.TemporaryDirectory())
    one = str(self.folder / 'b.mkv')
    for kind, message, fields in (
      (ValueError, r'VideoConfig: every=0; it must be at least', {'every': 0}),
      (ValueError, 'too short for one window of 9', {'num_frames': 9}),
      (ValueError, '48 x 32 pixels; frames of 33 need', {'size': 33}),
      (ValueError, "clip 'x'; allowed are .*bikes", {'source': 'clips:x'}),
      (ValueError, 'holds no video ending in .avi', {'source': empty}),
      (FileNotFoundError, 'no such file or folder', {'source': '/no/such'}),
      (
        ValueError,
        'text.mp4: cannot be read as a video',
        {'source': str(self.folder / 'text.mp4')},
      ),
    ):
      with self.subTest(message), self.assertRaisesRegex(kind, message):
        videos.load(self.config(**{'source': one, **fields}))

  def test_a_sound_file_is_refused(self):
    path = self.folder / 'sound.wav'
    with av.open(str(path), 'w') as container:
      stream = container.add_stream('pcm_s16le', rate=8000, layout='mono')
      sound = av.AudioFrame.from_ndarray(
        np.zeros((1, 800), np.int16), format='s16', layout='mono'
      )
      sound.sample_rate = 8000
      container.mux(stream.encode(sound))
    with self.assertRaisesRegex(ValueError, 'sound.wav: has no pictures'):
      list(videos.read(path))

  def test_without_the_decoder(self):
    with (
      mock.patch.dict(sys.modules, {'av': None}),
      self.assertRaisesRegex(ModuleNotFoundError, r'jaxq\[video\]'),
    ):
      list(videos.read(self.folder / 'a.mkv'))


if __name__ == '__main__':
  absltest.main()
