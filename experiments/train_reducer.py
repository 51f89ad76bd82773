r"""Trains a token reducer on a MosaicQA model.

  python -m experiments.train_reducer --model=FOLDER \
      --token_reducer=qtsplus:budget=0.1 --train=rate=0.001 --steps=2000

FOLDER is one of experiments.train. The reducer is cached by what went into it:
the same command again trains nothing, a run that was killed goes on with the
same command. Without --output it lies under $JAXQ_CACHE/reducers; the last line
says where. `--token_reducer` of experiments.evaluate and experiments.generate
reads it. Measured at the end: all tokens, the reducer, and as many tokens
drawn at random or evenly spaced.
"""

import os
import pathlib
import sys
from collections.abc import Sequence

import jax
import tqdm
from absl import flags

from experiments import cli, results, token_reduction, training
from experiments.reducer_training import job as job_lib
from experiments.reducer_training import program, registry

FLAGS = flags.FLAGS
_DEFAULTS = program.Schedule()

flags.DEFINE_string('model', None, 'Folder of experiments.train.')
flags.DEFINE_string(
  'token_reducer',
  None,
  'What is trained, as in tokenflex:counts=1/4/16; one of '
  f'{", ".join(registry.TRAININGS)}.',
  required=True,
)
flags.DEFINE_string(
  'train', '', "Fields of the reducer's training, as in rate=0.001,tau=0.5."
)
flags.DEFINE_integer('steps', _DEFAULTS.steps, 'How many.', lower_bound=1)
flags.DEFINE_integer('batch', _DEFAULTS.batch, 'Videos a step.', lower_bound=1)
flags.DEFINE_integer(
  'questions', _DEFAULTS.questions, 'About each video.', lower_bound=1
)
flags.DEFINE_integer('seed', _DEFAULTS.seed, 'Of all that is drawn.')
flags.DEFINE_integer(
  'save_every', _DEFAULTS.save_every, 'Steps.', lower_bound=1
)
flags.DEFINE_integer('log_every', _DEFAULTS.log_every, 'Steps.', lower_bound=1)
flags.DEFINE_string(
  'output', None, 'Folder of the reducer. Default: in the cache, by content.'
)
flags.DEFINE_integer(
  'eval_videos', 128, 'Test videos to measure on; 0: none.', lower_bound=0
)


def main(argv: Sequence[str]) -> None:
  """Trains, measures beside the controls, and says where the reducer is."""
  del argv
  if FLAGS.model is None:
    raise ValueError(
      '--model not given; a reducer is trained on a folder of '
      'experiments.train. Train one, then give --model=FOLDER.'
    )
  trained = training.load(FLAGS.model)
  names = ('steps', 'batch', 'questions', 'seed', 'save_every', 'log_every')
  schedule = program.Schedule(**{name: getattr(FLAGS, name) for name in names})
  wanted = job_lib.job(FLAGS.token_reducer, trained, schedule, FLAGS.train)
  folder = pathlib.Path(FLAGS.output or job_lib.folder_of(wanted))
  first = jax.process_index() == 0
  if first:
    folder.mkdir(parents=True, exist_ok=True)
    cli.write_flagfile(folder / 'resolved.flags')
  bar = tqdm.tqdm(
    total=schedule.steps,
    desc=f'train {wanted.name}',
    unit='step',
    dynamic_ncols=True,
    disable=not first,
  )

  def report(progress: job_lib.Progress) -> None:
    bar.n = progress.step
    bar.set_postfix_str(
      ', '.join(f'{k} {v:.3f}' for k, v in progress.figures.items())
    )

  try:
    job_lib.train(wanted, folder, report=report)
  finally:
    bar.close()
  if FLAGS.eval_videos:
    _measure(folder, trained, first)
  if first:
    print(f'the reducer is in {folder}', file=sys.stderr)


def _measure(
  folder: pathlib.Path, trained: training.Trained, first: bool
) -> None:
  """Prints and stores the reducer's accuracy, and that of its controls."""
  method = token_reduction.parse(str(folder), trained)
  share = method.config.budget
  texts = [str(folder)]
  texts += [f'{name}:budget={share}' for name in ('random', 'uniform')]
  rows = token_reduction.compare(trained, texts, FLAGS.eval_videos)
  results.print_table(rows)
  if first:
    run = results.run_info(cli.resolved_flags())
    results.save(folder / 'results.json', results.Result(run=run, rows=rows))


if __name__ == '__main__':
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  cli.run(main)
