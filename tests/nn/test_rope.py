"""Tests of jaxq.nn.rope: each way of stretching, and its refusals.

tests/parity/test_architectures.py compares whole models with transformers.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import rope

D = 8


def scaled(kind, **fields):
  return rope.Rope(
    theta=100.0, scaling=rope.Scaling(kind=kind, original=10, **fields)
  )


class RopeTest(parameterized.TestCase):
  def test_frequencies_by_hand(self):
    plain = rope.Rope(theta=100.0).frequencies(D)
    np.testing.assert_allclose(plain, [1, 100**-0.25, 0.1, 100**-0.75])
    linear = scaled('linear', factor=4.0).frequencies(D)
    np.testing.assert_allclose(linear, plain / 4)

  def test_llama3_keeps_fast_waves_and_slows_slow_ones(self):
    plain = rope.Rope(theta=100.0).frequencies(D)
    # Turns over 10 positions: 1.59, 0.50, 0.16, 0.05.
    got = scaled('llama3', factor=8.0, low=0.1, high=1.0).frequencies(D)
    turns = 10 * plain / (2 * math.pi)
    blend = (turns - 0.1) / 0.9
    np.testing.assert_allclose(got[0], plain[0])
    np.testing.assert_allclose(got[3], plain[3] / 8)
    for i in (1, 2):
      expected = blend[i] * plain[i] + (1 - blend[i]) * plain[i] / 8
      np.testing.assert_allclose(got[i], expected)

  def test_yarn_is_a_ramp_and_a_temperature(self):
    r = scaled('yarn', factor=4.0, fast=1.0, slow=0.1, temperature=1.5)
    plain = rope.Rope(theta=100.0).frequencies(D)
    kept = (r.frequencies(D) / plain - 0.25) / 0.75
    self.assertTrue(np.all(np.diff(kept) <= 1e-9))
    np.testing.assert_allclose([kept[0], kept[-1]], [1, 0], atol=1e-6)
    x = jnp.ones((1, 1, 1, D))
    y = rope.rotate(x, jnp.zeros((1, 1), jnp.int32), r)
    np.testing.assert_allclose(y, 1.5 * x, rtol=1e-6)

  def test_dynamic_and_longrope_follow_the_length_of_a_row(self):
    plain = rope.Rope(theta=100.0).frequencies(D)
    lengths = jnp.array([5, 10, 20])
    r = scaled('dynamic', factor=2.0)
    got = np.asarray(r.frequencies_at(D, lengths))
    np.testing.assert_allclose(got[:2], [plain, plain], rtol=1e-6)
    theta = 100 * 3 ** (D / (D - 2))  # 2 * 20 / 10 - 1 = 3.
    np.testing.assert_allclose(
      got[2], rope.Rope(theta=theta).frequencies(D), rtol=1e-5
    )
    r = scaled('longrope', short=(1.0,) * 4, long=(1.0, 2.0, 3.0, 4.0))
    got = np.asarray(r.frequencies_at(D, lengths))
    np.testing.assert_allclose(got[1], plain, rtol=1e-6)
    np.testing.assert_allclose(got[2], plain / [1, 2, 3, 4], rtol=1e-6)

  def test_only_the_first_channels_turn(self):
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, D))
    positions = jnp.arange(3)[None]
    y = rope.rotate(x, positions, rope.Rope(dim=4))
    np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
    np.testing.assert_allclose(
      y[..., :4], rope.rotate(x[..., :4], positions, rope.Rope()), rtol=1e-6
    )

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, "kind='cubic'; allowed"):
      rope.Scaling(kind='cubic')
    with self.assertRaisesRegex(ValueError, 'factor=0.5, original=10; both'):
      rope.Scaling(kind='yarn', factor=0.5, original=10)


if __name__ == '__main__':
  absltest.main()
