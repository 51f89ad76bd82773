"""The ahead-of-time plan: does a run fit devices that are not there?

  planner = Planner(model, transform, settings, steps)
  plan = planner.plan(plan_topology.parse('v5e:16x16'), mesh)

Every jitted function of a calibration (steps.Steps, the ones that the driver
calls), and of what comes behind it, is compiled for the topology from shapes
alone. To what the compiler says of each is added what the driver keeps beside
it (plan_phases). A plan fits if its largest phase does.

Where it does not, `smallest` looks for the smallest topology and mesh that do:
known bytes are added up exactly, temporaries are scaled from those that were
compiled, and what seems to fit is compiled to be sure.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxq.calibrate import driver, plan_phases, plan_program, plan_topology
from jaxq.calibrate import steps as steps_lib
from jaxq.nn import blocks
from jaxq.numerics import chips
from jaxq.parallel import mesh as mesh_lib
from jaxq.quant import transform as transform_lib

Params = Mapping[str, Any]
MeshShape = Mapping[str, int]
Runs = Sequence[tuple[int, Params]]

_BATCH = 8  # The least of a batch that is chosen here.
_ATTEMPTS = 3  # Topologies that `smallest` compiles at most.


class ShapedModel(Protocol):
  """A driver.CalibrationModel of shapes (models.shapes.ShapeModel is one)."""

  @property
  def num_blocks(self) -> int: ...

  def block_at(self, i: int) -> blocks.BlockSpec: ...

  def outside(self) -> Params: ...

  def block_params(self, i: int) -> Params: ...

  def embed(self, outside: Params, batch: Any) -> blocks.Carry: ...

  def rules(self, mesh: Any) -> mesh_lib.Rules: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What a run is given.

  samples, length: sequences of so many tokens.
  batch_size: None: chosen for the mesh.
  inputs, ignore, experts: as in driver.CalibrationConfig.
  """

  samples: int
  length: int
  batch_size: int | None = None
  inputs: str = 'quantized'
  ignore: tuple[str, ...] = ()
  experts: str = 'routed'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """A jitted function that is no part of the calibration.

  Attributes:
    name: 'evaluate', 'decode'.
    calls: mesh -> how often it runs in all.
    arguments: (outside, runs, mesh) -> shapes with shardings. outside: shapes
      of the parameters outside the blocks, as the method leaves them; runs: for
      each run of equal blocks their number and the variables of one; the mesh
      may be abstract. Raises ValueError where the mesh does not fit.
    lower: (outside, runs, arguments) -> the lowered function.
  """

  name: str
  calls: Callable[[Any], int]
  arguments: Callable[[Params, Runs, Any], tuple[Any, ...]]
  lower: Callable[[Params, Runs, tuple[Any, ...]], jax.stages.Lowered]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedPhase:
  """A phase and what the compiler said of it; bytes on one device.

  Attributes:
    name, calls, arguments, outputs, resident: as in plan_phases.Phase.
    temporaries: of the compiled program.
    program: what was compiled for it; None where nothing was.
    bound: of one call; None where there is none (a CPU, a refused program).
  """

  name: str
  calls: int
  arguments: int
  outputs: int
  temporaries: int
  resident: int
  program: plan_program.Program | None = None
  bound: plan_program.Bound | None = None

  @property
  def total(self) -> int:
    """All bytes that a device needs at once."""
    return self.arguments + self.outputs + self.temporaries + self.resident


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What a run takes on a topology.

  topology, mesh: where it runs. phases: in order.
  batch_size: of the calibration; 0 where none is planned.
  """

  topology: plan_topology.Topology
  mesh: MeshShape
  batch_size: int
  phases: tuple[PlannedPhase, ...]

  @property
  def peak(self) -> PlannedPhase:
    """The phase that needs most."""
    return max(self.phases, key=lambda phase: phase.total)

  @property
  def fits(self) -> bool:
    """Whether every phase fits a device's memory."""
    return self.peak.total <= self.topology.memory

  @property
  def mesh_flag(self) -> str:
    """As --mesh takes it."""
    return ','.join(f'{axis}:{size}' for axis, size in self.mesh.items())

  @property
  def seconds(self) -> float | None:
    """A lower bound on the time of all calls; None if one has no bound."""
    total = 0.0
    for phase in self.phases:
      if phase.program is not None:
        if phase.bound is None:
          return None
        total += phase.calls * phase.bound.seconds
    return total


class Planner:
  """Plans one run for any topology and mesh; shapes are traced once."""

  def __init__(
    self,
    model: ShapedModel,
    transform: transform_lib.Transform | None,
    settings: Settings,
    steps: Sequence[Step] = (),
    *,
    calibrates: bool = True,
    runs: Runs = (),
  ):
    """Traces the blocks.

    Args:
      model: its shapes.
      transform: what quantizes it; None: nothing does, or it is done already.
      settings: what the run is given.
      steps: what comes behind the calibration.
      calibrates: whether the calibration itself is planned.
      runs: for the steps, without a transform.

    Raises:
      ValueError, NotImplementedError: what a method says of the shapes.
    """
    self._model = model
    self._settings = settings
    self._steps = tuple(steps)
    self._calibrates = calibrates and transform is not None
    self._stages = () if transform is None else transform_lib.stages(transform)
    self._outside = model.outside()
    for stage in self._stages:
      self._outside = jax.eval_shape(stage.outside, self._outside)
    self._kinds: list[plan_phases.BlockShapes] = []
    self._runs = list(runs)
    if transform is not None:
      self._kinds, order = self._trace()
      self._runs = [
        (length, self._kinds[kind].variables[-1]) for kind, length in order
      ]

  def _trace(
    self,
  ) -> tuple[list[plan_phases.BlockShapes], list[tuple[int, int]]]:
    """The kinds of blocks; of each run of equal ones, its kind and length."""
    settings, model = self._settings, self._model
    counts: dict[blocks.BlockSpec, int] = {}
    first: dict[blocks.BlockSpec, int] = {}
    runs: list[tuple[blocks.BlockSpec, int]] = []
    for i in range(model.num_blocks):
      spec = model.block_at(i).without(settings.ignore, i)
      if settings.experts == 'all':
        spec = spec.with_all_experts()
      counts[spec] = counts.get(spec, 0) + 1
      first.setdefault(spec, i)
      if runs and runs[-1][0] == spec:
        runs[-1] = (spec, runs[-1][1] + 1)
      else:
        runs.append((spec, 1))
    kinds = [
      plan_phases.shapes_of(
        spec,
        count,
        model.block_params(first[spec]),
        self._carry(_BATCH),
        self._stages,
        self._carry(settings.samples),
      )
      for spec, count in counts.items()
    ]
    specs = list(counts)
    return kinds, [(specs.index(spec), length) for spec, length in runs]

  def _tokens(self, batch_size: int) -> jax.ShapeDtypeStruct:
    shape = (batch_size, self._settings.length)
    return jax.ShapeDtypeStruct(shape, jnp.int32)

  def _carry(self, batch_size: int) -> Any:
    return jax.eval_shape(
      self._model.embed, self._outside, self._tokens(batch_size)
    )

  def batch_size(self, mesh: MeshShape) -> int:
    """The batch size on a mesh: as given, or the least whole one from 8 up.

    Raises:
      ValueError: `data` divides no batch that divides the sequences.
    """
    samples, data = self._settings.samples, mesh['data']
    given = self._settings.batch_size
    fitting = [b for b in range(data, samples + 1, data) if samples % b == 0]
    if given is not None:
      if given % data or samples % given:
        raise ValueError(
          f'mesh data:{data}: batch_size={given} and sequences={samples}; data '
          'must divide the batch, and the batch the sequences. Choose others.'
        )
      return given
    if not fitting:
      raise ValueError(
        f'mesh data:{data}: sequences={samples}; data must divide the '
        'sequences. Choose more sequences, or a larger model axis.'
      )
    return next((b for b in fitting if b >= _BATCH), fitting[-1])

  def phases(self, mesh: Any) -> list[plan_phases.Phase]:
    """All phases on a mesh, which may be abstract; nothing is compiled.

    Raises:
      ValueError: the mesh does not divide the batch or the model.
    """
    found: list[plan_phases.Phase] = []
    if self._calibrates:
      rules = self._model.rules(mesh)
      size = self.batch_size(mesh.shape)
      found += plan_phases.calibration_phases(
        self._sized(size),
        self._outside,
        self._tokens(size),
        self._settings.samples,
        self._config(size),
        self._stages,
        rules,
        mesh,
      )
    for step in self._steps:
      arguments = step.arguments(self._outside, self._runs, mesh)
      found.append(
        plan_phases.Phase(
          name=step.name,
          calls=step.calls(mesh),
          arguments=plan_phases.placed_bytes(arguments, mesh),
          outputs=0,
          resident=0,
          program=step.name,
        )
      )
    return found

  def plan(
    self, topology: plan_topology.Topology, mesh_shape: MeshShape
  ) -> Plan:
    """Compiles everything for a topology.

    Raises:
      ValueError: the mesh does not fit the topology, the batch or the model, or
        the topology cannot be had.
    """
    devices = plan_topology.devices(topology)
    text = ','.join(f'{axis}:{size}' for axis, size in mesh_shape.items())
    mesh = mesh_lib.make_mesh(text, devices)
    phases = self.phases(mesh)
    known = {p.program: p.arguments for p in phases if p.program}
    with chips.compiling_for(topology.chip):
      lowered = self._lower(mesh)
    # One may serve phases of other names: what none needs is not compiled.
    lowered = {name: low for name, low in lowered.items() if name in known}
    programs = plan_program.compile_all(lowered, known, mesh)
    return Plan(
      topology=topology,
      mesh=dict(mesh.shape),
      batch_size=self.batch_size(mesh.shape) if self._calibrates else 0,
      phases=tuple(
        _planned(phase, programs.get(phase.program), topology, mesh)
        for phase in phases
      ),
    )

  def best_mesh(
    self,
    topology: plan_topology.Topology,
    ratios: Mapping[str, float] | None = None,
  ) -> tuple[MeshShape, float]:
    """The mesh of a topology with the least bytes, by estimate, and those.

    Args:
      topology: of which devices are not needed.
      ratios: program -> compiled temporaries / what is guessed of them.

    Raises:
      ValueError: no mesh of the topology divides the batch and the model.
    """
    found: list[tuple[float, int, MeshShape]] = []
    reasons: list[str] = []
    for shape in plan_topology.meshes(topology.num_devices):
      mesh = plan_topology.abstract_mesh(shape)
      try:
        found.append(
          (self._estimate(mesh, ratios or {}), shape['model'], shape)
        )
      except ValueError as e:
        reasons.append(str(e))
    if not found:
      raise ValueError(
        f'--topology={topology.name}: none of its meshes can be used, for '
        f'instance: {reasons[-1]}'
      )
    size, _, best = min(found, key=lambda f: f[:2])
    return best, size

  def smallest(self, plan: Plan) -> Plan | None:
    """The smallest topology, and its mesh, that were compiled and fit.

    Args:
      plan: one that does not fit; its temporaries are the measure for others.
        Topologies of its chip come first.

    Returns:
      None where the first few that might fit do not, or none might.
    """
    mesh = plan_topology.abstract_mesh(plan.mesh)
    guesses = {p.program: self._guess(p, mesh) for p in self.phases(mesh)}
    ratios = {
      phase.name: phase.program.temporaries / guesses[phase.name]
      for phase in plan.phases
      if phase.program is not None and guesses.get(phase.name)
    }
    attempts = 0
    for topology in plan_topology.candidates(plan.topology):
      try:
        shape, size = self.best_mesh(topology, ratios)
      except ValueError:
        continue
      if size > topology.memory:
        continue
      try:
        found = self.plan(topology, shape)
      except ValueError:
        continue  # libtpu, or the number of simulated devices, refuses it.
      if found.fits:
        return found
      attempts += 1
      if attempts == _ATTEMPTS:
        break
    return None

  def _sized(self, batch_size: int) -> list[plan_phases.BlockShapes]:
    carry = self._carry(batch_size)
    return [dataclasses.replace(kind, carry=carry) for kind in self._kinds]

  def _config(self, batch_size: int) -> driver.CalibrationConfig:
    return driver.CalibrationConfig(
      batch_size=batch_size,
      inputs=self._settings.inputs,
      ignore=self._settings.ignore,
      experts=self._settings.experts,
    )

  def _lower(self, mesh: Mesh) -> dict[str, jax.stages.Lowered]:
    """Everything, for the devices of a mesh."""
    lowered: dict[str, jax.stages.Lowered] = {}
    rules = self._model.rules(mesh)
    if self._calibrates:
      size = self.batch_size(mesh.shape)
      steps = steps_lib.Steps(
        self._stages, self._model.embed, rules=rules, mesh=mesh
      )
      tokens = plan_phases.abstract_batch(self._tokens(size), mesh)
      outside = plan_phases.abstract(self._outside, rules, mesh)
      lowered['embed'] = steps.embed.lower(outside, tokens)
      streams = plan_phases.abstract_batch(
        self._carry(self._settings.samples), mesh
      )
      for i, kind in enumerate(self._sized(size)):
        suffix = f'[{i}]' if len(self._kinds) > 1 else ''
        made = steps.lower(kind.spec, kind.params, kind.carry, streams)
        lowered |= {f'{name}{suffix}': low for name, low in made.items()}
    for step in self._steps:
      arguments = step.arguments(self._outside, self._runs, mesh)
      lowered[step.name] = step.lower(self._outside, self._runs, arguments)
    return lowered

  def _estimate(self, mesh: Any, ratios: Mapping[str, float]) -> float:
    """Bytes of the largest phase, its temporaries guessed."""
    return max(
      phase.known
      + self._guess(phase, mesh) * phase.scale * ratios.get(phase.program, 1.0)
      for phase in self.phases(mesh)
    )

  def _guess(self, phase: plan_phases.Phase, mesh: Any) -> float:
    """Temporaries of a phase, roughly: right in how they grow with the mesh.

    A solver works on copies of its largest statistic, which is on every device;
    all else on activations as wide as the widest linear of a shard.
    """
    if not phase.program:
      return 0.0
    if phase.program.startswith('apply'):
      leaves = jax.tree.leaves([kind.stats for kind in self._kinds])
      sizes = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
      return 4.0 * max(sizes, default=phase.arguments)
    if phase.program in [step.name for step in self._steps]:
      return 0.2 * phase.arguments
    one = plan_phases.batch_bytes(
      self._carry(self.batch_size(mesh.shape)), mesh
    )
    shapes = [leaf.shape for leaf in jax.tree.leaves(self._kinds[0].params)]
    widest = max(shape[-1] / shape[-2] for shape in shapes if len(shape) > 1)
    return one * (4 + 4 * widest / mesh.shape['model'])


def _planned(
  phase: plan_phases.Phase,
  program: plan_program.Program | None,
  topology: plan_topology.Topology,
  mesh: Mesh,
) -> PlannedPhase:
  """A phase with what its program takes."""
  own = program if phase.own else None
  bound = None
  if own is not None and own.work is not None and topology.device is not None:
    bound = plan_program.bound(own, topology.device, mesh)
  temporaries = 0 if program is None else program.temporaries
  return PlannedPhase(
    name=phase.name,
    calls=phase.calls,
    # The program knows of padding, the phase of arguments that it leaves out.
    arguments=max(phase.arguments, own.arguments if own else 0),
    outputs=max(phase.outputs, own.outputs if own else 0),
    temporaries=int(temporaries * phase.scale),
    resident=phase.resident,
    program=own,
    bound=bound,
  )
