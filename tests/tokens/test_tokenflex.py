"""TokenFLEX: pooling against torch, the projector, the reduction."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import interface, tokenflex
from tests.parity import oracle


@functools.partial(jax.jit, static_argnums=(1, 3))
def pool(x, grid, n, n_max):
  """x (H, W, d) -> (n_max * n_max, d) and the mass."""
  flat = x.reshape(-1, x.shape[-1])
  return tokenflex.pool(flat, jnp.ones(flat.shape[0]), grid, n, n_max)


def patches(side, d=3, seed=0):
  return jax.random.normal(jax.random.key(seed), (side, side, d))


class PoolTest(parameterized.TestCase):
  @parameterized.parameters(
    (32, 8), (32, 12), (32, 16), (27, 8), (27, 12), (27, 14), (27, 16)
  )
  def test_is_adaptive_average_pooling(self, side, n):
    torch = oracle.torch()
    x = patches(side)
    got, _ = pool(x, (1, side, side), n, n)
    expected = torch.nn.functional.adaptive_avg_pool2d(
      torch.from_numpy(np.array(x)).permute(2, 0, 1), n
    )
    np.testing.assert_allclose(
      got, expected.permute(1, 2, 0).reshape(n * n, -1), atol=1e-6
    )

  def test_bins_by_hand(self):
    x = jnp.arange(5.0)[None, :, None] * jnp.ones((5, 1, 1))
    got, mass = pool(x, (1, 5, 5), 3, 3)
    np.testing.assert_allclose(got[:3, 0], [0.5, 2.0, 3.5])
    np.testing.assert_array_equal(mass[:3], [4, 6, 4])

  def test_all_tokens_is_the_identity(self):
    x = patches(32)
    got, _ = pool(x, (1, 32, 32), 32, 32)
    np.testing.assert_array_equal(got, x.reshape(-1, 3))

  def test_traced_counts_are_static_ones_bit_for_bit(self):
    x = patches(32)
    for n in (8, 12, 16):
      static, _ = pool(x, (1, 32, 32), n, n)
      traced, mass = pool(x, (1, 32, 32), jnp.int32(n), 16)
      inside = traced.reshape(16, 16, 3)[:n, :n].reshape(n * n, 3)
      np.testing.assert_array_equal(inside, static)
      self.assertEqual(int((mass > 0).sum()), n * n)

  @parameterized.parameters((8, True), (16, True), (12, False))
  def test_mean_is_kept_where_bins_do_not_overlap(self, n, kept):
    x = patches(32)
    got, mass = pool(x, (1, 32, 32), n, n)
    mean = (got * mass[:, None]).sum(0) / mass.sum()
    same = np.allclose(mean, x.mean((0, 1)), atol=1e-6)
    self.assertEqual(same, kept)

  def test_constant_image_and_gradient(self):
    got, _ = pool(jnp.full((27, 27, 3), 0.7), (1, 27, 27), 16, 16)
    np.testing.assert_allclose(got, 0.7, rtol=1e-6)
    grad = jax.grad(lambda x: pool(x, (1, 32, 32), 8, 8)[0].sum())(patches(32))
    np.testing.assert_allclose(grad, 1 / 16, rtol=1e-6)  # Bins of 4 x 4.


MODULE = tokenflex.TokenAdaptiveProjector(features=4, hidden=4, counts=(4, 9))
init = jax.jit(MODULE.init, static_argnums=(3, 5))
apply = jax.jit(MODULE.apply, static_argnums=(3, 5))
reduce = jax.jit(
  lambda config, ts, budget: config.reduce(ts, budget=budget),
  static_argnums=0,
)


class ProjectorTest(parameterized.TestCase):
  def apply(self, n=2, n_max=2, **changes):
    x = jax.random.normal(jax.random.key(1), (2, 16, 4))
    weight = jnp.ones((2, 16))
    made = init(jax.random.key(2), x, weight, (1, 4, 4), 2, 2)['params']
    for name, leaf in changes.items():
      made = {**made, name: jax.tree.map(lambda _, v=leaf: v, made[name])}
    out = apply({'params': made}, x, weight, (1, 4, 4), n, n_max)
    return out, made, x

  def test_without_a_gate_nothing_passes(self):
    out, _, _ = self.apply(gate_proj=jnp.zeros((4, 4)))
    np.testing.assert_array_equal(out, 0)

  def test_is_silu_of_the_gate_where_the_rest_is_one(self):
    out, made, x = self.apply(down_proj=jnp.eye(4))
    y = x.reshape(2, 2, 2, 2, 2, 4).mean((2, 4)).reshape(2, 4, 4)
    y = (y - y.mean(-1, keepdims=True)) / jnp.sqrt(
      y.var(-1, keepdims=True) + 1e-5
    )
    gate = y @ made['gate_proj']['kernel']
    up = y @ made['up_proj']['kernel']
    np.testing.assert_allclose(out, jax.nn.silu(gate) * up, atol=1e-5)

  def test_the_mlp_has_as_many_parameters(self):
    number = {}
    for block in tokenflex.BLOCKS:
      config = tokenflex.TokenFlexConfig(
        project=True, features=6, hidden=10, norm='none', block=block
      )
      ts = interface.token_set(jnp.ones((1, 16, 4)), grid=(1, 4, 4))
      params = jax.eval_shape(config.init_params, jax.random.key(0), ts)
      number[block] = sum(leaf.size for leaf in jax.tree.leaves(params))
    self.assertEqual(number['swiglu'], 10 * (2 * 4 + 6))
    self.assertEqual(number['mlp'], 14 * (4 + 6))

  def test_the_mlp_is_gelu_between_two_matrices(self):
    module = tokenflex.TokenAdaptiveProjector(
      features=3, hidden=5, norm='none', gated=False
    )
    x, weight = (
      jax.random.normal(jax.random.key(0), (1, 4, 4)),
      jnp.ones((1, 4)),
    )
    args = (x, weight, (1, 2, 2), 2, 2)
    params = module.init(jax.random.key(1), *args)['params']
    up, down = (params[f'{name}_proj']['kernel'] for name in ('up', 'down'))
    out: Any = module.apply({'params': params}, *args)
    np.testing.assert_allclose(out, jax.nn.gelu(x @ up) @ down, atol=1e-5)

  def test_a_count_has_its_own_vector_in_the_gate(self):
    plain, _, _ = self.apply()
    table = jnp.zeros((2, 4)).at[1].set(1.0)
    other, _, _ = self.apply(count_embed=table)
    np.testing.assert_array_equal(other, plain)  # 4 tokens: row 0.
    plain, _, _ = self.apply(n=3, n_max=3)
    other, _, _ = self.apply(n=3, n_max=3, count_embed=table)
    self.assertTrue(np.any(plain != other))

  def test_mixed_counts_in_one_batch(self):
    both, _, _ = self.apply(n=jnp.array([2, 3]), n_max=3)
    two, _, _ = self.apply()
    three, _, _ = self.apply(n=3, n_max=3)
    np.testing.assert_allclose(both[1], three[1], atol=1e-6)
    got = both[0].reshape(3, 3, 4)[:2, :2].reshape(4, 4)
    np.testing.assert_allclose(got, two[0], atol=1e-6)

  def test_columns_then_rows_are_sharded(self):
    rules = dict(tokenflex.sharding_rules(64, 4))
    self.assertEqual(rules[r'down_proj/kernel'][0], 'model')
    self.assertEqual(rules[r'(gate|up)_proj/kernel'][1], 'model')
    with self.assertRaisesRegex(ValueError, 'hidden=6 is not a multiple of 4'):
      tokenflex.sharding_rules(6, 4)


class ReduceTest(parameterized.TestCase):
  def test_slots_of_frames(self):
    x = jnp.arange(32.0).reshape(1, 32, 1)
    ts = interface.token_set(x, grid=(2, 4, 4))
    config = tokenflex.TokenFlexConfig()
    self.assertEqual(config.budget_for(ts).k_max, 8)
    full = jnp.array([8])
    r = reduce(config, ts, interface.Budget(k_max=8, k=full))
    expected = [2.5, 4.5, 10.5, 12.5]
    np.testing.assert_allclose(
      r.tokens[0, :, 0], [*expected, *(e + 16 for e in expected)]
    )
    np.testing.assert_array_equal(r.size, np.full((1, 8), 4))
    np.testing.assert_array_equal(r.positions[0, 5], [1, 1, 3])
    np.testing.assert_array_equal(
      r.assignment[0, :16], [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    )
    fewer = reduce(config, ts, interface.Budget(k_max=8, k=jnp.array([3])))
    np.testing.assert_array_equal(fewer.count, [2])  # 1 x 1 of each frame.
    np.testing.assert_allclose(fewer.tokens[0, :2, 0], [7.5, 23.5])

  def test_the_projector_changes_the_width(self):
    config = tokenflex.TokenFlexConfig(project=True, features=6)
    ts = interface.token_set(jnp.ones((1, 16, 4)), grid=(1, 4, 4), special=0)
    params = config.init_params(jax.random.key(0), ts)
    shapes = jax.eval_shape(lambda: config.reduce(ts, params=params))
    self.assertEqual(shapes.tokens.shape, (1, 4, 6))


class MessagesTest(parameterized.TestCase):
  def test_messages(self):
    ts = interface.token_set(jnp.ones((1, 16, 4)))
    config = tokenflex.TokenFlexConfig()
    budget = lambda k: interface.Budget(k_max=k)
    with self.assertRaisesRegex(ValueError, 'n x n, a square number; got 5'):
      config.reduce(ts, budget=budget(5))
    with self.assertRaisesRegex(ValueError, '5 x 5 tokens of a frame of 4 x 4'):
      config.reduce(ts, budget=budget(25))
    with self.assertRaisesRegex(ValueError, 'N=15 tokens without a grid'):
      config.reduce(interface.token_set(jnp.ones((1, 15, 4))))
    with self.assertRaisesRegex(ValueError, 'a square number; got 60'):
      tokenflex.TokenFlexConfig(counts=(60,))
    with self.assertRaisesRegex(ValueError, 'counts=\\(\\); at least one'):
      tokenflex.TokenFlexConfig(counts=())
    for probs in ((0.5, 0.5), (0.5, 0.4, 0.2)):
      with self.assertRaisesRegex(ValueError, 'must sum to 1'):
        tokenflex.TokenFlexConfig(probs=probs)
    with self.assertRaisesRegex(ValueError, "norm='rms'; allowed .'after'"):
      tokenflex.TokenFlexConfig(norm='rms')
    with self.assertRaisesRegex(ValueError, "block='x'; allowed .'mlp'"):
      tokenflex.TokenFlexConfig(block='x')
    with self.assertRaisesRegex(ValueError, 'which an MLP has not. Use block='):
      tokenflex.TokenFlexConfig(block='mlp', count_embed=True)
    with self.assertRaisesRegex(ValueError, 'features=-1, hidden=0; neither'):
      tokenflex.TokenFlexConfig(features=-1)


if __name__ == '__main__':
  absltest.main()
