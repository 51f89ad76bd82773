"""Tests of jaxq.eval.embedding and jaxq.eval.features."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from flax import linen as nn

from jaxq.eval import embedding, features


class Double(nn.Module):
  """(B, C) -> twice the first leaf plus the second."""

  def __call__(self, batch):
    return 2 * batch['x'] + batch['y']


class EmbeddingTest(absltest.TestCase):
  def test_encode_in_batches(self):
    x = np.arange(14, dtype=np.float32).reshape(7, 2)
    data = {'x': x, 'y': np.ones((7, 2), np.float32)}
    got = embedding.encode(Double(), {}, data, batch_size=3)
    np.testing.assert_array_equal(got, 2 * x + 1)
    mesh = jax.make_mesh((1,), ('data',))
    got = embedding.encode(Double(), {}, data, batch_size=4, mesh=mesh)
    np.testing.assert_array_equal(got, 2 * x + 1)

  def test_cosine_by_hand(self):
    a = np.array([[3.0, 4.0], [1.0, 0.0]])
    b = np.array([[6.0, 8.0], [0.0, 2.0]])
    np.testing.assert_allclose(embedding.cosine(a, b), [1.0, 0.0])
    with self.assertRaisesRegex(
      ValueError, r'\(2, 2\) and \(1, 2\).*same samp'
    ):
      embedding.cosine(a, b[:1])

  def test_retrieval_by_hand(self):
    keys = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    queries = np.array([[2.0, 0.1], [1.0, 0.2], [-1.0, 0.1]])
    out = embedding.retrieve(queries, keys)
    np.testing.assert_array_equal(out.found, [0, 0, 2])
    np.testing.assert_array_equal(out.correct, [1.0, 0.0, 1.0])

  def test_rank_correlation(self):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 6, 4))
    same = embedding.rank_correlation(q, k, 3 * q, k)
    np.testing.assert_allclose(same, 1.0)
    np.testing.assert_allclose(embedding.rank_correlation(q, k, -q, k), -1.0)
    near = embedding.rank_correlation(q, k, q + 0.1 * k, k)
    self.assertBetween(float(near.mean()), 0.5, 0.999)

  def test_neighbours_by_hand(self):
    x = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    np.testing.assert_array_equal(features.nearest(x), [1, 0, 3, 2])
    labels = np.array([0, 0, 1, 2])
    np.testing.assert_array_equal(features.accuracy(x, labels), [1, 1, 0, 0])
    np.testing.assert_array_equal(features.agreement(x, x), np.ones(4))
    moved = jnp.asarray(x).at[1].set(jnp.array([-1.0, 0.0]))
    moved = np.asarray(moved)
    np.testing.assert_array_equal(features.agreement(moved, x), [0, 0, 1, 1])
    with self.assertRaisesRegex(ValueError, r'\(1, 2\); at least two rows'):
      features.nearest(x[:1])


if __name__ == '__main__':
  absltest.main()
