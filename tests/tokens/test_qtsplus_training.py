"""QTSplus' training: slots, losses, and a selector that learns to choose."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized

from jaxq.tokens import interface, qtsplus, qtsplus_training, training

D, N = 8, 32
CONFIG = qtsplus.QTSplusConfig(
  num_heads=2, num_kv_heads=2, budget_hidden=8, mixing_layers=0, n_max=16
)
TRAIN = qtsplus_training.TrainConfig()


def batch(key, n=16):
  """Videos in which 3 of 32 tokens look like the question; their answer."""
  keys = jax.random.split(key, 4)
  query = jax.random.normal(keys[0], (n, 1, D))
  x = jax.random.normal(keys[1], (n, N, D))
  order = jax.random.uniform(keys[2], (n, N)).argsort(1)
  evidence = order < 3
  answer = jax.random.normal(keys[3], (n,))
  found = query.at[..., 0].set(answer[:, None])
  x = jnp.where(evidence[..., None], found, x.at[..., 0].set(0.0))
  return interface.token_set(x, grid=(2, 4, 4)), query, answer, evidence


select_jit = jax.jit(qtsplus_training.select, static_argnums=(0, 1))


class SelectTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.ts, self.query, *_ = batch(jax.random.key(0), 2)
    self.params = CONFIG.init_params(jax.random.key(1), self.ts, self.query)

  def select(self, train=TRAIN, config=CONFIG, params=None):
    return select_jit(
      config,
      train,
      self.params if params is None else params,
      self.ts,
      self.query,
      None,
      jax.random.key(0),
      qtsplus_training.running_mean(),
    )

  def test_slots_hold_what_was_kept_in_order(self):
    self.assertEqual(qtsplus_training.train_slots(CONFIG, TRAIN, N), 20)
    r, state = self.select()
    self.assertEqual(r.mask.shape, (2, 20))
    for b in range(2):
      index = np.asarray(r.index[b, : r.count[b]])
      self.assertTrue((np.diff(index) > 0).all())
      np.testing.assert_array_equal(
        r.tokens[b, : r.count[b]], self.ts.tokens[b, index]
      )
    np.testing.assert_array_equal(r.aux['overflow'], [0, 0])
    np.testing.assert_allclose(state.mean, r.aux['rho'].mean(), rtol=1e-6)
    again = qtsplus_training.update_mean(state, jnp.array([1.0, 1.0]), 0.9)
    np.testing.assert_allclose(again.mean, 0.9 * state.mean + 0.1, rtol=1e-6)

  def test_what_does_not_fit_is_counted(self):
    tight = dataclasses.replace(TRAIN, slack=1.0, calibrated=False, tau=0.5)
    config = dataclasses.replace(CONFIG, rho_min=0.001, rho_max=0.05)
    r, _ = self.select(tight, config)
    self.assertEqual(r.mask.shape[1], 2)
    self.assertGreater(int(r.aux['overflow'].sum()), 0)

  def test_losses_by_hand(self):
    losses = qtsplus_training.budget_losses(
      jnp.array([0.1, 0.3]), jnp.array([100.0, 100.0]), jnp.float32(0.2), 50
    )
    np.testing.assert_allclose(losses['compute'], (0.04 + 0.36) / 2, rtol=1e-5)
    np.testing.assert_allclose(losses['memory'], 0.4, rtol=1e-5)
    np.testing.assert_allclose(losses['spread'], 0.01, rtol=1e-4)

  @parameterized.parameters('bisection', 'newton')
  def test_gradients_reach_scores_and_share(self, solver):
    train = dataclasses.replace(TRAIN, solver=solver)

    def total(params):
      r, _ = self.select(train, params=params)
      return jnp.sum(r.tokens**2) + r.aux['losses']

    grads = jax.jit(jax.grad(total))(self.params)
    for part in ('scoring_0', 'budget_up', 'budget_down'):
      norm = optax.global_norm(grads[part])
      self.assertGreater(float(norm), 0, part)
      self.assertTrue(np.isfinite(norm), part)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, "solver='x'; allowed .'bisection'"):
      qtsplus_training.TrainConfig(solver='x')
    with self.assertRaisesRegex(ValueError, 'tau=0, slack=1.25'):
      qtsplus_training.TrainConfig(tau=0)


@pytest.mark.loose_promotion  # optax promotes.
class LearningTest(parameterized.TestCase):
  def test_the_question_finds_its_tokens_and_cost_lowers_the_share(self):
    # The reader sums channel 0 of the kept tokens: each token of evidence tells
    # a third of the answer, everything else is silent and only costs.
    def loss(params, ts, query, answer, key, cost):
      r, _ = qtsplus_training.select(
        CONFIG,
        TRAIN,
        params,
        ts,
        query,
        None,
        key,
        qtsplus_training.RunningMean(jnp.float32(0.2), jnp.int32(1)),
      )
      told = jnp.sum(r.tokens[..., 0], axis=1) / 3
      budget = 0.1 * r.aux['compute'] + 0.17 * r.aux['memory']
      return jnp.mean((told - answer) ** 2) + cost * budget, r.aux

    optimizer = optax.adam(1e-2)
    update = jax.jit(training.step(loss, optimizer))
    make = jax.jit(batch)
    ts, query, *_ = make(jax.random.key(0))
    first = CONFIG.init_params(jax.random.key(1), ts, query)

    def train(steps, cost):
      params, state = first, optimizer.init(first)
      for key in jax.random.split(jax.random.key(2), steps):
        ts, query, answer, _ = make(key)
        params, state, _, aux = update(
          params, state, ts, query, answer, key, cost
        )
      return params, float(aux['rho'].mean())

    params, _ = train(150, 1.0)
    ts, query, _, evidence = make(jax.random.key(9))
    r = jax.jit(CONFIG.reduce)(ts, query=query, params=params)
    six = jax.lax.top_k(r.aux['relevance'], 6)[1]
    found = jnp.take_along_axis(evidence, six, axis=1).sum(1).mean() / 3
    self.assertGreater(float(found), 0.6)  # At random: 6 / 32.
    self.assertLess(train(40, 10.0)[1], train(40, 0.0)[1])


if __name__ == '__main__':
  absltest.main()
