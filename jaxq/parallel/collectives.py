"""The collectives of a compiled program: what crosses devices, and along what.

Reads the text of an optimized HLO module (`compiled.as_text()`). What XLA
splits into several instructions (start and done, the pieces of an overlapped
gather) shares a channel and counts once.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

KINDS = (
  'all-gather',
  'all-reduce',
  'all-to-all',
  'collective-permute',
  'reduce-scatter',
)
_CALL = re.compile(rf'= (.*?) ({"|".join(KINDS)})(?:-start)?\((.*)')
_IOTA = re.compile(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_MESH = re.compile(
  r'replica_groups=mesh\[([^\]]*)\]'
  r'(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}'
)
_SETS = re.compile(r'(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}')
_SHAPE = re.compile(r'\b[a-z]+(\d+)[a-z0-9]*\[([\d,]*)\]')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
  """One collective.

  kind: one of KINDS.
  axes: names of the mesh axes it runs along, in the mesh's order.
  nbytes: of its largest operand or result, on one device.
  where: the operation of the model it serves, as XLA names it.
  """

  kind: str
  axes: tuple[str, ...]
  nbytes: int
  where: str


def collectives(text: str, mesh: Mesh) -> list[Collective]:
  """The collectives of a program for the devices of `mesh`.

  Args:
    text: of the optimized HLO module.
    mesh: whose devices, in order, are the module's partitions.

  Raises:
    ValueError: a collective whose groups cannot be read.
  """
  found: dict[str, Collective] = {}
  for line in text.splitlines():
    call = _CALL.search(line)
    if call is None:
      continue
    shapes, kind, rest = call.groups()
    channel = re.search(r'channel_id=(\d+)', rest)
    where = re.search(r'op_name="([^"]*)"', rest)
    found.setdefault(
      channel[1] if channel else line,
      Collective(
        kind=kind,
        axes=_axes(list(_groups(rest, mesh)), mesh),
        nbytes=max(
          (_nbytes(*shape) for shape in _SHAPE.findall(shapes)), default=1
        ),
        where=where[1] if where else '',
      ),
    )
  return list(found.values())


def _nbytes(bits: str, dims: str) -> int:
  """('32', '4,8') -> 128."""
  return math.prod(map(int, filter(None, dims.split(',')))) * int(bits) // 8


def _groups(rest: str, mesh: Mesh) -> Iterator[Sequence[int]]:
  """The groups of partitions that talk to each other."""
  if match := _MESH.search(rest):  # mesh['a'=4,'b'=4] {'b'}: along b.
    sizes = {
      name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])
    }
    names = list(sizes)
    along = [names.index(name) for name in re.findall(r"'(\w+)'", match[4])]
    ids = np.arange(math.prod(sizes.values()))
    if match[2]:  # Devices in another order: [2,4]T(1,0).
      ids = ids.reshape([int(n) for n in match[2].split(',')])
      if match[3]:
        ids = ids.transpose([int(n) for n in match[3].split(',')])
    ids = ids.reshape(*sizes.values())
    ids = np.moveaxis(ids, along, range(-len(along), 0))
    width = math.prod(ids.shape[ids.ndim - len(along) :])
    yield from ids.reshape(-1, width).tolist()
  elif match := _IOTA.search(rest):  # [2,4]<=[4,2]T(1,0).
    shape, dims, order = (
      [int(n) for n in part.split(',')] if part else None
      for part in match.groups()
    )
    assert shape is not None and dims is not None
    ids = np.arange(math.prod(dims)).reshape(dims).transpose(order)
    yield from ids.reshape(shape).tolist()
  elif match := _SETS.search(rest):  # {{0,1},{2,3}}.
    for group in re.findall(r'\{([\d,]+)\}', match[1]):
      yield [int(n) for n in group.split(',')]
  elif 'replica_groups={}' in rest:
    yield range(mesh.size)
  else:
    raise ValueError(
      f'collectives: cannot read the groups of {rest[:200]!r}; allowed are '
      'lists, iota and mesh notation. Report it with the version of JAX.'
    )


def _axes(groups: list[Sequence[int]], mesh: Mesh) -> tuple[str, ...]:
  """The axes along which members of a group differ."""
  shape = tuple(mesh.shape.values())
  differ: set[int] = set()
  for group in groups:
    places = [np.unravel_index(i, shape) for i in group]
    for a, b in itertools.pairwise(places):
      differ |= {d for d in range(len(shape)) if a[d] != b[d]}
  return tuple(name for d, name in enumerate(mesh.axis_names) if d in differ)
