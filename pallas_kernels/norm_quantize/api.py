"""norm_quantize: RMSNorm or LayerNorm, and codes of what it gives.

Bytes that must move: (x bytes + 1) M K; a norm that is stored and quantized
afterwards moves 2 M K (x bytes) more, and reads rows twice for their absmax.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import compat, rows, targets
from pallas_kernels.norm_quantize import (
  base,
  pallas_mosaic_gpu,
  pallas_mosaic_tpu,
)

IMPLEMENTATIONS = ('pallas_mosaic_gpu', 'pallas_mosaic_tpu', 'xla')
_OP = 'norm_quantize'
_KERNELS = {
  'pallas_mosaic_gpu': pallas_mosaic_gpu,
  'pallas_mosaic_tpu': pallas_mosaic_tpu,
}


def norm_quantize(
  x: jax.Array,
  weight: jax.Array,
  bias: jax.Array | None = None,
  *,
  kind: str = 'rms',
  eps: float = 1e-5,
  x_format: str = 'int8',
  scale: jax.Array | None = None,
  gather: jax.Array | None = None,
  offset: jax.Array | None = None,
  narrow: bool = True,
  implementation: str | None = None,
  chip: str | None = None,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
  """x (..., K) -> codes (..., K + S), and their scale (..., 1) or None.

  Args:
    x: floating.
    weight, bias: (K,), of the norm.
    kind: 'rms' or 'layer'.
    eps: added to the mean square.
    x_format: a key of rows.QMAX.
    scale: static steps: (1,) one in all, or (K,) one per channel; None: one per
      row, taken here and returned.
    gather: (S,) int32, with static steps: channels whose copies follow the K;
      K stands for a column of zeros. None: S = 0.
    offset: (K + S,), in steps, added before the rounding; None: 0.
    narrow: whether integers stop at -qmax, not at -qmax - 1, with static steps.
    implementation: one of IMPLEMENTATIONS, or None for what `choose` says.
    chip: the one compiled for; None: the one at hand.
    interpret: runs the kernel in Pallas's interpreter.

  Raises:
    ValueError: arguments that do not fit each other.
    NotImplementedError: the implementation that was named cannot serve.
  """
  K = _check(x, kind, x_format)
  _check_static(scale, gather, offset, K)
  for name, leaf, allowed in (
    ('weight', weight, [(K,)]),
    ('bias', bias, [(K,)]),
    ('scale', scale, [(1,), (K,)]),
  ):
    if leaf is not None and leaf.shape not in allowed:
      raise ValueError(
        f'{_OP}: {name} has shape {leaf.shape}, x has K={K}; allowed '
        f'{allowed}. Reshape it.'
      )
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f'{_OP}: implementation={implementation!r}; allowed '
      f'{sorted(IMPLEMENTATIONS)} or None. Use one of them.'
    )
  chip = chip or targets.current()
  inverse = 1.0 if scale is None else 1.0 / scale.astype(jnp.float32)[None]
  weight = weight.astype(jnp.float32)[None] * inverse
  bias = (
    jnp.zeros_like(weight)
    if bias is None
    else (bias.astype(jnp.float32)[None] * inverse)
  )
  if gather is not None:
    weight, bias = (
      jnp.concatenate([leaf, _taken(leaf, gather)], axis=1)
      for leaf in (weight, bias)
    )
  if offset is not None:
    bias = bias + offset.astype(jnp.float32)[None]
  flat, static = x.reshape(-1, K), scale is not None
  args: Any = (flat, weight, bias, kind, eps, x_format, not static)
  args += (gather, narrow)
  copies = 0 if gather is None else gather.shape[0]
  name = implementation or choose(x, chip, copies)
  if name == 'xla':
    codes, steps = base.norm_quantize(*args)
  else:
    kernel: Any = _KERNELS[name]
    codes, steps = kernel.norm_quantize(*args, chip=chip, interpret=interpret)
  if steps is not None:
    steps = steps.reshape(*x.shape[:-1], 1)
  return codes.reshape(*x.shape[:-1], -1), steps


def choose(x: Any, chip: str | None = None, copies: int = 0) -> str:
  """The name of the implementation that None stands for.

  The kernel where it serves and XLA is not to partition it, else 'xla'.

  Args:
    x: array or ShapeDtypeStruct (..., K).
    chip: the one compiled for; None: the one at hand.
    copies: S, how many columns `gather` adds.
  """
  chip = chip or targets.current()
  for name, kernel in _KERNELS.items():
    if not kernel.why_not(x, chip, copies):
      return 'xla' if compat.is_partitioned() else name
  return 'xla'


def _check(x, kind, x_format):
  for name, value, allowed in (
    ('kind', kind, base.KINDS),
    ('x_format', x_format, rows.QMAX),
  ):
    if value not in allowed:
      raise ValueError(
        f'{_OP}: {name}={value!r}; allowed {sorted(allowed)}. Use one of them.'
      )
  if x.ndim < 2 or 0 in x.shape:
    raise ValueError(
      f'{_OP}: x has shape {x.shape}; it needs the axes (..., M, K), none of '
      'them empty. Leave the call out where there are no rows.'
    )
  return x.shape[-1]


def _check_static(scale, gather, offset, K):
  if scale is None and not (gather is None and offset is None):
    raise ValueError(
      f'{_OP}: gather or offset without scale; copies are rounded with offsets '
      'of a static step. Give scale, ones (1,) where x comes in steps.'
    )
  if gather is not None and (gather.ndim != 1 or 0 in gather.shape):
    raise ValueError(
      f'{_OP}: gather has shape {gather.shape}; it needs (S,), S > 0. Leave it '
      'out where nothing is copied.'
    )
  width = K + (0 if gather is None else gather.shape[0])
  if offset is not None and offset.shape != (width,):
    raise ValueError(
      f'{_OP}: offset has shape {offset.shape}; K={K} and what is gathered '
      f'need {(width,)}. Reshape it.'
    )


def _taken(leaf, gather):
  """(1, K) -> (1, S); zeros for index K."""
  return jnp.take(leaf, gather, axis=1, mode='fill', fill_value=0)
