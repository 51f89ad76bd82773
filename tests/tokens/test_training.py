"""Tests of jaxq.tokens.training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest

from jaxq.tokens import training


class TrainingTest(absltest.TestCase):
  def test_next_token_loss_by_hand(self):
    logits = jnp.log(jnp.array([[[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]]))
    labels = jnp.array([[-1, 1, 0]], jnp.int32)
    mask = jnp.ones((1, 3), bool)
    loss = training.next_token_loss(logits, labels, mask)
    expected = -(np.log(0.5) + np.log(0.25)) / 2
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    # A slot that is not in use is not asked for.
    loss = training.next_token_loss(
      logits, labels, jnp.array([[True, True, False]])
    )
    np.testing.assert_allclose(loss, -np.log(0.5), rtol=1e-6)
    self.assertEqual(
      training.next_token_loss(logits, labels * 0 - 1, mask), 0.0
    )

  def test_rates_by_path(self):
    params = {'new': {'w': jnp.ones(2)}, 'old': {'w': jnp.ones(2)}}
    rules = [('^new', 0.5), ('', 0.0)]
    optimizer = training.rates(rules, optax.sgd)

    def loss(params, x):
      y = params['new']['w'] * params['old']['w']
      return jnp.sum(y * x), None

    update = training.step(loss, optimizer)
    params, _, value, _ = update(params, optimizer.init(params), jnp.ones(2))
    self.assertEqual(value, 2.0)
    np.testing.assert_allclose(params['new']['w'], [0.5, 0.5])
    np.testing.assert_array_equal(params['old']['w'], [1, 1])
    with self.assertRaisesRegex(ValueError, "no rule for the parameter 'old/w"):
      training.rates([('^new', 1.0)]).init(params)

  def test_step_under_jit_descends(self):
    optimizer = optax.sgd(0.1)
    update = jax.jit(
      training.step(lambda p, x: (jnp.sum((p - x) ** 2), {}), optimizer)
    )
    p, x = jnp.zeros(3), jnp.ones(3)
    state = optimizer.init(p)
    values = []
    for _ in range(3):
      p, state, value, _ = update(p, state, x)
      values.append(float(value))
    self.assertLess(values[2], values[1])


if __name__ == '__main__':
  absltest.main()
