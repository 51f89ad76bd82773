"""Tests of jaxq.eval.divergence."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.eval import divergence, perplexity


def bigram(V):
  """A model whose logits are a row of a table (V, V)."""
  return perplexity.Scorer(
    score_fn=lambda table, tokens: jax.nn.one_hot(tokens, V),
    head_fn=lambda table, x: jnp.matmul(x, table),
  )


def table(seed, V=11):
  return jax.random.normal(jax.random.key(seed), (V, V))


TOKENS = np.random.default_rng(0).integers(0, 11, (3, 10))


class DivergenceTest(parameterized.TestCase):
  def test_by_hand(self):
    # p = (3/4, 1/4), q = (1/4, 3/4): KL = (3/4 - 1/4) log 3.
    p = jnp.log(jnp.array([[0.75, 0.25]] * 2))
    out = divergence.per_token(
      bigram(2), p, bigram(2), p[:, ::-1], np.array([[0, 0, 1]])
    )
    np.testing.assert_allclose(out.kl, [[0.5 * np.log(3)] * 2], rtol=1e-6)
    np.testing.assert_array_equal(out.agree, [[0.0, 0.0]])
    nll = -np.log([[0.75, 0.25]])
    np.testing.assert_allclose(out.reference_nll, nll, rtol=1e-6)
    np.testing.assert_allclose(out.nll, nll[:, ::-1], rtol=1e-6)

  def test_equal_models_do_not_diverge(self):
    out = divergence.per_token(
      bigram(11), table(1), bigram(11), table(1), TOKENS
    )
    np.testing.assert_array_equal(out.kl, np.zeros((3, 9)))
    np.testing.assert_array_equal(out.agree, np.ones((3, 9)))

  @parameterized.parameters(1, 4, 256)
  def test_numpy_oracle(self, chunk):
    models = [np.asarray(table(seed), np.float64) for seed in (1, 2)]
    p, q = [np.exp(m) / np.exp(m).sum(axis=1, keepdims=True) for m in models]
    kl = np.sum(p * np.log(p / q), axis=1)[TOKENS[:, :-1]]
    agree = (p.argmax(axis=1) == q.argmax(axis=1))[TOKENS[:, :-1]]
    out = divergence.per_token(
      bigram(11), table(1), bigram(11), table(2), TOKENS, chunk=chunk
    )
    # A float32 sum of 11 terms of size 1.
    np.testing.assert_allclose(out.kl, kl, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out.agree, agree)
    nll = perplexity.token_nll(bigram(11), table(2), TOKENS)
    np.testing.assert_allclose(out.nll, nll, rtol=1e-6)

  def test_of_equal_logits_the_lowest_index_counts(self):
    tied = jnp.array([[1.0, 1.0, 0.0]] * 3)
    first = jnp.array([[2.0, 1.0, 0.0]] * 3)
    out = divergence.per_token(
      bigram(3), tied, bigram(3), first, np.array([[0, 1]])
    )
    self.assertEqual(out.agree, 1.0)

  def test_other_vocabulary(self):
    with self.assertRaisesRegex(ValueError, '11 and 12 tokens; .*reference'):
      divergence.per_token(
        bigram(11), table(1), bigram(12), table(1, 12), TOKENS
      )


if __name__ == '__main__':
  absltest.main()
