"""What a plan is made for: a job, and its evaluation and decode steps.

The steps are the jitted functions that evaluation and generation run, with the
arguments they are given, as shapes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments import adapters
from jaxq.calibrate import plan, plan_phases
from jaxq.calibrate import steps as steps_lib
from jaxq.decode import autoregressive
from jaxq.eval import divergence, perplexity
from jaxq.kvcache import interface
from jaxq.quant import transform as transform_lib
from models import loading, shapes

_WINDOW = 2048
_ROWS = 8  # Decoded together, if not said otherwise.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """What would run.

  Attributes:
    model: as shapes.open_shapes takes it.
    label: of the method, in words.
    transform: what quantizes the model; None: nothing.
    settings: of the calibration.
    calibrates: whether it is planned.
    evaluates: '' not at all, 'alone' the quantized model, 'compared' with the
      float one beside it.
    decodes: whether a decode step is planned.
    window, tokens: of the evaluation.
    decode_batch: rows of a decode step; None: 8, or as many as `data` needs.
    dtype: of float parameters in evaluation and decoding.
    kv_cache: what a decode step keeps keys and values in; None: contiguous.
    mesh: as --mesh; '': chosen.
    wrap: what the calibration makes of the model (mixed.LabelledModel).
  """

  model: str
  label: str
  transform: transform_lib.Transform | None
  settings: plan.Settings
  calibrates: bool = True
  evaluates: str = 'alone'
  decodes: bool = True
  window: int = _WINDOW
  tokens: int = 16384
  decode_batch: int | None = None
  dtype: str = 'float32'
  kv_cache: interface.CacheConfig | None = None
  mesh: str = ''
  wrap: Callable[[Any], Any] = lambda model: model


def label(description: Mapping[str, Any]) -> str:
  """'W4A16 with gptq', from a recipe's description."""
  methods = [method['method'] for method in description['methods']]
  return f'{description["scheme"]} with {", ".join(methods)}'


def make_planner(job: Job) -> plan.Planner:
  """The planner of a job.

  Raises:
    As shapes.open_shapes; ValueError, NotImplementedError: what a method says
      of the shapes.
  """
  model = shapes.open_shapes(job.model)
  steps = []
  if job.evaluates:
    steps.append(_evaluation(job, model))
  if job.decodes:
    steps.append(_decoding(job, model))
  return plan.Planner(
    job.wrap(model),
    job.transform,
    job.settings,
    steps,
    calibrates=job.calibrates,
    runs=stored_runs(model, job.model) if job.transform is None else (),
  )


def stored_runs(
  model: shapes.ShapeModel, source: str
) -> list[tuple[int, Mapping[str, Any]]]:
  """Runs of equal blocks as they are stored, by the first block of each.

  Of a float model, and of a shape by name, they are float.
  """
  if source in shapes.CONFIGS:
    return model.float_runs()
  opened = loading.open_model(source)
  if opened.quantization is None:
    return model.float_runs()
  runs, start = [], 0
  for length in model.config.kind_runs():
    block = opened.source.block(start)
    part = {'params': block['params'], 'quant': block.get('quant', {})}
    runs.append((length, steps_lib.shapes_of(part)))
    start += length
  return runs


def _evaluation(job: Job, model: shapes.ShapeModel) -> plan.Step:
  """The step that scores windows, with the float model or alone."""
  compared = job.evaluates == 'compared'
  floats = (model.outside(), model.float_runs())

  def arguments(outside, runs, mesh):
    rules = model.rules(mesh)
    tokens = jax.ShapeDtypeStruct((mesh.shape['data'], job.window), jnp.int32)
    variables = [model.variables(outside, runs, job.dtype)]
    if compared:
      variables.insert(0, model.variables(*floats, job.dtype))
    return (
      *(plan_phases.abstract(v, rules, mesh) for v in variables),
      plan_phases.abstract_batch(tokens, mesh),
    )

  def lower(outside, runs, arguments):
    scorer = adapters.scorer(model.module(outside, runs, job.dtype))
    if not compared:
      return perplexity.lower(scorer, *arguments)
    reference = adapters.scorer(model.module(*floats, job.dtype))
    before, after, tokens = arguments
    return divergence.lower(reference, before, scorer, after, tokens)

  windows = max(1, job.tokens // job.window)
  return plan.Step(
    name='evaluate',
    calls=lambda mesh: -(-windows // mesh.shape['data']),
    arguments=arguments,
    lower=lower,
  )


def _decoding(job: Job, model: shapes.ShapeModel) -> plan.Step:
  """One token of every row, with caches as long as the settings' length.

  Caches lie as interface.shardings has them.
  """

  def model_of(outside, runs):
    module = model.module(outside, runs, job.dtype)
    return adapters.language_model(module, job.kv_cache)

  def batch_of(mesh):
    data = mesh.shape['data']
    rows = job.decode_batch
    if rows is None:
      rows = -(-_ROWS // data) * data
    if rows % data:
      raise ValueError(
        f'mesh data:{data}: {rows} rows to decode; data must divide them. '
        'Choose another mesh or number of rows.'
      )
    return rows

  def arguments(outside, runs, mesh):
    rules = model.rules(mesh)
    variables = model.variables(outside, runs, job.dtype)
    B = batch_of(mesh)
    language_model = model_of(outside, runs)
    caches = jax.eval_shape(
      lambda: language_model.init_caches(B, job.settings.length)
    )
    rows: Any = jax.ShapeDtypeStruct((B,), jnp.int32)
    done: Any = jax.ShapeDtypeStruct((B,), jnp.bool_)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
    state = autoregressive.State(
      anchor=rows,
      length=rows,
      done=done,
      caches=None,
    )
    state, keys = plan_phases.abstract_batch((state, keys), mesh)
    caches = tuple(
      jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        cache,
        interface.shardings(cache, mesh),
      )
      for cache in caches
    )
    state = state.replace(caches=caches)
    return plan_phases.abstract(variables, rules, mesh), keys, state

  def lower(outside, runs, arguments):
    language_model = model_of(outside, runs)
    return autoregressive.lower_step(language_model, *arguments)

  return plan.Step(
    name='decode', calls=lambda mesh: 1, arguments=arguments, lower=lower
  )
