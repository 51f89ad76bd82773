"""What OS+ searches by, and where the scales of a hidden layer go."""

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import blocks, linear, taps
from jaxq.numerics import qarray
from jaxq.quant import activations, os_plus
from tests.quant import planted, test_os_plus, testing

LARGE = 7  # Of the hidden channels.


def with_a_large_hidden_channel():
  """Llama's block, one channel of up * silu(gate) fifty times the others."""
  block, params = planted.block('rms')
  up, down = (
    blocks.kernel_of(params, f'mlp/{name}_proj') for name in ('up', 'down')
  )
  up = up.at[:, LARGE].multiply(50.0)
  params = taps.set_path(params, 'mlp/up_proj/kernel', up)
  down = down.at[LARGE].divide(50.0**0.5)
  return block, taps.set_path(params, 'mlp/down_proj/kernel', down)


class LossTest(parameterized.TestCase):
  def test_it_is_the_error_of_what_o_reads(self):
    """At s = 1: attention on rounded inputs and kernels, as the block runs.

    With grouped heads, which it has to repeat.
    """
    block, params = planted.block('rms', planted.SCALED)
    site, x = block.sites[0], planted.inputs()
    how = test_os_plus.config(shift='never', n_grid=1)
    seen = test_os_plus.sample_of(block, params, site, x)
    _, losses = os_plus.migrate(block, site, params, seen, how)
    t = jnp.max(jnp.abs(seen)).reshape(1)
    scale, zero = activations.static_params(-t, t, how.inputs)
    rounded, quant = params, {}
    for path in site.consumers:
      kernel = qarray.fake_quant(blocks.kernel_of(params, path), how.weights)
      rounded = taps.set_path(rounded, f'{path}/kernel', kernel)
      act = linear.ActQuant(scale, zero, how.inputs)
      quant = taps.set_path(quant, f'{path}/input', act)
    exact, got = (
      block.tapped({'params': p, 'quant': q}, x)['attention']['o_proj']['in']
      for p, q in ((params, {}), (rounded, quant))
    )
    error = jnp.mean(jnp.sum((got - exact) ** 2, axis=-1))
    self.assertGreater(float(error), 0)
    np.testing.assert_allclose(losses[0], error, rtol=1e-4)


class HiddenLayerTest(parameterized.TestCase):
  def test_its_scale_goes_into_the_columns_of_up(self):
    block, params = with_a_large_hidden_channel()
    x = planted.inputs()
    stage = test_os_plus.migration(n_grid=10)
    moved, _ = testing.run(block, params, stage, x)
    up, down = (
      [blocks.kernel_of(p, f'mlp/{n}_proj') for p in (params, moved)]
      for n in ('up', 'down')
    )
    gate = moved['post_norm']['scale'] / params['post_norm']['scale']
    s = up[0] / (up[1] * gate[:, None])  # The norm's own scale taken back.
    np.testing.assert_allclose(s, jnp.broadcast_to(s[:1], s.shape), rtol=1e-3)
    self.assertGreater(float(s[0, LARGE]), 5)
    self.assertGreaterEqual(float(jnp.min(s)), 1 - 1e-3)
    np.testing.assert_allclose(
      down[1] / down[0], jnp.broadcast_to(s[:1].T, down[0].shape), rtol=1e-3
    )
    error = test_os_plus.relative(
      testing.output(block, moved, {}, x), testing.output(block, params, {}, x)
    )
    self.assertLess(error, 1e-5)

  def test_it_gains(self):
    block, params = with_a_large_hidden_channel()
    block = block.without(('re:attention', 're:gate|up'), 0)
    x = planted.inputs()
    ours = os_plus.os_plus(test_os_plus.config(n_grid=50, bmm=()))
    nearest = test_os_plus.rtn(test_os_plus.W6, test_os_plus.A6)
    errors = [planted.error(block, params, m, x) for m in (ours, nearest)]
    self.assertLess(errors[0], 0.5 * errors[1])


if __name__ == '__main__':
  absltest.main()
