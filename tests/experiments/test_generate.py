"""Tests of experiments.generate and experiments.generation."""

import os
import subprocess
import sys
import tempfile

from absl.testing import absltest

from experiments import generation
from jaxq.decode import sampling
from tests.decode import testing


def run(*flags):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.generate', *flags],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )


class GenerationTest(absltest.TestCase):
  def test_characters_of_several_tokens_are_never_broken(self):
    text = 'a\u00e9\u20ac\U0001f600 z'  # 1, 2, 3, 4, 1 and 1 bytes.
    tokens = list(text.encode('utf-8'))
    got = list(generation.pieces(testing.tokenizer(), tokens))
    self.assertEqual(got, list(text))

  def test_special_and_unfinished_text_is_left_out(self):
    tokens = [*b'ok', testing.EOS, *'\u20ac'.encode()[:2]]
    self.assertEqual(
      ''.join(generation.pieces(testing.tokenizer(), tokens)), 'ok'
    )

  def test_stream(self):
    model = testing.model()
    config = sampling.Sampling(temperature=1.0, top_k=50)

    def ids(seed):
      return list(
        generation.stream(
          model, 'hello', max_new_tokens=5, sampling=config, seed=seed
        )
      )

    first = ids(0)
    self.assertLen(first, 5)
    self.assertEqual(first, ids(0))
    self.assertNotEqual(first, ids(1))

  def test_empty_prompt_is_refused_at_the_call(self):
    with self.assertRaisesRegex(ValueError, "--prompt=''; .*Give some text"):
      generation.stream(
        testing.model(), '', max_new_tokens=5, sampling=sampling.GREEDY
      )

  def test_stopwatch(self):
    watch = generation.Stopwatch()
    self.assertEqual(list(watch.time([1, 2])), [1, 2])
    self.assertRegex(watch.summary(), r'^2 tokens in \d+\.\d s$')
    self.assertEqual(list(watch.time([3])), [3])
    self.assertRegex(watch.summary(), r'^3 tokens in .* s; [\d.]+ tokens/s aft')


class CommandTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    model = testing.model()
    folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.folder = testing.save(model, folder)
    cls.expected = ''.join(
      generation.pieces(
        model.tokenizer,
        generation.stream(
          model, 'hello', max_new_tokens=7, sampling=sampling.GREEDY
        ),
      )
    )

  def test_text_on_stdout_and_speed_on_stderr(self):
    done = run(f'--model={self.folder}', '--prompt=hello', '--max_new_tokens=7')
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertEqual(done.stdout, self.expected + '\n')
    self.assertRegex(done.stderr, '7 tokens in .* tokens/s')

  def test_too_long_is_one_line(self):
    done = run(
      f'--model={self.folder}', '--prompt=hello', '--max_new_tokens=252'
    )
    self.assertEqual(done.returncode, 1)
    self.assertRegex(done.stderr, r'^error: .*make 257; .* is 256\. Shorten')
    self.assertLen(done.stderr.splitlines(), 1)


if __name__ == '__main__':
  absltest.main()
