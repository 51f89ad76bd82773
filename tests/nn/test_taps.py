"""Tests of jaxq.nn.taps."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import linen as nn

from jaxq.nn import taps


@flax.struct.dataclass
class Total:
  """Sums what it sees."""

  total: jax.Array

  def update(self, x):
    return Total(self.total + jnp.sum(x))


class Layer(nn.Module):
  """Doubles, with a tap before."""

  @nn.compact
  def __call__(self, x):
    return 2 * taps.tap(self, 'in', x)


class TapsTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_tap_updates_its_states_and_is_the_identity(self, jit):
    def run(states, x):
      y, updated = Layer().apply({'taps': states}, x, mutable=['taps'])
      return y, updated['taps']

    run = jax.jit(run) if jit else run
    x = jnp.arange(4.0)
    states = {'in': {'total': Total(jnp.float32(1))}}
    y, states = run(states, x)
    _, states = run(states, x)
    np.testing.assert_array_equal(y, 2 * x)
    self.assertEqual(float(states['in']['total'].total), 1 + 6 + 6)

  def test_without_states_the_tap_leaves_no_trace(self):
    jaxpr = jax.make_jaxpr(lambda x: Layer().apply({}, x))(jnp.ones(3))
    self.assertLen(jaxpr.eqns, 1)

  def test_paths(self):
    tree = taps.set_path({'a': {'b': 1}}, 'a/c/d', 2)
    self.assertEqual(tree, {'a': {'b': 1, 'c': {'d': 2}}})
    self.assertEqual(taps.get_path(tree, 'a/c/d'), 2)
    self.assertIsNone(taps.get_path(tree, 'a/x/d'))
    self.assertEqual(list(taps.leaves(tree)), [('a/b', 1), ('a/c/d', 2)])

  def test_set_path_copies(self):
    tree = {'a': {'b': 1}}
    taps.set_path(tree, 'a/b', 2)
    self.assertEqual(tree, {'a': {'b': 1}})


if __name__ == '__main__':
  absltest.main()
