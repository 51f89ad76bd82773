"""Tests of jaxq.quant.low_rank."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import linear
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from jaxq.quant import gptq, low_rank

W4 = spec_lib.QuantSpec(dtype='int4')
K, N = 32, 24


@functools.cache
def data():
  """x (8, 32, K) correlated, w (K, N), the Hessian (K, K)."""
  keys = jax.random.split(jax.random.key(0), 3)
  mix = jax.random.normal(keys[0], (K, K)) / jnp.arange(1, K + 1.0)[None]
  x = jax.random.normal(keys[1], (8, 32, K)) @ mix.T
  w = jax.random.normal(keys[2], (K, N)) / 6
  return x, w, 2 * jnp.einsum('btk,btj->kj', x, x) / 256


def config(**fields):
  fields = {'rank': 4, 'sample_sequences': 8, **fields}
  return low_rank.LowRankConfig(**fields)


def error(w, effective, hessian):
  difference = effective - w
  return float(jnp.sum(difference * (hessian @ difference)))


def compensated(q, how, with_branch=True):
  x, w, hessian = data()
  branch = low_rank.Branch(('a',), lambda kernels, x: x @ kernels['a'], x)
  branches = [branch] if with_branch else []

  def run(q):
    return low_rank.compensate(
      {'a': w}, {'a': q}, {'a': hessian}, branches, how
    )

  return jax.jit(run)(q)['a']


class FitTest(parameterized.TestCase):
  def test_it_is_the_best_of_its_rank(self):
    _, w, hessian = data()
    e = w - qarray.fake_quant(w, W4)
    term = low_rank.fit(e, hessian, 4)
    damped = np.asarray(hessian, np.float64)
    damped = damped + 0.01 * np.mean(np.diag(damped)) * np.eye(K)
    values, vectors = np.linalg.eigh(damped)
    root = vectors * np.sqrt(values) @ vectors.T  # H^(1/2)
    singular = np.linalg.svd(root @ np.asarray(e), compute_uv=False)
    left = root @ np.asarray(e - term.a @ term.b)
    np.testing.assert_allclose(
      np.sum(left**2), np.sum(singular[4:] ** 2), rtol=1e-3
    )

  def test_the_full_rank_is_exact(self):
    _, w, hessian = data()
    term = low_rank.fit(w, hessian, N)
    np.testing.assert_allclose(term.a @ term.b, w, atol=1e-4)

  def test_no_data_no_nan(self):
    _, w, _ = data()
    term = low_rank.fit(w, jnp.zeros((K, K)), 4)
    self.assertTrue(bool(jnp.all(jnp.isfinite(term.a @ term.b))))

  def test_damping_grows_until_it_factors(self):
    indefinite = jnp.diag(jnp.array([1.0, 1.0, -0.5]))
    lower = low_rank.whitening(indefinite)
    # 1 % and 10 % of the mean of 0.5 are not enough, nor is all of it.
    np.testing.assert_allclose(
      lower @ lower.T, indefinite + 5.0 * jnp.eye(3), rtol=1e-5
    )
    self.assertTrue(bool(jnp.all(jnp.isnan(low_rank.whitening(-indefinite)))))

  @parameterized.parameters(((16, 40),), ((40, 16),))
  def test_no_other_term_of_its_rank_is_better(self, shape):
    """Alternating least squares from random starts ends no lower."""
    rng = np.random.default_rng(0)
    K, rank = shape[0], 3
    d = rng.normal(size=(K, K)) * np.arange(1, K + 1) / K
    gram, e = d @ d.T, rng.normal(size=shape)
    lower = np.asarray(low_rank.whitening(jnp.asarray(gram, jnp.float32)))
    damped = np.asarray(lower, np.float64) @ np.asarray(lower, np.float64).T
    term = low_rank.whitened_svd(
      jnp.asarray(e, jnp.float32), jnp.asarray(lower), rank
    )

    def energy(product):
      r = e - product
      return np.sum(r * (damped @ r))

    ours = energy(np.asarray(term.a, np.float64) @ np.asarray(term.b))
    best = np.inf
    for _ in range(5):
      a = rng.normal(size=(K, rank))
      for _ in range(200):
        b = np.linalg.solve(a.T @ damped @ a, a.T @ damped @ e)
        a = e @ b.T @ np.linalg.inv(b @ b.T)
      best = min(best, energy(a @ b))
    self.assertLess(ours, best * (1 + 1e-3))
    self.assertGreater(ours, best * (1 - 1e-3))


class CompensateTest(parameterized.TestCase):
  def test_merged_terms_gain_on_rounding_to_nearest(self):
    _, w, hessian = data()
    q = qarray.quantize(w, W4)
    term = compensated(q, config(epochs=10))
    made = low_rank.merge(w, q, term)
    np.testing.assert_array_equal(made.scale, q.scale)
    self.assertLess(
      error(w, qarray.dequantize(made), hessian),
      0.6 * error(w, qarray.dequantize(q), hessian),
    )

  @parameterized.parameters(True, False)
  def test_kept_terms_gain_behind_gptq(self, with_branch):
    _, w, hessian = data()
    q = gptq.quantize(w, hessian, gptq.GptqConfig(weights=W4))
    how = config(compensate='keep', epochs=1)
    term = compensated(q, how, with_branch)
    made = qarray.dequantize(q) + term.a @ term.b
    self.assertLess(
      error(w, made, hessian), 0.6 * error(w, qarray.dequantize(q), hessian)
    )

  def test_what_does_not_help_is_zero(self):
    _, w, hessian = data()
    q = gptq.quantize(w, hessian, gptq.GptqConfig(weights=W4))
    term = compensated(q, config(learning_rate=1.0, epochs=1))
    np.testing.assert_array_equal(term.a @ term.b, 0)
    made = low_rank.merge(w, q, term)
    np.testing.assert_array_equal(qarray.codes(made), qarray.codes(q))

  def test_a_layer_adds_a_kept_term(self):
    x, w, _ = data()
    term = low_rank.fit(w, jnp.eye(K), 4)
    layer = linear.QuantDense(N)
    y = layer.apply({'params': {'kernel': w}, 'quant': {'low_rank': term}}, x)
    np.testing.assert_allclose(y, x @ (w + term.a @ term.b), atol=1e-4)


class MessagesTest(parameterized.TestCase):
  def test_a_rank_larger_than_the_layer(self):
    _, w, hessian = data()
    with self.assertRaisesRegex(
      ValueError, r'rank=25 is larger than a layer of shape \(32, 24\); at most'
    ):
      low_rank.fit(w, hessian, 25)

  @parameterized.parameters(
    (dict(compensate='add'), r"compensate='add'; allowed \['keep', 'merge'\]"),
    (dict(rank=-1), 'rank=-1; allowed 0 to'),
    (dict(learning_rate=2.0), 'learning_rate=2.0; allowed 0.0 to 1.0'),
    (dict(sample_sequences=0), 'sample_sequences=0; allowed 1 to'),
  )
  def test_config(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      low_rank.LowRankConfig(**fields)


if __name__ == '__main__':
  absltest.main()
