"""What one process of a job does in tests/multihost/test_worker.py.

  python -m tests.multihost.worker --folder=DIR   (and the flags of the job)

Every property prints its name on process 0 when it holds; an assertion that
fails ends the job.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

import models
from experiments import cli, evaluation, generation
from jaxq.decode import sampling as sampling_lib
from jaxq.io import checkpoint, lazy, shared_checkpoint, trees
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.parallel import arrays, distributed
from jaxq.parallel import mesh as mesh_lib

FLAGS = flags.FLAGS
flags.DEFINE_string('folder', None, 'With model/, a Hugging Face directory.')

X = np.arange(64, dtype=np.float32).reshape(8, 8)


def main(argv: Sequence[str]) -> None:
  """Checks one property after the other."""
  del argv
  folder = pathlib.Path(FLAGS.folder)
  mesh = mesh_lib.choose('', batch_size=2)
  assert dict(mesh.shape) == {'data': 2, 'model': jax.device_count() // 2}
  put_and_fetch(mesh)
  agree(folder)
  tree = stored(mesh)
  write(folder / 'out', tree)
  here, there = load(folder, mesh)
  evaluate(folder, mesh, here, there)
  generate(here, there)


def put_and_fetch(mesh) -> None:
  """Each process reads its own shards, and gets all values back."""
  read = []

  def part(index):
    read.append(index)
    return X[index]

  array = lazy.LazyArray(shape=X.shape, dtype=X.dtype, read=part)
  placed = arrays.put(
    array, NamedSharding(mesh, PartitionSpec('data', 'model'))
  )
  assert not placed.is_fully_addressable
  assert len(read) == jax.local_device_count()
  np.testing.assert_array_equal(arrays.fetch({'x': placed})['x'], X)
  # Those that were computed on one device of each process, too.
  whole = arrays.put(jnp.asarray(X), mesh_lib.replicated(mesh))
  np.testing.assert_array_equal(arrays.fetch(whole), X)
  turned = arrays.put(placed, NamedSharding(mesh, PartitionSpec('model')))
  np.testing.assert_array_equal(arrays.fetch(turned), X)
  print('put and fetch', flush=True)


def agree(folder: pathlib.Path) -> None:
  """What process 0 says holds for all; a difference is named by all."""
  said = distributed.on_first(lambda: [jax.process_index(), str(folder)])
  assert said == [0, str(folder)]
  distributed.check_same('flags', {'--x': '1'})
  index = jax.process_index()
  try:
    distributed.check_same('data', {'data': 'old' if index == 1 else 'new'})
  except ValueError as e:
    assert 'process 1 (' in str(e), e
    assert 'runs other data: data=old there, new on process 0' in str(e), e
    assert 'The cache of that host may be stale' in str(e), e
  else:
    raise AssertionError('nobody noticed')
  failed: Any = None
  try:
    distributed.on_first(lambda: 1 // 0)
  except (ZeroDivisionError, distributed.Elsewhere) as e:
    failed = e
  assert isinstance(failed, ZeroDivisionError) == (index == 0), failed
  print('agree', flush=True)


def stored(mesh) -> dict[str, Any]:
  """A block's tree: quantized, in part sharded, in part replicated."""
  w = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
  spec = spec_lib.QuantSpec(dtype='int4', granularity='group', group_size=16)
  tree = {
    'mlp': {'kernel': jax.device_get(qarray.quantize(jnp.asarray(w), spec))},
    'norm': {'scale': np.arange(32, dtype=np.float32)},
    'bias': np.arange(32, dtype=np.float32).astype(jnp.bfloat16),
  }
  rules = ((r'kernel', PartitionSpec(None, 'model')),)
  return {'params': mesh_lib.place(tree, rules, mesh), 'quant': {}}


def write(output: pathlib.Path, tree: dict[str, Any]) -> None:
  """All processes write one directory, which one alone reads, and all."""
  want = jax.tree.leaves(arrays.fetch(tree))
  with shared_checkpoint.open_writer(output, {'flags': 'same'}) as writer:
    assert not writer.complete and not writer.has_block(0)
    writer.save_outside({'embed': {'embedding': X}})
    for _ in range(2):  # The second takes the place of the first.
      writer.save_block(0, tree)
    assert writer.has_block(0) and not writer.has_block(1)
    for got in (
      jax.tree.leaves(trees.load(output / checkpoint.block_name(0))),
      jax.tree.leaves(writer.load_block(0)),
    ):
      assert len(got) == len(want)
      for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype, (a.dtype, b.dtype)
        np.testing.assert_array_equal(np.asarray(a), b)
  with shared_checkpoint.open_writer(output, {'flags': 'same'}) as writer:
    assert writer.has_outside() and writer.has_block(0)
    model = {'family': 'decoder', 'config': {'num_hidden_layers': 1}}
    writer.finish({'model': model, 'quantization': None}, None)
  with shared_checkpoint.open_writer(output, {'flags': 'same'}) as writer:
    assert writer.complete
  print('write', flush=True)


def load(folder: pathlib.Path, mesh) -> tuple[models.Model, models.Model]:
  """A model on the mesh has the values of the model on one device."""
  source = str(folder / 'model')
  here, there = models.load(source), models.load(source, mesh=mesh)
  for a, b in zip(
    jax.tree.leaves(here.variables),
    jax.tree.leaves(arrays.fetch(there.variables)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  print('load', flush=True)
  return here, there


def evaluate(folder: pathlib.Path, mesh, here, there) -> None:
  """Both score the same."""
  text = str(folder / 'text.txt')
  windows = evaluation.load_windows(here, source=text, window=32, tokens=96)
  one = evaluation.compare(None, here, windows)
  many = evaluation.compare(None, there, windows, mesh=mesh)
  np.testing.assert_allclose(many.model.nll, one.model.nll, rtol=1e-4)
  print('evaluate', flush=True)


def generate(here, there) -> None:
  """Both continue a text alike, drawn and token by token."""
  prompt, how = 'Five hexing', {'max_new_tokens': 8}
  drawn = sampling_lib.Sampling(temperature=1.0)
  one, many = (
    list(generation.stream(model, prompt, sampling=drawn, **how))
    for model in (here, there)
  )
  assert one == many, (one, many)
  print('generate', flush=True)


if __name__ == '__main__':
  cli.run(main)
