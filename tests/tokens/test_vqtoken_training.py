"""VQToken's losses, rates and metrics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxq.tokens import interface, vqtoken, vqtoken_training

CONFIG = vqtoken.VQTokenConfig(codes=2, wiring='none', codebook_of='normalized')


reduce = jax.jit(
  lambda config, ts, budget=None: config.reduce(ts, budget=budget),
  static_argnums=0,
)


@pytest.mark.loose_promotion  # optax promotes.
class TrainingTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    x = jnp.array([[[1.0, 0], [0.28, 0.96], [0, 0.5], [0, 0]]])
    mask = jnp.array([[True, True, True, False]])
    self.ts = interface.token_set(x, grid=(1, 2, 2), mask=mask)

  def test_commitment_by_hand(self):
    r = reduce(CONFIG, self.ts)
    # (.28, .96) goes to (0, 1): the code is (.14, .98).
    np.testing.assert_array_equal(r.assignment, [[0, 1, 1, -1]])
    loss = lambda x: vqtoken_training.commitment_loss(
      dataclasses.replace(self.ts, tokens=x), r, r.tokens
    )
    expected = 0.25 * (0 + 0.02 + 0.02) / 3
    np.testing.assert_allclose(loss(self.ts.tokens), expected, rtol=1e-5)
    grad = jax.grad(loss)(self.ts.tokens)
    self.assertTrue(np.isfinite(grad).all())
    self.assertGreater(float(jnp.abs(grad[0, 1]).max()), 0)
    np.testing.assert_array_equal(grad[0, 3], 0)

  def test_explained_variance_and_ratio(self):
    config = vqtoken.VQTokenConfig(codes=3, wiring='none')
    all_codes = reduce(config, self.ts)
    np.testing.assert_allclose(
      vqtoken_training.explained_variance(self.ts, all_codes), 1, atol=1e-6
    )
    one = reduce(config, self.ts, interface.Budget(k_max=1))
    np.testing.assert_allclose(
      vqtoken_training.explained_variance(self.ts, one), 0, atol=1e-6
    )
    self.assertAlmostEqual(vqtoken_training.token_ratio(one, self.ts), 1 / 3)

  def test_each_part_has_its_rate(self):
    params = {
      'vision': jnp.ones(2),
      'projector': jnp.ones(2),
      'vqtoken': jnp.ones(2),
      'decoder': jnp.ones(2),
    }
    optimizer = vqtoken_training.optimizer(10, warmup=0.1)
    state, moved = optimizer.init(params), jax.tree.map(jnp.zeros_like, params)
    for _ in range(3):
      updates, state = optimizer.update(params, state, params)
      moved = jax.tree.map(jnp.add, moved, updates)
    scale = {name: float(-v[0]) for name, v in moved.items()}
    self.assertAlmostEqual(scale['vision'] / scale['projector'], 2, places=3)
    self.assertAlmostEqual(scale['decoder'] / scale['vqtoken'], 10, places=2)

  def test_density(self):
    self.assertEqual(vqtoken_training.token_density(56.0, 32.0), 1.75)
    with self.assertRaisesRegex(ValueError, 'tokens=0; it must be positive'):
      vqtoken_training.token_density(56.0, 0)


if __name__ == '__main__':
  absltest.main()
