"""A mesh from its flag, and shardings of parameter trees from rules.

A mesh has two axes: `data` shards the calibration sequences, `model` the
weights. Rules are (regular expression, PartitionSpec) pairs matched against a
leaf's path, first match wins, no match is replicated. A QArray is sharded as
its logical matrix is: its codes and scales follow the axis where every shard
keeps whole packing tiles and whole groups, else the leaf is replicated. A
low-rank term lies as the kernel beside it: a by its rows, b by its columns.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxq.nn import kernel_weight
from jaxq.numerics import packing, qarray
from jaxq.parallel import arrays

AXES = ('data', 'model')
Rules = Sequence[tuple[str, PartitionSpec]]


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
  """'data:2,model:4' -> a Mesh with axes data and model.

  Args:
    text: comma-separated axis:size; an axis left out has size 1.
    devices: the devices to use; None: all of this job.

  Raises:
    ValueError: unreadable text, unknown axis, or sizes that do not multiply to
      the number of devices.
  """
  processes = jax.process_count() if devices is None else 1
  devices = list(jax.devices() if devices is None else devices)
  sizes = dict.fromkeys(AXES, 1)
  for part in filter(None, text.split(',')):
    match = re.fullmatch(r'\s*(\w+)\s*:\s*([1-9]\d*)\s*', part)
    if not match or match[1] not in AXES:
      raise ValueError(
        f'--mesh={text}: cannot read {part!r}; allowed are axis:size pairs '
        f'with axes {sorted(AXES)}, as in --mesh=data:2,model:4.'
      )
    sizes[match[1]] = int(match[2])
  needed = sizes['data'] * sizes['model']
  if needed != len(devices):
    found = f'{len(devices)}'
    if processes > 1:
      found += f' ({processes} processes x {len(devices) // processes})'
    raise ValueError(
      f'--mesh={text}: data:{sizes["data"]} x model:{sizes["model"]} needs '
      f'{needed} devices and there are {found}; choose sizes that '
      f'multiply to {len(devices)}.'
    )
  grid = np.array(devices).reshape(sizes['data'], sizes['model'])
  return Mesh(grid, AXES)


def choose(text: str, batch_size: int | None = None) -> Mesh | None:
  """The mesh of a flag; where it is empty, one that fits the job.

  A single process without the flag uses its default device (None). Several
  must share a mesh: all devices along `data`, or as many as divide the batch,
  and the rest along `model`.

  Args:
    text: of --mesh.
    batch_size: what the `data` axis must divide; None: anything goes.

  Raises:
    ValueError: as make_mesh.
  """
  if text:
    return make_mesh(text)
  if jax.process_count() == 1:
    return None
  count = jax.device_count()
  data = count if batch_size is None else math.gcd(count, batch_size)
  return make_mesh(f'data:{data},model:{count // data}')


def check_divides(what: str, size: int, mesh: Mesh, axis: str) -> None:
  """Raises ValueError unless the mesh axis divides `size`."""
  shards = mesh.shape[axis]
  if size % shards:
    raise ValueError(
      f'mesh {axis}:{shards}: {what}={size} is not a multiple of {shards}; '
      f'choose a {axis} size that divides {size}.'
    )


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis over `data`."""
  return NamedSharding(mesh, PartitionSpec('data'))


def shardings(tree: Mapping[str, Any], rules: Rules, mesh: Mesh) -> Any:
  """A tree of NamedShardings for a nested dict of arrays and QArrays."""

  def visit(node: Any, path: str) -> Any:
    if isinstance(node, Mapping):  # Empty ones are kept.
      return {
        k: visit(v, f'{path}/{k}' if path else k) for k, v in node.items()
      }
    low_rank = path.endswith('/low_rank')
    if low_rank:
      path = path.removesuffix('low_rank') + 'kernel'
    spec = next(
      (s for pattern, s in rules if re.search(pattern, path)), PartitionSpec()
    )
    place_leaf = _low_rank_sharding if low_rank else _leaf_sharding
    return place_leaf(node, spec, mesh)

  return visit(tree, '')


def place(tree: Mapping[str, Any], rules: Rules, mesh: Mesh | None) -> Any:
  """Puts a nested dict on the mesh by its rules; None: default device.

  Leaves may be lazy (io.lazy): a process then reads its own shards only.
  """
  if mesh is None:
    return jax.device_put(tree)
  return jax.tree.map(arrays.put, tree, shardings(tree, rules, mesh))


def constrain(tree: Mapping[str, Any], rules: Rules, mesh: Mesh | None) -> Any:
  """Inside jit: asks for the layout that `place` gives; None: nothing."""
  if mesh is None:
    return tree
  return jax.lax.with_sharding_constraint(tree, shardings(tree, rules, mesh))


def _leaf_sharding(leaf: Any, spec: PartitionSpec, mesh: Mesh) -> Any:
  """The sharding of one leaf; a QArray gives a QArray of shardings."""
  if not isinstance(leaf, qarray.QArray):
    return jax.tree.map(
      lambda a: NamedSharding(mesh, _fit(a.shape, spec, mesh)), leaf
    )
  if isinstance(leaf, kernel_weight.PackedArray):
    return _packed_sharding(leaf, spec, mesh)
  spec = _fit_matrix(leaf, spec, mesh)
  return jax.tree.map(
    lambda a: NamedSharding(mesh, _fit(a.shape, spec, mesh)), leaf
  )


def _packed_sharding(
  w: kernel_weight.PackedArray, spec: PartitionSpec, mesh: Mesh
) -> Any:
  """The shardings of a weight in tiles; none is split, nor is a group."""
  fits = [
    axis if axis and size % (unit * mesh.shape[axis]) == 0 else None
    for axis, size, unit in zip(
      (None, None, *spec)[-2:], w.shape, w.unit, strict=True
    )
  ]
  return jax.tree.map(
    lambda a, own: NamedSharding(mesh, _fit(a.shape, own, mesh)),
    w,
    w.partition(*fits),
  )


def _low_rank_sharding(term: Any, spec: PartitionSpec, mesh: Mesh) -> Any:
  """The sharding of a low-rank term beside a kernel that lies as `spec`."""
  rows, columns = (*spec, None, None)[:2]
  by_field = {
    'b': PartitionSpec(None, columns),
    'weight': PartitionSpec(rows),
  }  # All else is (K, ...).

  def fit(path, a):
    own = by_field.get(path[0].name, PartitionSpec(rows, None))
    return NamedSharding(mesh, _fit(a.shape, own, mesh))

  return jax.tree_util.tree_map_with_path(fit, term)


def _fit(
  shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh
) -> PartitionSpec:
  """The spec aligned to trailing axes, less those it does not divide."""
  padded = (None,) * (len(shape) - len(spec)) + tuple(spec)
  padded = padded[len(padded) - len(shape) :]
  return PartitionSpec(
    *(
      axis if axis and size % mesh.shape[axis] == 0 and size > 1 else None
      for size, axis in zip(shape, padded, strict=True)
    )
  )


def _fit_matrix(
  q: qarray.QArray, spec: PartitionSpec, mesh: Mesh
) -> PartitionSpec:
  """Drops the K axis where a shard would split a tile or a group."""
  if len(spec) < 2 or spec[-2] is None:
    return spec
  shards = mesh.shape[spec[-2]]
  K = q.shape[-2]
  group_size = q.spec.group_size if q.spec.granularity == 'group' else -1
  unit = max(group_size, 1)
  if q.is_packed:
    unit = packing.tile_rows(K, group_size)
  if K % shards or (K // shards) % unit:
    return PartitionSpec(None, spec[-1])
  return spec
