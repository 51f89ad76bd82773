"""Tests of experiments.evaluate and experiments.evaluation."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
from absl.testing import absltest

from experiments import evaluation, results
from tests.decode import testing

TEXT = 'Five hexing wizard bots jump quickly, and caf\u00e9s close.\n' * 9


def run(*flags):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.evaluate', *flags],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )


def perturbed(model, size=0.05):
  """The model with noise on its head, so that it differs a little."""
  kernel = model.variables['params']['head']['kernel']
  noise = size * jax.random.normal(jax.random.key(9), kernel.shape)
  params = {
    **model.variables['params'],
    'head': {'kernel': kernel + noise},
  }
  return dataclasses.replace(
    model, variables={**model.variables, 'params': params}, name='perturbed'
  )


class EvaluationTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    folder = pathlib.Path(folder)
    cls.model = testing.model()
    cls.saved = testing.save(cls.model, folder / 'model')
    cls.text = folder / 'text.txt'
    cls.text.write_text(TEXT, 'utf-8')
    cls.windows = evaluation.load_windows(
      cls.model, source=str(cls.text), window=64, tokens=450
    )

  def test_windows(self):
    tokens = self.windows.tokens
    self.assertEqual(tokens.shape, (7, 64))  # 450 // 64.
    data = TEXT.encode('utf-8')
    self.assertEqual(tokens.reshape(-1).tolist(), list(data[: 7 * 64]))

  def test_alone(self):
    done = []
    got = evaluation.compare(
      None,
      self.model,
      self.windows,
      progress=lambda *args: done.append(args),
    )
    self.assertEqual(done[-1], (7, 7))
    (row,) = got.rows()
    self.assertEqual(
      [m.name for m in row.metrics],
      ['token perplexity', 'word perplexity', 'byte perplexity',
       'bits per byte'],
    )  # fmt: skip
    ppl = row[evaluation.PERPLEXITY]
    self.assertAlmostEqual(ppl.value, np.exp(got.model.nll.mean()), places=1)
    self.assertBetween(ppl.value, ppl.low, ppl.high)
    self.assertEqual(ppl.conventions['dtype'], 'float32')
    self.assertEqual(ppl.conventions['scored tokens'], 7 * 63)
    self.assertRegex(ppl.conventions['text'], 'windows of 64 tokens, without')
    for name, value in (
      (evaluation.WORD, got.model.word),
      (evaluation.BYTE, got.model.byte),
      (evaluation.BITS, got.model.bits_per_byte),
    ):
      np.testing.assert_allclose(row[name].value, value, rtol=1e-9)
    with self.assertRaisesRegex(ValueError, 'tiny was measured alone; .*ref'):
      _ = got.ratio

  def test_reference_is_scored_as_alone_and_the_ratio_is_paired(self):
    other = perturbed(self.model)
    got = evaluation.compare(self.model, other, self.windows)
    reference, row = got.rows()
    self.assertEqual((reference.name, row.name), ('tiny', 'perturbed'))
    alone = evaluation.compare(None, other, self.windows)
    np.testing.assert_allclose(got.model.nll, alone.model.nll, rtol=1e-5)
    ratio = row[evaluation.RATIO]
    np.testing.assert_allclose(
      ratio.value, got.model.token / got.reference.token, rtol=1e-6
    )
    self.assertEqual(ratio.conventions['against'], 'tiny')
    # Paired: far narrower than what the two perplexities by themselves allow.
    ppl = reference[evaluation.PERPLEXITY]
    self.assertLess(
      ratio.high - ratio.low, 0.3 * (ppl.high - ppl.low) / ppl.value
    )
    self.assertGreater(row[evaluation.KL].low, 0.0)
    self.assertBetween(row[evaluation.AGREEMENT].value, 0.5, 0.999)

  def test_same_model(self):
    got = evaluation.compare(self.model, self.model, self.windows)
    row = got.rows()[1]
    self.assertEqual(row[evaluation.RATIO].value, 1.0)
    self.assertEqual(row[evaluation.KL].value, 0.0)
    self.assertEqual(row[evaluation.AGREEMENT].value, 1.0)

  def test_mesh_changes_nothing(self):
    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    mesh = jax.sharding.Mesh(devices, ('data', 'model'))
    got = evaluation.compare(None, self.model, self.windows, mesh=mesh)
    alone = evaluation.compare(None, self.model, self.windows)
    np.testing.assert_allclose(got.model.nll, alone.model.nll, rtol=1e-6)

  def test_messages(self):
    def load(window, tokens):
      evaluation.load_windows(
        self.model, source=str(self.text), window=window, tokens=tokens
      )

    with self.assertRaisesRegex(ValueError, 'window=257; tiny takes .*2..256'):
      load(257, 1000)
    with self.assertRaisesRegex(ValueError, 'tokens=60, window=64; at least o'):
      load(64, 60)
    with self.assertRaisesRegex(ValueError, 'fill 7 windows of 64; 15 were'):
      load(64, 1000)

    def compare(reference, **fields):
      windows = dataclasses.replace(self.windows, **fields)
      evaluation.compare(reference, self.model, windows)

    with self.assertRaisesRegex(ValueError, 'ids 0..300; tiny has ids 0..256'):
      compare(None, tokens=np.array([[0, 300]]))
    other = testing.model(name='other')
    other.tokenizer.add_tokens(['new'])
    with self.assertRaisesRegex(ValueError, 'other .* tiny .*vocabularies dif'):
      compare(other)

  def test_command(self):
    output = self.text.with_name('results.json')
    done = run(
      f'--model={self.saved}',
      f'--reference={self.saved}',
      f'--data={self.text}',
      '--window=64',
      '--tokens=450',
      f'--output={output}',
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertRegex(done.stdout, r'(?s)token perplexity +\|.*perplexity ratio')
    self.assertRegex(done.stderr, 'window 7/7')
    saved = results.load(output)
    self.assertEqual(saved.run.flags['window'], 64)
    self.assertEqual(saved.run.flags['data'], str(self.text))
    got = saved.rows[1][evaluation.PERPLEXITY]
    expected = evaluation.compare(None, self.model, self.windows)
    np.testing.assert_allclose(got.value, expected.model.token, rtol=1e-5)

  def test_command_with_too_little_text(self):
    done = run(f'--model={self.saved}', f'--data={self.text}', '--window=64')
    self.assertEqual(done.returncode, 1)
    self.assertRegex(done.stderr, '^error: .*fill 7 windows of 64; 256 were')
    self.assertLen(done.stderr.splitlines(), 1)


if __name__ == '__main__':
  absltest.main()
