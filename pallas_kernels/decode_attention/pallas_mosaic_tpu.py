"""Decode attention on TPU: codes are unpacked where they are multiplied.

XLA keeps an array (B, S, Hkv, W) on a TPU in one of two layouts, and a kernel
that asks for another gets a copy of the cache. There is a body for each.

rows, W = 128: as written, tokens and heads along sublanes.
  Keys are one matrix (tokens * Hkv, 128), and all heads' queries multiply it:
  where head and row do not match, the score is masked, so that p V needs no
  head of its own either. The products that are thrown away are free: loading
  keys and values into the matrix unit is what costs, once.
lanes, W < 128: tokens along lanes, channels along sublanes (packed codes, or
  heads of 64). A head is a matrix (W, tokens); 1, 2 and 4 bits become bfloat16
  by planar.unpack_words, whose order of channels q and the output follow.

Scales, with c' = code + z as it comes out of the unpacking:
  keys per token        s = scale (q c') + (offset - (z + center) scale) sum(q)
  keys per channel      t_g = q scale_g for each group g of tokens; t_g of all
                        groups of a tile multiply it, and each column keeps its
                        own: rows of the left side cost nothing. s = t_g c' +
                        sum(q offset_g - (z + center) t_g)
  values per token, in G groups of channels
                        p scale_g of all groups multiply c'; outside, each
                        channel keeps its own group. Beside it sum(p offset_g -
                        (z + center) p scale_g)

Grid    (B, splits, pages of a split); pages innermost, softmax in scratch.
        `visits` are prefetched: a page that holds nothing is not computed, and
        the page before stands in for it, so that nothing is loaded. So is the
        first row: the layers of a stack lie one behind the other.
Blocks  a page (or `tokens` slots of a row) of each array, all heads.
On-chip 2 * page bytes + a chunk's scores, unpacked codes and scales. 2048
        tokens, Hkv 8, D 128, bfloat16: 2 * 8.4 + 4 = 21 MB; int2: 2 * 1.6 + 4.
Traffic the pages, once. 131072 tokens, Hkv 8, D 128: 537 MB in bfloat16.
Needs   capacity and pages of whole 128 tokens (rows: 16), floating codes of
        bfloat16, Hkv 1 to 8 (rows: 1, 2, 4, 8, 16, 32; bytes: not 2, which XLA
        would copy), per-token scales in rows. float16 is seen as integers.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compat, stored, targets, tiles
from pallas_kernels.decode_attention import base, tpu_body

_LANES = 128
_SUBLANES = 8
_MOST_ROWS = 64  # Queries of a head, T * H / Hkv.
_STEP_BYTES = 2 * 2**20  # Of keys and values, that hide a step's fixed costs.
_CORES = {'v5p': 2}  # Of a device; others show each core as a device.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
  """How a call is cut up.

  Attributes:
    tokens: slots of a step, where there are no pages.
    chunk: slots whose scores are held at once; divides the step.
    splits: parts of a row that cores may share, merged afterwards.
  """

  tokens: int = 2048
  chunk: int = 512
  splits: int = 1

  def __post_init__(self):
    if self.tokens % self.chunk or self.chunk % 16 or self.splits < 1:
      raise ValueError(
        f'Block: tokens={self.tokens}, chunk={self.chunk}, splits='
        f'{self.splits}; chunk must be a multiple of 16 and divide tokens, and '
        'splits at least 1. Use powers of two.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
  """What of a call is static. M: padded queries of a head, or of all."""

  page: int
  chunk: int
  splits: int
  steps: int
  ring: int
  scale: float
  softcap: float | None
  windowed: bool
  heads: int
  head_dim: int
  M: int
  k: Any
  v: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Form:
  """Static facts of keys or values.

  bits: 16: floating. tokens, groups: that share a scale, of a head. middle: of
  the codes; correction: z + center + middle. has_offset; norms: heads of the
  norms, 0: none.
  """

  bits: int
  tokens: int
  groups: int
  middle: float
  correction: float
  has_offset: bool
  norms: int


def in_rows(x: stored.Stored) -> bool:
  """Whether the array is laid out with heads along sublanes."""
  return x.codes.shape[3] % _LANES == 0


def why_not(
  q: Any,
  k: stored.Stored,
  v: stored.Stored,
  pooled: bool,
  page: int | None,
  chip: str,
) -> str:
  """Why this kernel cannot serve; '' if it can."""
  if chip not in targets.TARGETS:
    return f'chip is {chip!r}; it runs on {sorted(targets.TARGETS)}.'
  if q.dtype != jnp.bfloat16:
    return f'q is {q.dtype}; it takes bfloat16. Cast q.'
  T, H = q.shape[1:3]
  queries = T * H // k.heads
  if queries > _MOST_ROWS:
    return (
      f'{T} tokens of {H} heads are {queries} queries of a key head; it takes '
      f'{_MOST_ROWS}. Use prefill_attention.'
    )
  if in_rows(k) != in_rows(v):
    return (
      f'keys of {k.bits} and values of {v.bits} bits lie in different layouts; '
      'it takes one. Use the same width.'
    )
  rows = in_rows(k)
  heads = (1, 2, 4, 8, 16, 32) if rows else tuple(range(1, 9))
  if rows and k.bits == 8:  # Two rows of bytes: XLA would copy them.
    heads = (1, 4, 8, 16, 32)
  if k.heads not in heads:
    return f'{k.heads} key heads; it takes {list(heads)}.'
  unit = 16 if rows else _LANES
  if (page or k.slots) % unit:
    return (
      f'{page or k.slots} slots in a {"page" if page else "row"}; it takes '
      f'multiples of {unit}. Make the cache or its pages so long.'
    )
  return why_not_form('k', k, rows) or why_not_form('v', v, rows)


def why_not_form(name: str, x: stored.Stored, rows: bool) -> str:
  """Why keys or values cannot be read; '' if they can."""
  if x.bits == 16:
    if x.codes.dtype != jnp.bfloat16:
      return f'{name} is {x.codes.dtype}; it takes bfloat16. Cast the cache.'
    if rows and x.head_dim != _LANES:
      return f'head_dim={x.head_dim}; it takes 128 and what is below.'
  elif rows:
    if x.bits != 8 or x.tokens > 1 or x.groups > 1 or x.head_dim != _LANES:
      return (
        f'{name} has {x.bits} bits, groups of {x.tokens} tokens and '
        f'{x.groups} of a head; at this width it takes 8 bits with a scale per '
        'token.'
      )
  elif x.codes.shape[3] % 16 or _LANES % x.head_dim:
    return (
      f'{name} has head_dim={x.head_dim} at {x.bits} bits; it takes 64 and 128 '
      'with at least 16 bytes a head.'
    )
  if rows and x.norm is not None:
    return 'keys with norms at this width; it takes none.'
  per_channel = x.groups == x.head_dim and x.tokens > 1
  shared = x.bits < 16 and (x.tokens > 1 or x.groups > 1)
  if name == 'k' and shared and not per_channel:
    return (
      f'k has groups of {x.tokens} tokens and {x.groups} of a head; it takes a '
      'scale per token, or per channel.'
    )
  if name == 'k' and per_channel and _LANES % x.tokens:
    return f'k has groups of {x.tokens} tokens; it takes divisors of 128.'
  if name == 'v' and x.bits < 16 and (x.tokens > 1 or x.groups > 8):
    return (
      f'v has groups of {x.tokens} tokens and {x.groups} of a head; it takes '
      'scales per token, up to 8 of a head.'
    )
  return ''


def pick_block(
  k: stored.Stored, page: int | None, batch: int, chip: str
) -> Block:
  """The block by rule: a few MB a step, and chunks that registers can hold."""
  splits = _CORES.get(chip, 1) if batch == 1 else 1
  most = 4096 // k.heads if in_rows(k) else 2048
  if 1 < k.tokens < _LANES:  # Many groups of a chunk: a long program.
    most = 1024
  if page is not None:
    return Block(tokens=page, chunk=tiles.divisor(page, most), splits=splits)
  nbytes = 2 * k.codes.shape[3] * k.heads * k.codes.dtype.itemsize
  tokens = tiles.divisor(k.slots, max(_LANES, _STEP_BYTES // nbytes))
  return Block(tokens=tokens, chunk=tiles.divisor(tokens, most), splits=splits)


def decode_attention(
  q: jax.Array,
  k: stored.Stored,
  v: stored.Stored,
  seen: stored.Visits,
  oldest: jax.Array | None,
  *,
  first: jax.Array | None = None,
  page: int,
  pooled: bool,
  in_order: bool,
  ring: int,
  scale: float,
  softcap: float | None,
  block: Block,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """As base.decode_attention.

  Args:
    q: as it is, bfloat16; scale: of the scores.
    oldest: None: there is no window.
    first: (), the row of k and v where those of q begin; None: 0.
    in_order: whether the pages are those of a row, one after the other.
    block: how the call is cut up. interpret: runs the interpreter.
  """
  B, T, H, D = q.shape
  if page % block.chunk:
    raise ValueError(
      f'Block: chunk={block.chunk} with pages of {page} slots; it must divide '
      'them. Use a divisor.'
    )
  rows = in_rows(k)
  exact = math.frexp(scale)[0] == 0.5  # A power of two: q stays as it is.
  queries = T * H if rows else T * H // k.heads
  steps = pl.cdiv(seen.pages.shape[1], block.splits)
  call = _Call(
    page=page,
    chunk=block.chunk,
    splits=block.splits,
    steps=steps,
    ring=ring,
    scale=1.0 if exact else scale,
    softcap=softcap,
    windowed=oldest is not None,
    heads=k.heads,
    head_dim=D,
    M=-(-queries // _SUBLANES) * _SUBLANES,
    k=_form(k),
    v=_form(v),
  )
  scalars = _scalars(seen, oldest, ring, steps, block.splits, in_order)
  row = jnp.zeros((1,), jnp.int32) if first is None else first.reshape(1)
  scalars = (*scalars, row.astype(jnp.int32))
  low = None if oldest is None else _query_rows_of(oldest, k.heads, H, rows)
  q_rows = _query_rows(
    q * scale if exact else q, k.heads, rows
  )  # (B, Hkv or 1, T * G, D)
  q_rows = _pad_rows(q_rows, call.M)
  parts = _call(
    call,
    scalars,
    q_rows,
    low,
    k,
    v,
    rows=rows,
    pooled=pooled,
    interpret=interpret,
  )
  return _finish(call, *parts, B=B, T=T, H=H, rows=rows)


def _form(x):
  z = {16: 0.0, 8: -128.0}.get(x.bits, 128.0)
  # Codes that are not signed are taken from their middle, so that what is
  # rounded to bfloat16 multiplies small numbers.
  middle = (2**x.bits - 1) / 2 - x.center if x.offset is not None else 0.0
  return _Form(
    bits=x.bits,
    tokens=x.tokens,
    groups=x.groups,
    middle=middle,
    correction=z + x.center + middle,
    has_offset=x.offset is not None,
    norms=0 if x.norm is None else x.norm.shape[2],
  )


def _scalars(seen, oldest, ring, steps, splits, in_order):
  """(pages, first, count, last), padded to whole splits.

  A page that nothing is seen of is given the number of the one before, which
  the pipeline then does not load again.
  """
  count = seen.count
  if oldest is not None and not ring:
    past = seen.first + count <= jnp.min(oldest, axis=1, keepdims=True)
    count = jnp.where(past, 0, count)
  B, total = count.shape[0], splits * steps
  pad = ((0, 0), (0, total - count.shape[1]))
  pages, first, count = (
    jnp.pad(a, pad) for a in (seen.pages, seen.first, count)
  )
  at = jnp.arange(total, dtype=jnp.int32)[None]
  held = (count > 0).reshape(B, splits, steps)
  before = jax.lax.cummax(
    jnp.where(held, at.reshape(1, splits, -1), -1), axis=2
  )
  start = jnp.argmax(held, axis=2, keepdims=True).astype(jnp.int32)
  start = start + at.reshape(1, splits, -1)[:, :, :1]
  at = jnp.where(before >= 0, before, start).reshape(B, total)
  if not in_order:
    at = jnp.take_along_axis(pages, at, axis=1)
  return at, first, count, seen.last


def _query_rows(x, Hkv, rows):
  """(B, T, H, D) -> (B, Hkv, T G, D), or (B, 1, T G Hkv, D) in rows."""
  B, T, H, D = x.shape
  x = x.reshape(B, T, Hkv, H // Hkv, D)
  if rows:  # Heads fastest, as the rows of the keys.
    return x.transpose(0, 1, 3, 2, 4).reshape(B, 1, -1, D)
  return x.transpose(0, 2, 1, 3, 4).reshape(B, Hkv, -1, D)


def _query_rows_of(oldest, Hkv, H, rows):
  """(B, T) -> (B, 1, rows of queries, 128)."""
  B, T = oldest.shape
  wide = jnp.broadcast_to(oldest[:, :, None, None], (B, T, H, _LANES))
  return _query_rows(wide, Hkv, rows)[:, :1]


def _pad_rows(x, M):
  return jnp.pad(x, ((0, 0), (0, 0), (0, M - x.shape[2]), (0, 0)))


def _words(a):
  """float16, which the chip has no registers for, as integers."""
  if a is None or a.dtype != jnp.float16:
    return a
  return jax.lax.bitcast_convert_type(a, jnp.int16)


def _views(x, rows):
  """Arrays of keys or values as the chip has them, and their token axes.

  [(array, axis of the tokens, tokens of an element)]; all reshapes and
  transposes here are of the shape only.
  """
  found = []
  if rows:
    A, S, Hkv, W = x.codes.shape
    found.append((x.codes.reshape(A, S * Hkv, W), 1))
  else:
    found.append((x.codes.transpose(0, 2, 3, 1), 3))
  per_channel = x.tokens > 1
  for a in (x.scale, x.offset):
    if a is None:
      continue
    a = _words(a)
    if per_channel:
      found.append((a, 1))
    elif x.groups == 1:
      found.append((a[..., 0].transpose(0, 2, 1), 2))
    else:
      found.append((a.transpose(0, 2, 3, 1), 3))
  if x.norm is not None:
    found.append((_words(x.norm)[..., 0].transpose(0, 2, 1), 2))
  return found


def _call(call, scalars, q, low, k, v, *, rows, pooled, interpret):
  B, heads, M, D = q.shape
  n = call.v.groups

  def per_row(shape):
    def index(b, s, i, *refs):
      del s, i, refs
      return (b,) + (0,) * (len(shape) - 1)

    return pl.BlockSpec((1, *shape[1:]), index)

  def paged(a, axis, slots):
    block = list(a.shape)
    block[0], block[axis] = 1, a.shape[axis] * call.page // slots

    def index(b, s, i, pages, *refs):
      page = pages[b, s * call.steps + i]
      at = [0] * a.ndim
      if pooled:
        at[0] = page
      else:
        at[0], at[axis] = refs[-1][0] + b, page
      return tuple(at)

    return pl.BlockSpec(tuple(block), index)

  q = q.astype(jnp.bfloat16)
  queries = [tpu_body.to_unpacked_order(q, call.k.bits)]
  if call.k.tokens > 1:
    lanes = tpu_body.to_unpacked_order(
      jnp.arange(D, dtype=jnp.int32), call.k.bits
    )
    queries += [q, jnp.broadcast_to(lanes[None, None], (1, _SUBLANES, D))]
  operands = list(queries)
  in_specs = [per_row(a.shape) for a in queries[:2]]
  if call.k.tokens > 1:
    in_specs.append(pl.BlockSpec((1, _SUBLANES, D), lambda *_: (0, 0, 0)))
  if low is not None:
    low = _pad_rows(low, M)
    operands.append(low)
    in_specs.append(per_row(low.shape))
  nbytes = 0
  for x in (k, v):
    for a, axis in _views(x, rows):
      spec = paged(a, axis, x.slots)
      operands.append(a)
      in_specs.append(spec)
      nbytes += int(np.prod(spec.block_shape)) * a.dtype.itemsize
  shapes = [(heads, n * M, D), (heads, M, _LANES), (heads, M, _LANES)]
  scratch = [pltpu.VMEM(s, jnp.float32) for s in shapes]
  if call.v.bits < 16:
    scratch.append(pltpu.VMEM((heads, n * M, _LANES), jnp.float32))
  if call.k.tokens > 1:
    groups = (call.chunk // call.k.tokens, k.heads, D)
    scratch += [pltpu.VMEM(groups, jnp.float32)] * (1 + call.k.has_offset)
  used = 2 * nbytes + 24 * 2**20
  return pl.pallas_call(
    functools.partial(tpu_body.kernel, call=call, rows=rows),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5,
      grid=(B, call.splits, call.steps),
      in_specs=in_specs,
      out_specs=[
        pl.BlockSpec((1, 1, *s), lambda b, s, i, *_: (b, s, 0, 0, 0))
        for s in shapes
      ],
      scratch_shapes=scratch,
    ),
    out_shape=[
      compat.out_struct((B, call.splits, *s), jnp.float32, *operands)
      for s in shapes
    ],
    compiler_params=compat.tpu_params(
      ('parallel', 'parallel', 'arbitrary'), used
    ),
    interpret=compat.interpret_mode(interpret),
    name=f'decode_attention_k{call.k.bits}v{call.v.bits}',
  )(*scalars, *operands)


def _finish(call, acc, largest, total, *, B, T, H, rows):
  """Partial results of splits -> output and log-sum-exp in natural order."""
  n, M, D, Hkv = call.v.groups, call.M, call.head_dim, call.heads
  heads = acc.shape[2]
  acc = acc.reshape(B, call.splits, heads, n, M, D)
  acc = tpu_body.from_unpacked_order(acc, call.v.bits)
  width = D // n
  acc = jnp.concatenate(
    [acc[:, :, :, g, :, g * width : (g + 1) * width] for g in range(n)],
    axis=-1,
  )  # (B, splits, heads, M, D)
  largest, total = largest[..., 0], total[..., 0]
  none = largest <= base.MASKED / 2
  safe = jnp.where(none | (total <= 0), 1.0, total)
  lse = jnp.where(none, -jnp.inf, largest + jnp.log(safe))
  out = jnp.where(none[..., None], 0.0, acc / safe[..., None])
  out, lse = base.merge([(out[:, s], lse[:, s]) for s in range(call.splits)])
  queries = T * H // heads
  out, lse = out[:, :, :queries], lse[:, :, :queries]
  G = H // Hkv
  if rows:
    out = out.reshape(B, T, G, Hkv, D).transpose(0, 1, 3, 2, 4)
    lse = lse.reshape(B, T, G, Hkv).transpose(0, 1, 3, 2)
  else:
    out = out.reshape(B, Hkv, T, G, D).transpose(0, 2, 1, 3, 4)
    lse = lse.reshape(B, Hkv, T, G).transpose(0, 2, 1, 3)
  return out.reshape(B, T, H, D), lse.reshape(B, T, H)
