"""Ahead-of-time plans: what --plan of every entry point does.

`run` compiles the functions of a job (plan_job.Job) for --topology without
running any, prints what they take of a device and the time below which they
cannot stay, and says whether they fit; where they do not, which is the smallest
topology where they do.
"""

import collections
import os
import subprocess
import sys
from collections.abc import Mapping

import jax
from absl import flags

from experiments import cli, plan_job, results
from jaxq.calibrate import plan as plan_lib
from jaxq.calibrate import plan_topology
from jaxq.parallel import mesh as mesh_lib

_PLAN = flags.DEFINE_bool(
  'plan',
  False,
  'Run nothing: compile for --topology and say what a device needs, and '
  'whether it fits (exit code 1 if not).',
)
_TOPOLOGY = flags.DEFINE_string(
  'topology',
  None,
  'What to plan for: a TPU slice (v5e:16x16) or a number of GPUs (h100:8) or '
  'simulated CPUs (cpu:8).',
)
_OUTPUT = flags.DEFINE_string(
  'plan_output', None, 'JSON file for the figures of the plan.'
)
_SEARCH = flags.DEFINE_bool(
  'plan_search',
  True,
  'Where the plan does not fit, look for the smallest topology that does.',
)

GB = 1e9
_SIMULATED = 64  # Devices to search among, where the topology has fewer.


def asked() -> bool:
  """Whether --plan was given."""
  return _PLAN.value


def run(job: plan_job.Job, module: str) -> int:
  """Plans, prints and saves.

  Args:
    job: what would run.
    module: the entry point, to start again with simulated devices.

  Returns:
    The exit code: 0 if it fits, else 1.

  Raises:
    ValueError: no or an unknown topology, a mesh that does not fit it.
  """
  if not _TOPOLOGY.value:
    raise ValueError(
      '--topology not given; ' + plan_topology.unknown('').partition('; ')[2]
    )
  topology = plan_topology.parse(_TOPOLOGY.value)
  if topology.is_tpu:
    # There is no TPU to ask about, and nobody to tell.
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    os.environ.setdefault('TPU_MIN_LOG_LEVEL', '3')
    os.environ.setdefault('TPU_STDERR_LOG_LEVEL', '3')
  else:
    least = 1 if topology.chip == 'cpu' else _SIMULATED
    code = _again_with(max(least, topology.num_devices), module)
    if code is not None:
      return code
  planner = plan_job.make_planner(job)
  mesh: Mapping[str, int] = mesh_shape(job.mesh, topology)
  if not mesh:
    mesh, _ = planner.best_mesh(topology)
  plan = planner.plan(topology, mesh)
  rows = list(plan_rows(plan))
  print(_heading(job, plan))
  _print_tables(plan)
  print(verdict(plan), flush=True)
  rows.append(_summary('plan', plan))
  if not plan.fits and _SEARCH.value:
    found = planner.smallest(plan)
    print(_alternative(found))
    if found is not None:
      rows.append(_summary('smallest that fits', found))
  if _OUTPUT.value is not None:
    info = results.run_info(cli.resolved_flags())
    results.save(_OUTPUT.value, results.Result(run=info, rows=tuple(rows)))
    print(f'plan: {_OUTPUT.value}')
  return 0 if plan.fits else 1


def mesh_shape(text: str, topology: plan_topology.Topology) -> dict[str, int]:
  """--mesh as {'data': ..., 'model': ...}; {} where it is not given.

  Raises:
    ValueError: as mesh_lib.make_mesh and plan_topology.devices.
  """
  if not text:
    return {}
  mesh = mesh_lib.make_mesh(text, plan_topology.devices(topology))
  return dict(mesh.shape)


def plan_rows(plan: plan_lib.Plan) -> list[results.Row]:
  """All figures of a plan, a row per phase."""
  rows = []
  for phase in plan.phases:
    metrics = _memory_metrics(phase, plan) + _work_metrics(phase)
    rows.append(results.Row(name=phase.name, metrics=metrics))
  return rows


def verdict(plan: plan_lib.Plan) -> str:
  """'fits: ...' or 'does not fit: ...', and the lower bound in words."""
  peak, memory = plan.peak, plan.topology.memory
  lines = [
    f'{"fits" if plan.fits else "does not fit"}: {plan.topology.name} with '
    f'--mesh={plan.mesh_flag} needs {peak.total / GB:.2f} of '
    f'{memory / GB:.2f} GB on a device, in {peak.name}'
  ]
  if plan.seconds is not None:
    lines.append(
      f'lower bound on the time of all calls: {plan.seconds:.3g} s (roofline; '
      'nothing was timed, and real runs take longer)'
    )
  return '\n'.join(lines)


def _memory_metrics(
  phase: plan_lib.PlannedPhase, plan: plan_lib.Plan
) -> tuple[results.Metric, ...]:
  def gigabytes(name, size):
    return results.Metric(name=name, value=size / GB, unit='GB')

  share = 100 * phase.total / plan.topology.memory
  return (
    gigabytes('arguments', phase.arguments),
    gigabytes('outputs', phase.outputs),
    gigabytes('temporaries', phase.temporaries),
    gigabytes('resident', phase.resident),
    gigabytes('total', phase.total),
    results.Metric(name='of memory', value=share, unit='%'),
  )


def _work_metrics(
  phase: plan_lib.PlannedPhase,
) -> tuple[results.Metric, ...]:
  if phase.program is None or phase.program.work is None:
    return ()
  work, bound = phase.program.work, phase.bound
  count = sum(c.count for c in work.collectives)
  metric = results.Metric
  found = [
    metric(name='calls', value=phase.calls),
    metric(name='TFLOP', value=work.total_flops / 1e12),
    metric(name='collectives', value=count),
    metric(name='sent', value=work.collective_bytes / 1e6, unit='MB'),
  ]
  if bound is not None:
    found += [
      metric(name=name, value=1e3 * getattr(bound, name), unit='ms')
      for name in ('compute', 'memory', 'links')
    ]
  return tuple(found)


def _print_tables(plan: plan_lib.Plan) -> None:
  memory = [
    results.Row(name=p.name, metrics=_memory_metrics(p, plan))
    for p in plan.phases
  ]
  print('\nMemory of one device:\n')
  print(results.to_markdown(memory))
  work = [
    results.Row(name=p.name, metrics=_work_metrics(p))
    for p in plan.phases
    if _work_metrics(p)
  ]
  title = 'Work of one device and call'
  if any(p.bound for p in plan.phases):
    title += '; compute, memory, links: lower bounds, no time was measured'
  print(f'{title}:\n')
  print(results.to_markdown(work))
  for phase in plan.phases:
    program = phase.program
    if program is not None and program.work is None:
      reason = (
        'refused by the compiler; it needs more memory'
        if program.refused
        else 'this jaxlib cannot read what it does; a newer one may'
      )
      print(f'{phase.name}: {reason}.')
    elif text := work_text(phase):
      print(f'{phase.name}: {text}')
  print()


def work_text(phase: plan_lib.PlannedPhase) -> str:
  """'4 all-reduce over data (268 MB), ...'; '' if there is nothing to say."""
  if phase.program is None or phase.program.work is None:
    return ''
  work = phase.program.work
  counts: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0])
  for counted in work.collectives:
    collective = counted.collective
    key = f'{collective.kind} over {" and ".join(collective.axes) or "none"}'
    counts[key][0] += counted.count
    counts[key][1] += counted.count * collective.nbytes
  found = [
    f'{int(count)} {key} ({size / 1e6:.3g} MB)'
    for key, (count, size) in sorted(counts.items())
  ]
  if work.unknown_loops:
    found.append(f'{work.unknown_loops} loops of unknown length counted once')
  return ', '.join(found)


def _heading(job: plan_job.Job, plan: plan_lib.Plan) -> str:
  settings, topology = job.settings, plan.topology
  device = f'{topology.num_devices} devices of {topology.memory / GB:.1f} GB'
  lines = [f'{job.model}, {job.label}']
  if job.calibrates:
    lines[0] += (
      f', {settings.samples} x {settings.length} tokens in batches of '
      f'{plan.batch_size}, float32'
    )
  lines.append(f'{topology.name} ({device}), --mesh={plan.mesh_flag}')
  lines.append(f'compiled by {topology.compiler}; nothing was run')
  return '\n'.join(lines)


def _alternative(found: plan_lib.Plan | None) -> str:
  if found is None:
    return 'no larger topology was found to fit; a smaller batch may.'
  batches = f' (batches of {found.batch_size})' if found.batch_size else ''
  return (
    f'smallest that fits: --topology={found.topology.name} '
    f'--mesh={found.mesh_flag}{batches}: {found.peak.total / GB:.2f} of '
    f'{found.topology.memory / GB:.2f} GB, compiled'
  )


def _summary(name: str, plan: plan_lib.Plan) -> results.Row:
  where = {
    'topology': plan.topology.name,
    'mesh': plan.mesh_flag,
    'batch_size': plan.batch_size,
    'compiler': plan.topology.compiler,
  }
  metric = results.Metric
  metrics = [
    metric(name='fits', value=int(plan.fits), conventions=where),
    metric(name='peak', value=plan.peak.total / GB, unit='GB'),
    metric(name='device memory', value=plan.topology.memory / GB, unit='GB'),
  ]
  if plan.seconds is not None:
    metrics.append(
      metric(name='lower bound on time', value=plan.seconds, unit='s')
    )
  return results.Row(name=name, metrics=tuple(metrics))


def _again_with(count: int, module: str) -> int | None:
  """Runs this command in a process with so many simulated devices.

  Returns:
    Its exit code; None where this process has them.
  """
  wanted = f'--xla_force_host_platform_device_count={count}'
  given = os.environ.get('XLA_FLAGS', '')
  if len(jax.devices('cpu')) >= count or wanted in given:
    return None
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  env['XLA_FLAGS'] = f'{given} {wanted}'.strip()
  command = [sys.executable, '-m', module, *sys.argv[1:]]
  return subprocess.run(command, env=env, check=False).returncode
