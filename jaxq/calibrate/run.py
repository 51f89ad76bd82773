"""`calibrate`: a float model to a finished quantized directory, resumable.

  calibrate(model, transform, data, output)

ties the driver to a checkpoint.Writer. What the output's bytes depend on (the
tokens, the settings, the weights, the code, JAX and the device) is its
fingerprint: the same call on an unfinished directory goes on with it, another
one is refused. All processes of a job make the same call; they compare their
fingerprints first.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
import tokenizers
from jax.sharding import Mesh

from jaxq.calibrate import driver
from jaxq.io import checkpoint, files, shared_checkpoint
from jaxq.parallel import distributed, preemption
from jaxq.quant import transform as transform_lib


class SourceModel(driver.CalibrationModel, Protocol):
  """What `calibrate` needs of a model beside what the driver does."""

  def description(self) -> dict[str, Any]: ...

  def fingerprint(self) -> str: ...

  def tokenizer(self) -> tokenizers.Tokenizer | None: ...


def calibrate(
  model: SourceModel,
  transform: transform_lib.Transform,
  data: Any,
  output: str | os.PathLike,
  *,
  config: driver.CalibrationConfig | None = None,
  mesh: Mesh | None = None,
  settings: Mapping[str, Any] | None = None,
  on_start: Callable[[int], None] = lambda blocks_done: None,
  on_block: Callable[[driver.BlockReport], None] = lambda report: None,
) -> bool:
  """Quantizes a model into a directory that models.load reads.

  Args:
    model: from models.open_model.
    transform: the method, or a chain.
    data: what the model's `embed` takes, all samples; of a decoder tokens
      (sequences, T) int32, from pipeline.calibration_tokens.
    output: a new directory, or one that this same call was writing.
    config: how the driver runs; None is its default.
    mesh: None is the default device.
    settings: JSON data that says what the transform is; kept in the manifest
      and part of the fingerprint. None: the names of its stages, which do not
      tell their hyper-parameters.
    on_start: called with the number of blocks that are done already.
    on_block: called with each block's report.

  Returns:
    False if the directory was complete already.

  Raises:
    ValueError: the directory holds something else, the driver refuses, or
      another process of the job has other code, flags or data.
    OSError: it cannot be written.
    preemption.Preempted: a SIGTERM came; all finished blocks are saved.
  """
  config = driver.CalibrationConfig() if config is None else config
  if settings is None:
    names = [stage.name for stage in transform_lib.stages(transform)]
    settings = {'methods': [{'method': name} for name in names]}
  calibrator = driver.Calibrator(model, transform, config, mesh)
  if not checkpoint.is_checkpoint(output):
    calibrator.check(data)  # A run that cannot end leaves nothing behind.
  marks = fingerprint(model, data, config, mesh, settings)
  check_same(marks)
  with shared_checkpoint.open_writer(output, marks) as writer:
    if writer.complete:
      return False
    on_start(sum(writer.has_block(i) for i in range(model.num_blocks)))
    with preemption.finishing():
      calibrator.run(data, writer, on_block)
    tokenizer = model.tokenizer()
    writer.finish(
      {
        'model': model.description(),
        'num_blocks': model.num_blocks,
        'quantization': {**settings, 'ignore': list(config.ignore)},
      },
      None if tokenizer is None else tokenizer.to_str(),
    )
  return True


def fingerprint(
  model: SourceModel,
  data: Any,
  config: driver.CalibrationConfig,
  mesh: Mesh | None,
  settings: Mapping[str, Any],
) -> dict[str, str]:
  """What the output's bytes depend on, as a flat dict of strings."""
  device = jax.devices()[0]
  leaves = jax.tree.leaves(data)
  digest = hashlib.sha256()
  for leaf in leaves:
    digest.update(np.ascontiguousarray(leaf).tobytes())
  chosen = {
    **settings,
    'batch_size': config.batch_size,
    'inputs': config.inputs,
    'ignore': config.ignore,
    'experts': config.experts,
    'reproducible': config.reproducible,
    'mesh': None if mesh is None else dict(mesh.shape),
  }
  if jax.process_count() > 1:  # The order of sums depends on it.
    chosen['processes'] = jax.process_count()
  return {
    'code': files.code_hash(),
    'data': ', '.join(
      [' x '.join(map(str, leaf.shape)) for leaf in leaves]
      + [digest.hexdigest()]
    ),
    'device': f'{device.platform} {device.device_kind}',
    'jax': jax.__version__,
    'source': model.fingerprint(),
    **{f'flags.{name}': json.dumps(value) for name, value in chosen.items()},
  }


def check_same(marks: Mapping[str, str]) -> None:
  """Raises ValueError if the fingerprints of a job's processes differ."""
  parts: dict[str, dict[str, str]] = {'code': {}, 'flags': {}, 'data': {}}
  for name, value in marks.items():
    what = 'data' if name in ('data', 'source') else 'code'
    parts['flags' if name.startswith('flags.') else what][name] = value
  for what, part in parts.items():
    distributed.check_same(what, part)
