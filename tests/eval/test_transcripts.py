"""Tests of jaxq.eval.transcripts: what is counted, against a plain loop."""

import numpy as np
from absl.testing import absltest

from jaxq.eval import transcripts

V = 7


def logits(variables, features, tokens):
  """Some function of everything that is given."""
  table, weight = variables
  return table[tokens] + weight * features.mean(axis=(1, 2))[:, None, None]


def log_softmax(x):
  x = x - x.max(axis=-1, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


class TranscriptsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.batch = {
      'features': rng.normal(0, 1, (5, 4, 3)).astype(np.float32),
      'tokens': rng.integers(0, V, (5, 6)).astype(np.int32),
      'mask': np.arange(6)[None] < np.array([6, 4, 5, 3, 6])[:, None],
    }
    self.float = (rng.normal(0, 1, (V, V)).astype(np.float32), np.float32(0.5))
    self.other = (rng.normal(0, 1, (V, V)).astype(np.float32), np.float32(0.4))

  def compare(self, a, b, **how):
    return transcripts.per_token(
      logits, a, logits, b, self.batch, prompt=2, **how
    )

  def test_equals_a_loop(self):
    got = self.compare(self.float, self.other, batch_size=2)
    kl, agree, first, second = [], [], [], []
    for i, tokens in enumerate(self.batch['tokens']):
      # The prompt is tokens 0 and 1: token 2 is the first to be predicted.
      for t in range(2, int(self.batch['mask'][i].sum())):
        p, q = (
          log_softmax(table[tokens[t - 1]])
          for table in (self.float[0], self.other[0])
        )
        kl.append(np.sum(np.exp(p) * (p - q)))
        agree.append(float(p.argmax() == q.argmax()))
        first.append(-p[tokens[t]])
        second.append(-q[tokens[t]])
    self.assertLen(got.kl, 4 + 2 + 3 + 1 + 4)
    np.testing.assert_allclose(got.kl, kl, atol=1e-5)
    np.testing.assert_array_equal(got.agree, agree)
    np.testing.assert_allclose(got.reference_nll, first, atol=1e-5)
    np.testing.assert_allclose(got.nll, second, atol=1e-5)

  def test_same_model(self):
    got = self.compare(self.float, self.float)
    np.testing.assert_allclose(got.kl, 0.0, atol=1e-6)
    np.testing.assert_array_equal(got.agree, 1.0)

  def test_batch_size_changes_nothing(self):
    want = self.compare(self.float, self.other, batch_size=5)
    for size in (1, 3, 8):
      got = self.compare(self.float, self.other, batch_size=size)
      np.testing.assert_allclose(got.kl, want.kl, atol=1e-6)


if __name__ == '__main__':
  absltest.main()
