r"""How a calibration's bytes grow with the devices, and what sharding costs.

  python -m benchmarks.scaling --output_dir=docs            the growth
  python -m benchmarks.scaling --output_dir=docs --measure  the overhead

The growth is planned, not run: one job (--model, --sequences of
--sequence_length tokens, GPTQ) compiled for 1, 2, 4, ... devices, of which up
to --model_axis share the weights and the rest the sequences. It writes
scaling.json, scaling.svg and prints the table: bytes per device, and bytes that
cross devices, for one block.

The overhead is measured, on simulated devices: all of them are threads of this
one host, so that more of them add no speed. The same small calibration runs on
1, 2, 4 and 8, with as much work in all (strong) or on each (weak). Were
sharding free, strong would take the same time on any number, and weak the
number's multiple; what is beyond that is overhead. It says nothing of the speed
of a real slice.
"""

import json
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

import jax
from absl import flags

from experiments import cli, results
from jaxq.calibrate import driver, plan, plan_topology
from jaxq.parallel import mesh as mesh_lib
from jaxq.quant import gptq, schemes
from models import decoder, shapes

FLAGS = flags.FLAGS
flags.DEFINE_string('output_dir', 'out/scaling', 'Where to write.')
flags.DEFINE_string('model', 'llama3-8b', 'A shape by name.')
flags.DEFINE_integer('sequences', 512, 'Of the job.', lower_bound=1)
flags.DEFINE_integer('sequence_length', 2048, 'Of the job.', lower_bound=2)
flags.DEFINE_integer('model_axis', 8, 'Devices that share the weights.')
flags.DEFINE_list(
  'counts', [str(2**i) for i in range(10)], 'Numbers of devices it grows by.'
)
flags.DEFINE_bool('measure', False, 'Measure the overhead instead.')
flags.DEFINE_multi_integer('devices', [1, 2, 4, 8], 'To measure on.')
flags.DEFINE_integer('repeats', 3, 'Runs of each; the median counts.')
flags.DEFINE_string('one', None, 'Internal: DEVICES:SEQUENCES of one run.')

# Of the measured run: small, but with matmuls that are worth sharding.
SMALL = decoder.DecoderConfig(
  vocab_size=512,
  hidden_size=256,
  intermediate_size=1024,
  num_layers=4,
  num_heads=8,
  num_kv_heads=8,
  head_dim=32,
)
LENGTH, LEAST, BATCHES = 128, 32, 4


def main(argv: Sequence[str]) -> int | None:
  """Grows or measures; see above."""
  del argv
  if FLAGS.one is not None:
    print(json.dumps(run_one(*map(int, FLAGS.one.split(':')))))
    return None
  folder = pathlib.Path(FLAGS.output_dir)
  if (
    not FLAGS.measure
    and (code := again(max(map(int, FLAGS.counts)))) is not None
  ):
    return code
  rows = measured() if FLAGS.measure else grown()
  kind = 'overhead' if FLAGS.measure else 'growth'
  table = results.to_markdown(rows)
  print(table)
  info = results.run_info(cli.resolved_flags())
  path = folder / f'scaling_{kind}.json'
  results.save(path, results.Result(run=info, rows=tuple(rows)))
  write_table(folder / 'scaling.md', kind, table)
  if not FLAGS.measure:
    draw(rows, folder / 'scaling.svg')
  return None


def write_table(page: pathlib.Path, kind: str, table: str) -> None:
  """Puts a table between <!-- KIND --> and <!-- end of KIND --> of a page."""
  if not page.exists():
    return
  before, begin, rest = page.read_text('utf-8').partition(f'<!-- {kind} -->')
  _, end, after = rest.partition(f'<!-- end of {kind} -->')
  if not begin or not end:
    raise ValueError(
      f'{page}: no place for a table between <!-- {kind} --> and <!-- end of '
      f'{kind} -->; add these two lines.'
    )
  command = f'Made by `{results.command()}`.'
  text = f'{before}{begin}\n\n{table}\n{command}\n\n{end}{after}'
  results.write_text(page, text)


def grown() -> list[results.Row]:
  """A row per number of devices."""
  weights = schemes.parse('W4A16').weights
  assert weights is not None
  planner = plan.Planner(
    shapes.open_shapes(FLAGS.model),
    gptq.gptq(gptq.GptqConfig(weights=weights)),
    plan.Settings(samples=FLAGS.sequences, length=FLAGS.sequence_length),
  )
  rows = []
  for devices in map(int, FLAGS.counts):
    topology = plan_topology.parse(f'cpu:{devices}')
    model = math.gcd(devices, FLAGS.model_axis)
    mesh = {'data': devices // model, 'model': model}
    rows.append(grown_row(planner.plan(topology, mesh)))
    print(f'{devices} devices: planned', file=sys.stderr, flush=True)
  return rows


def grown_row(made: plan.Plan) -> results.Row:
  """Bytes of a device: what it holds, and what it exchanges for a block."""
  metric = results.Metric
  phases = {phase.name: phase for phase in made.phases}
  metrics = [
    metric(name='data', value=made.mesh['data']),
    metric(name='model', value=made.mesh['model']),
    metric(name='batch', value=made.batch_size),
    metric(name='peak', value=made.peak.total / 1e9, unit='GB'),
  ]
  for name in ('observe_gptq', 'apply_gptq', 'forward'):
    metrics.append(metric(name=name, value=phases[name].total / 1e9, unit='GB'))
  for name in ('observe_gptq', 'forward'):
    metrics.append(
      metric(name=f'{name} sends', value=block_bytes(phases[name]), unit='MB')
    )
  return results.Row(
    name=str(made.topology.num_devices), metrics=tuple(metrics)
  )


def block_bytes(phase: plan.PlannedPhase) -> float:
  """MB of collectives of all of a block's batches, on one device."""
  assert phase.program is not None and phase.program.work is not None
  blocks = shapes.open_shapes(FLAGS.model).num_blocks
  return phase.program.work.collective_bytes * phase.calls / blocks / 1e6


def draw(rows: Sequence[results.Row], path: pathlib.Path) -> None:
  """The table as two charts beside each other.

  Raises:
    NotImplementedError: matplotlib is not installed.
  """
  try:
    import matplotlib.pyplot as plt
  except ImportError as e:
    raise NotImplementedError(
      'the plot needs matplotlib, which is not installed; install it with '
      'pip install matplotlib.'
    ) from e
  devices = [int(row.name) for row in rows]
  figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
  charts = (
    ('Held by one device', 'GB', ('observe_gptq', 'apply_gptq', 'forward')),
    (
      'Sent and received by one device for a block',
      'MB',
      ('observe_gptq sends', 'forward sends'),
    ),
  )
  for axis, (title, unit, names) in zip(axes, charts, strict=True):
    for name in names:
      axis.plot(
        devices,
        [row[name].value for row in rows],
        marker='o',
        label=name.removesuffix(' sends'),
      )
    axis.set(title=title, xlabel='devices', ylabel=unit)
    axis.set_xscale('log', base=2)
    axis.set_yscale('log')
    axis.set_xticks(devices, [str(n) for n in devices])
    axis.grid(alpha=0.3)
    axis.legend()
  path.parent.mkdir(parents=True, exist_ok=True)
  # No date and fixed ids: the same figures give the same file.
  plt.rcParams['svg.hashsalt'] = 'jaxq'
  figure.savefig(path, metadata={'Date': None})


def measured() -> list[results.Row]:
  """A row per kind of scaling and number of devices."""
  rows = []
  for kind in ('strong', 'weak'):
    alone = 0.0  # Seconds on one device.
    for devices in FLAGS.devices:
      share = max(FLAGS.devices) if kind == 'strong' else devices
      runs = [_spawn(devices, LEAST * share) for _ in range(FLAGS.repeats)]
      seconds = sorted(run['seconds'] for run in runs)[len(runs) // 2]
      print(f'{kind}, {devices}: {seconds:.2f} s', file=sys.stderr, flush=True)
      alone = alone or seconds
      # All devices are this one host, which has so many times the work to do.
      ideal = alone * (devices if kind == 'weak' else 1)
      metric = results.Metric
      rows.append(
        results.Row(
          name=f'{kind}, {devices}',
          metrics=(
            metric(name='sequences', value=LEAST * share),
            metric(name='wall', value=seconds, unit='s'),
            metric(name='without overhead', value=ideal, unit='s'),
            metric(name='overhead', value=seconds / ideal),
            metric(name='crossing', value=runs[0]['megabytes'], unit='MB'),
          ),
        )
      )
  return rows


def run_one(devices: int, sequences: int) -> dict[str, float]:
  """One calibration of the small model on so many simulated devices."""
  from tests.calibrate import testing  # Random weights, kept in memory.

  weights = schemes.parse('W4A16', group_size=64).weights
  assert weights is not None
  transform = gptq.gptq(gptq.GptqConfig(weights=weights))
  mesh_flag = f'data:{devices},model:1'
  mesh = mesh_lib.make_mesh(mesh_flag, jax.devices()[:devices])
  batch_size = sequences // BATCHES
  config = driver.CalibrationConfig(batch_size=batch_size)
  model = testing.small_model(SMALL)
  tokens = testing.tokens(sequences, LENGTH)
  calibrator = driver.Calibrator(model, transform, config, mesh)
  calibrator.run(tokens, testing.MemoryStore())  # Compiles.
  start = time.perf_counter()
  calibrator.run(tokens, testing.MemoryStore())
  seconds = time.perf_counter() - start
  planner = plan.Planner(
    shapes.ShapeModel(config=SMALL, name='small'),
    transform,
    plan.Settings(samples=sequences, length=LENGTH, batch_size=batch_size),
  )
  topology = plan_topology.parse(f'cpu:{devices}')
  made = planner.plan(topology, dict(mesh.shape))
  crossing = sum(
    p.calls * p.program.work.collective_bytes
    for p in made.phases
    if p.program is not None and p.program.work is not None
  )
  return {'seconds': seconds, 'megabytes': crossing / 1e6}


def again(devices: int) -> int | None:
  """Runs this command with so many simulated devices, if there are fewer."""
  if len(jax.devices('cpu')) >= devices:
    return None
  command = [sys.executable, '-m', 'benchmarks.scaling', *sys.argv[1:]]
  return subprocess.run(command, env=_env(devices), check=False).returncode


def _spawn(devices: int, sequences: int) -> dict[str, float]:
  """`run_one` in a process of its own."""
  command = [sys.executable, '-m', 'benchmarks.scaling']
  done = subprocess.run(
    [*command, f'--one={devices}:{sequences}'],
    env=_env(devices),
    stdout=subprocess.PIPE,
    text=True,
    check=False,
  )
  if done.returncode:
    raise ValueError(
      f'{" ".join(command)} on {devices} devices exits with code '
      f'{done.returncode}; it must succeed. Its own message is above.'
    )
  return json.loads(done.stdout.splitlines()[-1])


def _env(devices: int) -> dict[str, str]:
  count = f'--xla_force_host_platform_device_count={devices}'
  given = os.environ.get('XLA_FLAGS', '')
  return {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{given} {count}'.strip(),
  }


if __name__ == '__main__':
  cli.run(main)
