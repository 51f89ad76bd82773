"""Tests of jaxq.nn.routed_low_rank."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import linear, routed_low_rank
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib

K, N, E, SHARED, RANK = 24, 16, 3, 4, 2


def term(top_k=1, weighted=False, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 4)
  R = SHARED + E * RANK
  return routed_low_rank.RoutedLowRank(
    jax.random.normal(keys[0], (K, R)).astype(dtype),
    jax.random.normal(keys[1], (R, N)).astype(dtype),
    jax.random.normal(keys[2], (K, E)).astype(jnp.bfloat16),
    jax.random.uniform(keys[3], (K,)) if weighted else None,
    SHARED,
    top_k,
  )


def inputs(B=2, T=7):
  return jax.random.normal(jax.random.key(9), (B, T, K))


def by_loops(made, x):
  """One token and one expert at a time, in float64."""
  a, b = (np.asarray(leaf, np.float64) for leaf in (made.a, made.b))
  router = np.asarray(made.router.astype(jnp.float32), np.float64)
  y = np.zeros((*x.shape[:-1], N))
  for index in np.ndindex(*x.shape[:-1]):
    token = np.asarray(x[index], np.float64)
    u = token
    if made.weight is not None:
      u = np.abs(token) * np.asarray(made.weight, np.float64)
    logits = u / np.linalg.norm(u) @ router
    chosen = np.argsort(-logits)[: made.top_k]
    share = np.exp(logits[chosen]) / np.sum(np.exp(logits[chosen]))
    y[index] = token @ a[:, :SHARED] @ b[:SHARED]
    for e, part in zip(chosen, share, strict=True):
      own = slice(SHARED + e * RANK, SHARED + (e + 1) * RANK)
      y[index] += part * (token @ a[:, own] @ b[own])
  return y


class RoutedLowRankTest(parameterized.TestCase):
  def test_by_hand(self):
    made = routed_low_rank.RoutedLowRank(
      jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
      jnp.array([[1.0], [10.0], [100.0]]),
      jnp.eye(2),
      None,
      shared=1,
    )
    # (3, 2) goes to expert 0, (2, 3) to expert 1.
    y = made(jnp.array([[3.0, 2.0], [2.0, 3.0]]))
    np.testing.assert_array_equal(y, [[33.0], [302.0]])
    self.assertEqual(made.active, 2)
    np.testing.assert_array_equal(made.product, [[1.0], [0.0]])

  @parameterized.product(
    top_k=(1, 2), weighted=(False, True), jit=(False, True)
  )
  def test_masks_equal_loops_over_tokens(self, top_k, weighted, jit):
    made, x = term(top_k, weighted), inputs()
    run = lambda made, x: made(x)
    y = (jax.jit(run) if jit else run)(made, x)
    self.assertEqual(y.dtype, x.dtype)
    expected = by_loops(made, x)
    # Sums of 24 x 10 products of about 1.
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=2e-5)

  @parameterized.parameters(False, True)
  def test_a_token_is_routed_alike_alone_and_beside_padding(self, weighted):
    made, x = term(weighted=weighted), inputs(B=1, T=9)
    whole = made(x)
    padded = jnp.concatenate([x, jnp.zeros((1, 5, K))], axis=1)
    np.testing.assert_allclose(made(padded)[:, :9], whole, atol=2e-5)
    np.testing.assert_array_equal(made(padded)[:, 9:], 0)
    steps = [made(x[:, t : t + 1]) for t in range(9)]
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), whole, atol=2e-5)

  def test_gates_sum_to_one(self):
    made = term(top_k=2)
    g = routed_low_rank.gates(inputs(), made.router, made.weight, 2)
    np.testing.assert_allclose(jnp.sum(g, axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(jnp.sum(g > 0, axis=-1), 2)

  def test_there_is_no_dispatch(self):
    made = term()
    jaxpr = str(jax.make_jaxpr(lambda x: made(x))(inputs()))
    for name in ('gather', 'scatter', 'sort', 'while', 'cond', 'dynamic_slice'):
      self.assertNotIn(name, jaxpr)
    self.assertEqual(jaxpr.count('dot_general'), 3)

  def test_int8_factors_and_low_rank(self):
    made, x = term(), inputs()
    a = qarray.quantize(made.a, spec_lib.QuantSpec(dtype='int8'))
    rows = spec_lib.QuantSpec(dtype='int8', granularity='token')
    small = dataclasses.replace(made, a=a, b=qarray.quantize(made.b, rows))
    self.assertEqual(small.active, made.active)
    error = jnp.linalg.norm(small(x) - made(x)) / jnp.linalg.norm(made(x))
    self.assertLess(float(error), 0.02)  # Two roundings to 1/127.
    alone = linear.LowRank(small.a, small.b)
    np.testing.assert_allclose(alone(x), x @ alone.product, atol=1e-4)

  def test_bfloat16_keeps_the_dtype_of_x(self):
    made = term(dtype=jnp.bfloat16)
    x = inputs().astype(jnp.bfloat16)
    self.assertEqual(made(x).dtype, jnp.bfloat16)
    error = made(x).astype(jnp.float32) - term()(inputs())
    self.assertLess(float(jnp.mean(jnp.abs(error))), 0.2)

  def test_a_layer_adds_it(self):
    made, x = term(), inputs()
    kernel = jax.random.normal(jax.random.key(5), (K, N))
    variables = {'params': {'kernel': kernel}, 'quant': {'low_rank': made}}
    y = linear.QuantDense(N).apply(variables, x)
    np.testing.assert_allclose(y, x @ kernel + made(x), atol=2e-5)


if __name__ == '__main__':
  absltest.main()
