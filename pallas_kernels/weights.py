"""Arguments that stand for a quantized weight, checked; and its float values.

A weight of the kernels is `qvalue`, `scale` and maybe `zero_point`, plain
arrays as jaxq.numerics.qarray stores them: W = (code - zero_point) * scale,
with one scale per column or per `group_size` rows of a column. `qvalue` may
also be packed for Hopper (hopper.py); it then stands for what was packed.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import hopper, planar

SCALE_DTYPES = ('bfloat16', 'float16', 'float32')
FP8 = ('float8_e4m3fn', 'float8_e5m2')


def check(
  op: str,
  x: jax.Array,
  qvalue: jax.Array,
  scale: jax.Array,
  zero_point: jax.Array | None,
  *,
  bits: int,
  group_size: int,
) -> planar.Planar:
  """The layout of a weight that fits x (..., K).

  Args:
    op: the operation's name, for messages.
    x: left side; its last axis is K.
    qvalue: codes; packed planar below 8 bits, or for Hopper.
    scale: (1, N), or (K / group_size, N).
    zero_point: uint8 as scale, or None.
    bits: 1, 2, 4 or 8.
    group_size: rows sharing a scale; -1 for all.

  Raises:
    TypeError: a dtype that no such weight has.
    ValueError: shapes that do not fit each other.
    NotImplementedError: a width that no kernel has.
  """
  if x.ndim < 2 or 0 in x.shape:
    raise ValueError(
      f'{op}: x has shape {x.shape}; it needs the axes (..., M, K), none of '
      'them empty. Leave the call out where there are no rows.'
    )
  if bits not in planar.BITS:
    raise NotImplementedError(
      f'{op}: bits={bits}; allowed {list(planar.BITS)}. Dequantize other '
      'widths and multiply.'
    )
  K = x.shape[-1]
  stored: Any = qvalue
  if hopper.is_packed(qvalue):
    stored = hopper.stored(qvalue, bits, zero_point is None)
  elif qvalue.ndim != 2:
    raise ValueError(
      f'{op}: qvalue has shape {qvalue.shape}; it must be (rows, N). Use '
      'jax.vmap over stacked weights.'
    )
  if group_size != -1 and (group_size < 1 or K % group_size):
    raise ValueError(
      f'{op}: K={K}, group_size={group_size}; group_size must divide K, or be '
      '-1 for one scale per column. Use a divisor of K.'
    )
  signed = zero_point is None and bits > 1
  layout = planar.Planar(bits=bits, K=K, group_size=group_size, signed=signed)
  _check_qvalue(op, stored, layout)
  _check_scale(op, scale, zero_point, layout, stored.shape[-1])
  return layout


def codes(qvalue: jax.Array, layout: planar.Planar) -> jax.Array:
  """(K, N) codes of a weight as stored, or packed for Hopper."""
  if qvalue.ndim == 2:
    return planar.unpack(qvalue, layout)
  return hopper.codes_of(qvalue, layout)


def dequantize(
  qvalue: jax.Array,
  scale: jax.Array,
  zero_point: jax.Array | None,
  layout: planar.Planar,
) -> jax.Array:
  """(K, N) float32: (code - zero_point) * scale."""
  w = codes(qvalue, layout).astype(jnp.float32)
  if zero_point is not None:
    w = w - _rows(zero_point.astype(jnp.float32), layout)
  return w * _rows(scale.astype(jnp.float32), layout)


def _rows(param, layout):
  """(1, N) or (K/G, N) -> so that it broadcasts against (K, N)."""
  if layout.group_size < 0:
    return param
  return jnp.repeat(param, layout.group_size, axis=0)


def _check_qvalue(op, qvalue, layout):
  rows = layout.rows if layout.is_packed else layout.K
  given = f'{op}: qvalue is {qvalue.dtype} {qvalue.shape}, x has K={layout.K}'
  if qvalue.shape[0] != rows:
    how = f'bits={layout.bits}'
    if layout.is_packed:
      how += (
        f' packed in tiles of {layout.tile} rows (jaxq.numerics.packing), so '
        'without gaps between them'
      )
    raise ValueError(
      f'{given}; {how}, it must have {rows} rows. Give the weight of this '
      'layer, packed so.'
    )
  dtypes: tuple[str, ...] = ('int8', 'uint8')
  if layout.is_packed:
    dtypes = ('uint8',)
  if layout.bits == 8:
    dtypes = ('int8', *FP8) if layout.signed else ('uint8',)
  if qvalue.dtype.name not in dtypes:
    raise TypeError(
      f'{given}; for bits={layout.bits} '
      f'{"without" if layout.signed else "with"} unsigned codes it must be one '
      f'of {sorted(dtypes)}. Take it from a QArray of that spec.'
    )


def _check_scale(op, scale, zero_point, layout, N):
  groups = 1 if layout.group_size < 0 else layout.K // layout.group_size
  for name, param, dtypes in (
    ('scale', scale, SCALE_DTYPES),
    ('zero_point', zero_point, ('uint8',)),
  ):
    if param is None:
      continue
    if param.shape != (groups, N):
      raise ValueError(
        f'{op}: {name} has shape {param.shape}; K={layout.K}, N={N} and '
        f'group_size={layout.group_size} need {(groups, N)}. Broadcast or '
        'reshape it to that.'
      )
    if param.dtype.name not in dtypes:
      raise TypeError(
        f'{op}: {name} is {param.dtype}; allowed {sorted(dtypes)}. Cast it.'
      )
