"""PackedArray: a QArray laid out for the kernels of a Hopper GPU.

The stored layout is one for all platforms; wgmma wants another, and no kernel
has the time to change it (pallas_kernels/hopper.py):

  words  for kernels that unpack 8, 4 or 2 bits in registers
  rows   for those that multiply 8-bit codes as they are

Both hold the same codes, no more and no fewer bytes, and go back to the stored
layout to the bit. A PackedArray is a QArray to all that asks for its values or
codes; what writes checkpoints knows no such type and refuses it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxq.numerics import packing, qarray
from pallas_kernels import hopper, planar

LAYOUTS = ('rows', 'words')


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('qvalue', 'scale', 'zero_point', 'tensor_scale'),
  meta_fields=('spec', 'shape'),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedArray(qarray.QArray):
  """A QArray but for its third invariant: what qvalue is.

  Attributes:
    qvalue: words (*L, N/64, K/kt, 64, 16) int32, or rows (*L, N/64, 64, K) of
      8 bits.
  """

  @property
  def layout(self) -> str:
    """'rows' or 'words'."""
    axes = self.qvalue.ndim - self.scale.ndim + 2  # Of one matrix.
    return 'rows' if axes == 3 else 'words'

  def unpacked(self) -> jax.Array:
    """Codes (*L, K, N)."""
    codes_of = functools.partial(hopper.codes_of, layout=planar_of(self))
    return _stacked(codes_of, self.scale.ndim - 2)(self.qvalue)

  def partition(self, rows: Any, columns: Any) -> 'PackedArray':
    """How it is sharded where its matrix is over (rows, columns)."""
    matrix: Any = PartitionSpec(rows, columns)
    packed: Any = PartitionSpec(columns, rows, None, None)
    if self.layout == 'rows':
      packed = PartitionSpec(columns, None, rows)
    return dataclasses.replace(
      self,
      qvalue=packed,
      scale=matrix,
      zero_point=None if self.zero_point is None else matrix,
    )

  @property
  def unit(self) -> tuple[int, int]:
    """Rows and columns that a shard holds multiples of."""
    group = max(self.spec.group_size, 1)
    if self.layout == 'rows':
      return group, hopper.COLUMNS
    return max(group, hopper.tile_rows(self.spec.bits)), hopper.COLUMNS


def planar_of(q: qarray.QArray) -> planar.Planar:
  """The stored layout of one of its matrices, as kernels call it."""
  return planar.Planar(
    bits=q.spec.bits,
    K=q.shape[0],
    group_size=q.spec.group_size,
    signed=q.spec.symmetric and q.spec.bits > 1,
  )


def pack(q: qarray.QArray, layout: str) -> PackedArray:
  """The QArray (*L, K, N) in `layout`, one of LAYOUTS.

  Raises:
    ValueError: another layout, or K and N that its tiles do not divide.
    NotImplementedError: a width without words.
  """
  if layout not in LAYOUTS:
    raise ValueError(
      f'kernel_weight.pack: layout={layout!r}; allowed {sorted(LAYOUTS)}. Use '
      'one of them.'
    )
  f = hopper.pack_words if layout == 'words' else hopper.pack_rows
  packed = _stacked(functools.partial(f, layout=planar_of(q)), q.scale.ndim - 2)
  qvalue = jax.jit(packed)(jnp.asarray(q.qvalue))
  return PackedArray(**{**_fields(q), 'qvalue': qvalue})


def unpack(w: PackedArray) -> qarray.QArray:
  """The QArray that was packed, to the bit."""
  qvalue = jax.jit(_stored)(w)
  return qarray.QArray(**{**_fields(w), 'qvalue': qvalue})


def _stored(w: PackedArray) -> jax.Array:
  """Codes as a QArray stores them."""
  codes = w.unpacked()
  if not w.is_packed:
    return codes
  codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
  codes = codes & jnp.uint8(2**w.spec.bits - 1)
  tile = packing.tile_rows(w.shape[0], w.spec.group_size)
  return packing.pack(codes, w.spec.bits, tile)


def _stacked(f: Any, axes: int) -> Any:
  """f under as many vmaps."""
  for _ in range(axes):
    f = jax.vmap(f)
  return f


def _fields(q: qarray.QArray) -> dict[str, Any]:
  return {f.name: getattr(q, f.name) for f in dataclasses.fields(q)}
