"""Rotary positions with several axes: M-RoPE, Sync-RoPE and plain RoPE.

  angle_i = position[axis of channel i] * theta^(-2i/D),  i = 0 .. D/2 - 1
  channels are cut into `sections`; section s turns with positions[axes[s]]

Channel i of the first half of a head turns with channel i of the second half,
as in jaxq.nn.rope. One section of one axis is plain RoPE. M-RoPE (Qwen2-VL)
gives time the fastest channels, (16, 24, 24) of (t, h, w): the slowest of them
comes round every 160 ids, 6.4 s of video, so tokens that are far apart, as they
are behind a reduction, look near. Sync-RoPE (EchoingPixels, arXiv 2512.10324)
gives time the slowest channels too: sections (18, 18, 18, 10) of (t, h, w, t).

`interleaved` numbers a prompt of text, video and audio as Qwen2.5-Omni does: a
part starts at the largest id before it plus one; time counts 25 ids a second in
video and audio alike, and both are interleaved in chunks of 2 seconds.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TEXT, VIDEO, AUDIO = range(3)  # TokenSet.modality.

Tables = tuple[jax.Array, jax.Array]  # cos, sin (B, T, D/2) float32.


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyncRope:
  """Which axis turns which channels.

  sections: channels of half a head, from the fastest to the slowest.
  axes: the axis of positions of each section.
  theta: base of the frequencies.
  """

  sections: tuple[int, ...] = (18, 18, 18, 10)
  axes: tuple[int, ...] = (0, 1, 2, 0)
  theta: float = 1e6

  def __post_init__(self):
    if len(self.sections) != len(self.axes) or not self.sections:
      raise ValueError(
        f'SyncRope: sections={self.sections}, axes={self.axes}; each section '
        'needs one axis. Give as many of one as of the other.'
      )
    if min(self.sections) < 0 or sum(self.sections) < 1 or min(self.axes) < 0:
      raise ValueError(
        f'SyncRope: sections={self.sections}, axes={self.axes}; none may be '
        'negative, and sections sum to half a head.'
      )

  @property
  def head_dim(self) -> int:
    """D."""
    return 2 * sum(self.sections)

  def frequencies(self) -> np.ndarray:
    """(D / 2,) float64, falling."""
    return self.theta ** -(np.arange(0, self.head_dim, 2) / self.head_dim)


M_ROPE = SyncRope(sections=(16, 24, 24), axes=(0, 1, 2))


def plain(head_dim: int, theta: float = 1e6) -> SyncRope:
  """RoPE of the first axis only."""
  return SyncRope(sections=(head_dim // 2,), axes=(0,), theta=theta)


def check(rope: SyncRope, head_dim: int, axes: int) -> None:
  """Raises ValueError unless a rope fits the heads and the positions."""
  if rope.head_dim != head_dim:
    raise ValueError(
      f'SyncRope: sections={rope.sections} sum to {sum(rope.sections)} for '
      f'head_dim={head_dim}; they must sum to {head_dim // 2}, half of it. '
      'Change the sections.'
    )
  if max(rope.axes) >= axes:
    raise ValueError(
      f'SyncRope: axes={rope.axes} of positions with {axes}; positions need '
      f'{max(rope.axes) + 1} axes. Pass (time, row, column) of every token.'
    )


def tables(positions: jax.Array, rope: SyncRope) -> Tables:
  """positions (B, T, P) int32 -> cos, sin (B, T, D/2) float32.

  Raises:
    ValueError: P is too small.
  """
  check(rope, rope.head_dim, positions.shape[-1])
  axis_of_channel = np.repeat(np.array(rope.axes), np.array(rope.sections))
  at = positions[..., axis_of_channel].astype(jnp.float32)  # (B, T, D/2)
  angles = at * jnp.asarray(rope.frequencies(), jnp.float32)[None, None]
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos_sin: Tables) -> jax.Array:
  """x (B, T, H, D) turned, in x.dtype; computed in float32."""
  cos, sin = (table[:, :, None] for table in cos_sin)
  x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
  return turned.astype(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
  """length: tokens."""

  length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
  """A video, its sound, or both.

  frame_times: seconds of each frame. rows, columns: tokens of a frame.
  audio_tokens: one per 40 ms at 25 ids a second.
  """

  frame_times: tuple[float, ...] = ()
  rows: int = 0
  columns: int = 0
  audio_tokens: int = 0


class Numbered(NamedTuple):
  """positions (L, 3) int32, modality (L,) int32, segment (L,) int32.

  segment: which part of the prompt a token is of. Attention that must not cross
  parts needs it: behind a reduction, gaps between positions say nothing.
  """

  positions: np.ndarray
  modality: np.ndarray
  segment: np.ndarray


def interleaved(
  parts: Sequence[Text | Clip],
  *,
  ids_per_second: int = 25,
  chunk_seconds: float = 2.0,
) -> Numbered:
  """Positions (t, h, w) of a prompt, in the order its tokens come in.

  Raises:
    ValueError: no part has a token.
  """
  positions, modality, segment = [], [], []
  start = 0
  for i, part in enumerate(parts):
    if isinstance(part, Text):
      at = np.repeat(np.arange(part.length)[:, None], 3, axis=1)
      kind = np.full(part.length, TEXT)
    else:
      chunk = int(chunk_seconds * ids_per_second)
      at, kind = _clip_positions(part, ids_per_second, chunk)
    if not len(at):
      continue
    positions.append(at + start)
    modality.append(kind)
    segment.append(np.full(len(at), i))
    start = int(positions[-1].max()) + 1
  if not positions:
    raise ValueError(
      f'interleaved: {len(parts)} parts without a token; at least one token is '
      'needed. Give Text(length=...) or Clip(...).'
    )
  return Numbered(
    *(
      np.concatenate(a).astype(np.int32) for a in (positions, modality, segment)
    )
  )


def _clip_positions(
  clip: Clip, ids_per_second: int, chunk: int
) -> tuple[np.ndarray, np.ndarray]:
  """(n, 3) positions from 0 and (n,) modality, chunk by chunk, video first."""
  times = np.floor(np.array(clip.frame_times) * ids_per_second).astype(int)
  grid = np.indices((len(times), clip.rows, clip.columns)).reshape(3, -1).T
  video = np.column_stack([times[grid[:, 0]], grid[:, 1:]])
  audio = np.repeat(np.arange(clip.audio_tokens)[:, None], 3, axis=1)
  at = np.concatenate([video, audio])
  kind = np.repeat([VIDEO, AUDIO], [len(video), len(audio)])
  order = np.lexsort((np.arange(len(at)), kind, at[:, 0] // chunk))
  return at[order], kind[order]
