"""Plans small calibrations for eight simulated devices, runs them, compares.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \
    python -m tests.calibrate.planned_calibration METHOD...

Prints one JSON line per method: for every phase the bytes of the device that
holds most, planned and found. What is found:

  live      after each call of a jitted function of the driver, the shards of
            all live arrays on a device, no buffer counted twice; the largest
            over the calls. Held against the plan less its temporaries.
  program   memory_analysis of the same function, compiled from the very arrays
            of the run. Held against the plan's program. Of the first method.

Then it prints a line on a program whose collectives and flops are known, and
one on the search for a topology that fits.
"""

import collections
import functools
import gc
import json
import sys

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxq.calibrate import driver, plan, plan_hlo, plan_topology
from jaxq.numerics import spec as spec_lib
from jaxq.parallel import mesh as mesh_lib
from jaxq.quant import activations, gptq, ptq161, smoothquant
from jaxq.quant import transform as transform_lib
from models import decoder, shapes
from tests.calibrate import testing

MESH = {'data': 2, 'model': 4}
CONFIG = decoder.DecoderConfig(
  vocab_size=256,
  hidden_size=128,
  intermediate_size=512,
  num_layers=1,
  num_heads=8,
  num_kv_heads=4,
  head_dim=16,
)
SAMPLES, LENGTH, BATCH = 16, 64, 4
W4 = spec_lib.QuantSpec(dtype='int4', granularity='group', group_size=32)
W8 = spec_lib.QuantSpec(dtype='int8', granularity='channel')
A8 = spec_lib.QuantSpec(dtype='int8', granularity='token')
METHODS = {
  'gptq': lambda: gptq.gptq(gptq.GptqConfig(weights=W4)),
  'w8a8': lambda: transform_lib.chain(
    smoothquant.smoothquant(smoothquant.SmoothQuantConfig()),
    gptq.gptq(gptq.GptqConfig(weights=W8)),
    activations.activations(activations.ActivationsConfig(inputs=A8)),
  ),
  # It asks for the block's inputs, all batches of both models.
  'ptq161': lambda: ptq161.ptq161(
    ptq161.PTQ161Config(
      weights=spec_lib.QuantSpec(dtype='binary'),
      epochs=1,
      samples=4,
      batch_size=4,
      scale_dtype='float32',
    )
  ),
}


def live_bytes():
  """Bytes of live arrays on the device that holds most."""
  gc.collect()
  sizes = collections.Counter()
  seen = set()
  for array in jax.live_arrays():
    for shard in array.addressable_shards:
      buffer = (shard.device.id, shard.data.unsafe_buffer_pointer())
      if buffer not in seen:
        seen.add(buffer)
        sizes[shard.device.id] += shard.data.nbytes
  return max(sizes.values(), default=0)


class Watch:
  """Wraps jitted functions; notes what is alive behind each call.

  Attributes:
    live: name -> bytes.
    programs: name -> bytes of the program, without and with temporaries.
  """

  def __init__(self, compiles):
    self._compiles = compiles
    self.live = collections.Counter()
    self.programs = {}
    self._base = live_bytes()

  def wrap(self, name, function):
    """The function, watched."""

    def call(*args):
      if self._compiles and name not in self.programs and name != 'probe':
        memory = function.lower(*args).compile().memory_analysis()
        known = (
          memory.argument_size_in_bytes
          + memory.output_size_in_bytes
          - memory.alias_size_in_bytes
        )
        self.programs[name] = (known, memory.temp_size_in_bytes)
      out = jax.block_until_ready(function(*args))
      del args
      self.live[name] = max(self.live[name], live_bytes() - self._base)
      return out

    return call


def run(method, compiles):
  """Name of a phase -> figures planned and found."""
  transform = METHODS[method]()
  config = driver.CalibrationConfig(batch_size=BATCH)
  topology = plan_topology.parse('cpu:8')
  settings = plan.Settings(samples=SAMPLES, length=LENGTH, batch_size=BATCH)
  model = shapes.ShapeModel(config=CONFIG, name='small')
  planned = plan.Planner(model, transform, settings).plan(topology, MESH)
  mesh = mesh_lib.make_mesh('data:2,model:4', jax.devices())
  real = testing.small_model(CONFIG)
  tokens = testing.tokens(SAMPLES, LENGTH)
  watch = Watch(compiles)
  calibrator = driver.Calibrator(real, transform, config, mesh)
  steps, probe = calibrator.steps, calibrator._probe
  steps.embed = watch.wrap('embed', steps.embed)
  for i, stage in enumerate(steps.stages):
    observe, apply = f'observe_{stage.name}', f'apply_{stage.name}'
    steps.observe[i] = watch.wrap(observe, steps.observe[i])
    steps.apply[i] = watch.wrap(apply, steps.apply[i])
  steps.forward = watch.wrap('forward', steps.forward)
  steps.forward_float = watch.wrap('forward_float', steps.forward_float)
  probe._apply = watch.wrap('probe', probe._apply)
  calibrator.run(tokens, testing.MemoryStore())
  rows = {}
  for phase in planned.phases:
    if phase.name not in watch.live:
      continue
    row = {
      'planned_live': phase.total - phase.temporaries,
      'live': watch.live[phase.name],
    }
    if compiles and phase.program is not None:
      row['planned_program'] = [
        phase.program.arguments + phase.program.outputs,
        phase.program.temporaries,
      ]
      row['program'] = watch.programs[phase.name]
    rows[phase.name] = row
  return {'method': method, 'phases': rows, 'ran': sorted(watch.live)}


def known_program():
  """Three matmuls in a loop, whose contraction is shared out over `model`.

  x (8, 64) over data, w (3, 64, 64) by rows over model: on a device each of
  the three is (4, 16) x (16, 64), and their results (4, 64) are summed.
  """
  mesh = mesh_lib.make_mesh('data:2,model:4', jax.devices())
  place = functools.partial(NamedSharding, mesh)
  x = jax.ShapeDtypeStruct(
    (8, 64), jnp.float32, sharding=place(PartitionSpec('data'))
  )
  w = jax.ShapeDtypeStruct(
    (3, 64, 64), jnp.float32, sharding=place(PartitionSpec(None, 'model'))
  )

  def body(x, w):
    y = lax.with_sharding_constraint(x @ w, place(PartitionSpec('data')))
    return y, None

  compiled = jax.jit(lambda x, w: lax.scan(body, x, w)[0]).lower(x, w).compile()
  work = plan_hlo.work(compiled.as_text(), mesh)
  return {
    'flops': dict(work.flops),
    'unknown_loops': work.unknown_loops,
    'collectives': [
      [c.collective.kind, c.collective.axes, c.collective.nbytes, c.count]
      for c in work.collectives
    ],
  }


def search():
  """A job that does not fit one H100, and the smallest number that it does.

  The activations alone, twice, are 2 x 2^24 x 64 x 128 x 4 bytes: 1.1 TB,
  shared out over `data`.
  """
  settings = plan.Settings(samples=2**21, length=LENGTH)
  model = shapes.ShapeModel(config=CONFIG, name='small')
  planner = plan.Planner(model, METHODS['gptq'](), settings)
  one = plan_topology.parse('h100:1')
  first = planner.plan(one, planner.best_mesh(one)[0])
  found = planner.smallest(first)
  return {
    'first': first.fits,
    'topology': found.topology.name,
    'mesh': found.mesh_flag,
    'fits': found.fits,
    'peak': found.peak.total,
    'half': first.peak.total / found.topology.num_devices * 2,
    'seconds': found.seconds,
  }


def main(methods):
  for i, method in enumerate(methods):
    print(json.dumps(run(method, compiles=not i)), flush=True)
  print(json.dumps(known_program()), flush=True)
  print(json.dumps(search()), flush=True)


if __name__ == '__main__':
  main(sys.argv[1:])
