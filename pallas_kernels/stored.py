"""Keys or values of a cache as they are stored, and which slots are seen.

  x[t, h, d] ~ (code[t, h, d] - center) scale + offset, times norm[t, h]

Codes of b = 1, 2 or 4 bits are packed along channels: field f (bits f*b ..) of
byte j holds channel f * D*b/8 + j. Scales and offsets are shared by groups of
tokens, of channels, or of both; norms by the channels of a token, and by its
heads where there is one head of them. Slot t of a row holds the token at
position t; in a ring of S slots, the newest position that is t mod S.

Arrays are (B, S, heads, channels), or (pages, page, heads, channels) where a
table says which pages are whose.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

BITS = (1, 2, 4, 8)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['codes', 'scale', 'offset', 'norm'],
  meta_fields=['bits', 'center'],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
  """See the module docstring.

  Attributes:
    codes: (B, S, Hkv, D * bits / 8) uint8, or (B, S, Hkv, D) floating.
    scale: (B, S / tokens, Hkv, D / channels) floating; None for floating codes.
    offset: as scale; None: 0.
    norm: (B, S, 1 or Hkv, 1) floating; None: 1.
    bits: of a code; 16 where codes are floating.
    center: what is subtracted from a code.
  """

  codes: Any
  scale: Any = None
  offset: Any = None
  norm: Any = None
  bits: int = 16
  center: int = 0

  @property
  def slots(self) -> int:
    """S, or the slots of a page."""
    return self.codes.shape[1]

  @property
  def heads(self) -> int:
    """Hkv."""
    return self.codes.shape[2]

  @property
  def head_dim(self) -> int:
    """D."""
    width = self.codes.shape[3]
    return width if self.bits > 8 else width * 8 // self.bits

  @property
  def tokens(self) -> int:
    """Tokens that share a scale."""
    return 1 if self.scale is None else self.slots // self.scale.shape[1]

  @property
  def groups(self) -> int:
    """Scales of a head of a token."""
    return 1 if self.scale is None else self.scale.shape[3]


def check(op: str, name: str, x: Stored) -> None:
  """Raises TypeError or ValueError unless the arrays fit each other."""
  if jnp.issubdtype(x.codes.dtype, jnp.floating):
    if x.bits != 16 or x.scale is not None:
      raise ValueError(
        f'{op}: {name} has floating codes with bits={x.bits} and a scale='
        f'{x.scale is not None}; they come with bits=16 and no scale. Fold a '
        'scale into q or the output.'
      )
    return
  if x.codes.dtype != jnp.uint8:
    raise TypeError(
      f'{op}: {name} has codes of {x.codes.dtype}; allowed floating and uint8. '
      'Store codes as uint8, with a center.'
    )
  if x.bits not in BITS or x.scale is None:
    raise ValueError(
      f'{op}: {name} has bits={x.bits}, a scale={x.scale is not None}; codes '
      f'come with a scale and bits of {BITS}. Give both.'
    )
  A, n, Hkv, m = x.scale.shape
  fits = x.codes.shape[0] == A and Hkv == x.heads
  if not fits or x.slots % n or x.head_dim % m:
    raise ValueError(
      f'{op}: {name} has codes {x.codes.shape}, scale {x.scale.shape}; scales '
      'are (B, S / tokens, Hkv, D / channels). Give one for whole groups.'
    )
  if x.offset is not None and x.offset.shape != x.scale.shape:
    raise ValueError(
      f'{op}: {name} has scale {x.scale.shape}, offset {x.offset.shape}; they '
      'are shaped alike. Broadcast the offset.'
    )


def unpack(codes: jax.Array, bits: int) -> jax.Array:
  """(..., D * bits / 8) uint8 -> (..., D) uint8; 8 bits as they are."""
  if bits == 8:
    return codes
  fields = [(codes >> (f * bits)) & (2**bits - 1) for f in range(8 // bits)]
  return jnp.concatenate(fields, axis=-1)


def values(x: Stored) -> jax.Array:
  """Decoded, (B, S, Hkv, D) float32."""
  if x.bits > 8:
    out = x.codes.astype(jnp.float32)
  else:
    codes = unpack(x.codes, x.bits).astype(jnp.float32) - x.center
    out = codes * _spread(x.scale, codes.shape)
    if x.offset is not None:
      out = out + _spread(x.offset, codes.shape)
  return out if x.norm is None else out * x.norm.astype(jnp.float32)


def take_rows(x: Stored, first: jax.Array, count: int) -> Stored:
  """Rows first .. first + count - 1, first traced."""

  def take(a):
    return jax.lax.dynamic_slice_in_dim(a, first, count, axis=0)

  found: Stored = jax.tree.map(take, x)
  return found


def take_pages(x: Stored, pages: jax.Array, page: int, pooled: bool) -> Stored:
  """The pages (B, N) of each row, as arrays (B, N * page, ...).

  Args:
    x: contiguous rows of whole pages, or a pool of pages.
    pages: which; of a row, or of the pool.
    page: slots of a page.
    pooled: whether x is a pool.
  """
  B, N = pages.shape

  def take(a):
    if a is None:
      return None
    size = a.shape[1] * page // x.slots
    if pooled:
      return a[pages].reshape(B, N * size, *a.shape[2:])
    a = a.reshape(B, -1, size, *a.shape[2:])
    index = pages.reshape(B, N, 1, 1, 1)
    taken = jnp.take_along_axis(a, index, axis=1)
    return taken.reshape(B, N * size, *a.shape[3:])

  arrays = {
    n: take(getattr(x, n)) for n in ('codes', 'scale', 'offset', 'norm')
  }
  return dataclasses.replace(x, **arrays)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visits:
  """Which pages a row reads, in order; all (B, N) int32 but `last`.

  pages: where they lie, in a row or in a pool.
  first: the position of a page's slot 0; in a ring, of the turn that the
    newest token is in, and a slot past `last` is of the turn before.
  count: slots of it that hold tokens, from 0 on.
  last: (B,) position of the newest token; -1: none.
  """

  pages: jax.Array
  first: jax.Array
  count: jax.Array
  last: jax.Array


def visits(
  lengths: jax.Array,
  *,
  page: int,
  pages: int,
  table: jax.Array | None = None,
  selected: jax.Array | None = None,
  ring: int = 0,
) -> Visits:
  """All pages of a row, or those selected.

  Args:
    lengths: (B,) tokens of each row.
    page: slots of a page.
    pages: of a row.
    table: (B, pages) int32, where in a pool a row's pages lie.
    selected: (B, N) int32 pages of a row, -1: none.
    ring: slots of a ring; 0: positions are slots.
  """
  B = lengths.shape[0]
  last = lengths.astype(jnp.int32) - 1
  if selected is None:
    logical = jnp.broadcast_to(jnp.arange(pages, dtype=jnp.int32), (B, pages))
  else:
    logical = selected.astype(jnp.int32)
  slot = logical * page
  held = jnp.minimum(lengths, ring) if ring else lengths
  count = jnp.clip(held[:, None] - slot, 0, page)
  count = jnp.where(logical >= 0, count, 0).astype(jnp.int32)
  logical = jnp.clip(logical, 0, pages - 1)
  turn = jnp.where(last >= 0, last // ring * ring, 0) if ring else 0 * last
  return Visits(
    pages=logical
    if table is None
    else jnp.take_along_axis(table.astype(jnp.int32), logical, axis=1),
    first=slot + turn[:, None],
    count=count,
    last=last,
  )


def _spread(params: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """(B, n, Hkv, m) -> (B, S, Hkv, D) float32."""
  params = params.astype(jnp.float32)
  params = jnp.repeat(params, shape[1] // params.shape[1], axis=1)
  return jnp.repeat(params, shape[3] // params.shape[3], axis=3)
