r"""How much host memory does a model need that is streamed through a mesh?

  python -m benchmarks.streaming_memory --work=/tmp/jaxq_streaming \
      --gigabytes=4 --processes=4

Writes a synthetic Llama checkpoint in shards of safetensors (bfloat16), and
starts a job of several processes, each of which, block after block, reads the
shards of its own devices by byte range, rounds the block to int4 on the mesh
and writes its part of it. Prints per process the bytes it read, and the peak of
its resident memory above that of a job over a model of one block: what grows
with the size of a model. Simulated devices hold their arrays in host memory
too, so the peak counts the block on the devices as well.

Exit code 1 if a process's peak grows by more than one block of float32.
"""

import json
import math
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
from absl import flags
from jax.experimental import multihost_utils

import models
from benchmarks import local_job
from experiments import cli, results
from jaxq.calibrate import steps
from jaxq.io import shared_checkpoint
from jaxq.numerics import spec as spec_lib
from jaxq.parallel import arrays
from jaxq.parallel import mesh as mesh_lib
from jaxq.quant import round_to_nearest

FLAGS = flags.FLAGS
flags.DEFINE_string('work', '/tmp/jaxq_streaming', 'Where to write.')
flags.DEFINE_float('gigabytes', 4.0, 'Size of the checkpoint.', lower_bound=0.1)
flags.DEFINE_integer('processes', 4, 'Of the job.', lower_bound=1)
flags.DEFINE_integer('devices', 2, 'Simulated ones per process.', lower_bound=1)
flags.DEFINE_string('stream', None, 'Of the processes: the model to stream.')

CONFIG = {
  'model_type': 'llama',
  'hidden_act': 'silu',
  'rope_theta': 10000.0,
  'rms_norm_eps': 1e-5,
  'tie_word_embeddings': True,
  'max_position_embeddings': 2048,
  'vocab_size': 512,
  'hidden_size': 2048,
  'intermediate_size': 8192,
  'num_attention_heads': 16,
  'num_key_value_heads': 8,
  'head_dim': 128,
}


def main(argv: Sequence[str]) -> int:
  """Measures; or, started by itself with --stream, is one of the processes."""
  del argv
  if FLAGS.stream is not None:
    print(json.dumps(stream(pathlib.Path(FLAGS.stream))), flush=True)
    return 0
  work = pathlib.Path(FLAGS.work)
  per_block = sum(2 * math.prod(shape) for shape in _shapes().values())
  depth = max(2, round(FLAGS.gigabytes * 1e9 / per_block))
  rows, peaks = [], {}
  for blocks in (1, depth):
    model = write_model(work / f'model_{blocks}', blocks)
    peaks[blocks] = []
    for i, seen in enumerate(_run(model, work)):
      peaks[blocks].append(seen['peak'])
      metric = results.Metric
      values = {
        'peak above start': (seen['peak'] / 1e6, 'MB'),
        'read': (seen['read'] / 1e6, 'MB'),
        'checkpoint': (_size(model) / 1e6, 'MB'),
        'one block in float32': (2 * per_block / 1e6, 'MB'),
        'seconds': (seen['seconds'], 's'),
      }
      rows.append(
        results.Row(
          name=f'{blocks} blocks, process {i}',
          metrics=tuple(
            metric(name=name, value=value, unit=unit)
            for name, (value, unit) in values.items()
          ),
        )
      )
  results.print_table(rows)
  growth = max(b - a for a, b in zip(peaks[1], peaks[depth], strict=True))
  fits = growth <= 2 * per_block
  print(
    f'growth of the peak with {depth} blocks for 1: {growth / 1e6:.0f} MB, '
    f'{"within" if fits else "ABOVE"} one block of {2 * per_block / 1e6:.0f} MB'
  )
  return int(not fits)


def write_model(folder: pathlib.Path, blocks: int) -> pathlib.Path:
  """Writes a Hugging Face directory, a file per block; returns it."""
  if (folder / 'config.json').exists():
    return folder
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  width = CONFIG['hidden_size']
  embedding = rng.standard_normal((CONFIG['vocab_size'], width), np.float32)
  outside = {
    'model.embed_tokens.weight': embedding.astype(ml_dtypes.bfloat16),
    'model.norm.weight': np.ones(width, ml_dtypes.bfloat16),
  }
  weight_map = _save(folder, 'outside', outside)
  for i in range(blocks):
    weight_map |= _save(folder, f'block_{i:03d}', _block(i))
  index = {'metadata': {}, 'weight_map': weight_map}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  config = {**CONFIG, 'num_hidden_layers': blocks}
  (folder / 'config.json').write_text(json.dumps(config))
  return folder


def stream(model: pathlib.Path) -> list[dict[str, float]]:
  """Reads, rounds and writes every block; what each process saw of it."""
  mesh = mesh_lib.make_mesh(f'model:{jax.device_count()}')
  opened = models.open_model(str(model), lazy=True)
  weights = spec_lib.QuantSpec(
    dtype='int4', granularity='group', group_size=128
  )
  config = round_to_nearest.RoundToNearestConfig(weights=weights)
  transform = round_to_nearest.round_to_nearest(config)
  made: Any = steps.Steps(
    [transform], opened.embed, None, opened.rules(mesh), mesh
  )
  output = model.with_name(model.name + '_out')
  start, read, before = time.monotonic(), _bytes_read(), _resident()
  with (
    _Peak() as peak,
    shared_checkpoint.open_writer(output, {'model': model.name}) as writer,
  ):
    writer.save_outside(arrays.to_store(made.place(opened.outside())))
    for i in range(opened.num_blocks):
      variables = {'params': opened.block_params(i), 'quant': {}}
      solve = made.place_to_solve(variables)
      params, quant = made.apply[0](opened.block_at(i), *solve.values(), {})
      writer.save_block(
        i, arrays.to_store(made.place({'params': params, 'quant': quant}))
      )
      del variables, solve, params, quant
  seen = {
    'peak': peak.value - before,
    'read': _bytes_read() - read,
    'seconds': time.monotonic() - start,
  }
  every = multihost_utils.process_allgather(np.array([*seen.values()]))
  return [
    dict(zip(seen, map(float, values), strict=True))
    for values in every.reshape(-1, len(seen))
  ]


def _run(model: pathlib.Path, work: pathlib.Path) -> list[dict[str, float]]:
  """What each process of a fresh job saw."""
  shutil.rmtree(model.with_name(model.name + '_out'), ignore_errors=True)
  command = [sys.executable, '-m', 'benchmarks.streaming_memory']
  report = work / 'report'
  job = local_job.LocalJob(
    [*command, f'--stream={model}'],
    report,
    processes=FLAGS.processes,
    devices=FLAGS.devices,
  )
  codes = job.wait(3600)
  if any(codes):
    raise ValueError(f'the job failed: {codes}, {job.reasons()}')
  return json.loads(job.out(0).splitlines()[-1])


def _shapes() -> dict[str, tuple[int, ...]]:
  """Tensors of a block, as the file has them."""
  C, F = CONFIG['hidden_size'], CONFIG['intermediate_size']
  q, kv = (
    CONFIG['head_dim'] * CONFIG[f'num_{name}_heads']
    for name in ('attention', 'key_value')
  )
  return {
    'input_layernorm': (C,),
    'self_attn.q_proj': (q, C),
    'self_attn.k_proj': (kv, C),
    'self_attn.v_proj': (kv, C),
    'self_attn.o_proj': (C, q),
    'post_attention_layernorm': (C,),
    'mlp.gate_proj': (F, C),
    'mlp.up_proj': (F, C),
    'mlp.down_proj': (C, F),
  }


def _block(i: int) -> dict[str, np.ndarray]:
  """Random tensors of a block by name."""
  rng = np.random.default_rng(i + 1)
  made = {}
  for name, shape in _shapes().items():
    array = np.ones(shape, np.float32)
    if len(shape) == 2:
      array = rng.standard_normal(shape, np.float32) * shape[1] ** -0.5
    array = array.astype(ml_dtypes.bfloat16)
    made[f'model.layers.{i}.{name}.weight'] = array
  return made


def _save(folder: pathlib.Path, name: str, tensors) -> dict[str, str]:
  file = f'{name}.safetensors'
  safetensors.numpy.save_file(tensors, str(folder / file))
  return dict.fromkeys(tensors, file)


def _size(model: pathlib.Path) -> int:
  return sum(path.stat().st_size for path in model.glob('*.safetensors'))


def _bytes_read() -> int:
  """Bytes that this process read by system calls so far."""
  return _number(pathlib.Path('/proc/self/io'), 'rchar:')


def _resident() -> int:
  """Bytes of memory of this process now, files that are mapped left out."""
  return _number(pathlib.Path('/proc/self/status'), 'RssAnon:') * 1024


def _number(path: pathlib.Path, label: str) -> int:
  if path.exists():
    for line in path.read_text().splitlines():
      if line.startswith(label):
        return int(line.split()[1])
  raise ValueError(f'{path} has no {label} here; Linux is needed.')


class _Peak:
  """The largest `_resident` while it is open, looked at every 5 ms."""

  value = 0

  def __enter__(self) -> '_Peak':
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *unused_exception) -> None:
    self._over.set()
    self._thread.join()

  def _watch(self) -> None:
    while not self._over.wait(0.005):
      self.value = max(self.value, _resident())


if __name__ == '__main__':
  cli.run(main)
