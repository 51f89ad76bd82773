r"""Quantizes a model block by block, measures it and saves it.

  python -m experiments.calibrate \
      --flagfile=experiments/flags/smollm2_w4a16_gptq.flags

The source is a packaged name (smollm2-135m, minilm-l6, vit-s14, whisper-base),
a .gguf or .onnx file, or a Hugging Face directory: of a language model, a text
encoder, a vision transformer or a speech model, each calibrated and measured in
its own way. The output is a directory that `experiments.evaluate`,
`experiments.generate` and `models.load` read. A run that was killed goes on
with the same command; OUTPUT.run/ keeps its log, resolved flags and results.
"""

import dataclasses
import os
import pathlib
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import tqdm
from absl import flags
from jax.sharding import Mesh

import models
from experiments import (
  cli,
  families,
  plan_job,
  planning,
  recipe,
  reporting,
  results,
  run_folder,
)
from jaxq.calibrate import driver, plan, run
from jaxq.parallel import mesh as mesh_lib
from jaxq.quant import mixed, schemes

FLAGS = flags.FLAGS

# Of a decoder, as experiments.families has them.
_LENGTH, _WINDOW = 512, 2048

flags.DEFINE_string(
  'model', None, 'Packaged name, .gguf file or Hugging Face directory.'
)
flags.DEFINE_string(
  'output', None, 'Directory to write; must be new or hold this same run.'
)
flags.DEFINE_string(
  'scheme',
  'W4A16',
  'How weights and inputs are stored: W<bits>A<bits> (16: float), '
  'FP8_DYNAMIC, MXFP4A16, NVFP4A16 or NF4A16.',
)
flags.DEFINE_list(
  'method', [], f'Methods, in order, of {", ".join(sorted(recipe.METHODS))}.'
)
flags.DEFINE_multi_string(
  'set', [], 'A field of a method: method.field=value, as in gptq.damping=0.1.'
)
flags.DEFINE_integer(
  'group_size',
  None,
  'Weights along K that share a scale; -1 is one scale per channel. Default: '
  "the scheme's own.",
)
flags.DEFINE_bool('symmetric', True, 'Symmetric integer weights.')
flags.DEFINE_float(
  'input_clip',
  1.0,
  'Factor on the range of integer inputs.',
  lower_bound=0.01,
  upper_bound=1.0,
)
flags.DEFINE_bool('input_symmetric', True, 'Symmetric integer inputs.')
flags.DEFINE_integer(
  'input_group_size',
  None,
  'Channels of a dynamic integer input that share a scale. Default: all.',
  lower_bound=1,
)
flags.DEFINE_string(
  'bits_from',
  None,
  'An allocation.json of experiments.sensitivity: weights of single linears.',
)
flags.DEFINE_multi_string(
  'ignore', [], 'Linears kept float: a name (down_proj) or re:PATTERN.'
)
flags.DEFINE_string(
  'data',
  None,
  'Calibration text (packaged name, .txt, .jsonl or folder), images or speech. '
  'Default: wiki-sample:calibration, photos:calibration, speech:calibration.',
)
flags.DEFINE_integer(
  'sequences',
  64,
  'Calibration sequences, passages, images or clips.',
  lower_bound=1,
)
flags.DEFINE_integer(
  'sequence_length',
  None,
  'Tokens of a calibration sequence. Default: 512; 128 for an encoder.',
  lower_bound=2,
)
flags.DEFINE_integer(
  'image_size', 224, 'Pixels of an image, both sides.', lower_bound=1
)
flags.DEFINE_integer('batch_size', 8, 'Sequences per step.', lower_bound=1)
flags.DEFINE_enum(
  'inputs',
  'quantized',
  ['quantized', 'float'],
  'Which block feeds the next one: the quantized or the float one.',
)
flags.DEFINE_enum(
  'experts',
  'routed',
  ['routed', 'all'],
  'Which tokens the statistics of an expert are taken of.',
)
flags.DEFINE_string(
  'mesh',
  '',
  'Device mesh, as in data:2,model:4. Default: one device; of several '
  'processes all.',
)
flags.DEFINE_bool(
  'reproducible',
  False,
  'The same bits on any mesh: each device takes one sequence at a time and '
  'solves all, so only forward passes are shared out. Sets --batch_size.',
)
flags.DEFINE_bool('evaluate', True, 'Measure the model before and after.')
flags.DEFINE_string(
  'eval_data', None, 'What to measure on, as --data. Default: :evaluation.'
)
flags.DEFINE_integer(
  'eval_samples', 256, 'Pairs of passages, or images, to measure an encoder on.'
)
flags.DEFINE_integer(
  'eval_tokens', 16384, 'Evaluation tokens, in whole windows.', lower_bound=2
)
flags.DEFINE_integer(
  'eval_window',
  None,
  'Tokens of an evaluation window. Default: 2048; 128 for an encoder.',
  lower_bound=2,
)
flags.DEFINE_string(
  'tensorboard_dir', None, 'Also write the figures as TensorBoard scalars.'
)
flags.mark_flags_as_required(['model', 'output'])


def main(argv: Sequence[str]) -> int | None:
  """Calibrates, saves, evaluates and prints the table; or plans that."""
  del argv
  start = time.perf_counter()
  if FLAGS.tensorboard_dir is not None:
    reporting.check_tensorboard()
  scheme = schemes.parse(
    FLAGS.scheme,
    group_size=FLAGS.group_size,
    symmetric=FLAGS.symmetric,
    input_clip=FLAGS.input_clip,
    input_symmetric=FLAGS.input_symmetric,
    input_group_size=FLAGS.input_group_size,
  )
  allocation = mixed.load(FLAGS.bits_from) if FLAGS.bits_from else None
  built = recipe.build(FLAGS.method, scheme, FLAGS.set, allocation)
  if planning.asked():
    if FLAGS.reproducible:
      raise ValueError(
        '--reproducible --plan: a plan is of blocks that are cut over the '
        'mesh. Leave one of the two out.'
      )
    job = _planned(built, allocation)
    return planning.run(job, 'experiments.calibrate')
  batch_size = min(FLAGS.batch_size, FLAGS.sequences)
  mesh = mesh_lib.choose(FLAGS.mesh, batch_size)
  if FLAGS.reproducible:
    batch_size = 1 if mesh is None else mesh.size
  model: Any = models.open_model(FLAGS.model, lazy=mesh is not None)
  if allocation is not None:
    model = mixed.LabelledModel(model, allocation)
  config = driver.CalibrationConfig(
    batch_size=batch_size,
    inputs=FLAGS.inputs,
    experts=FLAGS.experts,
    ignore=tuple(FLAGS.ignore),
    reproducible=FLAGS.reproducible,
  )
  recipe.check_groups(
    scheme, model.block_at(0).without(config.ignore, 0), model.block_params(0)
  )
  data, description = families.calibration_data(model, _choice())
  # Now, so that no hours of work end in a word about these flags.
  samples = None
  if FLAGS.evaluate:
    samples = families.evaluation_data(model, _evaluation_choice())
  log = pathlib.Path(f'{pathlib.Path(FLAGS.output)}.run')
  _say(
    f'{FLAGS.model}: {model.num_blocks} blocks, {scheme.name} with '
    f'{", ".join(m["method"] for m in built.description["methods"])}, '
    f'{description}'
  )
  progress = _Progress(model.num_blocks, log)
  try:
    ran = run.calibrate(
      model,
      built.transform,
      data,
      FLAGS.output,
      config=config,
      mesh=mesh,
      settings=built.description,
      on_start=progress.start,
      on_block=progress.block,
    )
  finally:
    progress.close()
  if not ran:
    _say(f'{FLAGS.output} is complete already; nothing to calibrate.')
  cost = (
    results.Metric(
      name='calibration', value=time.perf_counter() - start, unit='s'
    ),
    # Of this process's threads: what a loaded machine does not stretch.
    results.Metric(name='processor time', value=time.process_time(), unit='s'),
    results.Metric(name='peak memory', value=_peak_gigabytes(), unit='GB'),
  )
  if ran:
    _say(f'saved {FLAGS.output}')
  if samples is not None:
    _evaluate(samples, log, cost if ran else (), mesh)
  _report(log)
  return None


def _planned(
  built: recipe.Recipe, allocation: mixed.Allocation | None
) -> plan_job.Job:
  """What --plan plans: this run, evaluation included."""
  window = FLAGS.eval_window or _WINDOW
  return plan_job.Job(
    model=FLAGS.model,
    label=plan_job.label(built.description),
    transform=built.transform,
    settings=plan.Settings(
      samples=FLAGS.sequences,
      length=FLAGS.sequence_length or _LENGTH,
      batch_size=min(FLAGS.batch_size, FLAGS.sequences),
      inputs=FLAGS.inputs,
      ignore=tuple(FLAGS.ignore),
      experts=FLAGS.experts,
    ),
    evaluates='compared' if FLAGS.evaluate else '',
    decodes=False,
    window=window,
    tokens=FLAGS.eval_tokens,
    mesh=FLAGS.mesh,
    wrap=lambda model: (
      model if allocation is None else mixed.LabelledModel(model, allocation)
    ),
  )


def _choice() -> families.Choice:
  """What the flags say of the calibration data."""
  return families.Choice(
    source=FLAGS.data or '',
    samples=FLAGS.sequences,
    length=FLAGS.sequence_length or 0,
    image_size=FLAGS.image_size,
  )


def _evaluation_choice() -> families.Choice:
  """What the flags say of the evaluation data."""
  return families.Choice(
    source=FLAGS.eval_data or '',
    samples=FLAGS.eval_samples,
    length=FLAGS.eval_window or 0,
    image_size=FLAGS.image_size,
    tokens=FLAGS.eval_tokens,
  )


class _Progress:
  """The progress bar, and the log of finished blocks; on process 0 only."""

  def __init__(self, num_blocks: int, log: pathlib.Path):
    self._num_blocks = num_blocks
    self._log = log
    self._bar: tqdm.tqdm | None = None

  def start(self, done: int) -> None:
    """Called when the output directory is ours: the first thing we write."""
    if jax.process_index() != 0:
      return
    self._log.mkdir(parents=True, exist_ok=True)
    cli.write_flagfile(self._log / 'resolved.flags')
    run_folder.save_start(
      self._log,
      results.run_info(cli.resolved_flags()),
      FLAGS.model,
      self._num_blocks,
    )
    run_folder.keep_blocks(self._log, done)
    if done:
      _say(f'resuming: {done} of {self._num_blocks} blocks are done')
    self._bar = tqdm.tqdm(
      total=self._num_blocks,
      initial=done,
      unit='block',
      desc='calibrate',
      dynamic_ncols=True,
    )

  def block(self, report: driver.BlockReport) -> None:
    """Logs a finished block."""
    if jax.process_index() != 0:
      return
    run_folder.append_block(self._log, report)
    if self._bar is not None:
      self._bar.set_postfix_str(
        f'layer {report.index}, output SQNR {report.output_sqnr_db:.1f} dB, '
        f'peak {_peak_gigabytes():.2f} GB'
      )
      self._bar.update()

  def close(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.close()


def _evaluate(
  samples: Any,
  log: pathlib.Path,
  cost: tuple[results.Metric, ...],
  mesh: Mesh | None,
) -> None:
  """Prints the before/after table and writes the results."""
  reference = models.load(FLAGS.model, mesh=mesh)
  quantized = models.load(FLAGS.output, mesh=mesh)
  compare = families.of(reference).compare
  rows = list(compare(reference, quantized, samples, mesh=mesh))
  rows[-1] = dataclasses.replace(rows[-1], metrics=rows[-1].metrics + cost)
  results.print_table(rows)
  if jax.process_index() != 0:
    return
  info = results.run_info(cli.resolved_flags())
  results.save(log / 'results.json', results.Result(run=info, rows=tuple(rows)))


def _report(log: pathlib.Path) -> None:
  """Writes the page, and the scalars if asked for; on process 0 only."""
  if jax.process_index() != 0 or not run_folder.holds_run(log):
    return
  page = reporting.write(log)
  if FLAGS.tensorboard_dir is not None:
    reporting.write_scalars(log, FLAGS.tensorboard_dir)
  _say(f'log and results are in {log}; to look at: {page}')


def _peak_gigabytes() -> float:
  """Peak resident memory of this process."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak * (1 if sys.platform == 'darwin' else 1024) / 1e9


def _say(text: str) -> None:
  if jax.process_index() == 0:
    print(text, file=sys.stderr, flush=True)


if __name__ == '__main__':
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  cli.run(main)
