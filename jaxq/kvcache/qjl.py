"""QJL: keys as the signs of a random sketch.

Zandieh et al., 2024, https://arxiv.org/abs/2406.03482.

  stored   sign(S k), m bits, and |k|          S (m, D), a random sketch
  q k   ~  c / m |k| <S q, sign(S k)>          unbiased, no scale per group

A key needs nothing of its neighbours, and m may be any number: the error falls
as |q| |k| / sqrt(m). It grows with |k|, which a few channels make up; so in
each group of tokens the `outliers` channels of largest norm have signs and a
norm of their own, from the first rows of S, and q is cut in two as k is.

Rows of S are orthogonal within each D of them, of length sqrt(D): less variance
than with independent ones. Then c = 1 / E|s_1| of a point s on that sphere,
sqrt(pi / 2) (1 - 1 / 4D + ...); the paper's sqrt(pi / 2) is that of normal
rows. Values and the newest tokens are kept as KIVI keeps them.

Bits per key element: (m + m_out + 32) / D + 8 outliers / (g D); 2.77 at D = 128
and the defaults. Departures: one sketch for all layers and heads, and one m;
the published code has m = 512 in its first 15 layers.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxq.kvcache import interface, kivi, residual, stores

_ARRAYS = ('signs', 'norm', 'channels', 'outlier_signs', 'outlier_norm')


@dataclasses.dataclass(frozen=True, kw_only=True)
class QjlConfig:
  """Attributes.

  sketch: m, signs of a key. outlier_sketch: of its outlier channels, at most m.
  outliers: channels of a group that have signs of their own; 0: none.
  value_bits: 16 keeps values. group_size: tokens that share outlier channels,
    and channels of a value group, of those at most a head.
  residual: newest tokens in full precision, a multiple of group_size.
  seed: of S.
  """

  sketch: int = 256
  outlier_sketch: int = 64
  outliers: int = 8
  value_bits: int = 2
  group_size: int = 32
  residual: int = 128
  seed: int = 0

  def __post_init__(self):
    for name in ('sketch', 'outlier_sketch'):
      value = getattr(self, name)
      if value < 8 or value % 8:
        raise ValueError(
          f'qjl: {name}={value}; signs fill whole bytes. Give a multiple of 8, '
          'as 256.'
        )
    if self.outlier_sketch > self.sketch:
      raise ValueError(
        f'qjl: outlier_sketch={self.outlier_sketch}, sketch={self.sketch}; it '
        'is the first rows of it. Give at most as many.'
      )
    if self.outliers < 0:
      raise ValueError(
        f'qjl: outliers={self.outliers}; allowed 0 (none) or more.'
      )
    self._around()

  def _around(self) -> kivi.KiviConfig:
    """What keeps the values and the newest tokens."""
    return kivi.KiviConfig(
      bits=16,
      value_bits=self.value_bits,
      group_size=self.group_size,
      residual=self.residual,
    )

  def init(self, shape: interface.CacheShape) -> kivi.KiviCache:
    """An empty cache.

    Raises:
      ValueError: as many outliers as channels, or a head of more than a byte
        can count, or whose values cannot be grouped or packed.
    """
    D, o = shape.head_dim, self.outliers
    if o >= D or D > 256:
      raise ValueError(
        f'qjl: outliers={o} of head_dim={D}; fewer than the channels of a head '
        'are needed, and at most 256 of those. Lower outliers.'
      )
    slots = residual.slots_of(self.residual, shape.capacity)
    size = (shape.batch, slots, shape.kv_heads)
    groups = (shape.batch, slots // self.group_size, shape.kv_heads)
    norm = jnp.zeros((*size, 1), jnp.float16)
    signs = lambda rows: jnp.zeros((*size, rows // 8), jnp.uint8)
    k = SketchStore(
      signs=signs(self.sketch),
      norm=norm,
      channels=jnp.zeros((*groups, o), jnp.uint8) if o else None,
      outlier_signs=signs(self.outlier_sketch) if o else None,
      outlier_norm=jnp.zeros_like(norm) if o else None,
      group_size=self.group_size,
      head_dim=D,
      seed=self.seed,
    )
    return self._around().around(shape, k)


@flax.struct.dataclass
class SketchStore:
  """Keys by their signs.

  signs (B, S, Hkv, m / 8) uint8, planar; norm (B, S, Hkv, 1) float16. channels
  (B, S / group_size, Hkv, outliers) uint8, outlier_signs and outlier_norm as
  signs and norm: None without outliers.
  """

  signs: jax.Array
  norm: jax.Array
  channels: jax.Array | None
  outlier_signs: jax.Array | None
  outlier_norm: jax.Array | None
  group_size: int = flax.struct.field(pytree_node=False)
  head_dim: int = flax.struct.field(pytree_node=False)
  seed: int = flax.struct.field(pytree_node=False)

  @property
  def slots(self) -> int:
    """S."""
    return self.signs.shape[-3]

  def encode(self, x: jax.Array) -> 'SketchStore':
    """x (B, T, Hkv, D), T whole groups -> a store of these alone."""
    x = x.astype(jnp.float32)
    rows = self._sketch()
    if self.channels is None:
      signs, norm = _sketched(x, rows)
      return dataclasses.replace(self, signs=signs, norm=norm)
    B, T, Hkv, D = x.shape
    grouped = x.reshape(B, -1, self.group_size, Hkv, D)
    energy = jnp.sum(grouped**2, axis=2)  # (B, n, Hkv, D)
    _, channels = jax.lax.top_k(energy, self.channels.shape[-1])
    out = jnp.repeat(_mask(channels, D), self.group_size, axis=1)
    signs, norm = _sketched(jnp.where(out, 0.0, x), rows)
    of_out = rows[: self._outlier_rows]
    outlier_signs, outlier_norm = _sketched(jnp.where(out, x, 0.0), of_out)
    return dataclasses.replace(
      self,
      signs=signs,
      norm=norm,
      channels=channels.astype(jnp.uint8),
      outlier_signs=outlier_signs,
      outlier_norm=outlier_norm,
    )

  def put(
    self, encoded: 'SketchStore', slots: jax.Array, run: int = 1
  ) -> 'SketchStore':
    """Writes to slots (B, T), which lie in whole groups of tokens."""
    groups = slots[:, :: self.group_size] // self.group_size

    def write(name, a):
      new = getattr(encoded, name)
      if name == 'channels':
        return stores.write(a, new, groups, max(run // self.group_size, 1))
      return stores.write(a, new, slots, run)

    return self._mapped(write)

  def values(self, first: Any, size: int) -> jax.Array:
    """(B, size, Hkv, D) float32: the keys whose products `scores` gives."""
    part, rows = self._block(first, size), self._sketch()
    x = _restored(part.signs, part.norm, rows)
    if part.channels is None:
      return x
    out = jnp.repeat(
      _mask(part.channels, self.head_dim), self.group_size, axis=1
    )
    of_out = rows[: self._outlier_rows]
    outliers = _restored(part.outlier_signs, part.outlier_norm, of_out)
    return jnp.where(out, outliers, x)

  def scores(self, q: jax.Array, first: Any, size: int) -> jax.Array:
    """q (B, Hkv, G, T, D) -> (B, Hkv, G, T, size)."""
    part, rows = self._block(first, size), self._sketch()
    turned = jnp.einsum('bkgtd,md->bkgtm', q, rows)
    if part.channels is None:
      x = _unpacked(part.signs, part.norm, self.head_dim)
      return jnp.einsum('bkgtm,bskm->bkgts', turned, x)
    # What the outlier channels of each group add to S q: a few columns of S.
    channels = part.channels.transpose(0, 2, 1, 3).astype(jnp.int32)
    index = channels[:, :, :, None, None]  # (B, Hkv, n, 1, 1, outliers)
    own = jnp.take_along_axis(q[:, :, None], index, axis=-1)
    own = jnp.einsum('bkngto,bknom->bkngtm', own, rows.T[channels])
    few = self._outlier_rows

    def products(turned, signs, norm):  # One S q for each group.
      x = _unpacked(signs, norm, self.head_dim)
      x = x.reshape(x.shape[0], -1, self.group_size, *x.shape[2:])
      return jnp.einsum('bkngtm,bnikm->bkgtni', turned, x)

    out = products(turned[:, :, None] - own, part.signs, part.norm)
    out = out + products(own[..., :few], part.outlier_signs, part.outlier_norm)
    return out.reshape(*q.shape[:-1], size)

  @property
  def _outlier_rows(self) -> int:
    assert self.outlier_signs is not None
    return self.outlier_signs.shape[-1] * 8

  def _sketch(self) -> jax.Array:
    rows = sketch(self.signs.shape[-1] * 8, self.head_dim, self.seed)
    return jnp.asarray(rows)

  def _block(self, first, size) -> 'SketchStore':
    """A run of slots, whole groups, as a store."""
    g = self.group_size

    def cut(name, a):
      if name == 'channels':
        return stores.take(a, first // g, size // g)
      return stores.take(a, first, size)

    return self._mapped(cut)

  def _mapped(self, f) -> 'SketchStore':
    """The store of f(name, array) of the arrays that there are."""
    there = {name: getattr(self, name) for name in _ARRAYS}
    made = {name: f(name, a) for name, a in there.items() if a is not None}
    return dataclasses.replace(self, **made)


@functools.cache
def sketch(rows: int, D: int, seed: int) -> np.ndarray:
  """S (rows, D) float32; every D rows are orthogonal, of length sqrt(D)."""
  rng = np.random.default_rng(seed)
  blocks = []
  for _ in range(-(-rows // D)):
    q, r = np.linalg.qr(rng.normal(size=(D, D)))
    blocks.append(q.T * np.sign(np.diag(r))[:, None])  # Uniform rotations.
  out = np.concatenate(blocks)[:rows] * math.sqrt(D)
  return out.astype(np.float32)


def correction(D: int) -> float:
  """c = 1 / E|s_1| for s uniform on the sphere of radius sqrt(D)."""
  ratio = math.lgamma((D + 1) / 2) - math.lgamma(D / 2)
  return math.sqrt(math.pi / D) * math.exp(ratio)


def _sketched(x: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
  """x (B, T, Hkv, D) -> packed signs of S x, and |x| in float16."""
  positive = jnp.einsum('btkd,md->btkm', x, rows) >= 0
  norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
  return stores.pack(positive.astype(jnp.uint8), 1), norm.astype(jnp.float16)


def _unpacked(signs: Any, norm: Any, D: int) -> jax.Array:
  """c / m |k| sign(S k), (B, size, Hkv, m) float32."""
  m = signs.shape[-1] * 8
  bits = stores.unpack(signs, 1, m).astype(jnp.float32)
  return (2 * bits - 1) * (norm.astype(jnp.float32) * (correction(D) / m))


def _restored(signs: Any, norm: Any, rows: jax.Array) -> jax.Array:
  """(B, size, Hkv, D): what a sketched q multiplies, turned back."""
  x = _unpacked(signs, norm, rows.shape[-1])
  return jnp.einsum('btkm,md->btkd', x, rows)


def _mask(channels: jax.Array, D: int) -> jax.Array:
  """channels (B, n, Hkv, o) -> (B, n, Hkv, D) bool, true at these."""
  at = jnp.arange(D, dtype=jnp.int32).reshape(1, 1, 1, 1, D)
  return jnp.any(channels[..., None].astype(jnp.int32) == at, axis=-2)
