"""Tests of jaxq.eval.perplexity."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.eval import perplexity

V = 11


def bigram(traces=None):
  """A model whose logits are a row of a table (V, V)."""

  def head(table, x):
    if traces is not None:
      traces.append(x.shape)
    return jnp.matmul(x, table)

  return perplexity.Scorer(
    score_fn=lambda table, tokens: jax.nn.one_hot(tokens, V), head_fn=head
  )


def windows(num=3, T=10):
  return np.random.default_rng(0).integers(0, V, (num, T))


def table(seed=1):
  return jax.random.normal(jax.random.key(seed), (V, V))


class PerplexityTest(parameterized.TestCase):
  def test_uniform_logits_give_the_vocabulary_size(self):
    nll = perplexity.token_nll(bigram(), jnp.zeros((V, V)), windows(2, 5))
    self.assertEqual(nll.shape, (2, 4))
    self.assertEqual(nll.dtype, np.float32)
    p = perplexity.Perplexity(nll=nll, words=4, num_bytes=16)
    self.assertAlmostEqual(p.token, V, places=4)
    self.assertAlmostEqual(p.word, V**2, places=2)  # 8 tokens in 4 words.
    self.assertAlmostEqual(p.byte, V**0.5, places=5)
    self.assertAlmostEqual(p.bits_per_byte, np.log2(V) / 2, places=5)

  def test_numpy_oracle(self):
    tokens, weights = windows(), np.asarray(table(), np.float64)
    expected = np.zeros((3, 9))
    for i, window in enumerate(tokens):
      for t in range(9):
        row = weights[window[t]]
        p = np.exp(row) / np.exp(row).sum()
        expected[i, t] = -np.log(p[window[t + 1]])
    nll = perplexity.token_nll(bigram(), table(), tokens)
    # float32 rounding of logits of size 3.
    np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-6)

  @parameterized.parameters(1, 2, 4, 9, 256)
  def test_chunked_is_unchunked(self, chunk):
    got = perplexity.token_nll(bigram(), table(), windows(), chunk=chunk)
    whole = perplexity.token_nll(bigram(), table(), windows(), chunk=9)
    np.testing.assert_allclose(got, whole, rtol=1e-6)

  def test_logits_exist_for_one_chunk_and_compile_once(self):
    traces = []
    perplexity.token_nll(bigram(traces), table(), windows(5), chunk=4)
    self.assertEqual(set(traces), {(1, 4, V)})
    once = len(traces)
    traces.clear()
    perplexity.token_nll(bigram(traces), table(), windows(1), chunk=4)
    self.assertLen(traces, once)  # As many for one window as for five.

  def test_log_softmax_is_float32(self):
    scorer = perplexity.Scorer(
      score_fn=lambda table, tokens: jax.nn.one_hot(tokens, V),
      head_fn=lambda table, x: jnp.full((*x.shape[:2], V), 3, jnp.bfloat16),
    )
    nll = perplexity.token_nll(scorer, None, windows())
    np.testing.assert_allclose(nll, np.log(V), rtol=1e-6)  # bf16: 1e-2 off.

  def test_diverged_model_is_infinite(self):
    nll = np.full((1, 4), 1e4, np.float32)
    p = perplexity.Perplexity(nll=nll, words=1, num_bytes=4)
    self.assertEqual(p.token, np.inf)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, 'words=0, num_bytes=3; .*at least'):
      perplexity.Perplexity(nll=np.zeros((1, 1)), words=0, num_bytes=3)
    with self.assertRaisesRegex(ValueError, 'chunk=0; .*at least 1'):
      perplexity.token_nll(bigram(), table(), windows(), chunk=0)


if __name__ == '__main__':
  absltest.main()
