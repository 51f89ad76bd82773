"""Spellings of JAX that differ, or may, by version.

Kernels take `interpret=True` from their callers and pass it through
`interpret_mode`; inside a shard_map an output says over which mesh axes it
varies, which `out_struct` works out. Both are the same from JAX 0.10.2 to 0.12;
they stand here so that the next change is a change of one file.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import compute_on as _compute_on
from jax.experimental.pallas import mosaic_gpu as _mosaic_gpu
from jax.experimental.pallas import tpu as pltpu

# Every version types it otherwise; kernels that use it ask for JAX 0.11 first.
mosaic_gpu: Any = _mosaic_gpu


def interpret_mode(interpret: bool) -> Any:
  """What pallas_call's `interpret` takes: the plain interpreter, or none."""
  return bool(interpret)


def tpu_params(semantics: tuple[str, ...], vmem_bytes: int) -> Any:
  """Compiler parameters of a TPU kernel.

  Args:
    semantics: 'parallel' or 'arbitrary' for each axis of the grid.
    vmem_bytes: what the kernel may use of the vector memory.
  """
  # The literal types of the names differ between versions.
  axes: Any = semantics
  return pltpu.CompilerParams(
    dimension_semantics=axes, vmem_limit_bytes=vmem_bytes
  )


def out_struct(shape: tuple[int, ...], dtype: Any, *operands: jax.Array) -> Any:
  """ShapeDtypeStruct that varies over the mesh axes any operand varies over."""
  varying: frozenset = frozenset()
  for operand in operands:
    kind = getattr(jax.typeof(operand), 'mat', None)
    varying |= getattr(kind, 'varying', frozenset())
  if not varying:
    return jax.ShapeDtypeStruct(
      shape, dtype, manual_axis_type=jax.sharding.ManualAxisType()
    )
  return jax.ShapeDtypeStruct(
    shape,
    dtype,
    manual_axis_type=jax.sharding.ManualAxisType(varying=varying),
  )


def on_host(f: Any, *args: jax.Array) -> Any:
  """f of arrays in host memory, run by the processor there; so are its results.

  JAX 0.10 calls compute_on2 what is compute_on from 0.12 on.
  """
  spelled: Any = getattr(_compute_on, 'compute_on2', _compute_on.compute_on)
  host = jax.memory.Space.Host
  run = spelled(f, compute_type='device_host', out_memory_spaces=host)
  return run(*args)


def no_cotangent(x: jax.Array | None) -> Any:
  """The cotangent of an array that is a constant to differentiation."""
  if x is None:
    return None
  if jax.numpy.issubdtype(x.dtype, jax.numpy.integer):
    return np.zeros(x.shape, jax.dtypes.float0)
  return jax.numpy.zeros_like(x)


def is_partitioned() -> bool:
  """Whether XLA may be asked to partition what is traced now.

  A Mosaic kernel cannot be partitioned: it runs on one device, or in a
  shard_map over all axes of the mesh.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not mesh.manual_axes:
    return jax.device_count() > 1
  return set(mesh.manual_axes) != set(mesh.axis_names)
