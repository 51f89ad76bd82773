"""Tests of jaxq.tokens.interface: what is filled in, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import fastv, interface, pooling, prumerge, registry, schedule

_B, _N, _D = 2, 8, 4


def tokens(**fields):
  return interface.token_set(jnp.ones((_B, _N, _D)), **fields)


class InterfaceTest(parameterized.TestCase):
  def test_positions_on_a_grid_start_behind_special_tokens(self):
    ts = interface.token_set(jnp.ones((1, 9, 2)), grid=(2, 2, 2), special=1)
    expected = [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    np.testing.assert_array_equal(ts.positions[0, :5], expected)
    np.testing.assert_array_equal(ts.positions[0, -1], [1, 1, 1])
    np.testing.assert_array_equal(tokens().positions[1, :, 0], np.arange(_N))

  def test_a_token_set_is_a_pytree_with_a_static_grid(self):
    ts = tokens(grid=(2, 2, 2))
    leaves, tree = jax.tree.flatten(ts)
    self.assertLen(leaves, 4)
    self.assertEqual(jax.tree.unflatten(tree, leaves).grid, (2, 2, 2))

  @parameterized.parameters(
    (10, 0.25, 'floor', 2),
    (10, 0.25, 'ceil', 3),
    (10, 0.25, 'round', 3),  # Python's round would give 2.
    (100, 0.29, 'floor', 29),  # 100 * 0.29 is 28.999...
    (3, 0.1, 'floor', 1),
  )
  def test_budget_from_ratio(self, n, ratio, rounding, k):
    budget = interface.budget_from_ratio(n, ratio, rounding)
    self.assertEqual(budget, interface.Budget(k_max=k))
    np.testing.assert_array_equal(budget.counts(2), [k, k])

  def test_a_reduction_can_follow_another(self):
    config = registry.parse('uniform')

    @jax.jit
    def both(ts):
      first = config.reduce(ts, budget=interface.Budget(k_max=4))
      ts = interface.as_token_set(first)
      return first, config.reduce(ts, budget=interface.Budget(k_max=2))

    first, second = both(tokens(grid=(1, 2, 4)))
    np.testing.assert_array_equal(
      second.positions, np.asarray(first.positions)[:, [1, 3]]
    )

  @parameterized.parameters(
    ({'mask': jnp.ones((_B, 3), bool)}, r'mask \(2, 3\) for tokens \(2, 8, 4'),
    ({'size': jnp.ones((_B,))}, r'size \(2,\) for tokens'),
    ({'grid': (1, 3, 3)}, r'grid=\(1, 3, 3\) .* N=8 tokens; frames \* rows'),
    ({'special': 9}, 'special=9 for N=8 tokens; allowed 0..N'),
    ({'mask': jnp.zeros((_B, _N), bool)}, 'all 2 x 8 tokens are masked'),
  )
  def test_token_sets_that_do_not_fit(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      tokens(**fields)

  @parameterized.parameters(
    ({'k_max': 0}, 'k_max=0; at least 1 slot'),
    ({'k_max': 9}, 'k_max=9 for N=8 tokens; a selector keeps at most all'),
    ({'k_max': 2, 'k': jnp.array([1, 3])}, r'k=\[1, 3\] with k_max=2; allowed'),
    ({'k_max': 2, 'k': jnp.array([-1, 2])}, r'k=\[-1, 2\] with k_max=2'),
  )
  def test_budgets_that_do_not_fit(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      registry.parse('uniform').reduce(
        tokens(), budget=interface.Budget(**fields)
      )

  @parameterized.parameters(
    ({}, 'FastvConfig: scores=None; this reducer needs scores'),
    ({'scores': jnp.ones((_B, 3))}, r'scores \(2, 3\) for 2 x 8 tokens'),
    (
      {'scores': jnp.ones((_B, _N)), 'query': jnp.ones((3, 2, 4))},
      r'query \(3, 2, 4\) for a batch of 2',
    ),
    (
      {'scores': jnp.ones((_B, _N)), 'query_mask': jnp.ones((_B, 2), bool)},
      'query_mask .* does not fit the query',
    ),
  )
  def test_arguments_that_do_not_fit(self, given, message):
    with self.assertRaisesRegex(ValueError, message):
      fastv.FastvConfig().reduce(tokens(), **given)

  def test_what_a_reducer_needs_of_the_tokens(self):
    scores = jnp.ones((_B, _N))
    with self.assertRaisesRegex(ValueError, 'special=0; .* class token'):
      prumerge.PruMergeConfig().reduce(tokens(), scores=scores)
    with self.assertRaisesRegex(
      ValueError, 'N=8 tokens without a grid; N must'
    ):
      pooling.PoolingConfig().reduce(tokens())
    needy = interface.Traits(kind='selector', position_axes=3, modality=True)

    class Needy(interface.Config):
      traits = needy

    with self.assertRaisesRegex(ValueError, 'ts.modality is None'):
      Needy().reduce(tokens())
    modality = jnp.zeros((_B, _N), jnp.int32)
    with self.assertRaisesRegex(
      ValueError, 'positions have 1 axes; at least 3'
    ):
      Needy().reduce(tokens(modality=modality))

  def test_other_messages(self):
    with self.assertRaisesRegex(ValueError, "kind='drop'; allowed"):
      interface.Traits(kind='drop')
    with self.assertRaisesRegex(ValueError, 'n=0; there must be at least 1'):
      interface.budget_from_ratio(0, 0.5)
    with self.assertRaisesRegex(ValueError, r'ratio=0; .*\(0, 1\]'):
      interface.budget_from_ratio(4, 0)
    with self.assertRaisesRegex(ValueError, "rounding='up'; allowed"):
      interface.budget_from_ratio(4, 0.5, 'up')


class ScheduleTest(parameterized.TestCase):
  @parameterized.parameters(
    # By hand, from r and inflect as the paper's code reads them.
    (8, 0.0, (92, 84, 76, 68)),
    (8, -1.0, (84, 74, 69, 69)),  # 16, 10.7, 5.3, 0.
    (8, 1.0, (100, 95, 85, 69)),  # 0, 5.3, 10.7, 16.
    (200, 0.0, (50, 25, 13, 7)),  # At most half.
    (0, 0.0, (100,) * 4),
  )
  def test_by_count(self, r, inflect, expected):
    found = schedule.by_count(r, 4, 100, 0, inflect=inflect)
    self.assertEqual(found, expected)

  def test_at_layer(self):
    self.assertEqual(schedule.at_layer(2, 4, 9, 1, 0.5), (9, 5, 5, 5))
    with self.assertRaisesRegex(
      ValueError, 'layer=4 of 4 layers; allowed 1..3'
    ):
      schedule.at_layer(4, 4, 9, 1, 0.5)

  def test_who_works_inside_an_encoder(self):
    inside = {
      name
      for name, config in registry.REDUCERS.items()
      if isinstance(config, schedule.InEncoder)
    }
    self.assertContainsSubset({'fastv', 'random', 'tome', 'uniform'}, inside)
    self.assertNotIn('visionzip', inside)


if __name__ == '__main__':
  absltest.main()
