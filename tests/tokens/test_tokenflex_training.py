"""TokenFLEX's draws of a count and its compiled steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized

from jaxq.tokens import interface, tokenflex, tokenflex_training

RECORDED = [144, 256, 64, 256, 256, 144]


class DrawTest(parameterized.TestCase):
  def test_is_a_function_of_seed_and_step(self):
    config = tokenflex.TokenFlexConfig()
    draw = lambda: [
      tokenflex_training.sample_count(0, step, config) for step in range(6)
    ]
    self.assertEqual(draw(), draw())  # Another host, or after a restart.
    # Recorded: a change of the draw would change every resumed run.
    self.assertEqual(draw(), RECORDED)

  def test_frequencies_are_the_probabilities(self):
    config = tokenflex.TokenFlexConfig(probs=(0.25, 0.25, 0.5))
    n = 10_000
    drawn = [tokenflex_training.sample_count(1, i, config) for i in range(n)]
    counts = np.array([drawn.count(c) for c in config.counts])
    expected = n * np.array(config.probs)
    # 13.8: one in a thousand for two degrees of freedom.
    self.assertLess(float(((counts - expected) ** 2 / expected).sum()), 13.8)

  def test_mean_tokens(self):
    mean = lambda *p: tokenflex_training.mean_tokens(
      tokenflex.TokenFlexConfig(probs=p)
    )
    self.assertAlmostEqual(mean(), 464 / 3)
    self.assertAlmostEqual(mean(0.2, 0.2, 0.6), 195.2)
    self.assertAlmostEqual(mean(0.25, 0.25, 0.5), 180)


@pytest.mark.loose_promotion  # optax promotes.
class StepsTest(parameterized.TestCase):
  def test_flexible_training_lowers_the_loss_at_every_count(self):
    # The projector is to tell how bright the left half of an image is.
    config = tokenflex.TokenFlexConfig(
      counts=(1, 4, 9), probs=(0.4, 0.3, 0.3), norm='none', project=True
    )
    module = config.projector(2)
    x = jax.random.uniform(jax.random.key(0), (64, 36, 2))
    x = x.at[..., 1].set(jnp.tile(jnp.arange(36.0) % 6 < 3, (64, 1)))
    target = jnp.mean(x[..., 0] * x[..., 1], axis=1)
    weight = jnp.ones((64, 36))

    def apply(params, n) -> Any:
      return module.apply({'params': params}, x, weight, (1, 6, 6), n, n)

    params = config.init_params(
      jax.random.key(1), interface.token_set(x, grid=(1, 6, 6))
    )

    def loss(params, target, n):
      out = jnp.mean(apply(params, n), axis=(1, 2))
      return jnp.mean((out - target) ** 2), n * n

    steps = tokenflex_training.compile_steps(
      config, loss, optax.adam(2e-2), params, target
    )
    self.assertEqual(sorted(steps.updates), [1, 4, 9])
    value = jax.jit(lambda *args: loss(*args)[0], static_argnums=2)
    before = [float(value(params, target, n)) for n in (1, 2, 3)]
    state, seen = optax.adam(2e-2).init(params), 0
    for step in range(60):
      params, state, _, tokens = steps(step, params, state, target)
      seen += int(tokens)
    self.assertEqual(steps.tokens_seen, seen)
    for n in (1, 2, 3):
      self.assertLess(value(params, target, n), 0.2 * before[n - 1])

  def test_counts_that_are_never_drawn_are_not_compiled(self):
    config = tokenflex.TokenFlexConfig(counts=(1, 4), probs=(1.0, 0.0))
    steps = tokenflex_training.compile_steps(
      config,
      lambda p, batch, n: (jnp.sum((p - batch) ** 2), n),
      optax.sgd(0.1),
      jnp.zeros(2),
      jnp.ones(2),
    )
    self.assertEqual(list(steps.updates), [1])


if __name__ == '__main__':
  absltest.main()
