"""Relevance, the threshold for a share and the gate, against the equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import qtsplus_gate

B, M = 4, 200


def relevances(seed=0):
  """Peaked rows in [0, 1], as a softmax over tokens gives; some padding."""
  key = jax.random.key(seed)
  r = jax.nn.softmax(3 * jax.random.normal(key, (B, M)), axis=1)
  r = r / r.max(axis=1, keepdims=True)
  mask = jnp.arange(M)[None] < jnp.array([[M], [150], [60], [M]])
  return jnp.where(mask, r, 0.0), mask


class ThresholdTest(parameterized.TestCase):
  @parameterized.parameters(0.01, 0.1, 0.5)
  def test_solves_its_equation(self, tau):
    r, mask = relevances()
    solve = jax.jit(qtsplus_gate.solve_threshold)
    for share in (0.05, 0.1, 0.3, 0.5):
      rho = jnp.full((B,), share)
      t = solve(r, mask, rho, jnp.float32(tau))
      kept = jnp.where(mask, jax.nn.sigmoid((r - t[:, None]) / tau), 0).sum(1)
      number = mask.sum(1, dtype=jnp.float32)
      self.assertLess(
        float(jnp.max(jnp.abs(kept / number - share))), 1e-3, f'{share}'
      )

  def test_gradients_are_finite_differences(self):
    r, mask = relevances(1)
    rho, tau = jnp.array([0.1, 0.2, 0.3, 0.45]), jnp.float32(0.1)
    solve = jax.jit(qtsplus_gate.solve_threshold)
    total = lambda r, rho, tau: jnp.sum(solve(r, mask, rho, tau))
    dr, drho, dtau = jax.grad(total, argnums=(0, 1, 2))(r, rho, tau)
    for i in range(B):
      e = 1e-2 * jnp.eye(B)[i]
      central = (total(r, rho + e, tau) - total(r, rho - e, tau)) / 2e-2
      np.testing.assert_allclose(drho[i], central, rtol=0.02)
    step = 0.01 * jax.random.normal(jax.random.key(3), r.shape)
    central = (total(r + step, rho, tau) - total(r - step, rho, tau)) / 2
    np.testing.assert_allclose(jnp.sum(dr * step), central, rtol=0.02)
    central = (total(r, rho, tau + 0.005) - total(r, rho, tau - 0.005)) / 0.01
    np.testing.assert_allclose(dtau, central, rtol=0.02)
    np.testing.assert_array_equal(jnp.where(mask, 0, dr), 0)

  def test_by_hand(self):
    # All r equal, rho .1, tau .5: t = r + .5 ln 9.
    r, mask = jnp.full((1, 10), 0.3), jnp.ones((1, 10), bool)
    t = qtsplus_gate.solve_threshold(
      r, mask, jnp.array([0.1]), jnp.float32(0.5)
    )
    np.testing.assert_allclose(t, [0.3 + 0.5 * np.log(9)], rtol=1e-5)
    empty = qtsplus_gate.solve_threshold(
      r, ~mask, jnp.array([0.1]), jnp.float32(0.5)
    )
    np.testing.assert_array_equal(empty, [0.0])

  def test_newton_agrees_where_r_is_flat_and_not_where_it_is_wide(self):
    mask = jnp.ones((1, 100), bool)
    newton = functools.partial(qtsplus_gate.newton_threshold, mask=mask)
    rho = jnp.array([0.1])
    flat = jax.random.uniform(jax.random.key(0), (1, 100)) / 100
    t = qtsplus_gate.solve_threshold(flat, mask, rho, jnp.float32(0.1))
    np.testing.assert_allclose(newton(flat, rho=rho, tau=0.1), t, atol=1e-4)
    # Between two r that are many tau apart the slope is 0.
    wide = jnp.arange(100.0)[None] / 10
    t = newton(wide, rho=rho, tau=1e-3)
    kept = jax.nn.sigmoid((wide - t[:, None]) / 1e-3).sum()
    self.assertFalse(9 < float(kept) < 11)
    t = qtsplus_gate.solve_threshold(wide, mask, rho, jnp.float32(1e-3))
    kept = jax.nn.sigmoid((wide - t[:, None]) / 1e-3).sum()
    np.testing.assert_allclose(kept, 10, atol=0.1)


class GateTest(parameterized.TestCase):
  def share(self, r, mask, t, tau, calibrated):
    gate = lambda key: qtsplus_gate.gate(
      key, r, t, mask, tau, calibrated=calibrated
    )[0]
    kept = jax.jit(jax.vmap(gate))(jax.random.split(jax.random.key(0), 400))
    return np.asarray(kept).sum(-1).mean(0) / np.asarray(mask).sum(1)

  def test_keeps_the_share_on_average_where_the_reference_keeps_more(self):
    r, mask = jnp.full((1, M), 0.3), jnp.ones((1, M), bool)
    t = qtsplus_gate.solve_threshold(
      r, mask, jnp.array([0.1]), jnp.float32(0.5)
    )
    np.testing.assert_allclose(
      self.share(r, mask, t, 0.5, True), 0.1, atol=0.01
    )
    np.testing.assert_allclose(
      self.share(r, mask, t, 0.5, False), 0.25, atol=0.01
    )

  def test_small_tau_is_the_hard_choice(self):
    r, mask = relevances(2)
    tau, rho = 1e-4, jnp.full((B,), 0.2)
    t = qtsplus_gate.solve_threshold(r, mask, rho, jnp.float32(tau))
    keep, _ = qtsplus_gate.gate(jax.random.key(0), r, t, mask, tau)
    for b in range(B):
      n = round(0.2 * int(mask[b].sum()))
      best = np.argsort(-np.asarray(r[b]))[:n]
      off = set(best) ^ set(np.flatnonzero(keep[b]))
      self.assertLessEqual(len(off), 2)  # Those within tau of the threshold.

  def test_something_is_kept_and_padding_never(self):
    r, mask = relevances()
    mask = mask.at[3].set(False)
    t = jnp.full((B,), 50.0)
    keep, s = qtsplus_gate.gate(jax.random.key(0), r, t, mask, 0.1)
    np.testing.assert_array_equal(keep.sum(1), [1, 1, 1, 0])
    self.assertFalse((keep & ~mask).any())
    np.testing.assert_array_equal(keep.argmax(1)[:3], r.argmax(1)[:3])
    np.testing.assert_array_equal(s, keep.astype(np.float32))

  def test_the_gradient_is_the_soft_choice(self):
    r, mask = relevances()
    t, key = jnp.full((B,), 0.1), jax.random.key(1)
    total = lambda r: qtsplus_gate.gate(key, r, t, mask, 0.5)[1].sum()
    grad = jax.grad(total)(r)
    noise = jax.random.logistic(key, r.shape)
    s = jax.nn.sigmoid(((r - 0.1) / 0.5 + noise) / 0.5)
    expected = jnp.where(mask, s * (1 - s) / 0.25, 0)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-7)


class RelevanceTest(parameterized.TestCase):
  def test_is_the_largest_weight_of_any_head_and_question_token(self):
    keys = jax.random.split(jax.random.key(0), 2)
    q = jax.random.normal(keys[0], (2, 3, 4, 8))
    k = jax.random.normal(keys[1], (2, 10, 2, 8))
    mask = jnp.arange(10)[None] < jnp.array([[10], [6]])
    asked = jnp.array([[True] * 3, [True, False, False]])
    got = jax.jit(qtsplus_gate.cross_relevance)(q, k, mask, asked)
    queries, tokens = np.asarray(q), np.asarray(k)
    for b, (n, L) in enumerate(((10, 3), (6, 1))):
      best = np.zeros(n)
      for h in range(4):
        scores = queries[b, :L, h] @ tokens[b, :n, h // 2].T / np.sqrt(8)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        best = np.maximum(best, weights.max(0))
      np.testing.assert_allclose(got[b, :n], best, rtol=1e-5)
      np.testing.assert_array_equal(got[b, n:], 0)

  def test_entropy(self):
    even, one = jnp.full((1, 8), 0.5), jnp.eye(8)[:1]
    np.testing.assert_allclose(qtsplus_gate.entropy(even), np.log(8), rtol=1e-5)
    np.testing.assert_allclose(qtsplus_gate.entropy(one), 0, atol=1e-6)
    np.testing.assert_array_equal(qtsplus_gate.entropy(0 * one), [0.0])


if __name__ == '__main__':
  absltest.main()
