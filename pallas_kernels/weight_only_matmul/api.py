"""weight_only_matmul: bfloat16 activations times weights of 8, 4, 2 or 1 bits.

  y[m, n] = sum_k x[m, k] (code[k, n] - zero_point[k / G, n]) scale[k / G, n]

Bytes that must move: K N bits / 8 + (K / G) N (scale + zero_point) + 2 M (K +
N). At few rows this is all a call costs; at many, the matrix unit is.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import compat, planar, targets, weights
from pallas_kernels.weight_only_matmul import (
  base,
  pallas_mosaic_gpu,
  pallas_mosaic_tpu,
)

IMPLEMENTATIONS = ('pallas_mosaic_gpu', 'pallas_mosaic_tpu', 'xla')
_OP = 'weight_only_matmul'
Block = pallas_mosaic_gpu.Block | pallas_mosaic_tpu.Block


_KERNELS = {
  'pallas_mosaic_gpu': pallas_mosaic_gpu,
  'pallas_mosaic_tpu': pallas_mosaic_tpu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
  """What of a call is static."""

  layout: planar.Planar
  implementation: str
  out_dtype: Any
  chip: str
  block: Block | None
  interpret: bool


def weight_only_matmul(
  x: jax.Array,
  qvalue: jax.Array,
  scale: jax.Array,
  zero_point: jax.Array | None = None,
  *,
  bits: int,
  group_size: int = -1,
  out_dtype: Any = None,
  axis_name: str | None = None,
  implementation: str | None = None,
  chip: str | None = None,
  block: Block | None = None,
  interpret: bool = False,
) -> jax.Array:
  """x (..., K) @ dequantize(w) (K, N) -> (..., N).

  Differentiable with respect to x, exactly; the weight is a constant. Under
  vmap over x or the weights the grid of the kernel gets an axis more.

  Args:
    x: activations.
    qvalue: codes (K * bits / 8, N) uint8, packed planar (planar.py); at 8 bits
      (K, N) int8, or uint8 with a zero point. Below 8 bits without a zero point
      they are two's complement; at 1 bit a 1 is +1 and a 0 is -1. Or
      hopper.pack_words of that, which the GPU form takes.
    scale: (1, N) or (K / group_size, N), floating.
    zero_point: uint8, shaped as scale; None: 0.
    bits: 8, 4, 2 or 1.
    group_size: rows sharing a scale, and packed together; -1: all share one,
      and are packed by the tile (planar.py). K: all, packed in one tile.
    out_dtype: of the result; None: x's.
    axis_name: inside a shard_map: the mesh axis K is sharded over, in whole
      groups. Partial sums are float32 and are summed once, then cast.
    implementation: one of IMPLEMENTATIONS, or None for what `choose` says.
    chip: the TPU or GPU compiled for; None: the one at hand.
    block: of the implementation; None: tuned or by rule.
    interpret: runs the kernel in Pallas's interpreter, on any platform.

  Raises:
    TypeError, ValueError: arguments that do not fit each other.
    NotImplementedError: the implementation that was named cannot serve.
  """
  layout = weights.check(
    _OP, x, qvalue, scale, zero_point, bits=bits, group_size=group_size
  )
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f'{_OP}: implementation={implementation!r}; allowed '
      f'{sorted(IMPLEMENTATIONS)} or None. Use one of them.'
    )
  flat = x.reshape(-1, x.shape[-1])
  chip = chip or targets.current()
  name = implementation or _choose(flat, qvalue, layout, chip)
  out = jnp.dtype(out_dtype or x.dtype)
  call = _Call(
    layout=layout,
    implementation=name,
    out_dtype=jnp.dtype(jnp.float32) if axis_name else out,
    chip=chip,
    block=block,
    interpret=interpret,
  )
  y = _matmul(call, flat, (qvalue, scale, zero_point))
  if axis_name is not None:
    y = jax.lax.psum(y, axis_name).astype(out)
  return y.reshape(*x.shape[:-1], y.shape[-1])


def choose(
  x: Any,
  qvalue: Any,
  *,
  bits: int,
  group_size: int = -1,
  symmetric: bool = True,
  chip: str | None = None,
) -> str:
  """The name of the implementation that None stands for.

  The kernel, on a TPU that it serves and where XLA is not to partition it; it
  reads the weight once where XLA's path writes it out in floats and reads that,
  at any M. On Hopper the kernel for up to 256 rows of a weight that is
  packed for it. Everywhere else the float path, 'xla'.

  Args:
    x: array or ShapeDtypeStruct (..., K).
    qvalue: array or ShapeDtypeStruct, as for weight_only_matmul.
    bits: 8, 4, 2 or 1.
    group_size: rows sharing a scale.
    symmetric: whether there is no zero point.
    chip: the TPU or GPU compiled for; None: the one at hand.
  """
  layout = planar.Planar(
    bits=bits,
    K=x.shape[-1],
    group_size=group_size,
    signed=symmetric and bits > 1,
  )
  return _choose(x, qvalue, layout, chip or targets.current())


def _choose(x, qvalue, layout, chip):
  for name, kernel in _KERNELS.items():
    if not kernel.why_not(x, qvalue, layout, chip):
      return 'xla' if compat.is_partitioned() else name
  return 'xla'


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(call: Any, x: jax.Array, w: Any) -> jax.Array:
  if call.implementation == 'xla':
    return base.weight_only_matmul(
      x, w[0], w[1], w[2], call.layout, call.out_dtype
    )
  kernel: Any = _KERNELS[call.implementation]
  return kernel.weight_only_matmul(
    x,
    w[0],
    w[1],
    w[2],
    call.layout,
    call.out_dtype,
    chip=call.chip,
    block=call.block,
    interpret=call.interpret,
  )


def _forward(call: Any, x: jax.Array, w: Any) -> Any:
  # The dtype of x, as a value that residuals may hold.
  return _matmul(call, x, w), (w, jnp.zeros((), x.dtype))


def _backward(call, residuals, g):
  w, like = residuals
  dx = base.vjp_x(g, w[0], w[1], w[2], call.layout, like.dtype)
  return dx, tuple(compat.no_cotangent(a) for a in w)


_matmul.defvjp(_forward, _backward)
