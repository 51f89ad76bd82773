"""Prints why more evidence can mean fewer right answers.

  python -m benchmarks.token_reduction_sinks --model=FOLDER

FOLDER is one of experiments.train. What is measured, and on which tokens, is
described in benchmarks.reduction_sinks. Half a minute on a CPU core.
"""

from collections.abc import Sequence

from absl import flags

from benchmarks import reduction_sinks
from experiments import cli, training

FLAGS = flags.FLAGS
flags.DEFINE_string('model', None, 'Folder of experiments.train.')
flags.DEFINE_integer('videos', 192, 'Test videos.', lower_bound=1)
flags.DEFINE_integer('kept', 16, 'Tokens of sets that have so many.')

_HEAD = (
  'tokens',
  'number',
  'digits kept',
  'accuracy',
  'yes: one found',
  'right of these',
  'presence: neither',
)


def main(argv: Sequence[str]) -> None:
  """Prints a table and the attention to noise."""
  del argv
  if FLAGS.model is None:
    raise ValueError(
      '--model not given; the tokens are those of a folder of '
      'experiments.train. Train one, then give --model=FOLDER.'
    )
  trained = training.load(FLAGS.model, 'video')
  videos = reduction_sinks.load(trained, FLAGS.videos)
  print('| ' + ' | '.join(_HEAD) + ' |')
  print('| --- |' + ' ---: |' * (len(_HEAD) - 1))
  for name, keep in reduction_sinks.choices(videos, FLAGS.kept).items():
    found = reduction_sinks.measure(trained, videos, keep)
    cells = [f'{found["number"]:.1f}']
    cells += [f'{found[key]:.1%}' for key in list(found)[1:]]
    print('| ' + ' | '.join([name, *cells]) + ' |')
  for i, shares in enumerate(reduction_sinks.attention(trained, videos)):
    told = ', '.join(f'{kind} {share:.1%}' for kind, share in shares.items())
    print(f'attention to noise in block {i}: {told}')


if __name__ == '__main__':
  cli.run(main)
