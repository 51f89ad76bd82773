"""The bodies of the TPU kernel: a chunk of a page into the running softmax.

See pallas_mosaic_tpu.py for the layouts, the identities and the grid. `call` is
its _Call. M queries, C tokens of a chunk, n groups of a head's channels.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import planar, tiles
from pallas_kernels.decode_attention import base

_LANES = tiles.LANES
_SUBLANES = 8
_AHEAD = 2  # Heads whose scores wait for their softmax.


def to_unpacked_order(x: jax.Array, bits: int) -> jax.Array:
  """x (..., D) in the order in which codes of these bits are unpacked.

  Words hold four bytes; of a field, bytes 0 and 2 of each come first.
  """
  if bits >= 8:
    return x
  *lead, D = x.shape
  x = x.reshape(*lead, 8 // bits, -1, 2, 2)  # field, word, half, low or high
  return jnp.moveaxis(x, -1, -3).reshape(*lead, D)


def from_unpacked_order(x: jax.Array, bits: int) -> jax.Array:
  """Inverse of to_unpacked_order."""
  if bits >= 8:
    return x
  *lead, D = x.shape
  x = x.reshape(*lead, 8 // bits, 2, -1, 2)  # field, low or high, word, half
  return jnp.moveaxis(x, -3, -1).reshape(*lead, D)


class _Refs:
  """The references of a kernel by name, taken in the order of `_call`."""

  def __init__(self, refs: Any, call: Any):
    left = list(refs)

    def take(there: bool = True) -> Any:
      return left.pop(0) if there else None

    self.pages, self.first, self.count, self.last = (take() for _ in range(4))
    take()  # The first row is the blocks' business.
    self.q = take()
    channels = call.k.tokens > 1
    self.q_natural, self.order = take(channels), take(channels)
    self.low = take(call.windowed)
    for name, form in (('k', call.k), ('v', call.v)):
      setattr(self, name, take())
      setattr(self, f'{name}_scale', take(form.bits < 16))
      setattr(self, f'{name}_offset', take(form.has_offset))
      setattr(self, f'{name}_norm', take(form.norms > 0))
    self.out, self.out_largest, self.out_total = (take() for _ in range(3))
    self.acc, self.largest, self.total = (take() for _ in range(3))
    self.shift = take(call.v.bits < 16)
    self.scales = take(channels)
    self.offsets = take(channels and call.k.has_offset)


def kernel(*refs: Any, call: Any, rows: bool) -> None:
  """A page of a row: chunk by chunk into the running softmax."""
  r = _Refs(refs, call)
  b, i = pl.program_id(0), pl.program_id(2)
  step = pl.program_id(1) * call.steps + i

  @pl.when(i == 0)
  def _():
    r.acc[...] = jnp.zeros_like(r.acc)
    r.total[...] = jnp.zeros_like(r.total)
    r.largest[...] = jnp.full_like(r.largest, base.MASKED)
    if r.shift is not None:
      r.shift[...] = jnp.zeros_like(r.shift)

  first, count, last = r.first[b, step], r.count[b, step], r.last[b]
  body = _rows_chunk if rows else _lanes_chunk

  def chunk(c):
    @pl.when(c * call.chunk < count)
    def _():
      body(r, call, c, first, count, last)

  if call.page == call.chunk:
    chunk(0)
  else:
    pl.loop(0, call.page // call.chunk)(chunk)

  @pl.when(i == call.steps - 1)
  def _():
    acc = r.acc[...]
    if r.shift is not None:
      # Without offsets it is the sum of what was multiplied.
      factor = 1.0 if call.v.has_offset else -call.v.correction
      acc = acc + factor * jnp.sum(r.shift[...], axis=2, keepdims=True)
    r.out[0, 0] = acc
    r.out_largest[0, 0] = r.largest[...]
    total = jnp.sum(r.total[...], axis=2, keepdims=True)
    r.out_total[0, 0] = jnp.broadcast_to(total, r.total.shape)


def _masks(call, r, slots, mine, first, count, last):
  """Function of scores (M, columns): those that a query sees, else MASKED.

  Masks are of one register each, shared by the heads and by all rows of
  queries unless there is a window.

  Args:
    call, r: of the kernel.
    slots: (8, width) int32 slots of each tile of columns.
    mine: (8, width) bools that rows of queries take in turn, in all tiles.
    first, count, last: scalars of the page.
  """
  found = []
  for slot in slots:
    seen = slot < count
    turns = [seen & m for m in mine] or [seen]
    if not call.windowed:
      found.append(turns)
      continue
    position = first + slot
    if call.ring:
      position = jnp.where(position > last, position - call.ring, position)
    width = slot.shape[1]
    low = [
      r.low[0, 0, m : m + _SUBLANES, :width]
      for m in range(0, call.M, _SUBLANES)
    ]
    found.append(
      [turns[i % len(turns)] & (position >= x) for i, x in enumerate(low)]
    )

  def mask(scores):
    width = slots[0].shape[1]
    columns = []
    for t, masks in enumerate(found):
      tile = scores[:, t * width : (t + 1) * width]
      rows = [
        jnp.where(
          masks[i % len(masks)],
          tile[i * _SUBLANES : (i + 1) * _SUBLANES],
          base.MASKED,
        )
        for i in range(call.M // _SUBLANES)
      ]
      columns.append(jnp.concatenate(rows, axis=0))
    return jnp.concatenate(columns, axis=1)

  return mask


def _take_in(r, call, h, scores, mask, combine):
  """Adds the scores (M, columns) of a head to the running softmax."""
  M, D = call.M, call.head_dim
  if call.softcap is not None:
    scores = call.softcap * jnp.tanh(scores * (1.0 / call.softcap))
  scores = mask(scores)
  before = r.largest[h]
  largest = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
  p = jnp.exp(scores - tiles.repeat(largest, scores.shape[1]))
  shrink = jnp.exp(before - largest)
  r.largest[h] = largest
  r.total[h] = r.total[h] * shrink + tiles.fold(p)
  product, shifts = combine(p)
  shrink = jnp.concatenate([shrink] * (product.shape[0] // M), axis=0)
  r.acc[h] = r.acc[h] * shrink[:, :D] + product
  if shifts is not None:
    r.shift[h] = r.shift[h] * shrink + shifts


def _lanes_chunk(r, call, c, first, count, last):
  """Tokens along lanes: each head for itself."""
  C = call.chunk
  at, start = _run(c, C), c * C
  lane = jax.lax.broadcasted_iota(jnp.int32, (_SUBLANES, _LANES), 1)
  slots = [start + tile + lane for tile in range(0, C, _LANES)]
  mask = _masks(call, r, slots, [], first, count, last)
  left = count - start  # Slots from here on hold anything.
  keys = _key_params(r, call, at, c)
  values = None
  if call.v.bits < 16 and call.v.groups == 1:
    values = _token_params(call.v, r.v_scale[0, :, at], r.v_offset, at, left)
  norms = None if r.k_norm is None else _float32(r.k_norm[0, :, at])

  def scores_of(h):
    scores = _key_scores(r, call, h, at, keys)
    if norms is None:
      return scores
    of = h if call.k.norms > 1 else 0
    return scores * norms[of : of + 1]

  # The next head's scores are made before this one's are used, so that the
  # matrix unit has work while a softmax waits for its maximum.
  ahead = [scores_of(h) for h in range(min(_AHEAD, call.heads))]
  for h in range(call.heads):
    if h + _AHEAD < call.heads:
      ahead.append(scores_of(h + _AHEAD))
    combine = functools.partial(
      _combine, r, call, h, at=at, left=left, params=values
    )
    _take_in(r, call, h, ahead.pop(0), mask, combine)


def _key_params(r, call, at, c):
  """Scales of a chunk's keys: rows (Hkv, C), or into scratch by channel."""
  form = call.k
  if form.bits == 16:
    return None
  if form.tokens == 1:
    scale = _float32(r.k_scale[0, :, at])
    shift = (form.middle - form.correction) * scale
    if r.k_offset is not None:
      shift = shift + _float32(r.k_offset[0, :, at])
    return scale * call.scale, shift * call.scale
  n = call.chunk // form.tokens
  groups = _run(c, n, aligned=False)
  natural = _float32(r.k_scale[0, groups])  # (n, Hkv, D)
  scale = natural * call.scale
  order = r.order[0, : call.heads]  # (Hkv, D)
  for g in range(n):
    row = scale[g]
    if form.bits < 8:
      row = jnp.take_along_axis(row, order, axis=1, mode='promise_in_bounds')
    r.scales[g] = row
  if r.k_offset is not None:
    offset = _float32(r.k_offset[0, groups]) + form.middle * natural
    r.offsets[...] = offset * call.scale
  return None


def _key_scores(r, call, h, at, params):
  """(M, C) float32 scores of a head."""
  form, M = call.k, call.M
  q = r.q[0, h]  # (M, D) bfloat16
  if form.bits == 16:
    return _scaled(tiles.dot(q, r.k[0, h, :, at], 0), call)
  codes = _codes(r.k[0, h, :, at], form.bits, call.head_dim)  # (D, C)
  if form.tokens == 1:
    total = jnp.sum(q.astype(jnp.float32), axis=1, keepdims=True)
    scale, shift = params
    return tiles.dot(q, codes, 0) * scale[h : h + 1] + total * shift[h : h + 1]
  q, natural = q.astype(jnp.float32), r.q_natural[0, h].astype(jnp.float32)
  per_tile = _LANES // form.tokens
  group_of_lane = jax.lax.broadcasted_iota(jnp.int32, (M, _LANES), 1)
  columns = []
  for tile in range(call.chunk // _LANES):
    left, bias = [], []
    for g in range(tile * per_tile, (tile + 1) * per_tile):
      t = (q * r.scales[g, h : h + 1]).astype(jnp.bfloat16)
      shift = -form.correction * t.astype(jnp.float32)
      if r.offsets is not None:
        shift = shift + natural * r.offsets[g, h : h + 1]
      left.append(t)
      bias.append(jnp.sum(shift, axis=1, keepdims=True))
    part = codes[:, tile * _LANES : (tile + 1) * _LANES]
    product = tiles.dot(jnp.concatenate(left, axis=0), part, 0)
    scores = product[:M] + bias[0]
    for g in range(1, per_tile):
      mine = group_of_lane >= g * form.tokens
      scores = jnp.where(mine, product[g * M : (g + 1) * M] + bias[g], scores)
    columns.append(scores)
  return jnp.concatenate(columns, axis=1)


def _scaled(scores, call):
  """Times the scale; one of a power of two is in q."""
  return scores if call.scale == 1.0 else scores * call.scale


def _combine(r, call, h, p, *, at, left, params):
  """p (M, C) -> p c' (groups * M, D), and what corrects it, by lane."""
  form = call.v
  if form.bits == 16:
    v = tiles.keep_columns(r.v[0, h, :, at], left)
    return tiles.dot(p.astype(jnp.bfloat16), v, 1), None
  codes = _codes(r.v[0, h, :, at], form.bits, call.head_dim)
  if form.groups == 1:
    scale, offset = params
    scale = scale[h : h + 1]
    offset = None if offset is None else offset[h : h + 1]
  else:
    scale, offset = _token_params(
      form, r.v_scale[0, h, :, at], r.v_offset, at, left, h
    )
  weights, shifts = [], []
  for g in range(form.groups):
    t = (p * scale[g : g + 1]).astype(jnp.bfloat16)
    shift = t.astype(jnp.float32)
    if offset is not None:
      shift = p * offset[g : g + 1] - form.correction * shift
    weights.append(t)
    shifts.append(tiles.fold(shift))
  product = tiles.dot(jnp.concatenate(weights, axis=0), codes, 1)
  return product, jnp.concatenate(shifts, axis=0)


def _token_params(form, scale, offset_ref, at, left, h=None):
  """(n, C) scales, and what a middle code is: 0 behind what is held."""
  held = jax.lax.broadcasted_iota(jnp.int32, scale.shape, 1) < left
  scale = jnp.where(held, _float32(scale), 0.0)
  if offset_ref is None:
    return scale, None
  offset = offset_ref[0, :, at] if h is None else offset_ref[0, h, :, at]
  offset = jnp.where(held, _float32(offset), 0.0)
  return scale, offset + form.middle * scale


def _rows_chunk(r, call, c, first, count, last):
  """Tokens and heads along sublanes: all heads at once."""
  C, M, Hkv = call.chunk, call.M, call.heads
  power = Hkv.bit_length() - 1
  columns = C * Hkv
  at, wide, start = _run(c, C), _run(c, columns), c * C
  # A tile of columns must not be less than the heads of a token.
  tile = (_SUBLANES, min(_LANES, columns))
  lane = jax.lax.broadcasted_iota(jnp.int32, tile, 1)
  row = jax.lax.broadcasted_iota(jnp.int32, tile, 0)
  mine = [
    ((lane ^ (row + i)) & (Hkv - 1)) == 0 for i in range(0, Hkv, _SUBLANES)
  ]
  slots = [start + ((t + lane) >> power) for t in range(0, columns, tile[1])]
  mask = _masks(call, r, slots, mine, first, count, last)
  left = count - start
  q = r.q[0, 0]

  def params(form, scale_ref, offset_ref, times=1.0):
    scale, offset = _token_params(
      form, scale_ref[0, :, at], offset_ref, at, left
    )
    scale = _interleave(scale * times, M)
    return scale, None if offset is None else _interleave(offset * times, M)

  if call.k.bits == 16:
    scores = _scaled(tiles.dot(q, r.k[0, wide], 1), call)
  else:
    scale, offset = params(call.k, r.k_scale, r.k_offset, call.scale)
    total = jnp.sum(q.astype(jnp.float32), axis=1, keepdims=True)
    scores = tiles.dot(q, _codes(r.k[0, wide], 8, _LANES), 1)
    scores = (scores - call.k.correction * total) * scale
    if offset is not None:
      scores = scores + total * offset

  def combine(p):
    if call.v.bits == 16:
      v = tiles.keep_rows(r.v[0, wide], left * Hkv)
      return tiles.dot(p.astype(jnp.bfloat16), v, 0), None
    scale, offset = params(call.v, r.v_scale, r.v_offset)
    t = (p * scale).astype(jnp.bfloat16)
    shift = t.astype(jnp.float32)
    if offset is not None:
      shift = p * offset - call.v.correction * shift
    return tiles.dot(t, _codes(r.v[0, wide], 8, _LANES), 0), tiles.fold(shift)

  _take_in(r, call, 0, scores, mask, combine)


def _interleave(x, M):
  """(Hkv, C) -> (M, C * Hkv): what row r % Hkv has for token column / Hkv."""
  Hkv, C = x.shape
  power = Hkv.bit_length() - 1
  x = jnp.concatenate([x] * (max(_SUBLANES, Hkv) // Hkv), axis=0)
  lane = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], _LANES), 1)
  width = min(C, _LANES)
  parts = []
  for tile in range(C // width):
    source = x[:, tile * width : (tile + 1) * width]
    if width < _LANES:
      source = jnp.pad(source, ((0, 0), (0, _LANES - width)))
    for part in range(width * Hkv // _LANES):
      index = (part * _LANES + lane) >> power
      parts.append(
        jnp.take_along_axis(source, index, axis=1, mode='promise_in_bounds')
      )
  wide = jnp.concatenate(parts, axis=1)
  return jnp.concatenate([wide] * (M // wide.shape[0]), axis=0)


def _codes(packed, bits, head_dim):
  """Bytes -> bfloat16 codes plus z; channels in `channel_order`."""
  layout = planar.Planar(bits=bits, K=head_dim, signed=False)
  if bits == 8:
    return planar.unpack_int8(packed, layout).astype(jnp.bfloat16)
  return planar.unpack_words(packed, layout)


def _float32(x):
  """Scales in float32; integers are the bits of float16.

  Its exponent's bias is 15 and not 127. Magnitudes below 2^-14 may become 0.
  """
  if x.dtype != jnp.int16:
    return x.astype(jnp.float32)
  bits = (x.astype(jnp.int32) << 13) & -0x70000001  # Sign, and what it has.
  return jax.lax.bitcast_convert_type(bits, jnp.float32) * 2.0**112


def _run(c, size, aligned=True):
  """The c-th run of so many."""
  if isinstance(c, int):
    return pl.ds(c * size, size)
  return pl.ds(pl.multiple_of(c * size, size) if aligned else c * size, size)
