"""A tree of arrays with typed nodes <-> JSON and a plain dict of arrays.

Orbax stores nested dicts of arrays and nothing else well. So a parameter tree
is split in two: `structure`, JSON that says which node is of what type, with
its static fields and the dtype and shape of each array; and `arrays`, nested
dicts of numpy arrays, in which a typed node is a dict of its array fields.
`join(*split(tree))` is the tree again, bit for bit.

`save` puts both in one directory: Orbax's files (zarr, one file per array, no
time stamps: equal trees are equal bytes) and structure.json, which also holds
the checksum of every file. Plain Orbax restores it as nested dicts of arrays.
A tree whose arrays are spread over the processes of a job is written by all of
them, each its own shards (`save_arrays`), and sealed by one (`seal`).

A new node type is one row of `NODE_TYPES`.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from jaxq.io import lazy
from jaxq.io import manifest as manifest_lib
from jaxq.nn import linear, routed_low_rank
from jaxq.numerics import binary, fpx, qarray
from jaxq.numerics import spec as spec_lib
from jaxq.parallel import arrays as arrays_lib

STRUCTURE = 'structure.json'
STRUCTURE_VERSION = 1

Codec = tuple[Callable[[Any], Any], Callable[[Any], Any]]  # To, from JSON.

_PLAIN: Codec = (lambda value: value, lambda value: value)
_TUPLE: Codec = (list, tuple)
_SPEC: Codec = (lambda spec: spec.to_dict(), spec_lib.QuantSpec.from_dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeType:
  """One dataclass: its array fields (None allowed) and its static ones."""

  cls: type
  arrays: tuple[str, ...]
  static: dict[str, Codec]


# {name in the file: the node type}. Never rename or drop a row.
NODE_TYPES: dict[str, NodeType] = {
  'QArray': NodeType(
    cls=qarray.QArray,
    arrays=('qvalue', 'scale', 'zero_point', 'tensor_scale'),
    static={'spec': _SPEC, 'shape': _TUPLE},
  ),
  'BinaryArray': NodeType(
    cls=binary.BinaryArray,
    arrays=(
      'bits',
      'alpha',
      'mu',
      'r',
      'order',
      'salient',
      'scale',
      'zero_point',
    ),
    static={'salient_bits': _PLAIN, 'shape': _TUPLE},
  ),
  'ActQuant': NodeType(
    cls=linear.ActQuant,
    arrays=('scale', 'zero_point'),
    static={'spec': _SPEC},
  ),
  'StepInput': NodeType(
    cls=linear.StepInput,
    arrays=(),
    static={'spec': _SPEC},
  ),
  'FpxInput': NodeType(
    cls=linear.FpxInput,
    arrays=('scale', 'man_bits', 'shift'),
    static={'spec': _SPEC, 'restore': _PLAIN},
  ),
  'FpxArray': NodeType(
    cls=fpx.FpxArray,
    arrays=(
      'qvalue',
      'scale',
      'zero_point',
      'tensor_scale',
      'man_bits',
      'row_shift',
    ),
    static={'spec': _SPEC, 'shape': _TUPLE},
  ),
  'SplitInput': NodeType(
    cls=linear.SplitInput,
    arrays=('src', 'offset'),
    static={'spec': _SPEC},
  ),
  'LowRank': NodeType(
    cls=linear.LowRank,
    arrays=('a', 'b'),
    static={},
  ),
  'RoutedLowRank': NodeType(
    cls=routed_low_rank.RoutedLowRank,
    arrays=('a', 'b', 'router', 'weight'),
    static={'shared': _PLAIN, 'top_k': _PLAIN},
  ),
  'OnlineHadamard': NodeType(
    cls=linear.OnlineHadamard,
    arrays=(),
    static={'size': _PLAIN},
  ),
}


def split(tree: dict[str, Any]) -> tuple[Any, dict]:
  """Nested dicts of arrays and known nodes -> (structure, arrays).

  Empty dicts, nodes without arrays and arrays without elements are in
  `structure` alone, as Orbax stores none of them.

  Raises:
    TypeError: a leaf that is neither an array nor of a known type.
    ValueError: a key that cannot name a file.
  """
  if not isinstance(tree, dict):
    raise TypeError(f'a tree must be a dict, not {type(tree).__name__}.')
  structure, arrays = _split(tree, ())
  return structure, arrays or {}


def join(structure: dict, arrays: dict) -> dict[str, Any]:
  """The inverse of `split`; array leaves are numpy arrays.

  Raises:
    ValueError: a node type of a later version, or arrays that do not fit the
      structure.
  """
  return _join(structure, arrays, ())


def save(directory: pathlib.Path, tree: dict[str, Any]) -> None:
  """Writes a tree to an empty directory and flushes it to the disk.

  Raises:
    ValueError: an array that is spread over several processes.
  """
  for leaf in jax.tree.leaves(tree):
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      raise ValueError(
        f'an array {leaf.shape} is spread over several processes; one process '
        'writes what it has. Gather it first, or use save_arrays and seal.'
      )
  _save_arrays(directory, split(tree)[1], _handler)
  seal(directory, tree)


def save_arrays(directory: pathlib.Path, tree: dict[str, Any]) -> None:
  """Writes this process's part of a tree; all processes of a job call it.

  Every shard is written once, by the process that has its first replica, and
  arrays that are the same everywhere by process 0. Nobody waits for the others.

  Args:
    directory: empty, and seen by all processes.
    tree: the same on all; its arrays are global ones, or NumPy's.
  """
  _save_arrays(directory, split(tree)[1], _shared_handler)


def seal(directory: pathlib.Path, tree: dict[str, Any]) -> None:
  """Adds structure.json to the arrays of a tree and flushes all of it."""
  structure, _ = split(tree)
  manifest_lib.write_json(
    directory / STRUCTURE,
    {
      'version': STRUCTURE_VERSION,
      'structure': structure,
      'files': manifest_lib.file_records(directory),
    },
  )
  manifest_lib.sync_tree(directory)


def load(directory: pathlib.Path, lazily: bool = False) -> dict[str, Any]:
  """What `save` wrote.

  Args:
    directory: that it was written to.
    lazily: leaves are io.lazy.LazyArrays, read where they are indexed.

  Raises:
    ValueError: a file is damaged; the message names it.
  """
  found = read_structure(directory)
  manifest_lib.check_files(directory, found['files'])
  if lazily:
    return join(found['structure'], _folders(directory))
  arrays = {}
  if found['files']:
    try:
      with _quiet_orbax():
        arrays = _handler().restore(directory)
    except (ValueError, KeyError, TypeError, OSError) as error:
      raise ValueError(
        f'{directory} is damaged: Orbax cannot read it '
        f'({str(error).splitlines()[0]}); copy or make it again.'
      ) from error
  return join(found['structure'], arrays)


def read_structure(directory: pathlib.Path) -> dict[str, Any]:
  """{'version', 'structure', 'files'} of a directory that `save` wrote."""
  path = directory / STRUCTURE
  if not path.is_file():
    raise ValueError(f'{path} is missing; copy or make it again.')
  found = manifest_lib.read_json(path)
  manifest_lib.check_version(path, found.get('version'), STRUCTURE_VERSION)
  return found


def _split(value: Any, path: tuple[str, ...]) -> tuple[dict | None, Any]:
  """One node -> (structure, arrays | None if it holds none)."""
  if value is None:
    return None, None
  if isinstance(value, dict):
    for key in value:
      _check_key(key, path)
    return _split_items({'type': 'dict'}, 'items', value, path)
  if isinstance(value, (np.ndarray, np.generic, jax.Array)):
    return _split_array(value, path)
  for name, node in NODE_TYPES.items():
    if type(value) is node.cls:
      static = {
        field: to_json(getattr(value, field))
        for field, (to_json, _) in node.static.items()
      }
      fields = {field: getattr(value, field) for field in node.arrays}
      head = {'type': name, 'static': static}
      return _split_items(head, 'fields', fields, path)
  raise TypeError(
    f'{_show(path)} is a {type(value).__name__}; a tree may hold dicts, arrays '
    f'and {sorted(NODE_TYPES)}. Convert it, or add its type to '
    'jaxq.io.trees.NODE_TYPES.'
  )


def _split_items(head, name, values, path):
  """Splits each of `values` and adds the structures to `head` as `name`."""
  arrays = {}
  head[name] = {}
  for key in sorted(values):  # The order is part of the stored bytes.
    head[name][key], part = _split(values[key], (*path, key))
    if part is not None:
      arrays[key] = part
  return head, arrays or None


def _split_array(value, path):
  """An array -> its dtype and shape, and its bytes in a storable dtype."""
  dtype = np.dtype(value.dtype)
  if dtype.kind not in 'biufc' and not hasattr(ml_dtypes, dtype.name):
    raise TypeError(
      f'{_show(path)} has dtype {dtype}; booleans and numbers are allowed.'
    )
  head = {'type': 'array', 'dtype': dtype.name, 'shape': list(value.shape)}
  if not value.size:
    return head, None
  stored = _stored_dtype(dtype)
  if isinstance(value, jax.Array) and not value.is_fully_addressable:
    if stored == dtype:
      return head, value
    value = arrays_lib.fetch(value)  # Such are scales, and small.
  array = np.ascontiguousarray(value).reshape(value.shape)
  return head, array.view(stored)


def _join(structure, arrays, path):
  """One node of `structure` with its part of the arrays -> the node."""
  if structure is None:
    return None
  kind = structure['type']
  if kind == 'array':
    return _join_array(structure, arrays, path)
  items = structure['items' if kind == 'dict' else 'fields']
  parts = arrays if isinstance(arrays, dict) else {}
  values = {
    key: _join(item, parts.get(key), (*path, key))
    for key, item in items.items()
  }
  if kind == 'dict':
    return values
  if kind not in NODE_TYPES:
    raise ValueError(
      f'{_show(path)} is of type {kind!r}; this jaxq knows '
      f'{sorted(NODE_TYPES)}. Upgrade jaxq to read it.'
    )
  static = {
    field: from_json(structure['static'][field])
    for field, (_, from_json) in NODE_TYPES[kind].static.items()
  }
  return NODE_TYPES[kind].cls(**values, **static)


def _join_array(structure, array, path):
  """The stored array, checked and given its own dtype again."""
  dtype, shape = _dtype(structure['dtype']), tuple(structure['shape'])
  if 0 in shape:
    return np.zeros(shape, dtype)
  stored = _stored_dtype(dtype)
  if isinstance(array, pathlib.Path):
    read = functools.partial(_read_zarr, array, dtype)
    return lazy.LazyArray(shape=shape, dtype=dtype, read=read)
  if not isinstance(array, np.ndarray) or (
    (array.dtype, array.shape) != (stored, shape)
  ):
    found = getattr(array, 'dtype', 'no array')
    raise ValueError(
      f'{_show(path)}: the structure says {stored}{shape} and the arrays hold '
      f'{found}{getattr(array, "shape", "")}; the files are damaged or '
      'mixed. Copy or make them again.'
    )
  return array.view(dtype)


def _dtype(name: str) -> np.dtype:
  """numpy's or ml_dtypes' dtype of that name."""
  return np.dtype(getattr(ml_dtypes, name, name))


def _stored_dtype(dtype: np.dtype) -> np.dtype:
  """The dtype itself, or uint8 for those that zarr may not know."""
  common = dtype.kind in 'biufc' or dtype.name in (
    'bfloat16',
    'float8_e4m3fn',
    'float8_e5m2',
  )
  return dtype if common else np.dtype(np.uint8)


def _check_key(key: Any, path: tuple[str, ...]) -> None:
  """Keys become file names, joined by dots."""
  if not isinstance(key, str) or not key or set(key) & set('./\\\0'):
    raise ValueError(
      f'{_show(path)} has the key {key!r}; keys must be non-empty strings '
      "without '.' and '/'. Rename it."
    )


def _show(path: tuple[str, ...]) -> str:
  return '/'.join(path) or 'the tree'


def _save_arrays(directory, arrays, make_handler) -> None:
  if arrays:  # Orbax refuses a tree without any.
    with _quiet_orbax():
      make_handler().save(directory, args=ocp.args.PyTreeSave(arrays))


def _folders(directory: pathlib.Path) -> dict[str, Any]:
  """The arrays of a directory, each as the folder that holds it."""
  found: dict[str, Any] = {}
  for path in sorted(directory.glob('*/.zarray')):
    *parents, last = path.parent.name.split('.')
    node = found
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = path.parent
  return found


def _read_zarr(path: pathlib.Path, dtype: np.dtype, index: lazy.Index) -> Any:
  """A part of one array."""
  spec = {
    'driver': 'zarr',
    'kvstore': {'driver': 'file', 'path': str(path)},
  }
  try:
    array = tensorstore.open(spec, open=True, read=True).result()
    part = array[index].read().result()
  except (ValueError, KeyError, OSError) as error:
    raise ValueError(
      f'{path} is damaged: it cannot be read '
      f'({str(error).splitlines()[0]}); copy or make it again.'
    ) from error
  return np.ascontiguousarray(part).view(dtype).reshape(part.shape)


def _handler() -> ocp.PyTreeCheckpointHandler:
  """Orbax without what differs from run to run.

  OCDBT names its files at random, and `ocp.Checkpointer` adds the time; the
  handler alone adds neither. This process does not wait for the others.
  """
  process = jax.process_index()
  return ocp.PyTreeCheckpointHandler(
    use_ocdbt=False,
    use_zarr3=False,
    multiprocessing_options=ocp.options.MultiprocessingOptions(
      primary_host=process,
      active_processes={process},
      barrier_sync_key_prefix=f'jaxq_{process}',
    ),
  )


class _ShardHandler(ocp.type_handlers.ArrayHandler):
  """Writes shards of what is read as NumPy arrays, on whatever devices."""

  def typestr(self) -> str:
    return ocp.type_handlers.NumpyHandler().typestr()


def _shared_handler() -> ocp.PyTreeCheckpointHandler:
  """The same for all processes of a job; process 0 writes what describes."""
  shards = _ShardHandler(
    use_replica_parallel=False,
    enable_write_sharding_file=False,
    array_metadata_store=None,
  )
  return ocp.PyTreeCheckpointHandler(
    use_ocdbt=False,
    use_zarr3=False,
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (jax.Array, shards), (np.ndarray, ocp.type_handlers.NumpyHandler())
    ),
  )


@contextlib.contextmanager
def _quiet_orbax():
  """Keeps Orbax's log out of the terminal; its failures are exceptions."""

  def keep(record: logging.LogRecord) -> bool:
    return f'{os.sep}orbax{os.sep}' not in record.pathname

  logger = logging.getLogger('absl')
  logger.addFilter(keep)
  try:
    yield
  finally:
    logger.removeFilter(keep)
