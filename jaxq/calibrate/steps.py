"""The jitted functions of a block step, and where their arguments lie.

  embed          batch -> carry                              once per batch
  bridge         carry -> carry, where a model has bridges   once per batch
  observe_NAME   states -> states, for one stage             per batch
  apply_NAME     params, quant, stats -> params, quant       per block
  forward        carry -> carry, quantized or float blocks   per batch

A carry is the residual stream and what else the blocks read (nn.blocks.Carry).
On a mesh it is sharded over `data` and parameters by the model's rules; states
are replicated. While a stage is applied kernels are sharded by column, since
methods solve columns independently, row by row: no value crosses devices.

A matmul or a sum that is cut over devices is taken in another order, and the
last bits of float32 with it; GPTQ turns them into other codes. `reproducible`
steps cut nothing but the batch, of which every device has one sequence: blocks
lie whole on every device, each statistic is updated sequence by sequence, and
every device solves all. Then a mesh gives the bits of one device. It costs what
it says: only the forward passes are shared out.

`Steps.lower` lowers all of them from shapes alone, for devices that need not be
there: a plan, and the test that they compile for a TPU.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxq.nn import blocks, taps
from jaxq.numerics import binary, qarray
from jaxq.parallel import arrays
from jaxq.parallel import mesh as mesh_lib
from jaxq.quant import transform as transform_lib

Params = Mapping[str, Any]

SOLVE_RULES: mesh_lib.Rules = ((r'kernel', PartitionSpec(None, 'model')),)


class Steps:
  """The functions of the module docstring, each with a cache of its own.

  Attributes:
    stages: single methods, in order.
    mesh, rules: where parameters lie; None and () are one device.
    batch: where batches lie; None is one device.
    batch_shards: how many parts a batch is cut into.
    embed: (outside, batch) -> carry.
    bridge: (index, outside, carry) -> carry.
    observe: one per stage, (block, variables, carry, states) -> states; donates
      the states. The block's output is not made.
    apply: one per stage, (block, params, quant, stats) -> (params, quant).
    forward, forward_float: (block, variables, carry) -> (carry, all finite
      ()).
  """

  def __init__(
    self,
    stages: Sequence[transform_lib.Transform],
    embed: Callable[[Params, Any], blocks.Carry],
    bridge: Callable[[int, Params, blocks.Carry], blocks.Carry] | None = None,
    rules: mesh_lib.Rules = (),
    mesh: Mesh | None = None,
    reproducible: bool = False,
  ):
    self.stages = tuple(stages)
    self.mesh = mesh
    self.rules = () if reproducible else rules
    self._solve_rules = () if reproducible else SOLVE_RULES
    whole = None if mesh is None else mesh_lib.replicated(mesh)
    batch = None if mesh is None else mesh_lib.batch_sharding(mesh)
    self.batch_shards = 1 if mesh is None else mesh.shape['data']
    if reproducible and mesh is not None:
      batch = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
      self.batch_shards = mesh.size
    self.batch = batch
    # A partial is a function of its own, with a cache of its own.
    make: Any = lambda f, *args, **how: jax.jit(
      functools.partial(f, *args), **how
    )
    forward = {'static_argnames': 'block', 'out_shardings': (batch, whole)}
    self.embed = make(embed, out_shardings=batch)
    self.bridge = make(
      _no_bridge if bridge is None else bridge,
      static_argnums=0,
      out_shardings=batch,
    )
    self.forward = make(_forward, **forward)
    self.forward_float = make(_forward, **forward)
    self.observe = [
      make(
        *((_observe_in_order, batch, whole) if reproducible else (_observe,)),
        static_argnames='block',
        donate_argnames='states',
        out_shardings=whole,
      )
      for _ in stages
    ]
    self.apply = [
      make(
        _apply,
        stage.name,
        stage.apply,
        mesh,
        self._solve_rules,
        whole if reproducible else None,
        static_argnums=0,
      )
      for stage in stages
    ]

  @property
  def streams(self) -> bool:
    """Whether a stage asks for the block's inputs."""
    return any(stage.streams for stage in self.stages)

  @property
  def compilations(self) -> dict[str, int]:
    """How many times each function was compiled."""
    named: dict[str, Any] = {
      'embed': self.embed,
      'forward': self.forward,
      'forward_float': self.forward_float,
    }
    for i, stage in enumerate(self.stages):
      named[f'observe_{stage.name}'] = self.observe[i]
      named[f'apply_{stage.name}'] = self.apply[i]
    return {name: f._cache_size() for name, f in named.items()}

  def place(self, variables: Params) -> Any:
    """Puts parameters where the model runs with them."""
    return mesh_lib.place(variables, self.rules, self.mesh)

  def place_to_solve(self, variables: Params) -> Any:
    """Puts parameters where a stage is applied to them."""
    return mesh_lib.place(variables, self._solve_rules, self.mesh)

  def place_states(self, states: Params) -> Any:
    """Puts observer states, the same on all devices."""
    return mesh_lib.place(states, (), self.mesh)

  def place_batch(self, batch: Any) -> Any:
    """Puts one batch."""
    sharding = self.batch
    if sharding is None:
      return jax.device_put(batch)
    return jax.tree.map(lambda a: arrays.put(a, sharding), batch)

  def trace(
    self, block: blocks.BlockSpec, params: Params, carry: blocks.Carry
  ) -> None:
    """Traces every stage on shapes: raises what a method says of them.

    Args:
      block: its spec.
      params: its float parameters; only their shapes are used.
      carry: what one batch is in front of the block; only its shapes are used.
    """
    variables: Any = {'params': shapes_of(params), 'quant': {}}
    for stage, apply in zip(self.stages, self.apply, strict=True):
      states = _state_shapes(stage, block, variables, carry)
      stats = _stats_of(stage, block, states, carry)
      made = apply.eval_shape(block, *variables.values(), stats)
      variables = {'params': made[0], 'quant': made[1]}

  def lower(
    self,
    block: blocks.BlockSpec,
    params: Params,
    carry: blocks.Carry,
    streams: blocks.Carry | None = None,
  ) -> dict[str, jax.stages.Lowered]:
    """Lowers the functions of a block step; nothing is computed.

    Args:
      block: its spec.
      params: its float parameters; only their shapes are used.
      carry: what one batch is in front of the block; only its shapes are used.
      streams: all batches together, for methods that ask for the block's
        inputs; None: one batch.

    Returns:
      name -> what `.compile()` turns into a program for the mesh's devices, in
      the order in which they run.
    """
    x, every = (
      jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self.batch),
        tree,
      )
      for tree in (carry, carry if streams is None else streams)
    )
    variables: Any = {'params': params, 'quant': {}}
    placed = self._abstract(variables, self.rules)
    lowered = {'forward_float': self.forward_float.lower(block, placed, x)}
    for i, stage in enumerate(self.stages):
      states = _state_shapes(stage, block, variables, carry)
      states = self._abstract(states, ())
      if states:
        placed = self._abstract(variables, self.rules)
        lowered[f'observe_{stage.name}'] = self.observe[i].lower(
          block, placed, x, states
        )
      stats = _stats_of(stage, block, states, every)
      solve = self._abstract(variables, self._solve_rules)
      arguments = (block, solve['params'], solve['quant'], stats)
      lowered[f'apply_{stage.name}'] = self.apply[i].lower(*arguments)
      made = self.apply[i].eval_shape(*arguments)
      variables = {'params': made[0], 'quant': made[1]}
    if not is_float(variables):
      placed = self._abstract(variables, self.rules)
      lowered['forward'] = self.forward.lower(block, placed, x)
    return lowered

  def _abstract(self, tree: Params, rules: mesh_lib.Rules) -> Any:
    """Shapes of a tree, laid out by rules."""
    if self.mesh is None:
      return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree
      )
    return jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
      tree,
      mesh_lib.shardings(tree, rules, self.mesh),
    )


def initial_states(
  block: blocks.BlockSpec,
  requests: transform_lib.Requests,
  variables: Params,
  carry: blocks.Carry,
) -> dict[str, Any]:
  """The `taps` collection before the first batch.

  Args:
    block: its spec.
    requests: what a stage's `observe` returned.
    variables: of the block.
    carry: what one batch is in front of it; only its shapes are used.
  """
  tapped: Any = jax.eval_shape(block.tapped, variables, carry)
  states: dict[str, Any] = {}
  for path, named in requests.items():
    shape = taps.get_path(tapped, path).shape
    made = {name: request(shape) for name, request in named.items()}
    states = taps.set_path(states, path, made)
  return states


def with_streams(
  stage: transform_lib.Transform,
  stats: transform_lib.Stats,
  quantized: Sequence[blocks.Carry],
  floats: Sequence[blocks.Carry] | None,
) -> transform_lib.Stats:
  """The stats of a stage; with the block's inputs, if it asks for them.

  Args:
    stage: one method.
    stats: from its taps.
    quantized: the batches in front of the block.
    floats: those of the float model; None where they are the same.
  """
  if not stage.streams:
    return stats
  join: Any = lambda xs: jax.tree.map(lambda *a: jnp.concatenate(a), *xs)
  joined = join(quantized)
  both = {
    'quantized': joined,
    'float': joined if floats is None else join(floats),
  }
  return {**stats, transform_lib.STREAMS: both}


def shapes_of(tree: Params) -> Any:
  """The tree with shapes and dtypes for arrays, which may be lazy."""
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def is_float(variables: Params) -> bool:
  """Whether nothing in a block is quantized yet."""
  kernels = [leaf for _, leaf in taps.leaves(variables['params'])]
  inputs = [
    path
    for path, _ in taps.leaves(variables['quant'])
    if path.endswith('/input')
  ]
  return not inputs and not any(
    isinstance(leaf, qarray.QArray | binary.BinaryArray) for leaf in kernels
  )


def _state_shapes(
  stage: transform_lib.Transform,
  block: blocks.BlockSpec,
  variables: Params,
  carry: blocks.Carry,
) -> Any:
  """Shapes of the `taps` collection of a stage."""
  requests = stage.observe(block)
  return jax.eval_shape(
    lambda: initial_states(block, requests, variables, carry)
  )


def _stats_of(
  stage: transform_lib.Transform,
  block: blocks.BlockSpec,
  states: Params,
  carry: blocks.Carry,
) -> dict[str, Any]:
  """The stats of a stage; its streams, if it wants any, are one batch."""
  stats: Any = {p: taps.get_path(states, p) for p in stage.observe(block)}
  if stage.streams:
    stats[transform_lib.STREAMS] = {'quantized': carry, 'float': carry}
  return stats


def _no_bridge(i: int, outside: Params, carry: blocks.Carry) -> blocks.Carry:
  raise NotImplementedError(f'bridge before block {i} of a model without any.')


def _observe(
  block: blocks.BlockSpec,
  variables: Params,
  carry: blocks.Carry,
  states: Params,
) -> Params:
  with jax.named_scope('observe'):
    return block.observe({**variables, 'taps': states}, carry)[1]


def _observe_in_order(
  batch: NamedSharding | None,
  whole: NamedSharding | None,
  block: blocks.BlockSpec,
  variables: Params,
  carry: blocks.Carry,
  states: Params,
) -> Params:
  """As `_observe`, one sequence after the other, on every device alike."""
  sequences = len(blocks.stream(carry))
  seen = dict(taps.leaves(block.tapped(variables, carry)))
  xs = {}
  for path, x in seen.items():
    if taps.get_path(states, path) is None:
      continue
    assert len(x) == sequences, path
    if batch is not None:
      # Made one sequence to a device, and only then given to all of them.
      x = jax.lax.with_sharding_constraint(x, batch)
      x = jax.lax.with_sharding_constraint(x, whole)
    xs[path] = x

  def update(i, states):
    for path, x in xs.items():
      x = jax.lax.dynamic_slice_in_dim(x, i, 1)
      named = taps.get_path(states, path)
      new = {name: state.update(x) for name, state in named.items()}
      states = taps.set_path(states, path, new)
    return states

  # XLA would unroll a loop of one turn, and fuse what is in it otherwise.
  count = jax.lax.optimization_barrier(jnp.int32(sequences))
  with jax.named_scope('observe'):
    return jax.lax.fori_loop(0, count, update, states)


def _apply(
  name: str,
  apply: Any,
  mesh: Mesh | None,
  rules: mesh_lib.Rules,
  whole: NamedSharding | None,
  block: blocks.BlockSpec,
  params: Params,
  quant: Params,
  stats: transform_lib.Stats,
) -> tuple[Params, Params]:
  """A stage's apply, whose results lie as its arguments do."""
  if whole is not None:  # Streams come as batches.
    stats = jax.lax.with_sharding_constraint(stats, whole)
  with jax.named_scope(f'apply_{name}'):
    params, quant = apply(block, params, quant, stats)
  params = mesh_lib.constrain(params, rules, mesh)
  return params, mesh_lib.constrain(quant, rules, mesh)


def _forward(
  block: blocks.BlockSpec, variables: Params, carry: blocks.Carry
) -> tuple[blocks.Carry, jax.Array]:
  with jax.named_scope('forward'):
    carry = block.apply(variables, carry)
  return carry, jnp.all(jnp.isfinite(blocks.stream(carry)))
