"""A filled cache on disk: one .npz file with a versioned header.

The file holds the bytes of every leaf and, as JSON, what they are of: the
cache's config, and the name, dtype and shape of each. A cache is loaded into an
empty one that was made the same way, so that a file of another cache, batch,
capacity or model is refused and not misread. Formats that NumPy does not know
(bfloat16, float8) are stored as bytes. Written beside its place and renamed.
"""

import json
import os
import pathlib
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.kvcache import interface, registry

FORMAT, VERSION = 'jaxq.kvcache', 1
_HEADER = 'header'


def save(
  path: str | os.PathLike,
  caches: Any,
  config: interface.CacheConfig,
  extra: dict[str, Any] | None = None,
) -> None:
  """Writes caches, a pytree of them.

  Args:
    path: the file; replaced if it is there.
    caches: filled.
    config: what made them.
    extra: JSON data that `load` gives back, such as the prompt's tokens.
  """
  leaves = {name: np.asarray(leaf) for name, leaf in _named(caches)}
  header = {
    'format': FORMAT,
    'version': VERSION,
    'config': registry.describe(config),
    'leaves': {
      name: {'dtype': str(leaf.dtype), 'shape': list(leaf.shape)}
      for name, leaf in leaves.items()
    },
    'extra': extra or {},
  }
  arrays = {
    str(i): np.frombuffer(leaf.tobytes(), np.uint8)
    for i, leaf in enumerate(leaves.values())
  }
  arrays[_HEADER] = np.frombuffer(json.dumps(header).encode(), np.uint8)
  path = pathlib.Path(path)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    with open(temporary, 'wb') as file:
      np.savez(file, **arrays)  # type: ignore[arg-type]
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def load(
  path: str | os.PathLike, caches: Any, config: interface.CacheConfig
) -> tuple[Any, dict[str, Any]]:
  """Reads what `save` wrote.

  Args:
    path: the file.
    caches: empty ones of the same making; their arrays may be
      ShapeDtypeStructs.
    config: what made them.

  Returns:
    The filled caches, and `extra`.

  Raises:
    ValueError: no file of this format and version, or of other caches.
    FileNotFoundError: no file.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files}
    header = json.loads(arrays.pop(_HEADER).tobytes())
  except (
    AttributeError,  # A single array.
    EOFError,
    KeyError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
  ) as e:
    raise ValueError(
      f'{path}: is no cache file, or a damaged one; a file that kvcache.storage'
      '.save wrote is needed. Make it again.'
    ) from e
  found = header.get('format'), header.get('version')
  if found != (FORMAT, VERSION):
    raise ValueError(
      f'{path}: format {found[0]!r}, version {found[1]}; this jaxq reads '
      f'{FORMAT!r}, version {VERSION}. Make the file again.'
    )
  made = registry.describe(config)
  if header['config'] != json.loads(json.dumps(made)):
    raise ValueError(
      f'{path}: holds {header["config"]}; the cache asked for is {made}. Load '
      'it with the settings it was made with.'
    )
  expected = {
    name: {'dtype': str(leaf.dtype), 'shape': list(leaf.shape)}
    for name, leaf in _named(caches)
  }
  if header['leaves'] != expected:
    name = next(
      n
      for n in sorted(set(expected) | set(header['leaves']))
      if expected.get(n) != header['leaves'].get(n)
    )
    raise ValueError(
      f'{path}: {name} is {header["leaves"].get(name)} and the cache has '
      f'{expected.get(name)}; model, batch and capacity must be those of the '
      'file. Make the cache with them.'
    )
  leaves = [
    _beside(
      np.frombuffer(
        arrays[str(i)].tobytes(), jnp.dtype(record['dtype'])
      ).reshape(record['shape']),
      like,
    )
    for i, (record, like) in enumerate(
      zip(header['leaves'].values(), jax.tree.leaves(caches), strict=True)
    )
  ]
  return jax.tree.unflatten(jax.tree.structure(caches), leaves), header['extra']


def _beside(array: np.ndarray, like: Any) -> jax.Array:
  """On the device, or in host memory where that is where `like` lies."""
  sharding = getattr(like, 'sharding', None)
  if getattr(sharding, 'memory_kind', None) == 'pinned_host':
    return jax.device_put(array, sharding)
  return jnp.asarray(array)


def _named(caches: Any) -> list[tuple[str, Any]]:
  found, _ = jax.tree_util.tree_flatten_with_path(caches)
  return [(jax.tree_util.keystr(path), leaf) for path, leaf in found]
