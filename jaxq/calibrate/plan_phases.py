"""What a calibration keeps on a device in each of its phases, in bytes.

While a jitted function runs, a device holds its arguments, outputs and
temporaries, and besides what the driver keeps for later:

  X   the activations of all batches; twice while a block advances them
  F   those of the float model, where a method asks for them
  V   variables: the block as it was read (the probe has it until the end of the
      block), its last all-float form, and the form of the moment
  P   the probe's samples
  and, while a later stage observes, what the stage before has left behind

This module adds them up from shapes and shardings, for a mesh that may be
abstract; it compiles nothing and knows no temporaries.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxq.calibrate import driver, probe
from jaxq.calibrate import steps as steps_lib
from jaxq.nn import blocks, taps
from jaxq.numerics import qarray
from jaxq.parallel import mesh as mesh_lib
from jaxq.quant import transform as transform_lib

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
  """One function of a run, or a moment between two.

  Attributes:
    name: of the function; of several kinds of blocks, with the kind's number.
    calls: how often it runs in all.
    arguments, outputs: bytes on a device; outputs less those written over
      arguments.
    resident: bytes of all else that is alive.
    program: name of the compiled program whose temporaries it needs.
    scale: times those temporaries.
    own: whether that very program runs; the probe runs one like it, on another
      number of samples.
  """

  name: str
  calls: int
  arguments: int
  outputs: int
  resident: int
  program: str = ''
  scale: float = 1.0
  own: bool = True

  @property
  def known(self) -> int:
    """All but the temporaries."""
    return self.arguments + self.outputs + self.resident


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockShapes:
  """The shapes of one kind of block, before and after every stage.

  Attributes:
    spec: the block's spec.
    count: how many blocks are of this kind.
    params: as they are read.
    carry: of one batch.
    variables: {'params', 'quant'} before the first stage, ..., behind the last.
    states, stats: of each stage; states are {} where it observes nothing.
    names: of the stages.
  """

  spec: blocks.BlockSpec
  count: int
  params: Params
  carry: blocks.Carry
  variables: tuple[Params, ...]
  states: tuple[Params, ...]
  stats: tuple[Params, ...]
  names: tuple[str, ...]

  @property
  def last_float(self) -> int:
    """Index of the last variables that are all float."""
    found = [i for i, v in enumerate(self.variables) if steps_lib.is_float(v)]
    return found[-1]


def shapes_of(
  spec: blocks.BlockSpec,
  count: int,
  params: Params,
  carry: blocks.Carry,
  stages: Sequence[transform_lib.Transform],
  streams: blocks.Carry,
) -> BlockShapes:
  """Traces every stage on shapes.

  Args:
    spec: of the block.
    count: how many blocks are of this kind.
    params: shapes of its float parameters.
    carry: shapes of one batch in front of it.
    stages: single methods, in order.
    streams: shapes of all batches together.
  """
  steps = steps_lib.Steps(stages, embed=lambda outside, batch: batch)
  lowered = steps.lower(spec, params, carry, streams)
  variables = [steps_lib.shapes_of(lowered['forward_float'].args_info[0][0])]
  states, stats = [], []
  for stage in stages:
    observe = lowered.get(f'observe_{stage.name}')
    states.append(
      {} if observe is None else steps_lib.shapes_of(observe.args_info[0][2])
    )
    apply = lowered[f'apply_{stage.name}']
    stats.append(steps_lib.shapes_of(apply.args_info[0][2]))
    made = steps_lib.shapes_of(apply.out_info)
    variables.append({'params': made[0], 'quant': made[1]})
  return BlockShapes(
    spec=spec,
    count=count,
    params=params,
    carry=carry,
    variables=tuple(variables),
    states=tuple(states),
    stats=tuple(stats),
    names=tuple(stage.name for stage in stages),
  )


def calibration_phases(
  kinds: Sequence[BlockShapes],
  outside: Params,
  tokens: Any,
  samples: int,
  config: driver.CalibrationConfig,
  stages: Sequence[transform_lib.Transform],
  rules: mesh_lib.Rules,
  mesh: Any,
) -> list[Phase]:
  """The phases of a whole calibration.

  Args:
    kinds: of the blocks.
    outside: shapes of the parameters outside them.
    tokens: shape of one batch of data.
    samples: sequences in all.
    config: how the driver runs.
    stages: single methods, in order.
    rules: where parameters lie.
    mesh: a Mesh or an AbstractMesh.
  """
  batches = samples // config.batch_size
  first = kinds[0]
  one = batch_bytes(first.carry, mesh)
  probed = _probe_share(config.batch_size, mesh)
  whole = one * batches
  out = tree_bytes(outside, rules, mesh)
  token_bytes = batch_bytes(tokens, mesh)
  phases = [
    Phase(
      name='outside',
      calls=len(stages),
      arguments=out,
      outputs=out,
      resident=int(one * probed),
    ),
    Phase(
      name='embed',
      calls=batches,
      arguments=out + token_bytes,
      outputs=one,
      resident=whole - one + int(one * probed),
      program='embed',
    ),
  ]
  for i, kind in enumerate(kinds):
    suffix = f'[{i}]' if len(kinds) > 1 else ''
    phases += _block_phases(
      kind, suffix, batches, probed, config, stages, rules, mesh
    )
  return phases


def _block_phases(
  kind, suffix, batches, probed, config, stages, rules, mesh
) -> list[Phase]:
  """The phases of one kind of block."""
  one = batch_bytes(kind.carry, mesh)
  whole, sample = one * batches, int(one * probed)
  apart = config.inputs == 'quantized' and any(s.streams for s in stages)
  floats = whole if apart else 0
  V = [tree_bytes(v, rules, mesh) for v in kind.variables]
  last_float, final = kind.last_float, len(kind.variables) - 1

  def kept(stage):
    """Indices of the variables that are alive at a stage."""
    return {0, min(stage, last_float), stage}

  def beside(stage, argument):
    """Bytes of these without the one that is an argument."""
    return sum(V[i] for i in kept(stage) - {argument})

  phases = _stage_phases(
    kind,
    suffix,
    batches,
    one,
    whole + floats + sample,
    [beside(s, s) for s in range(final)],
    [s > 0 and s - 1 not in kept(s) for s in range(final)],
    rules,
    mesh,
  )
  feed = final if config.inputs == 'quantized' else last_float
  forward = 'forward' if feed > last_float else 'forward_float'
  phases.append(
    Phase(
      name=f'forward{suffix}',
      calls=batches * kind.count,
      arguments=V[feed] + one,
      outputs=one,
      resident=2 * whole - 2 * one + floats + sample + beside(final, feed),
      program=f'{forward}{suffix}',
    )
  )
  if apart:
    phases.append(
      Phase(
        name=f'forward_float{suffix}',
        calls=batches * kind.count,
        arguments=V[last_float] + one,
        outputs=one,
        resident=4 * whole - 2 * one + sample + beside(final, last_float),
        program=f'forward_float{suffix}',
      )
    )
  rounded = _rounded_bytes(kind, rules, mesh)
  phases.append(
    Phase(
      name=f'probe{suffix}',
      calls=(4 if rounded else 3) * kind.count,
      # Rounded kernels take the place of those that nobody else holds.
      arguments=V[0] + (0 if last_float else rounded) + sample,
      outputs=5 * sample,
      resident=2 * (whole + floats) + beside(final, 0),
      program=f'{forward}{suffix}',
      scale=probed,
      own=False,
    )
  )
  return phases


def _stage_phases(
  kind, suffix, batches, one, streams, others, orphaned, rules, mesh
) -> list[Phase]:
  """Observe and apply of every stage.

  Args:
    kind: of block.
    suffix: of names.
    batches: how many there are.
    one: bytes of one.
    streams: bytes of the activations and samples that are kept.
    others: per stage, bytes of other variables that are kept.
    orphaned: per stage, whether the variables before are held by nothing but
      what the stage before has left behind.
    rules, mesh: as for calibration_phases.
  """
  # Leaves that `place` moves to the stages' layout and back, in either; the
  # others are the same buffers in both.
  moved = [moved_bytes(v, rules, mesh) for v in kind.variables]
  here, there = zip(*moved, strict=True)
  phases, left = [], 0
  for s, name in enumerate(kind.names):
    now = tree_bytes(kind.variables[s], rules, mesh)
    solve = tree_bytes(kind.variables[s], steps_lib.SOLVE_RULES, mesh)
    made = tree_bytes(kind.variables[s + 1], steps_lib.SOLVE_RULES, mesh)
    stats = tree_bytes(kind.stats[s], (), mesh)
    if orphaned[s]:
      left += tree_bytes(kind.variables[s - 1], rules, mesh)
    if kind.states[s]:
      phases.append(
        Phase(
          name=f'observe_{name}{suffix}',
          calls=batches * kind.count,
          arguments=now + one + tree_bytes(kind.states[s], (), mesh),
          outputs=0,
          resident=streams - one + others[s] + left,
          program=f'observe_{name}{suffix}',
        )
      )
    phases.append(
      Phase(
        name=f'apply_{name}{suffix}',
        calls=kind.count,
        arguments=solve + stats,
        outputs=made,
        # What the stage before made is still there, in the stages' layout.
        resident=streams + others[s] + here[s] + (there[s] if s else 0),
        program=f'apply_{name}{suffix}',
      )
    )
    left = stats + there[s] + there[s + 1]
  return phases


def leaf_bytes(leaf: Any, spec: PartitionSpec, mesh: Any) -> int:
  """Bytes of one array on one device, which has the largest shard."""
  shape = list(leaf.shape)
  for i, axes in enumerate(spec):
    for axis in (axes,) if isinstance(axes, str) else axes or ():
      shape[i] = -(-shape[i] // mesh.shape[axis])
  return math.prod(shape) * leaf.dtype.itemsize


def batch_bytes(tree: Any, mesh: Any) -> int:
  """Bytes of a batch on one device."""
  spec = PartitionSpec('data')
  return sum(leaf_bytes(leaf, spec, mesh) for leaf in jax.tree.leaves(tree))


def tree_bytes(tree: Params, rules: mesh_lib.Rules, mesh: Any) -> int:
  """Bytes of a tree that lies by rules, on one device."""
  return sum(size for size, _ in _leaf_sizes(tree, rules, mesh))


def moved_bytes(
  tree: Params, rules: mesh_lib.Rules, mesh: Any
) -> tuple[int, int]:
  """Of leaves that lie otherwise by `rules` than where stages are applied.

  Returns:
    Their bytes on a device by rules, and in the stages' layout.
  """
  pairs = zip(
    _leaf_sizes(tree, rules, mesh),
    _leaf_sizes(tree, steps_lib.SOLVE_RULES, mesh),
    strict=True,
  )
  moved = [(a, b) for (a, here), (b, there) in pairs if here != there]
  return sum(a for a, _ in moved), sum(b for _, b in moved)


def abstract(tree: Params, rules: mesh_lib.Rules, mesh: Any) -> Any:
  """Shapes of a tree, laid out by rules."""
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    tree,
    mesh_lib.shardings(tree, rules, mesh),
  )


def abstract_batch(tree: Any, mesh: Any) -> Any:
  """Shapes of a batch, its first axis over `data`."""
  sharding = mesh_lib.batch_sharding(mesh)
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
  )


def placed_bytes(tree: Any, mesh: Any) -> int:
  """Bytes on a device of shapes that have their shardings."""
  return sum(
    leaf_bytes(leaf, leaf.sharding.spec, mesh) for leaf in jax.tree.leaves(tree)
  )


def _leaf_sizes(tree, rules, mesh) -> list[tuple[int, tuple]]:
  """(bytes on a device, partition spec without trailing Nones) per leaf."""
  leaves = jax.tree.leaves(tree)
  placed = jax.tree.leaves(mesh_lib.shardings(tree, rules, mesh))
  out = []
  for leaf, sharding in zip(leaves, placed, strict=True):
    spec = [
      # An axis of one device divides nothing.
      axis if axis and mesh.shape[axis] > 1 else None
      for axis in sharding.spec
    ]
    while spec and spec[-1] is None:
      spec.pop()
    out.append((leaf_bytes(leaf, sharding.spec, mesh), tuple(spec)))
  return out


def _rounded_bytes(kind: BlockShapes, rules, mesh) -> int:
  """Of the kernels that the probe rounds to nearest; 0 if it does not."""
  quantized = kind.variables[-1]['params']
  size = 0
  for lin in kind.spec.linears:
    leaf = blocks.kernel_of(quantized, lin.path)
    if isinstance(leaf, qarray.QArray):
      kernel = taps.set_path(
        {}, f'{lin.path}/kernel', blocks.kernel_of(kind.params, lin.path)
      )
      size += tree_bytes(kernel, rules, mesh)
  return size


def _probe_share(batch_size: int, mesh: Any) -> float:
  """The probe's samples as a share of a batch."""
  data = mesh.shape['data']
  return (data if data > 1 else min(probe.SAMPLES, batch_size)) / batch_size
