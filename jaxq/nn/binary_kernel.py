"""A BinaryArray's matmul by Pallas kernels: signs and salient codes, each once.

  y = (x_r @ B) alpha + mu sum_j x_r[j] + (x_s @ (code - zero_point)) scale

with x_r and x_s as jaxq.numerics.binary.arrange has them: a weight_only_matmul
of 1 bit and one of the salient rows' bits, summed in float32. Both parts are
packed in one tile, which the kernel takes as it is (its group_size = K), so no
weight is unpacked, padded or copied outside of it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxq.numerics import binary
from pallas_kernels import planar
from pallas_kernels.weight_only_matmul import api as weight_only

_KERNEL = 'pallas_mosaic_tpu'


def choose(x: jax.Array, w: binary.BinaryArray, chip: str | None = None) -> str:
  """'pallas_mosaic_tpu' where it serves both parts best, else ''.

  Args:
    x: (..., K), or its ShapeDtypeStruct.
    w: kernel of the layer.
    chip: the TPU compiled for; None: the one at hand.
  """
  for rows, codes, bits in _parts(w):
    part = jax.ShapeDtypeStruct((*x.shape[:-1], rows), x.dtype)
    name = weight_only.choose(
      part, codes, bits=bits, group_size=rows, symmetric=bits == 1, chip=chip
    )
    if name != _KERNEL:
      return ''
  return _KERNEL


def why_not(w: binary.BinaryArray, act: Any) -> str:
  """Why no kernel takes these formats; '' if one does."""
  if w.bits.ndim != 2:
    return 'w must be a BinaryArray of one matrix.'
  if act is not None:
    return 'x is quantized; beside signs, kernels take it floating.'
  if w.salient is not None and w.salient_bits not in planar.BITS:
    return (
      f'salient rows have {w.salient_bits} bits; kernels take '
      f'{list(planar.BITS)}.'
    )
  return ''


def matmul(
  x: jax.Array,
  w: binary.BinaryArray,
  *,
  chip: str | None = None,
  interpret: bool = False,
) -> jax.Array:
  """x (..., K) @ w by the kernels -> (..., N) in x.dtype.

  Args:
    x: bfloat16.
    w: kernel of the layer.
    chip: the TPU compiled for; None: the one at hand.
    interpret: runs the kernels in Pallas's interpreter.

  Raises:
    NotImplementedError: no kernel serves, with the reason.
    ValueError: w's parts or x do not fit its shape.
  """
  if reason := why_not(w, None):
    raise NotImplementedError(f'binary_kernel: {reason}')
  N = w.shape[1]
  x_s, x_r = binary.arrange(x.reshape(-1, x.shape[-1]), w)

  def dot(x, codes, scale, zero_point, bits):
    return weight_only.weight_only_matmul(
      x,
      codes,
      scale,
      zero_point,
      bits=bits,
      group_size=x.shape[-1],
      out_dtype=jnp.float32,
      implementation=_KERNEL,
      chip=chip,
      interpret=interpret,
    )

  total = jnp.sum(x_r, axis=-1, keepdims=True, dtype=jnp.float32)  # (M, 1)
  y = dot(x_r, w.bits, w.alpha, None, 1) + w.mu.astype(jnp.float32) * total
  if w.salient is not None:
    assert w.scale is not None
    y = y + dot(x_s, w.salient, w.scale, w.zero_point, w.salient_bits)
  return y.astype(x.dtype).reshape(*x.shape[:-1], N)


def _parts(w):
  """(rows, codes, bits) of each part that there is."""
  R = w.r.shape[0]
  parts = [(R, w.bits, 1)]
  if w.salient is not None:
    parts.append((w.shape[0] - R, w.salient, w.salient_bits))
  return parts
