"""Rotary position embedding, half-split (Su et al., 2021, arXiv 2104.09864).

Channel i of the first half of a head turns with channel i of the second half
by the angle position * theta^(-2i/D): the layout of Hugging Face checkpoints.
GGUF files may interleave the pairs; jaxq.io.gguf undoes that at load.

A model is stretched past the length it was trained for by changing the
frequencies f_i = theta^(-2i/D) (`Scaling`), with N = position + 1 tokens:

  linear    f_i / factor (Chen et al., 2023, arXiv 2306.15595)
  dynamic   theta grows with N: theta * (factor N / original - factor + 1)
            ^(D/(D-2)) past `original` tokens ("NTK aware")
  llama3    f_i / factor for waves longer than original / low, f_i for those
            shorter than original / high, a blend between
  yarn      the same with a linear ramp in i, and cos and sin times a
            temperature (Peng et al., 2023, arXiv 2309.00071)
  longrope  f_i / short_i up to `original` tokens, f_i / long_i past them, and
            a temperature (Ding et al., 2024, arXiv 2402.13753)

Under dynamic and longrope the frequencies of a whole row follow the largest
position it has in the call; keys in a cache keep those they were made with.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ('linear', 'dynamic', 'llama3', 'yarn', 'longrope')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
  """How frequencies are stretched (module docstring).

  Attributes:
    kind: one of KINDS.
    factor: how many times longer.
    original: the length that was trained for; every kind but linear.
    low, high: llama3's wave lengths as fractions of `original`.
    fast, slow: yarn's ramp, in turns over `original` positions.
    truncate: whether yarn's ramp starts and ends at whole channels.
    temperature: times cos and sin; yarn and longrope.
    short, long: longrope's divisors, one per frequency.
  """

  kind: str
  factor: float = 1.0
  original: int = 0
  low: float = 1.0
  high: float = 4.0
  fast: float = 32.0
  slow: float = 1.0
  truncate: bool = True
  temperature: float = 1.0
  short: tuple[float, ...] = ()
  long: tuple[float, ...] = ()

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(
        f'rope.Scaling: kind={self.kind!r}; allowed {sorted(KINDS)}. Use a '
        'model with one of these.'
      )
    if self.factor < 1 or (self.kind != 'linear' and self.original < 1):
      raise ValueError(
        f'rope.Scaling: kind={self.kind!r}, factor={self.factor}, original='
        f'{self.original}; both must be at least 1. Check the configuration.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
  """Rotary positions.

  Attributes:
    theta: base of the frequencies.
    dim: channels of a head that turn, the first ones, even; None: all.
    scaling: None for none.
  """

  theta: float = 10000.0
  dim: int | None = None
  scaling: Scaling | None = None

  def frequencies(self, D: int) -> np.ndarray:
    """(dim / 2,) float64, of a row no longer than `scaling.original`."""
    D = self.dim or D
    exponents = np.arange(0, D, 2) / D
    frequencies = self.theta**-exponents
    scaling = self.scaling
    if scaling is None or scaling.kind == 'dynamic':
      return frequencies
    if scaling.kind == 'linear':
      return frequencies / scaling.factor
    if scaling.kind == 'longrope':
      return frequencies / np.array(scaling.short)
    kept = (
      _llama3(frequencies, scaling)
      if scaling.kind == 'llama3'
      else (_yarn(self.theta, D, scaling))
    )
    return frequencies * (kept + (1 - kept) / scaling.factor)

  def frequencies_at(self, D: int, length: jax.Array) -> jax.Array:
    """(B, dim / 2) float32 for rows of `length` (B,) tokens."""
    D = self.dim or D
    scaling = self.scaling
    frequencies = jnp.asarray(self.frequencies(D), jnp.float32)[None]
    if scaling is None or scaling.kind not in ('dynamic', 'longrope'):
      return frequencies
    length = length.astype(jnp.float32)[:, None]
    if scaling.kind == 'longrope':
      long = self.theta ** -(np.arange(0, D, 2) / D) / np.array(scaling.long)
      past = length > scaling.original
      return jnp.where(past, jnp.asarray(long, jnp.float32)[None], frequencies)
    length = jnp.maximum(length, scaling.original)
    growth = scaling.factor * length / scaling.original - (scaling.factor - 1)
    exponents = np.arange(0, D, 2) / D
    slower = jnp.asarray(-exponents * D / (D - 2), jnp.float32)[None]
    return frequencies * growth**slower


def rotate(x: jax.Array, positions: jax.Array, rope: Rope) -> jax.Array:
  """Turns x by its positions.

  Args:
    x: (B, T, H, D), D even.
    positions: (B, T) int32.
    rope: static.

  Returns:
    (B, T, H, D) in x.dtype; angles in float32.
  """
  dim = rope.dim or x.shape[-1]
  length = jnp.max(positions, axis=1) + 1
  frequencies = rope.frequencies_at(x.shape[-1], length)[:, None]  # (B, 1, D/2)
  angles = positions.astype(jnp.float32)[..., None] * frequencies
  cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
  if rope.scaling is not None:
    cos, sin = cos * rope.scaling.temperature, sin * rope.scaling.temperature
  x1, x2 = jnp.split(x[..., :dim].astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
  turned = turned.astype(x.dtype)
  if dim == x.shape[-1]:
    return turned
  return jnp.concatenate([turned, x[..., dim:]], axis=-1)


def _llama3(frequencies: np.ndarray, scaling: Scaling) -> np.ndarray:
  """(D/2,): how much of each frequency is kept, 1 all, 0 none."""
  turns = scaling.original * frequencies / (2 * math.pi)
  return np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)


def _yarn(theta: float, D: int, scaling: Scaling) -> np.ndarray:
  """(D/2,): how much of each frequency is kept, 1 all, 0 none."""

  def channel(turns):  # The one that makes so many turns over `original`.
    wave = scaling.original / (turns * 2 * math.pi)
    return D * math.log(wave) / (2 * math.log(theta))

  start, end = channel(scaling.fast), channel(scaling.slow)
  if scaling.truncate:
    start, end = math.floor(start), math.ceil(end)
  start, end = max(start, 0), min(end, D - 1)
  end = end + 0.001 if start == end else end
  return 1 - np.clip((np.arange(D // 2) - start) / (end - start), 0, 1)
