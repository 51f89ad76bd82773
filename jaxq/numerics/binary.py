"""BinaryArray: a matrix of signs, some rows of which are kept in more bits.

  W[j, n] = r_j (alpha_n B[j, n] + mu_n)        B in {-1, 1}, most rows
          = (code[j, n] - zero_point_n) scale_n           the salient rows

PTQ1.61's storage. Rows are stored salient first, each part in its own order, so
that x is gathered once; `order` says where they came from.

`matmul` makes no dense float weight: with B = 2 bit - 1 and S = sum_j x_j r_j

  y = alpha (2 (x r) @ bit - S) + mu S + scale (x_s @ code - zero_point sum x_s)

and bit and code are unpacked one field of a byte at a time: a shift, a mask, a
matmul of an eighth of the rows (a half, at 4 bits). Packed planar over all rows
of a part: field f of byte row i is row f * (rows / fields) + i (packing.py with
one tile), so that a kernel reads blocks of byte rows and as many runs of x.

Traffic: K N / 8 bytes for the signs of K rows, a tenth of bfloat16's with a
fifth of the rows at 4 bits.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.numerics import packing

_NARROW_ORDER = 1 << 16


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=(
    'bits',
    'alpha',
    'mu',
    'r',
    'order',
    'salient',
    'scale',
    'zero_point',
  ),
  meta_fields=('salient_bits', 'shape'),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class BinaryArray:
  """A (K, N) matrix, R rows of which are signs (module docstring).

  Attributes:
    bits: (R / 8, N) uint8; a 1 is a plus.
    alpha, mu: (1, N) float. r: (R, 1) float.
    order: (K, 1) uint16 (int32 from 65537 rows): the row of the matrix that is
      stored at each place, the K - R salient ones first.
    salient: ((K - R) * salient_bits / 8, N) uint8, None where K = R, as are
      scale (1, N) float and zero_point (1, N) uint8.
    salient_bits: 2..8.
    shape: (K, N).
  """

  bits: jax.Array
  alpha: jax.Array
  mu: jax.Array
  r: jax.Array
  order: jax.Array
  salient: jax.Array | None
  scale: jax.Array | None
  zero_point: jax.Array | None
  salient_bits: int
  shape: tuple[int, int]


def pack(
  signs: jax.Array,
  alpha: jax.Array,
  mu: jax.Array,
  r: jax.Array,
  order: jax.Array,
  codes: jax.Array,
  scale: jax.Array,
  zero_point: jax.Array,
  salient_bits: int,
) -> BinaryArray:
  """A BinaryArray of its parts.

  Args:
    signs: (R, N) bool, True is a plus; the rows order[K - R:].
    alpha, mu: (1, N), of the dtype that is stored, as are r and scale.
    r: (R, 1).
    order: (K,) integers.
    codes: (K - R, N) uint8; the rows order[:K - R].
    scale, zero_point: (1, N); the latter uint8.
    salient_bits: of codes.

  Raises:
    ValueError: R or K - R is no multiple of 8.
  """
  (R, N), k = signs.shape, codes.shape[0]
  for what, rows in (('binary', R), ('salient', k)):
    if rows % 8:
      raise ValueError(
        f'binary.pack: {rows} {what} rows of N={N}; both parts must be '
        'multiples of 8, so that they fill whole bytes. Round the number of '
        'salient rows.'
      )
  K = R + k
  narrow = jnp.uint16 if K <= _NARROW_ORDER else jnp.int32
  if k and salient_bits < 8:
    codes = packing.pack(codes, salient_bits, k)
  return BinaryArray(
    bits=packing.pack(signs.astype(jnp.uint8), 1, R),
    alpha=alpha,
    mu=mu,
    r=r,
    order=order.astype(narrow)[:, None],
    salient=codes if k else None,
    scale=scale if k else None,
    zero_point=zero_point if k else None,
    salient_bits=salient_bits,
    shape=(K, N),
  )


def matmul(x: jax.Array, w: BinaryArray) -> jax.Array:
  """x (..., K) @ w -> (..., N) in x.dtype, accumulated in float32.

  Raises:
    ValueError: w's parts or x do not fit its shape.
  """
  x_s, x_r = arrange(x, w)
  wide = (1,) * (x.ndim - 1) + (-1,)
  f32 = lambda a: a.astype(jnp.float32).reshape(wide)
  total = jnp.sum(x_r, axis=-1, keepdims=True, dtype=jnp.float32)
  y = f32(w.alpha) * (2 * _dot(x_r, w.bits, 1) - total) + f32(w.mu) * total
  if w.salient is not None:
    assert w.scale is not None and w.zero_point is not None
    sum_s = jnp.sum(x_s, axis=-1, keepdims=True, dtype=jnp.float32)
    dot = _dot(x_s, w.salient, w.salient_bits)
    y = y + f32(w.scale) * (dot - f32(w.zero_point) * sum_s)
  return y.astype(x.dtype)


def arrange(x: jax.Array, w: BinaryArray) -> tuple[jax.Array, jax.Array]:
  """x (..., K) in the order of the stored rows: x_s (..., K - R), x_r (..., R).

  What meets the signs is multiplied with r, and both are of x.dtype.

  Raises:
    ValueError: w's parts or x do not fit its shape.
  """
  validate(w)
  K, R = w.shape[0], w.r.shape[0]
  if x.shape[-1] != K:
    raise ValueError(
      f'binary.matmul: x has {x.shape[-1]} channels, the kernel K={K} rows; '
      'they must agree. Load the kernel that belongs to this layer.'
    )
  x = jnp.take(x, w.order[:, 0], axis=-1)
  x_s, x_r = x[..., : K - R], x[..., K - R :]
  r = w.r.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (R,))
  return x_s, (x_r.astype(jnp.float32) * r).astype(x.dtype)


def dequantize(w: BinaryArray) -> jax.Array:
  """(..., K, N) float32; leading axes are stacked matrices."""
  if w.bits.ndim > 2:
    return jax.vmap(dequantize)(w)
  validate(w)
  f32 = lambda a: a.astype(jnp.float32)
  R = w.r.shape[0]
  signs = 2 * f32(packing.unpack(w.bits, 1, R)) - 1
  rows = f32(w.r) * (f32(w.alpha) * signs + f32(w.mu))
  if w.salient is not None:
    assert w.scale is not None and w.zero_point is not None
    codes = w.salient
    if w.salient_bits < 8:
      codes = packing.unpack(codes, w.salient_bits, w.shape[0] - R)
    salient = (f32(codes) - f32(w.zero_point)) * f32(w.scale)
    rows = jnp.concatenate([salient, rows])
  return jnp.zeros(w.shape, jnp.float32).at[w.order[:, 0]].set(rows)


def nbytes(w: BinaryArray) -> int:
  """Bytes of all leaves, metadata included."""
  leaves = jax.tree.leaves(w)
  return sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in leaves)


def bits_per_weight(w: BinaryArray) -> float:
  """Stored bits per element, down to the order of the rows."""
  return 8 * nbytes(w) / math.prod(w.bits.shape[:-2] + tuple(w.shape))


def validate(w: BinaryArray) -> None:
  """Checks that the parts of one matrix fit its shape.

  Raises:
    ValueError: naming the part.
  """
  (K, N), R = w.shape, w.r.shape[-2]
  k = K - R
  columns = (1, N)
  wanted = {
    'bits': (R // 8, N),
    'alpha': columns,
    'mu': columns,
    'order': (K, 1),
    'salient': (k * w.salient_bits // 8, N) if k else None,
    'scale': columns if k else None,
    'zero_point': columns if k else None,
  }
  for name, want in wanted.items():
    leaf = getattr(w, name)
    have = None if leaf is None else tuple(leaf.shape)
    if have != want or R % 8:
      raise ValueError(
        f'binary.validate: {name} is {have}; a kernel of shape={w.shape} with '
        f'{R} binary and {k} salient rows needs {want}. Load the files that '
        'belong together.'
      )


def _dot(x: jax.Array, packed: jax.Array, bits: int) -> jax.Array:
  """x (..., rows) @ codes (rows, N) -> (..., N) float32, field by field."""
  y: jax.Array | float = 0.0
  start = low = 0
  for p in packing.planes(bits) or (8,):
    fields = 8 // p
    rows = x.shape[-1] // fields
    byte = packed[start : start + rows]
    runs = jnp.moveaxis(x.reshape(*x.shape[:-1], fields, rows), -2, 0)

    def add(acc, step, byte=byte, p=p):
      run, f = step
      plane = (byte >> (f * p).astype(jnp.uint8)) & jnp.uint8(2**p - 1)
      part = jnp.matmul(
        run, plane.astype(run.dtype), preferred_element_type=jnp.float32
      )
      return acc + part, None

    zero = jnp.zeros((*x.shape[:-1], packed.shape[-1]), jnp.float32)
    total, _ = lax.scan(add, zero, (runs, jnp.arange(fields)))
    y = y + 2.0**low * total
    start, low = start + rows, low + p
  assert isinstance(y, jax.Array)
  return y
