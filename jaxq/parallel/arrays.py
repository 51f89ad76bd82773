"""Arrays between hosts and a mesh that may span several of them.

With several processes a global array is one of which a process holds only the
shards of its own devices. What leaves the host goes through `put`, which asks
each process for its shards alone; what comes back goes through `fetch`, which
all processes call together.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding


def put(array: Any, sharding: Sharding) -> jax.Array:
  """An array of this host, or one on devices already, as `sharding` says.

  Args:
    array: a jax.Array, or what has a shape and can be indexed with slices
      (NumPy's, io.lazy.LazyArray); the same on all processes.
    sharding: where it goes.
  """
  if isinstance(array, jax.Array) and not (
    array.is_fully_addressable and not sharding.is_fully_addressable
  ):
    return jax.device_put(array, sharding)
  if isinstance(array, jax.Array | np.generic):
    array = np.asarray(array)  # Of this process: it has all of it.
  if isinstance(array, np.ndarray) and sharding.is_fully_addressable:
    return jax.device_put(array, sharding)
  parts: dict[Any, np.ndarray] = {}

  def part(index: Any) -> np.ndarray:
    """The shard of one device; replicas share what was read."""
    key = tuple((s.start, s.stop) for s in index)
    if key not in parts:
      parts[key] = array[index]
    return parts[key]

  return jax.make_array_from_callback(array.shape, sharding, part)


def fetch(tree: Any) -> Any:
  """Whole arrays on the host, on every process; all of them call it."""
  return jax.device_get(tree) if is_local(tree) else jax.tree.map(_whole, tree)


def to_store(tree: Mapping[str, Any]) -> Any:
  """A tree for a BlockStore: on the host, or global where it spans several."""
  return jax.device_get(tree) if is_local(tree) else tree


def is_local(tree: Any) -> bool:
  """Whether this process has all of every array."""
  return all(
    a.is_fully_addressable
    for a in jax.tree.leaves(tree)
    if isinstance(a, jax.Array)
  )


def _whole(array: Any) -> np.ndarray:
  if is_local(array):
    return np.asarray(array)
  if array.is_fully_replicated:
    return np.asarray(array.addressable_data(0))
  return multihost_utils.process_allgather(array, tiled=True)
