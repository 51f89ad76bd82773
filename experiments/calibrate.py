r"""Quantizes a language model block by block, measures it and saves it.

  python -m experiments.calibrate \
      --flagfile=experiments/flags/smollm2_w4a16_gptq.flags

The source is a packaged name (smollm2-135m), a .gguf file, or a Hugging Face
directory. The output is a directory that `experiments.evaluate`,
`experiments.generate` and `models.load` read. A run that was killed goes on
with the same command; OUTPUT.run/ keeps its log, its resolved flags and its
results.
"""

import dataclasses
import json
import os
import pathlib
import resource
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
import tqdm
from absl import flags
from jax.sharding import Mesh

import models
from experiments import cli, evaluation, recipe, results
from jaxq.calibrate import driver, run
from jaxq.data import pipeline
from jaxq.parallel import mesh as mesh_lib
from jaxq.quant import schemes

FLAGS = flags.FLAGS

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
flags.DEFINE_multi_string(
  'ignore', [], 'Linears kept float: a name (down_proj) or re:PATTERN.'
)
flags.DEFINE_string(
  'data',
  'wiki-sample:calibration',
  'Calibration text: packaged name, .txt, .jsonl or folder.',
)
flags.DEFINE_integer('sequences', 64, 'Calibration sequences.', lower_bound=1)
flags.DEFINE_integer(
  'sequence_length', 512, 'Tokens of a calibration sequence.', lower_bound=2
)
flags.DEFINE_integer('batch_size', 8, 'Sequences per step.', lower_bound=1)
flags.DEFINE_enum(
  'inputs',
  'quantized',
  ['quantized', 'float'],
  'Which block feeds the next one: the quantized or the float one.',
)
flags.DEFINE_string(
  'mesh', '', 'Device mesh, as in data:2,model:4. Default: one device.'
)
flags.DEFINE_bool('evaluate', True, 'Measure the model before and after.')
flags.DEFINE_string(
  'eval_data', 'wiki-sample:evaluation', 'Evaluation text, as --data.'
)
flags.DEFINE_integer(
  'eval_tokens', 16384, 'Evaluation tokens, in whole windows.', lower_bound=2
)
flags.DEFINE_integer(
  'eval_window', 2048, 'Tokens of an evaluation window.', lower_bound=2
)
flags.mark_flags_as_required(['model', 'output'])


def main(argv: Sequence[str]) -> None:
  """Calibrates, saves, evaluates and prints the table."""
  del argv
  start = time.perf_counter()
  mesh = mesh_lib.make_mesh(FLAGS.mesh) if FLAGS.mesh else None
  scheme = schemes.parse(
    FLAGS.scheme,
    group_size=FLAGS.group_size,
    symmetric=FLAGS.symmetric,
    input_clip=FLAGS.input_clip,
  )
  built = recipe.build(FLAGS.method, scheme, FLAGS.set)
  model = models.open_model(FLAGS.model)
  config = driver.CalibrationConfig(
    batch_size=min(FLAGS.batch_size, FLAGS.sequences),
    inputs=FLAGS.inputs,
    ignore=tuple(FLAGS.ignore),
  )
  recipe.check_groups(
    scheme, model.block_at(0).without(config.ignore, 0), model.block_params(0)
  )
  tokens = _tokens(model)
  # Now, so that no hours of work end in a word about these flags.
  windows = _windows(model) if FLAGS.evaluate else None
  log = pathlib.Path(f'{pathlib.Path(FLAGS.output)}.run')
  _say(
    f'{FLAGS.model}: {model.num_blocks} blocks, {scheme.name} with '
    f'{", ".join(m["method"] for m in built.description["methods"])}, '
    f'{tokens.shape[0]} x {tokens.shape[1]} tokens of {FLAGS.data}'
  )
  progress = _Progress(model.num_blocks, log)
  try:
    ran = run.calibrate(
      model,
      built.transform,
      tokens,
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
    results.Metric(name='peak memory', value=_peak_gigabytes(), unit='GB'),
  )
  if ran:
    _say(f'saved {FLAGS.output}')
  if windows is not None:
    _evaluate(windows, log, cost if ran else (), mesh)
  _say(f'log and results are in {log}')


def _tokens(model: models.OpenModel) -> np.ndarray:
  """The calibration tokens (sequences, sequence_length)."""
  longest = model.config.max_position
  if FLAGS.sequence_length > longest:
    raise ValueError(
      f'--sequence_length={FLAGS.sequence_length}; {FLAGS.model} takes '
      f'sequences of at most {longest} tokens. Give --sequence_length='
      f'{longest} or less.'
    )
  data = pipeline.DataConfig(
    source=FLAGS.data,
    num_sequences=FLAGS.sequences,
    sequence_length=FLAGS.sequence_length,
  )
  return pipeline.calibration_tokens(data, model.tokenizer())


def _windows(model: models.OpenModel) -> pipeline.EvaluationWindows:
  """What the models are measured on."""
  return evaluation.load_windows(
    model,
    source=FLAGS.eval_data,
    window=FLAGS.eval_window,
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
    self._log.mkdir(parents=True, exist_ok=True)
    cli.write_flagfile(self._log / 'resolved.flags')
    self._keep(done)
    if done:
      _say(f'resuming: {done} of {self._num_blocks} blocks are done')
    self._bar = tqdm.tqdm(
      total=self._num_blocks,
      initial=done,
      unit='block',
      desc='calibrate',
      disable=jax.process_index() != 0,
      dynamic_ncols=True,
    )

  def block(self, report: driver.BlockReport) -> None:
    """Logs a finished block."""
    with open(self._log / 'blocks.jsonl', 'a', encoding='utf-8') as f:
      f.write(json.dumps(dataclasses.asdict(report)) + '\n')
    if self._bar is not None:
      self._bar.set_postfix_str(
        f'layer {report.index}, output SQNR {report.output_sqnr_db:.1f} dB, '
        f'peak {_peak_gigabytes():.2f} GB'
      )
      self._bar.update()

  def _keep(self, done: int) -> None:
    """Drops what an earlier run, or the last moments of this one, left."""
    (self._log / 'results.json').unlink(missing_ok=True)
    path = self._log / 'blocks.jsonl'
    if path.exists():
      lines = path.read_text('utf-8').splitlines(keepends=True)
      whole = [line for line in lines if line.endswith('\n')]
      kept = [line for line in whole if json.loads(line)['index'] < done]
      results.write_text(path, ''.join(kept))

  def close(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.close()


def _evaluate(
  windows: pipeline.EvaluationWindows,
  log: pathlib.Path,
  cost: tuple[results.Metric, ...],
  mesh: Mesh | None,
) -> None:
  """Prints the before/after table and writes the results."""
  reference = models.load(FLAGS.model, mesh=mesh)
  quantized = models.load(FLAGS.output, mesh=mesh)
  rows = list(
    evaluation.compare(reference, quantized, windows, mesh=mesh).rows()
  )
  rows[-1] = dataclasses.replace(rows[-1], metrics=rows[-1].metrics + cost)
  results.print_table(rows)
  info = results.run_info(cli.resolved_flags())
  results.save(log / 'results.json', results.Result(run=info, rows=tuple(rows)))


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
