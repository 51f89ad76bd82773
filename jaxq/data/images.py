"""Photographs as normalised crops, for vision models.

A source is `photos:calibration`, `photos:evaluation` (real photographs out of
the scikit-image and scikit-learn packages; no photo is in both), an image file,
or a folder of image files, taken in the order of their names.

Crop i is a square of photo i modulo their number, of a size and at a place
drawn from (seed, i), at least as large as what is asked and then scaled down to
it: nothing is enlarged. Values are (pixel / 255 - mean) / std with the mean and
std of ImageNet, which is what nearly all vision models were trained with.
"""

import dataclasses
import pathlib

import numpy as np
import PIL.Image

from jaxq.data import packaged

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SUFFIXES = ('.jpeg', '.jpg', '.png', '.webp')

_PACKAGE = 'photos'
SPLITS: dict[str, tuple[str, ...]] = {  # Every other one by name.
  'calibration': (
    *('astronaut.png', 'china.jpg', 'flower.jpg', 'ihc.png', 'retina.jpg'),
  ),
  'evaluation': (
    *('chelsea.png', 'coffee.png', 'hubble_deep_field.jpg'),
    *('motorcycle_left.png', 'rocket.jpg'),
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig:
  """What to read and how to cut it.

  Attributes:
    source: see the module docstring.
    num_images: crops in all.
    size: pixels of a crop's side.
    seed: of the places.
  """

  source: str = 'photos:calibration'
  num_images: int = 64
  size: int = 224
  seed: int = 0

  def __post_init__(self):
    for name in ('num_images', 'size'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'ImageConfig: {name}={getattr(self, name)}; it must be at least 1. '
          f'{getattr(ImageConfig, name)} is the default.'
        )

  @property
  def description(self) -> str:
    """Photos and cut, as they stand beside every figure."""
    return f'{self.source}, crops of {self.size} x {self.size} pixels'


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Crops:
  """images (N, size, size, 3) float32, normalised; photo (N,) int, of which."""

  images: np.ndarray
  photo: np.ndarray


def load(config: ImageConfig) -> Crops:
  """The crops of `config`.

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: an image that cannot be read, is not RGB or too small, an
      unknown split, or no image at all.
  """
  photos = [read(path) for path in paths(config.source)]
  for path, photo in zip(paths(config.source), photos, strict=True):
    if min(photo.shape[:2]) < config.size:
      raise ValueError(
        f'{path}: has {photo.shape[1]} x {photo.shape[0]} pixels; crops of '
        f'{config.size} need at least as many on both sides. Give a larger '
        'image, or ask for smaller crops.'
      )
  crops = [
    _crop(photos[i % len(photos)], config, i) for i in range(config.num_images)
  ]
  return Crops(
    images=normalise(np.stack(crops)),
    photo=np.arange(config.num_images) % len(photos),
  )


def paths(source: str) -> list[pathlib.Path]:
  """The image files of a source; see `load` for what is raised."""
  name, _, split = source.partition(':')
  if name == _PACKAGE:
    if split not in SPLITS:
      raise ValueError(
        f'{source}: split {split!r}; allowed are {sorted(SPLITS)}, as in '
        f'{_PACKAGE}:calibration.'
      )
    folder = packaged.fetch(_PACKAGE)
    return [folder / file for file in SPLITS[split]]
  path = pathlib.Path(source).expanduser()
  if path.is_dir():
    found = sorted(p for p in path.rglob('*') if p.suffix.lower() in SUFFIXES)
    if not found:
      raise ValueError(
        f'{source}: the folder holds no image ending in {", ".join(SUFFIXES)}; '
        'put the images there or give another folder.'
      )
    return found
  if not path.is_file():
    raise FileNotFoundError(
      f'{source}: no such file or folder; images are a file, a folder, or '
      f'{_PACKAGE}:SPLIT with SPLIT one of {sorted(SPLITS)}.'
    )
  return [path]


def read(path: pathlib.Path) -> np.ndarray:
  """An image file -> (height, width, 3) uint8.

  Raises:
    ValueError: it cannot be decoded, or is not RGB.
  """
  try:
    with PIL.Image.open(path) as image:
      mode, pixels = image.mode, np.asarray(image)
  except (OSError, SyntaxError) as e:
    raise ValueError(
      f'{path}: cannot be read as an image ({e}). Give a PNG or JPEG file.'
    ) from e
  if mode != 'RGB':
    channels = len(PIL.Image.Image.getbands(PIL.Image.new(mode, (1, 1))))
    raise ValueError(
      f'{path}: is {mode} with {channels} channels of {pixels.dtype}; images '
      'must be RGB with 8 bits a channel. Convert it.'
    )
  return pixels


def normalise(images: np.ndarray) -> np.ndarray:
  """(N, height, width, 3) uint8 -> float32, by ImageNet's mean and std.

  Raises:
    ValueError: another shape. TypeError: another dtype.
  """
  if images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(
      f'normalise: images of shape {images.shape}; they must be (N, height, '
      'width, 3). Convert them to RGB.'
    )
  if images.dtype != np.uint8:
    raise TypeError(
      f'normalise: images are {images.dtype}; pixels must be uint8, 0..255. '
      'Pass them as they were read.'
    )
  mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
  return (images.astype(np.float32) / np.float32(255) - mean) / std


def _crop(photo: np.ndarray, config: ImageConfig, i: int) -> np.ndarray:
  """Crop i: (size, size, 3) uint8."""
  rng = np.random.default_rng((config.seed, i))
  height, width = photo.shape[:2]
  side = int(rng.integers(config.size, min(height, width) + 1))
  top = int(rng.integers(0, height - side + 1))
  left = int(rng.integers(0, width - side + 1))
  image = PIL.Image.fromarray(photo[top : top + side, left : left + side])
  size = (config.size, config.size)
  return np.asarray(image.resize(size, PIL.Image.Resampling.BICUBIC))
