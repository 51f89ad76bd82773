"""The driver: calibrates and quantizes a model block by block.

  x = embed(batch)                                   activations, on the mesh
  for each block:
    for each stage of the transform:
      stats = observe(block, x)                      jitted, one batch a call
      params, quant = stage.apply(params, stats)     jitted
    save(params, quant); x = block(x)

Blocks of one kind have the same shapes, so each of these functions is compiled
once per kind however deep the model is. Only one block's parameters, its
statistics and the activations are in memory. The next block is fed by the
quantized block (its errors are then seen, and made up for, further down) or by
the float one.

A run resumes at the first block that was not saved: the saved ones are only
run forward, by the same compiled function on the same values, so an
interrupted run ends with the same bits.

Nothing here knows how many hosts there are: what goes to the mesh or leaves it
passes through steps.Steps and parallel.arrays, and a store writes what spans
hosts by all of them (io.shared_checkpoint).
"""

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxq.calibrate import checks, observers, probe
from jaxq.calibrate import steps as steps_lib
from jaxq.nn import blocks, taps
from jaxq.parallel import arrays, preemption
from jaxq.parallel import mesh as mesh_lib
from jaxq.quant import transform as transform_lib

Params = Mapping[str, Any]


class CalibrationModel(Protocol):
  """What the driver needs of a model (models.loading.OpenModel is one).

  block_at(i): the spec of block i; equal specs share compiled functions.
  embed: one batch, a pytree of arrays with the batch first (a decoder's is
    tokens (B, T)), to the first block's input.
  bridges: the blocks in front of which the carry is turned into another by
    `bridge`, as between an encoder and a decoder; mostly ().
  """

  @property
  def num_blocks(self) -> int: ...

  @property
  def bridges(self) -> tuple[int, ...]: ...

  def block_at(self, i: int) -> blocks.BlockSpec: ...

  def outside(self) -> Params: ...

  def block_params(self, i: int) -> Params: ...

  def embed(self, outside: Params, batch: Any) -> blocks.Carry: ...

  def bridge(
    self, i: int, outside: Params, carry: blocks.Carry
  ) -> blocks.Carry: ...

  def rules(self, mesh: Mesh) -> mesh_lib.Rules: ...


class BlockStore(Protocol):
  """Where quantized blocks go (jaxq.io.checkpoint.Writer is one)."""

  def has_outside(self) -> bool: ...

  def save_outside(self, tree: dict[str, Any]) -> None: ...

  def has_block(self, i: int) -> bool: ...

  def save_block(self, i: int, tree: dict[str, Any]) -> None: ...

  def load_block(self, i: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
  """How the driver runs.

  batch_size: sequences per jitted call; divides the number of sequences.
  inputs: 'quantized' or 'float': which block's output feeds the next block.
  ignore: linears left in float (BlockSpec.without).
  experts: whether the statistics of an expert are of the tokens 'routed' to it
    or of 'all'; a report counts the routed ones either way.
  reproducible: the same bits on any mesh (steps.Steps); batch_size must be its
    number of devices, 1 without one.
  """

  batch_size: int = 8
  inputs: str = 'quantized'
  ignore: tuple[str, ...] = ()
  experts: str = 'routed'
  reproducible: bool = False

  def __post_init__(self):
    if self.batch_size < 1:
      raise ValueError(
        f'CalibrationConfig: batch_size={self.batch_size}; it must be at '
        'least 1.'
      )
    if self.inputs not in ('quantized', 'float'):
      raise ValueError(
        f'CalibrationConfig: inputs={self.inputs!r}; allowed '
        "['float', 'quantized']."
      )
    if self.experts not in ('all', 'routed'):
      raise ValueError(
        f'CalibrationConfig: experts={self.experts!r}; allowed '
        "['all', 'routed']."
      )
    for pattern in self.ignore:
      if pattern.startswith('re:'):
        try:
          re.compile(pattern[3:])
        except re.error as e:
          raise ValueError(
            f'--ignore={pattern}: {e}; what follows re: must be a regular '
            "expression, as in 're:mlp.*'."
          ) from e


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearReport:
  """What became of one kernel.

  name: of the linear. size: its number of weights.
  bits: per weight, all metadata counted.
  sqnr_db: of the weights, in the scales that the layer multiplies them with.
  """

  name: str
  size: int
  bits: float
  sqnr_db: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockReport:
  """What became of one block.

  output_sqnr_db, rtn_sqnr_db, stream_sqnr_db, channels: of the probe
    (probe.Reading).
  seconds: all of the block's work.
  expert_tokens: calibration tokens routed to each expert of a sparse block; ()
    of others, and where the methods take no statistics.
  """

  index: int
  output_sqnr_db: float
  seconds: float
  linears: tuple[LinearReport, ...]
  rtn_sqnr_db: float | None = None
  stream_sqnr_db: float | None = None
  channels: probe.Channels = dataclasses.field(default_factory=dict)
  expert_tokens: tuple[int, ...] = ()


class Calibrator:
  """Runs a transform over a model.

  Attributes:
    steps: the compiled functions.
    compilations: name -> how many times that function was compiled.
  """

  def __init__(
    self,
    model: CalibrationModel,
    transform: transform_lib.Transform,
    config: CalibrationConfig,
    mesh: Mesh | None = None,
  ):
    self._model = model
    self._config = config
    self._mesh = mesh
    self.steps = steps_lib.Steps(
      transform_lib.stages(transform),
      model.embed,
      model.bridge,
      () if mesh is None else model.rules(mesh),
      mesh,
      config.reproducible,
    )
    self._probe = probe.Probe(model, self.steps, config.batch_size)
    self._expert_tokens: tuple[int, ...] = ()

  @property
  def compilations(self) -> dict[str, int]:
    """How many times each function was compiled."""
    return self.steps.compilations

  def run(
    self,
    data: Any,
    store: BlockStore,
    on_block: Callable[[BlockReport], None] = lambda report: None,
  ) -> None:
    """Quantizes all blocks into `store`.

    Args:
      data: what `embed` takes, with all samples on the first axis, on the
        host; a decoder's is tokens (sequences, T) int32.
      store: keeps finished blocks; those it has are not done again.
      on_block: called after each block that was quantized.

    Raises:
      ValueError: no or indivisible sequences, a pattern that ignores nothing,
        NaN or Inf in weights or activations (the layer is named).
      preemption.Preempted: this job was told to stop, and a block is saved.
    """
    self._check_run(data)
    outside: Any = self._model.outside()
    checks.finite(outside, 'outside the blocks')
    outside = self.steps.place(outside)
    self._probe.start(outside, data)
    for stage in self.steps.stages:
      outside = jax.jit(stage.outside)(outside)
    if not store.has_outside():
      store.save_outside(arrays.to_store(outside))
    xs = self._embed_all(outside, data)
    apart = self._config.inputs == 'quantized' and self.steps.streams
    floats = list(xs) if apart else None  # Those of the float model.
    for i in range(self._model.num_blocks):
      if i > max(self._model.bridges, default=-1):
        outside = None  # Its memory.
      if i in self._model.bridges:
        xs = [self.steps.bridge(i, outside, x) for x in xs]
        if floats is not None:
          floats = [self.steps.bridge(i, outside, x) for x in floats]
        self._probe.bridge(i)
      with jax.profiler.StepTraceAnnotation('block', step_num=i):
        xs, floats = self._block(i, xs, floats, store, on_block)

  def check(self, data: Any) -> None:
    """Refuses at once what `run` would only find on its way.

    Reads the first block of each kind and traces every stage on its shapes;
    nothing is compiled or computed.

    Args:
      data: as for `run`.

    Raises:
      ValueError, NotImplementedError: as `run`, and what a method says of the
        shapes of the block.
    """
    self._check_run(data)
    outside = steps_lib.shapes_of(self._model.outside())
    batch = jax.tree.map(lambda a: a[: self._config.batch_size], data)
    carry = jax.eval_shape(self._model.embed, outside, batch)
    traced = set()
    for i in range(self._model.num_blocks):
      if i in self._model.bridges:
        bridge = functools.partial(self._model.bridge, i)
        carry = jax.eval_shape(bridge, outside, carry)
      spec = self._spec(i)
      if spec not in traced:
        traced.add(spec)
        params = self._model.block_params(i)
        checks.finite(params, f'blocks.{i}')
        self.steps.trace(spec, params, carry)

  def _spec(self, i: int) -> blocks.BlockSpec:
    """Block i, less the linears that are ignored."""
    spec = self._model.block_at(i).without(self._config.ignore, i)
    return spec.with_all_experts() if self._config.experts == 'all' else spec

  def _block(self, i, xs, floats, store, on_block) -> tuple[Any, Any]:
    """Quantizes block i, or loads it, and returns its outputs.

    A function of its own, so that nothing of a block outlives it.
    """
    start = time.perf_counter()
    spec = self._spec(i)
    done = store.has_block(i)
    before = None
    if done:
      variables = self.steps.place(store.load_block(i))
      if self._config.inputs == 'float' or floats is not None:
        before, _ = self._quantize(i, spec, xs, floats, until_float=True)
    else:
      before, variables = self._quantize(i, spec, xs, floats)
      store.save_block(i, arrays.to_store(variables))
    preemption.check(f'{i + 1} of {self._model.num_blocks} blocks are saved')
    feed = variables if self._config.inputs == 'quantized' else before
    first, xs = xs[0], self._advance(i, spec, feed, xs)
    if floats is not None:
      floats = self._advance(i, spec, before, floats)
    if done:
      self._probe.skip(i)
    else:
      assert before is not None  # It was made here.
      linears = self._linear_reports(i, spec, before, variables)
      behind = xs[0] if feed is variables else None
      del feed
      reading = self._probe.read(i, before, variables, first, behind)
      on_block(
        BlockReport(
          index=i,
          output_sqnr_db=reading.output_sqnr_db,
          seconds=time.perf_counter() - start,
          linears=linears,
          rtn_sqnr_db=reading.rtn_sqnr_db,
          stream_sqnr_db=reading.stream_sqnr_db,
          channels=reading.channels,
          expert_tokens=self._expert_tokens,
        )
      )
    return xs, floats

  def _check_run(self, data: Any) -> None:
    leaves = jax.tree.leaves(data)
    size, count = self._config.batch_size, len(leaves[0])
    for a in leaves:
      if a.ndim < 2 or not count or len(a) != count:
        raise ValueError(
          f'calibration data has shape {a.shape}; it must be (samples, ...), '
          'tokens (sequences, length), with at least one and equally many in '
          'all arrays.'
        )
    if count % size:
      raise ValueError(
        f'{count} calibration sequences do not make whole batches of '
        f'batch_size={size}; choose a batch_size that divides {count}.'
      )
    devices = 1 if self._mesh is None else self._mesh.size
    if self._config.reproducible and size != devices:
      raise ValueError(
        f'reproducible: batch_size={size} on {devices} devices; each takes one '
        f'sequence at a time. Set batch_size={devices}, and a number of '
        'sequences that it divides.'
      )
    if self._mesh is not None and not self._config.reproducible:
      mesh_lib.check_divides('batch_size', size, self._mesh, 'data')
    names = [
      blocks.name_of(i, linear.path)
      for i in range(self._model.num_blocks)
      for linear in self._model.block_at(i).linears
    ]
    for pattern in self._config.ignore:
      # The head is never quantized, and may be said so.
      if not any(blocks.matches(pattern, n) for n in (*names, 'lm_head')):
        raise ValueError(
          f'--ignore={pattern} names no linear; allowed are names such as '
          f'{names[0]!r} or {names[-1].rsplit(".", 1)[-1]!r}, or a regular '
          "expression after 're:'."
        )

  def _embed_all(self, outside: Params, data: Any) -> list[blocks.Carry]:
    size, count = self._config.batch_size, len(jax.tree.leaves(data)[0])
    batches = (
      jax.tree.map(lambda a, i=i: a[i : i + size], data)
      for i in range(0, count, size)
    )
    return [
      self.steps.embed(outside, self.steps.place_batch(batch))
      for batch in batches
    ]

  def _quantize(
    self,
    i: int,
    spec: blocks.BlockSpec,
    xs: Sequence[blocks.Carry],
    floats: Sequence[blocks.Carry] | None,
    until_float: bool = False,
  ) -> tuple[Params, Params]:
    """The block's last all-float variables, and its final ones."""
    host = self._model.block_params(i)
    checks.finite(host, f'blocks.{i}')
    float_variables = variables = self.steps.place(
      {'params': host, 'quant': {}}
    )
    self._probe.take(variables)
    del host
    self._expert_tokens = ()
    for stage, observe, apply in zip(
      self.steps.stages, self.steps.observe, self.steps.apply, strict=True
    ):
      requests = dict(stage.observe(spec))
      if requests and spec.coverage and not self._expert_tokens:
        requests[spec.coverage] = {'tokens': observers.mean_abs}
      stats = self._statistics(i, spec, requests, observe, variables, xs)
      if spec.coverage in stats:
        routed = stats.pop(spec.coverage)['tokens'].total
        self._expert_tokens = tuple(int(n) for n in np.asarray(routed))
      stats = steps_lib.with_streams(stage, stats, xs, floats)
      stage.check(f'blocks.{i}', stats)
      solve = self.steps.place_to_solve(variables)
      arguments = (spec, solve['params'], solve['quant'], stats)
      if until_float and _quantizes(stage, *arguments):
        break
      params, quant = apply(*arguments)
      variables = self.steps.place({'params': params, 'quant': quant})
      checks.finite(params, f'blocks.{i}', stage.failure)
      if steps_lib.is_float(variables):
        float_variables = variables
    return float_variables, variables

  def _statistics(self, i, spec, requests, observe, variables, xs) -> Any:
    """stats[tap][name] after all batches."""
    if not requests:
      return {}
    states = self.steps.place_states(
      steps_lib.initial_states(spec, requests, variables, xs[0])
    )
    for x in xs:
      states = observe(spec, variables, x, states)
      if all(_is_full(state) for state in _states(states)):
        break
    stats = {path: taps.get_path(states, path) for path in requests}
    checks.finite_stats(stats, i)
    return stats

  def _forward_of(self, variables: Params) -> Any:
    """The compiled forward function for float or for quantized blocks."""
    float_ = steps_lib.is_float(variables)
    return self.steps.forward_float if float_ else self.steps.forward

  def _advance(self, i, spec, variables, xs) -> list[blocks.Carry]:
    """The block's output on all batches."""
    forward = self._forward_of(variables)
    ys, finite = [], jnp.bool_(True)
    for x in xs:
      y, ok = forward(spec, variables, x)
      finite = finite & ok
      ys.append(y)
    if not bool(finite):
      raise ValueError(
        f'blocks.{i}: its output has NaN or Inf; check the weights of that '
        'block, or calibrate in float32.'
      )
    return ys

  def _linear_reports(self, i, spec, before, after) -> tuple[LinearReport, ...]:
    """What became of the block's kernels."""
    reports: list[LinearReport] = []
    for linear in spec.linears:
      old = probe.folded(spec, linear.path, before, after)
      new = blocks.kernel_of(after['params'], linear.path)
      if isinstance(new, jax.Array):
        continue
      marks = taps.get_path(after['quant'], linear.path) or {}
      bits, w = probe.stored(new, marks, old.shape[0])
      reports.append(
        LinearReport(
          name=blocks.name_of(i, linear.path),
          size=old.size,
          bits=bits,
          sqnr_db=float(probe.sqnr(old, w)),
        )
      )
    return tuple(reports)


def _states(tree: Params) -> list[Any]:
  """The observer states in a `taps` collection."""
  return [state for _, state in taps.leaves(tree)]


def _is_full(state: Any) -> bool:
  """Whether an observer has all it wants."""
  return isinstance(state, observers.Sample) and state.is_full


def _quantizes(stage, spec, params, quant, stats) -> bool:
  """Whether a stage's output is no longer float (nothing is run)."""
  params, quant = jax.eval_shape(
    lambda *args: stage.apply(spec, *args), params, quant, stats
  )
  return not steps_lib.is_float({'params': params, 'quant': quant})
