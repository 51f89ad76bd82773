"""norm_quantize: RMSNorm or LayerNorm, and codes of what it gives.

Bytes that must move: (x bytes + 1) M K; a norm that is stored and quantized
afterwards moves 2 M K (x bytes) more, and reads rows twice for their absmax.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import compat, rows, targets
from pallas_kernels.norm_quantize import base, pallas_mosaic_tpu

IMPLEMENTATIONS = ('pallas_mosaic_tpu', 'xla')
_OP = 'norm_quantize'


def norm_quantize(
  x: jax.Array,
  weight: jax.Array,
  bias: jax.Array | None = None,
  *,
  kind: str = 'rms',
  eps: float = 1e-5,
  x_format: str = 'int8',
  scale: jax.Array | None = None,
  implementation: str | None = None,
  chip: str | None = None,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
  """x (..., K) -> codes (..., K), and their scale (..., 1) or None.

  Args:
    x: floating.
    weight, bias: (K,), of the norm.
    kind: 'rms' or 'layer'.
    eps: added to the mean square.
    x_format: a key of rows.QMAX.
    scale: static steps: (1,) one in all, or (K,) one per channel; None: one per
      row, taken here and returned.
    implementation: one of IMPLEMENTATIONS, or None for what `choose` says.
    chip: the TPU compiled for; None: the one at hand.
    interpret: runs the kernel in Pallas's interpreter.

  Raises:
    ValueError: arguments that do not fit each other.
    NotImplementedError: the implementation that was named cannot serve.
  """
  K = _check(x, kind, x_format)
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
  flat = x.reshape(-1, K)
  args: Any = (flat, weight, bias, kind, eps, x_format, scale is None)
  if (implementation or choose(x, chip)) == 'xla':
    codes, steps = base.norm_quantize(*args)
  else:
    codes, steps = pallas_mosaic_tpu.norm_quantize(
      *args, chip=chip, interpret=interpret
    )
  if steps is not None:
    steps = steps.reshape(*x.shape[:-1], 1)
  return codes.reshape(x.shape), steps


def choose(x: Any, chip: str | None = None) -> str:
  """The name of the implementation that None stands for.

  The kernel where it serves and XLA is not to partition it, else 'xla'.
  """
  if pallas_mosaic_tpu.why_not(x, chip or targets.current()):
    return 'xla'
  return 'xla' if compat.is_partitioned() else 'pallas_mosaic_tpu'


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
