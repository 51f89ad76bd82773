"""hadamard_quantize: rotates blocks of channels and quantizes rows.

Bytes that must move: 3 M K for bfloat16 x; h multiply-adds an element, which a
matrix unit does far within the time of its bytes.
"""

from typing import Any

import jax

from pallas_kernels import compat, rows, targets
from pallas_kernels.hadamard_quantize import (
  base,
  pallas_mosaic_gpu,
  pallas_mosaic_tpu,
)

IMPLEMENTATIONS = ('pallas_mosaic_gpu', 'pallas_mosaic_tpu', 'xla')
_OP = 'hadamard_quantize'
_KERNELS = {
  'pallas_mosaic_gpu': pallas_mosaic_gpu,
  'pallas_mosaic_tpu': pallas_mosaic_tpu,
}


def hadamard_quantize(
  x: jax.Array,
  *,
  block: int,
  x_format: str = 'int8',
  implementation: str | None = None,
  chip: str | None = None,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """x (..., K) @ H / sqrt(block), by blocks -> codes (..., K), scale (..., 1).

  Args:
    x: floating.
    block: h, a power of two that divides K.
    x_format: a key of rows.QMAX.
    implementation: one of IMPLEMENTATIONS, or None for what `choose` says.
    chip: the one compiled for; None: the one at hand.
    interpret: runs the kernel in Pallas's interpreter.

  Raises:
    ValueError: arguments that do not fit each other.
    NotImplementedError: the implementation that was named cannot serve.
  """
  K = x.shape[-1]
  if x.ndim < 2 or 0 in x.shape:
    raise ValueError(
      f'{_OP}: x has shape {x.shape}; it needs the axes (..., M, K), none of '
      'them empty. Leave the call out where there are no rows.'
    )
  if block < 1 or block & (block - 1) or K % block:
    raise ValueError(
      f'{_OP}: block={block}, K={K}; block must be a power of two that divides '
      f'K. Use at most {K & -K}.'
    )
  if x_format not in rows.QMAX:
    raise ValueError(
      f'{_OP}: x_format={x_format!r}; allowed {sorted(rows.QMAX)}. Use one of '
      'them.'
    )
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f'{_OP}: implementation={implementation!r}; allowed '
      f'{sorted(IMPLEMENTATIONS)} or None. Use one of them.'
    )
  chip = chip or targets.current()
  flat = x.reshape(-1, K)
  name = implementation or choose(x, block, chip)
  if name == 'xla':
    codes, scale = base.hadamard_quantize(flat, block, x_format)
  else:
    kernel: Any = _KERNELS[name]
    codes, scale = kernel.hadamard_quantize(
      flat, block, x_format, chip=chip, interpret=interpret
    )
  return codes.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)


def choose(x: Any, block: int, chip: str | None = None) -> str:
  """The name of the implementation that None stands for.

  The kernel where it serves and XLA is not to partition it, else 'xla'.
  """
  chip = chip or targets.current()
  for name, kernel in _KERNELS.items():
    if not kernel.why_not(x, block, chip):
      return 'xla' if compat.is_partitioned() else name
  return 'xla'
