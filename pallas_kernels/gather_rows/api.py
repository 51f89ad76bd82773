"""gather_rows: rows by index, times a scale, zeros where the index is none.

  y[r] = scale[r] * x[index[r]]     0 where index[r] is not one of x's rows

What every selector of tokens and every compaction of a cache ends with. Bytes
that must move: those of the rows that are kept, twice, and 4 R.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import compat, targets
from pallas_kernels.gather_rows import base, pallas_mosaic_tpu

IMPLEMENTATIONS = ('pallas_mosaic_tpu', 'xla')
_OP = 'gather_rows'


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
  """What of a call is static; N is the rows of x."""

  N: int
  implementation: str
  chip: str
  interpret: bool


def gather_rows(
  x: jax.Array,
  index: jax.Array,
  scale: jax.Array | None = None,
  *,
  implementation: str | None = None,
  chip: str | None = None,
  interpret: bool = False,
) -> jax.Array:
  """x (..., N, D), index (..., R) -> (..., R, D) of x's dtype.

  Without a scale the rows are copied to the bit. Differentiable with respect to
  x and scale; rows that were taken twice add up.

  Args:
    x: rows; floating where there is a scale.
    index: int32; -1, or any that is not in [0, N), gives a row of zeros.
    scale: (..., R) floating, or None; multiplied in float32.
    implementation: one of IMPLEMENTATIONS, or None for what `choose` says.
    chip: the TPU compiled for; None: the one at hand.
    interpret: runs the kernel in Pallas's interpreter.

  Raises:
    TypeError, ValueError: arguments that do not fit each other.
    NotImplementedError: the implementation that was named cannot serve.
  """
  _check(x, index, scale)
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f'{_OP}: implementation={implementation!r}; allowed '
      f'{sorted(IMPLEMENTATIONS)} or None. Use one of them.'
    )
  N, D = x.shape[-2:]
  B, R = x.size // (N * D), index.shape[-1]
  chip = chip or targets.current()
  call = _Call(
    N=N,
    implementation=implementation or choose(x, index, chip),
    chip=chip,
    interpret=interpret,
  )
  y = _gather(
    call,
    x.reshape(B, N, D),
    index.reshape(B, R),
    None if scale is None else scale.reshape(B, R),
  )
  return y.reshape(*index.shape, D)


def choose(x: Any, index: Any, chip: str | None = None) -> str:
  """The name of the implementation that None stands for.

  The kernel where it serves and XLA is not to partition it, else 'xla'.
  """
  if pallas_mosaic_tpu.why_not(x, index, chip or targets.current()):
    return 'xla'
  return 'xla' if compat.is_partitioned() else 'pallas_mosaic_tpu'


def _check(x, index, scale):
  if x.ndim < 2 or 0 in x.shape:
    raise ValueError(
      f'{_OP}: x has shape {x.shape}; it needs the axes (..., N, D), none of '
      'them empty. Leave the call out where there are no rows.'
    )
  if index.shape[:-1] != x.shape[:-2] or index.ndim < 1 or 0 in index.shape:
    raise ValueError(
      f'{_OP}: index has shape {index.shape}, x {x.shape}; allowed '
      f'{(*x.shape[:-2], "R")}, R at least 1. Reshape it.'
    )
  if index.dtype != jnp.int32:
    raise TypeError(
      f'{_OP}: index is {index.dtype}; it must be int32. Cast it.'
    )
  if scale is None:
    return
  if scale.shape != index.shape:
    raise ValueError(
      f'{_OP}: scale has shape {scale.shape}; index {index.shape} needs the '
      'same. Reshape it.'
    )
  for name, array in (('x', x), ('scale', scale)):
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise TypeError(
        f'{_OP}: {name} is {array.dtype}; with a scale it must be floating. '
        'Cast it, or leave the scale out.'
      )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(call, x, index, scale):
  """x (B, N, D), index (B, R), scale (B, R) -> (B, R, D)."""
  if call.implementation == 'xla':
    return jax.vmap(base.gather_rows)(x, index, scale)
  return pallas_mosaic_tpu.gather_rows(
    x, index, scale, chip=call.chip, interpret=call.interpret
  )


def _forward(call, x, index, scale):
  kept = x if scale is not None else None  # For the scale's gradient alone.
  like = jnp.zeros((), x.dtype)  # Its dtype, as a residual may hold it.
  return _gather(call, x, index, scale), (kept, like, index, scale)


def _backward(call, residuals, g):
  x, like, index, scale = residuals
  g = g.astype(jnp.float32)
  no_index = compat.no_cotangent(index)
  pull = g if scale is None else g * scale.astype(jnp.float32)[..., None]
  dx = jax.vmap(functools.partial(base.scatter_rows, N=call.N))(pull, index)
  if scale is None:
    return dx.astype(like.dtype), no_index, None
  rows = jax.vmap(base.gather_rows, (0, 0, None))(x, index, None)
  ds = jnp.sum(g * rows.astype(jnp.float32), axis=-1).astype(scale.dtype)
  return dx.astype(like.dtype), no_index, ds


_gather.defvjp(_forward, _backward)
