"""nearest_center: for every row, the centers of the best scores.

  score[n, k] = sum_d x[n, d] c[k, d] + bias[k]
  values[n, t], indices[n, t] = the t-th best of score[n, :]

With unit rows the score is the cosine; with `distance_bias` its best center is
the nearest one. Serves ToMe, VisionZip, VQToken and EmbedLens. Bytes that must
move: (N + K) D bytes + 8 N top; the plain form moves 8 N K more.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import compat, targets
from pallas_kernels.nearest_center import base, pallas_mosaic_tpu

IMPLEMENTATIONS = ('pallas_mosaic_tpu', 'xla')
_OP = 'nearest_center'
_TABLE_BYTES = 2**20  # Of scores, that need no kernel to stay on the chip.
_DTYPES = ('bfloat16', 'float16', 'float32')


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
  """What of a call is static."""

  top: int
  implementation: str
  chip: str
  block: pallas_mosaic_tpu.Block | None
  interpret: bool


def nearest_center(
  x: jax.Array,
  c: jax.Array,
  *,
  top: int = 1,
  bias: jax.Array | None = None,
  implementation: str | None = None,
  chip: str | None = None,
  block: pallas_mosaic_tpu.Block | None = None,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """x (..., N, D), c (K, D) -> values, indices (..., N, top).

  Values are float32 and descend; of equal ones the lowest index comes first.
  Differentiable with respect to x, c and bias through the values, at the
  centers that were found.

  Args:
    x: rows, floating.
    c: centers, of x's dtype: (K, D) for all rows, or (..., K, D) with the
      leading axes of x.
    top: ranks, 1 <= top <= K.
    bias: added to the scores of a center, floating: (K,), or (..., K) if c has
      leading axes. -inf leaves a center out; with all of them out the values
      are -inf and the indices 0, 1, ...
    implementation: one of IMPLEMENTATIONS, or None for what `choose` says.
    chip: the TPU compiled for; None: the one at hand.
    block: of the TPU form; None: by rule.
    interpret: runs the kernel in Pallas's interpreter.

  Raises:
    TypeError, ValueError: arguments that do not fit each other.
    NotImplementedError: the implementation that was named cannot serve.
  """
  _check(x, c, top, bias)
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f'{_OP}: implementation={implementation!r}; allowed '
      f'{sorted(IMPLEMENTATIONS)} or None. Use one of them.'
    )
  chip = chip or targets.current()
  call = _Call(
    top=top,
    implementation=implementation or choose(x, c, top=top, chip=chip),
    chip=chip,
    block=block,
    interpret=interpret,
  )
  f = functools.partial(_nearest, call)
  if c.ndim == 2:
    values, indices = f(x.reshape(-1, x.shape[-1]), c, bias)
    shape = (*x.shape[:-1], top)
    return values.reshape(shape), indices.reshape(shape)
  for _ in x.shape[:-2]:
    f = jax.vmap(f)
  return f(x, c, bias)


def distance_bias(c: jax.Array) -> jax.Array:
  """c (..., K, D) -> (..., K) float32: the bias that ranks by distance.

  With b_k = -|c_k|^2 / 2, twice the value less |x|^2 is -|x - c_k|^2.
  """
  return -0.5 * jnp.sum(jnp.square(c.astype(jnp.float32)), axis=-1)


def choose(x: Any, c: Any, *, top: int = 1, chip: str | None = None) -> str:
  """The name of the implementation that None stands for.

  The kernel where it serves, XLA is not to partition it, and the table of the
  scores is more than what XLA keeps on the chip in any case; else 'xla'.
  """
  if pallas_mosaic_tpu.why_not(x, c, top, chip or targets.current()):
    return 'xla'
  if 4 * x.shape[-2] * c.shape[-2] < _TABLE_BYTES:
    return 'xla'
  return 'xla' if compat.is_partitioned() else 'pallas_mosaic_tpu'


def _check(x, c, top, bias):
  if x.ndim < 2 or 0 in x.shape:
    raise ValueError(
      f'{_OP}: x has shape {x.shape}; it needs the axes (..., N, D), none of '
      'them empty. Leave the call out where there are no rows.'
    )
  shared = c.ndim == 2
  leading = () if shared else x.shape[:-2]
  K, D = c.shape[-2:] if c.ndim >= 2 else (0, 0)
  if x.shape[-1] != D or c.shape[:-2] != leading or K < 1:
    raise ValueError(
      f'{_OP}: c has shape {c.shape}, x {x.shape}; allowed (K, D), or (..., K, '
      "D) with x's leading axes, K at least 1. Reshape it."
    )
  if x.dtype != c.dtype or x.dtype.name not in _DTYPES:
    raise TypeError(
      f'{_OP}: x is {x.dtype} and c is {c.dtype}; both must be the same of '
      f'{sorted(_DTYPES)}. Cast them.'
    )
  if not 1 <= top <= K:
    raise ValueError(
      f'{_OP}: top={top} of K={K} centers; allowed 1 to K. Ask for no more '
      'ranks than there are centers.'
    )
  if bias is not None and bias.shape != (*leading, K):
    raise ValueError(
      f'{_OP}: bias has shape {bias.shape}; c {c.shape} needs '
      f'{(*leading, K)}. Reshape it.'
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nearest(call, x, c, bias):
  """x (N, D), c (K, D), bias (K,) -> values, indices (N, top)."""
  if call.implementation == 'xla':
    return base.nearest_center(x, c, bias, call.top)
  return pallas_mosaic_tpu.nearest_center(
    x,
    c,
    bias,
    call.top,
    chip=call.chip,
    block=call.block,
    interpret=call.interpret,
  )


def _forward(call, x, c, bias):
  values, indices = _nearest(call, x, c, bias)
  return (values, indices), (x, c, bias, indices)


def _backward(call, residuals, g):
  """d value[n, t] is x[n] dc[index] + dx[n] c[index] + dbias[index]."""
  del call
  x, c, bias, indices = residuals
  dv = g[0]  # (N, top)
  found = c.astype(jnp.float32)[indices]  # (N, top, D)
  dx = jnp.einsum('nt,ntd->nd', dv, found).astype(x.dtype)
  pull = dv[..., None] * x.astype(jnp.float32)[:, None]  # (N, top, D)
  dc = jnp.zeros(c.shape, jnp.float32).at[indices].add(pull).astype(c.dtype)
  if bias is None:
    return dx, dc, None
  db = jnp.zeros(bias.shape, jnp.float32).at[indices].add(dv)
  return dx, dc, db.astype(bias.dtype)


_nearest.defvjp(_forward, _backward)
