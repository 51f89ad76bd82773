"""Kernels compiled for TPUs that are not there.

The libtpu wheel compiles for real chips on any x86 Linux host. A compile checks
tilings and on-chip memory as the chip would, and measures no time.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import targets


@functools.cache
def devices(topology: str) -> tuple[Any, ...]:
  """The devices of a slice, such as 'v5e:2x2'.

  Raises:
    NotImplementedError: there is no libtpu, or it gives no such slice.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise NotImplementedError(
      f'ahead_of_time: {topology!r} needs libtpu, which is not installed. The '
      'extra tpu-aot has it.'
    )
  try:
    found = topologies.get_topology_desc(topology, platform='tpu')
  except Exception as e:  # Of several kinds; another process has it, mostly.
    raise NotImplementedError(
      f'ahead_of_time: libtpu gives no {topology!r}: {e}'
    ) from e
  return tuple(found.devices)


def compile_for(
  chip: str, f: Callable[..., Any], shapes: Sequence[tuple[tuple, Any]]
) -> Any:
  """f compiled for one chip.

  Args:
    chip: a key of targets.TARGETS.
    f: function of arrays.
    shapes: (shape, dtype) of each, or None for an argument that is None.

  Raises:
    NotImplementedError: as `devices`.
  """
  device = devices(targets.get(chip).topology)[0]
  sharding = jax.sharding.SingleDeviceSharding(device)
  operands = [
    None if s is None else jax.ShapeDtypeStruct(*s, sharding=sharding)
    for s in shapes
  ]
  return jax.jit(f).lower(*operands).compile()


def compile_sharded(
  mesh: Mesh,
  f: Callable[..., Any],
  shapes: Sequence[tuple[tuple, Any]],
  in_specs: tuple[PartitionSpec, ...],
  out_specs: PartitionSpec,
) -> Any:
  """f in a shard_map over all axes of `mesh`, compiled for its devices."""
  operands = [
    jax.ShapeDtypeStruct(*s, sharding=NamedSharding(mesh, spec))
    for s, spec in zip(shapes, in_specs, strict=True)
  ]
  sharded = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
  return jax.jit(sharded).lower(*operands).compile()
