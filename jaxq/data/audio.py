"""Speech for Whisper: 16 kHz mono wav files and log-mel features.

  power  = |rfft(hann * frame)|^2            frames of 400 samples, 160 apart
  mel    = power @ filters                   Slaney's scale, equal area
  y      = log10(max(mel, 1e-10))
  y      = (max(y, max(y) - 8) + 4) / 4      80 dB of range per window

A model sees windows of 30 s, padded with silence: 480,000 samples make 3,000
frames. The frames are centred on multiples of 160 samples, with the ends of the
window mirrored. `log_mel` is jittable; reading is the standard library's and
refuses what it would have to resample or mix down.
"""

import functools
import pathlib
import wave

import jax
import jax.numpy as jnp
import numpy as np

RATE = 16000  # Hz.
WINDOW = 30 * RATE  # Samples of a model's window.
HOP = 160  # Samples from one frame to the next: 10 ms.
FRAME = 400  # Samples of a frame: 25 ms.
FRAMES = WINDOW // HOP
_DYNAMIC_RANGE = 8.0  # Of log10: 80 dB.


def read_wav(path: str | pathlib.Path) -> np.ndarray:
  """The samples of a 16 kHz mono wav file, (N,) float32 in [-1, 1).

  Raises:
    FileNotFoundError: no such file.
    ValueError: another rate, or what `read_pcm` refuses.
  """
  samples, rate = read_pcm(path)
  if rate != RATE:
    raise ValueError(
      f'{path}: {rate} Hz; allowed is {RATE} Hz. Resample it first, as in: '
      'ffmpeg -i IN -ar 16000 -ac 1 OUT.wav'
    )
  return samples


def read_pcm(path: str | pathlib.Path) -> tuple[np.ndarray, int]:
  """The samples (N,) of a mono wav file, and its rate in Hz.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not a PCM wav file, several channels, an unusual sample width,
      or no samples.
  """
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    raise FileNotFoundError(
      f'{path}: no such file; a 16 kHz mono .wav file is needed. Give its path.'
    )
  try:
    with wave.open(str(path), 'rb') as file:
      rate, channels = file.getframerate(), file.getnchannels()
      width, data = file.getsampwidth(), file.readframes(file.getnframes())
  except (wave.Error, EOFError) as e:
    raise ValueError(
      f'{path}: is no PCM wav file ({e}); 16 kHz mono PCM is needed. Convert '
      'it first, as in: ffmpeg -i IN -ar 16000 -ac 1 OUT.wav'
    ) from e
  if channels != 1:
    raise ValueError(
      f'{path}: {channels} channels; allowed is 1 (mono). Mix it down first, '
      'as in: ffmpeg -i IN -ar 16000 -ac 1 OUT.wav'
    )
  if width not in (2, 4):
    raise ValueError(
      f'{path}: samples of {8 * width} bits; allowed are 16 and 32. Convert it '
      'first, as in: ffmpeg -i IN -ar 16000 -ac 1 OUT.wav'
    )
  data = data[: len(data) - len(data) % width]  # A file that was cut short.
  samples = np.frombuffer(data, f'<i{width}').astype(np.float32)
  if not samples.size:
    raise ValueError(f'{path}: holds no samples; record some speech.')
  return samples / np.float32(2 ** (8 * width - 1)), rate


def windows(samples: np.ndarray, size: int = WINDOW) -> np.ndarray:
  """Samples (N,) as windows (num, size), the last one padded with silence.

  Raises:
    ValueError: not one channel of samples, or none at all, or NaN or Inf.
  """
  samples = np.asarray(samples, np.float32)
  if samples.ndim != 1 or not samples.size:
    raise ValueError(
      f'audio.windows: samples of shape {samples.shape}; allowed is (N,), one '
      'channel of at least one sample. Pass one clip at a time.'
    )
  if not np.all(np.isfinite(samples)):
    raise ValueError(
      'audio.windows: samples with NaN or Inf; they must be finite. Check how '
      'the clip was made.'
    )
  num = -(-samples.size // size)
  padded = np.zeros(num * size, np.float32)
  padded[: samples.size] = samples
  return padded.reshape(num, size)


@functools.partial(jax.jit, static_argnames='mels')
def log_mel(samples: jax.Array, mels: int = 80) -> jax.Array:
  """Samples (B, N) float32 -> log-mel features (B, N / 160, mels) float32.

  Args:
    samples: windows of 30 s for Whisper; any other length is allowed.
    mels: filters; 80, or 128 for the large models of version 3.

  Raises:
    ValueError: fewer samples than half a frame, which cannot be mirrored.
  """
  B, N = samples.shape
  if N <= FRAME // 2:
    raise ValueError(
      f'audio.log_mel: {N} samples; more than {FRAME // 2} are needed. Pad the '
      'clip with silence (audio.windows does).'
    )
  padded = jnp.pad(samples, ((0, 0), (FRAME // 2, FRAME // 2)), mode='reflect')
  starts = HOP * np.arange(N // HOP)
  frames = padded[:, starts[:, None] + np.arange(FRAME)]  # (B, F, 400)
  hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / FRAME)
  spectrum = jnp.fft.rfft(frames * jnp.asarray(hann, jnp.float32)[None, None])
  power = jnp.real(spectrum) ** 2 + jnp.imag(spectrum) ** 2  # (B, F, 201)
  filters = jnp.asarray(mel_filters(mels), jnp.float32)
  mel = jnp.matmul(power, filters, precision=jax.lax.Precision.HIGHEST)
  y = jnp.log10(jnp.maximum(mel, 1e-10))
  peak = jnp.max(y, axis=(1, 2), keepdims=True)
  return (jnp.maximum(y, peak - _DYNAMIC_RANGE) + 4.0) / 4.0


@functools.cache
def mel_filters(mels: int) -> np.ndarray:
  """Triangular filters (201, mels) float64 from 0 to 8 kHz, each of area 1."""
  edges = _mel_to_hertz(np.linspace(0.0, _hertz_to_mel(RATE / 2), mels + 2))
  bins = np.linspace(0.0, RATE / 2, FRAME // 2 + 1)
  low, centre, high = edges[:-2], edges[1:-1], edges[2:]
  rising = (bins[:, None] - low) / (centre - low)
  falling = (high - bins[:, None]) / (high - centre)
  return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (high - low))


# Slaney's scale: linear below 1 kHz, which is 15 mel, logarithmic above.
_BREAK_HERTZ, _BREAK_MEL = 1000.0, 15.0
_LOG_STEP = np.log(6.4) / 27.0


def _hertz_to_mel(hertz: float) -> float:
  if hertz < _BREAK_HERTZ:
    return hertz * _BREAK_MEL / _BREAK_HERTZ
  return _BREAK_MEL + np.log(hertz / _BREAK_HERTZ) / _LOG_STEP


def _mel_to_hertz(mel: np.ndarray) -> np.ndarray:
  linear = mel * _BREAK_HERTZ / _BREAK_MEL
  logarithmic = _BREAK_HERTZ * np.exp(_LOG_STEP * (mel - _BREAK_MEL))
  return np.where(mel < _BREAK_MEL, linear, logarithmic)
