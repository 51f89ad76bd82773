r"""Trains a MosaicQA model: digits in videos, questions about them.

  python -m experiments.train --flagfile=experiments/flags/mosaicqa.flags

The model is cached by what went into it: the same command again trains nothing,
a run that was killed goes on with the same command. Without --output it lies
under $JAXQ_CACHE/mosaicqa; the last line says where. `--token_reducer` of
experiments.evaluate and experiments.generate reads it.
"""

import os
import pathlib
import sys
from collections.abc import Mapping, Sequence

import jax
import tqdm
from absl import flags

from experiments import cli, mosaic_evaluation, results, training
from jaxq import config_text
from jaxq.data import mosaic, mosaic_variants
from jaxq.parallel import mesh as mesh_lib
from models import vision_language

FLAGS = flags.FLAGS

DATA: Mapping[str, mosaic.MosaicConfig] = {
  'audio': mosaic_variants.audio_config(),
  'caption': mosaic_variants.caption_config(),
  'image': mosaic.image_config(),
  'video': mosaic.MosaicConfig(),
}
MODELS: Mapping[str, vision_language.VisionLanguageConfig] = {
  'base': vision_language.VisionLanguageConfig(),
  'small': vision_language.VisionLanguageConfig(
    patch_size=8,
    vision_size=64,
    vision_layers=2,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    mlp_ratio=2,
  ),
}
TRAINING: Mapping[str, training.TrainConfig] = {'adamw': training.TrainConfig()}

flags.DEFINE_string(
  'data', 'video', 'What is shown and asked, as in video:frames=4,repeat=0.5.'
)
flags.DEFINE_string(
  'model', 'base', 'Shape of the model, as in small:num_layers=4.'
)
flags.DEFINE_string(
  'train', 'adamw', 'How to train, as in adamw:steps=1000,batch=32.'
)
flags.DEFINE_string(
  'output', None, 'Folder of the model. Default: in the cache, by content.'
)
flags.DEFINE_string('mesh', '', 'Device mesh, as in data:2,model:4.')
flags.DEFINE_integer(
  'eval_videos', 256, 'Test videos to measure on; 0: none.', lower_bound=0
)


def job() -> training.Job:
  """What the flags ask for."""

  def read(flag, table):
    example = {'data': 'video:frames=4', 'model': 'small', 'train': 'adamw'}
    return config_text.parse(
      getattr(FLAGS, flag), table, flag=flag, noun=flag, example=example[flag]
    )

  data = read('data', DATA)
  model = training.fit(data, read('model', MODELS))
  return training.Job(data=data, model=model, train=read('train', TRAINING))


def main(argv: Sequence[str]) -> None:
  """Trains, measures with all tokens, and says where the model is."""
  del argv
  wanted = job()
  mesh = mesh_lib.choose(FLAGS.mesh, wanted.train.batch)
  if mesh is not None:
    for name in ('batch', 'vision_batch'):
      size = getattr(wanted.train, name)
      mesh_lib.check_divides(name, size, mesh, 'data')
  folder = pathlib.Path(FLAGS.output or training.folder_of(wanted))
  first = jax.process_index() == 0
  if first:
    folder.mkdir(parents=True, exist_ok=True)
    cli.write_flagfile(folder / 'resolved.flags')
  total = wanted.train.vision_steps + wanted.train.steps
  bar = tqdm.tqdm(
    total=total,
    desc='train',
    unit='step',
    dynamic_ncols=True,
    disable=not first,
  )

  def report(progress: training.Progress) -> None:
    before = wanted.train.vision_steps if progress.phase == 'answers' else 0
    bar.n = before + progress.step
    bar.set_postfix_str(
      f'{progress.phase}, loss {progress.loss:.3f}, accuracy '
      f'{progress.accuracy:.3f}'
    )

  try:
    training.train(wanted, folder, mesh=mesh, report=report)
  finally:
    bar.close()
  if FLAGS.eval_videos:
    _measure(folder, first)
  if first:
    print(f'the model is in {folder}', file=sys.stderr)


def _measure(folder: pathlib.Path, first: bool) -> None:
  """Prints and stores the accuracy with all tokens, by kind of question."""
  trained = training.load(folder)
  row = mosaic_evaluation.full_accuracy(trained, FLAGS.eval_videos)
  results.print_table([row])
  if not first:
    return
  info = results.run_info(cli.resolved_flags())
  results.save(folder / 'results.json', results.Result(run=info, rows=(row,)))
  if row['accuracy'].value < mosaic_evaluation.LEAST_ACCURACY:
    print(
      f'the accuracy with all tokens is {row["accuracy"].value:.1%}, below '
      f'{mosaic_evaluation.LEAST_ACCURACY:.0%}: comparisons of reducers on '
      'this model say little. Train longer.',
      file=sys.stderr,
    )


if __name__ == '__main__':
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  cli.run(main)
