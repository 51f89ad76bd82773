"""QArray: a quantized array, and the way to it and back.

  quantize(x, spec) = from_codes(encode(x, *find_params(x, spec), spec), ...)
  dequantize(q)     = decode(codes(q), scale, zero_point, spec)
  fake_quant(x, s) == dequantize(quantize(x, s), x.dtype), bit for bit

The trailing two axes (K, N) are quantized; axes before them are stacked
matrices, each treated as under vmap. Weights are (K, N) with y = x @ W, so
'channel' is a column and a 'group' runs along K. For groups along the last
axis (activations in a block format) pass jnp.swapaxes(x, -1, -2).

Integers: s = max(absmax, 1e-5) / qmax, code = clip(round(x / s)), half to
even; asymmetric: s = max(hi - lo, 1e-5) / qmax, zero_point = round(-lo / s),
with lo <= 0 <= hi and (lo, hi) = (-1, 1) for an all-zero slice. Binary: sign(x)
* mean |x|. Floats: s = absmax / max, clipped before the cast, so that nothing
becomes NaN. mx: s is a power of two. nvfp4: s = e4m3 block scale * float32
tensor scale.

Methods that quantize row by row (GPTQ) call find_params once per slab, then
`encode(row, scale_row, zero_point_row, spec)` on rows (N,), and `from_codes` at
the end. In these calls `scale` is always the *effective* float32 step, already
rounded to what is stored.

Departure: nvfp4's tensor scale absmax / (6 * 448) is rounded to 20 significant
bits (relative 2^-21), which makes block scale * tensor scale exact in float32:
an effective scale can be split again, and the order of products is immaterial.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxq.numerics import codec, packing, ranges
from jaxq.numerics import spec as spec_lib

QuantSpec = spec_lib.QuantSpec


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('qvalue', 'scale', 'zero_point', 'tensor_scale'),
  meta_fields=('spec', 'shape'),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class QArray:
  """A quantized array: a pytree whose leaves are arrays, spec and shape static.

  Invariants, which `validate` checks (L: stacking axes, possibly none):
    1. shape is (K, N), the logical shape of one matrix.
    2. K % group_size == 0 for granularity 'group'.
    3. qvalue is (*L, rows, N). Where `is_packed`, rows = K * bits / 8 and the
       dtype is uint8 (layout: packing.py); else rows = K and the dtype is
       spec.code_dtype.
    4. scale is (*L, *scale_shape(shape, spec)), of spec.stored_scale_dtype.
    5. zero_point is None, or uint8 shaped as scale if the spec is asymmetric.
    6. tensor_scale is None, or float32 (*L, 1, 1) for nvfp4.

  Attributes:
    qvalue: codes, packed below 8 bits.
    scale: step of each slice; x ~ (qvalue - zero_point) * scale.
    zero_point: code that stands for 0.0, or None.
    tensor_scale: second factor of the scale, nvfp4 only.
    spec: what the array was quantized to.
    shape: (K, N).
  """

  qvalue: jax.Array
  scale: jax.Array
  zero_point: jax.Array | None = None
  tensor_scale: jax.Array | None = None
  spec: QuantSpec
  shape: tuple[int, int]

  @property
  def is_packed(self) -> bool:
    """Whether codes share bytes: below 8 bits, where a tile fills them."""
    return packing.packable(self.spec.bits, _tile(self.shape[0], self.spec))

  def unpacked(self) -> jax.Array:
    """Codes (*L, K, N); other ways to lay them out override this."""
    spec = self.spec
    if not self.is_packed:
      return self.qvalue
    u = packing.unpack(self.qvalue, spec.bits, _tile(self.shape[0], spec))
    if spec.dtype == 'binary':
      return 2 * u.astype(jnp.int8) - 1
    return packing.sign_extend(u, spec.bits) if spec.code_dtype == 'int8' else u

  def values(self) -> jax.Array:
    """float32 (*L, K, N); other ways to store values override this."""
    scale = codec.load_scale(self.scale, self.tensor_scale, self.spec)
    return decode(codes(self), scale, self.zero_point, self.spec)


def scale_shape(shape: tuple[int, ...], spec: QuantSpec) -> tuple[int, int]:
  """Shape of the scale of one matrix (K, N).

  Raises:
    ValueError: K is no multiple of the group size.
  """
  K, N = shape
  if spec.granularity == 'group':
    _check_groups(K, spec.group_size)
    return K // spec.group_size, N
  return {'tensor': (1, 1), 'channel': (1, N), 'token': (K, 1)}[
    spec.granularity
  ]


@functools.partial(jax.jit, static_argnames=('spec', 'search'))
def quantize(
  x: jax.Array,
  spec: QuantSpec,
  *,
  scale: jax.Array | None = None,
  zero_point: jax.Array | None = None,
  search: ranges.RangeSearch | None = None,
) -> QArray:
  """x (..., K, N) floating -> QArray.

  Args:
    x: finite values, any floating dtype; computed in float32.
    spec: static.
    scale: effective step (..., *scale_shape), to skip find_params; rounded to
      what the spec stores.
    zero_point: goes with `scale` if the spec is asymmetric.
    search: range search; None is absmax (minmax if asymmetric).

  Raises:
    TypeError: x is not floating.
    ValueError: x has no (K, N), K is no multiple of group_size, or scale and
      zero_point do not fit.
  """
  codes_, params = _quantize(x, spec, scale, zero_point, search)
  return _assemble(codes_, params, spec)


@functools.partial(jax.jit, static_argnames='dtype')
def dequantize(q: QArray, dtype: jnp.dtype = jnp.float32) -> jax.Array:
  """QArray -> (..., K, N): computed in float32, then cast to dtype."""
  return q.values().astype(dtype)


@functools.partial(jax.jit, static_argnames=('spec', 'search', 'ste'))
def fake_quant(
  x: jax.Array,
  spec: QuantSpec,
  *,
  scale: jax.Array | None = None,
  zero_point: jax.Array | None = None,
  search: ranges.RangeSearch | None = None,
  ste: bool = False,
) -> jax.Array:
  """dequantize(quantize(x, spec), x.dtype) without storing the codes.

  Args:
    x: as for `quantize`, as are spec, scale, zero_point, search and errors.
    spec: static.
    scale: effective step, or None.
    zero_point: goes with scale.
    search: range search.
    ste: straight-through: the gradient is that of the identity, also where
      values were clipped. False: it is zero.
  """
  codes_, (stored, zero, outer) = _quantize(x, spec, scale, zero_point, search)
  y = decode(codes_, codec.load_scale(stored, outer, spec), zero, spec)
  y = lax.stop_gradient(y.astype(x.dtype))
  return _straight_through(x, y) if ste else y


@functools.partial(jax.jit, static_argnames=('spec', 'search'))
def find_params(
  x: jax.Array,
  spec: QuantSpec,
  search: ranges.RangeSearch | None = None,
  *,
  tensor_scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
  """Scale and zero point of x (..., K, N).

  Args:
    x: finite values; K may be one group of a larger matrix.
    spec: static.
    search: range search; None is absmax (minmax if asymmetric).
    tensor_scale: nvfp4: the `tensor_scale` of the whole matrix when x is part
      of it; None takes that of x.

  Returns:
    scale: effective float32 step, (..., *scale_shape(x.shape[-2:], spec)).
    zero_point: uint8 of the same shape, or None if the spec is symmetric.
  """
  x = _as_matrix(x, 'find_params')
  shape = x.shape[:-2] + scale_shape(x.shape[-2:], spec)
  if spec.dtype == 'nvfp4' and tensor_scale is None:
    tensor_scale = codec.tensor_scale(x, spec)
  axes = {'tensor': (-2, -1), 'token': (-1,)}.get(spec.granularity, (-2,))
  if spec.granularity == 'group':
    x = x.reshape(*shape[:-1], spec.group_size, shape[-1])  # (.., K/G, G, N)
    if tensor_scale is not None:
      tensor_scale = tensor_scale[..., None]  # (..., 1, 1, 1)

  if spec.dtype == 'binary':
    if search is not None:
      raise ValueError(
        f"qarray.find_params: search={search.kind!r} with dtype='binary', "
        'whose scale is the mean of |x|. Use search=None.'
      )
    scale = jnp.mean(jnp.abs(x), axis=axes, keepdims=True) * spec.clip
    return codec.round_scale(scale, spec).reshape(shape), None

  lo, hi = ranges.extent(x, axes, spec.symmetric, search)
  lo, hi = codec.shrink(lo, hi, spec.clip)
  if search is not None and search.kind == 'mse':

    def round_trip(ratio):
      scale, zero = codec.params(
        *codec.shrink(lo, hi, ratio), spec, tensor_scale
      )
      return codec.decode(codec.encode(x, scale, zero, spec), scale, zero, spec)

    ratio = ranges.best_ratio(x, axes, search, round_trip)
    lo, hi = codec.shrink(lo, hi, ratio)
  scale, zero = codec.params(lo, hi, spec, tensor_scale)
  return scale.reshape(shape), None if zero is None else zero.reshape(shape)


@functools.partial(jax.jit, static_argnames='spec')
def tensor_scale(x: jax.Array, spec: QuantSpec) -> jax.Array | None:
  """nvfp4's tensor scale of x (..., K, N), float32 (..., 1, 1); else None."""
  if spec.dtype != 'nvfp4':
    return None
  return codec.tensor_scale(_as_matrix(x, 'tensor_scale'), spec)


@functools.partial(jax.jit, static_argnames='spec')
def encode(
  x: jax.Array,
  scale: jax.Array,
  zero_point: jax.Array | None,
  spec: QuantSpec,
) -> jax.Array:
  """Codes of x for given parameters: x's shape, spec.code_dtype, unpacked.

  Args:
    x: of any rank, such as one row (N,) of a matrix.
    scale: effective float32 step. Of x's rank, each axis 1 or x's, save that
      axis -2 may count groups of x; or a scalar. A row (N,) takes scale (N,).
    zero_point: shaped as scale if the spec is asymmetric, else None.
    spec: static.

  Raises:
    ValueError: scale or zero_point does not fit x or spec.
  """
  _check_zero_point('encode', zero_point, spec)
  x = jnp.asarray(x).astype(jnp.float32)
  scale = _expand(jnp.asarray(scale, jnp.float32), x.shape, spec, 'scale')
  if zero_point is not None:
    zero_point = _expand(jnp.asarray(zero_point), x.shape, spec, 'zero_point')
  return codec.encode(x, scale, zero_point, spec)


@functools.partial(jax.jit, static_argnames='spec')
def decode(
  codes: jax.Array,
  scale: jax.Array,
  zero_point: jax.Array | None,
  spec: QuantSpec,
) -> jax.Array:
  """Values of unpacked codes, float32; shapes and errors as for `encode`."""
  _check_zero_point('decode', zero_point, spec)
  codes = jnp.asarray(codes)
  scale = _expand(jnp.asarray(scale, jnp.float32), codes.shape, spec, 'scale')
  if zero_point is not None:
    zero_point = _expand(
      jnp.asarray(zero_point), codes.shape, spec, 'zero_point'
    )
  return codec.decode(codes, scale, zero_point, spec)


@functools.partial(jax.jit, static_argnames='spec')
def from_codes(
  codes: jax.Array,
  scale: jax.Array,
  zero_point: jax.Array | None,
  spec: QuantSpec,
  *,
  tensor_scale: jax.Array | None = None,
) -> QArray:
  """QArray of unpacked codes (..., K, N) as `encode` returns them.

  Args:
    codes: of spec.code_dtype.
    scale: effective step, (..., *scale_shape); rounded to what is stored,
      which changes nothing if it came from find_params.
    zero_point: shaped as scale if the spec is asymmetric, else None.
    spec: static.
    tensor_scale: nvfp4: what find_params was given, (..., 1, 1). None takes
      max(scale) / 448, which is exact if all scales are of one find_params
      call without search.

  Raises:
    ValueError: scale or zero_point does not fit codes or spec.
  """
  _check_zero_point('from_codes', zero_point, spec)
  _check_scale('from_codes', codes.shape, scale, zero_point, spec)
  stored, outer = codec.store_scale(scale, spec, tensor_scale)
  zero = (
    None if zero_point is None else codec.store_zero_point(zero_point, spec)
  )
  return _assemble(codes, (stored, zero, outer), spec)


def codes(q: QArray) -> jax.Array:
  """Unpacked codes (..., K, N) of spec.code_dtype."""
  return q.unpacked()


def effective_scale(q: QArray) -> jax.Array:
  """The float32 step of each slice, tensor scale included."""
  return codec.load_scale(q.scale, q.tensor_scale, q.spec)


def nbytes(q: QArray) -> int:
  """Bytes of all leaves, metadata included."""
  leaves = jax.tree.leaves(q)
  return sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in leaves)


def bits_per_weight(q: QArray) -> float:
  """Stored bits per logical element, all metadata counted."""
  return 8 * nbytes(q) / math.prod(q.scale.shape[:-2] + tuple(q.shape))


def validate(q: QArray) -> None:
  """Checks the invariants listed in QArray's docstring.

  Raises:
    ValueError: naming the leaf, what it is and what it should be.
  """
  K, N = q.shape
  spec, lead = q.spec, tuple(q.qvalue.shape[:-2])
  per_matrix = scale_shape((K, N), spec)
  rows = K * spec.bits // 8 if q.is_packed else K
  expected = {
    'qvalue': ((rows, N), 'uint8' if q.is_packed else spec.code_dtype),
    'scale': (per_matrix, spec.stored_scale_dtype),
    'zero_point': None if spec.symmetric else (per_matrix, 'uint8'),
    'tensor_scale': ((1, 1), 'float32') if spec.dtype == 'nvfp4' else None,
  }
  for name, per_leaf in expected.items():
    leaf = getattr(q, name)
    if leaf is None and per_leaf is None:
      continue
    want = per_leaf and (lead + per_leaf[0], per_leaf[1])
    have = None
    if leaf is not None:
      have = (tuple(leaf.shape), jnp.dtype(leaf.dtype).name)
    if have != want:
      raise ValueError(
        f'qarray.validate: {name} is {_describe(have)}; for shape={q.shape} '
        f'and {spec.dtype}/{spec.granularity} it must be {_describe(want)}. '
        'Build the QArray with quantize or from_codes.'
      )


def _describe(leaf):
  return 'None' if leaf is None else f'{leaf[1]} {leaf[0]}'


def _tile(K, spec):
  return packing.tile_rows(K, spec.group_size)


def _quantize(x, spec, scale, zero_point, search):
  """-> codes, (stored scale, zero point, tensor scale)."""
  x = _as_matrix(x, 'quantize')
  if scale is None:
    if zero_point is not None:
      raise ValueError(
        'qarray.quantize: zero_point without scale; they belong together. Give '
        'both or neither.'
      )
    outer = codec.tensor_scale(x, spec) if spec.dtype == 'nvfp4' else None
    scale, zero = find_params(x, spec, search, tensor_scale=outer)
  else:
    _check_zero_point('quantize', zero_point, spec)
    _check_scale('quantize', x.shape, scale, zero_point, spec)
    outer = None
    zero = (
      None if zero_point is None else codec.store_zero_point(zero_point, spec)
    )
  stored, outer = codec.store_scale(scale, spec, outer)
  codes_ = encode(x, codec.load_scale(stored, outer, spec), zero, spec)
  return codes_, (stored, zero, outer)


def _assemble(codes_, params, spec):
  stored, zero, outer = params
  K, N = codes_.shape[-2:]
  tile = _tile(K, spec)
  if packing.packable(spec.bits, tile):
    if spec.dtype == 'binary':
      codes_ = (codes_ > 0).astype(jnp.uint8)
    else:
      codes_ = lax.bitcast_convert_type(codes_, jnp.uint8)
      codes_ &= 2**spec.bits - 1
    codes_ = packing.pack(codes_, spec.bits, tile)
  return QArray(
    qvalue=codes_,
    scale=stored,
    zero_point=zero,
    tensor_scale=outer,
    spec=spec,
    shape=(K, N),
  )


def _expand(param, shape, spec, name):
  """param so that it broadcasts, rank kept, against an array of `shape`."""
  if param.ndim == 0:
    return param.reshape((1,) * len(shape))
  fits = [a in (1, b) for a, b in zip(param.shape, shape, strict=False)]
  if param.ndim == len(shape):
    if all(fits):
      return param
    groups = param.shape[-2] if param.ndim >= 2 else 0
    others = fits[:-2] + fits[-1:]
    grouped = groups * spec.group_size == shape[-2] if groups else False
    if spec.granularity == 'group' and grouped and all(others):
      G = spec.group_size
      wide = param.shape[:-1] + (G,) + param.shape[-1:]
      param = jnp.broadcast_to(param[..., None, :], wide)
      return param.reshape(*wide[:-3], groups * G, wide[-1])
  raise ValueError(
    f'qarray: {name} has shape {param.shape}, the array {tuple(shape)}; each '
    'axis must be 1 or the same (or K / group_size at axis -2). Take it from '
    'find_params, or index it as the array was indexed.'
  )


def _as_matrix(x, name):
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(
      f'qarray.{name}: x is {x.dtype}; it must be floating. Cast it to float32.'
    )
  if x.ndim < 2:
    raise ValueError(
      f'qarray.{name}: x has shape {x.shape}; it needs the axes (K, N). Add '
      'one with x[None] or x[:, None].'
    )
  return x.astype(jnp.float32)


def _check_groups(K, group_size):
  if K % group_size:
    fits = [g for g in (128, 64, 32, 16) if K % g == 0]
    padded = -(-K // group_size) * group_size
    use = f'Use {fits[0]}, or pad K' if fits else 'Pad K'
    raise ValueError(
      f'qarray: K={K}, group_size={group_size}; K must be a multiple of '
      f'group_size. {use} to {padded}.'
    )


def _check_scale(name, shape, scale, zero_point, spec):
  want = tuple(shape[:-2]) + scale_shape(tuple(shape[-2:]), spec)
  for label, leaf in (('scale', scale), ('zero_point', zero_point)):
    if leaf is not None and jnp.shape(leaf) != want:
      raise ValueError(
        f'qarray.{name}: {label} has shape {jnp.shape(leaf)}, the array '
        f'{tuple(shape)}; granularity {spec.granularity!r} needs {want}. '
        'Reshape or broadcast it to that.'
      )


def _check_zero_point(name, zero_point, spec):
  if (zero_point is None) != spec.symmetric:
    given = 'no zero_point' if zero_point is None else 'a zero_point'
    fix = 'Leave it out' if spec.symmetric else 'Give it with the scale'
    raise ValueError(
      f'qarray.{name}: {given} for a spec with symmetric={spec.symmetric}; '
      f'only asymmetric specs have one. {fix}.'
    )


@jax.custom_jvp
def _straight_through(x, y):
  """y, with the derivative of x."""
  del x
  return y


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
  return primals[1], tangents[0]
