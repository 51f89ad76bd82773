"""Tests of jaxq.decode.sampling."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.decode import sampling


def filter_oracle(logits, temperature, top_k, top_p):
  """The kept tokens of one row, by loops."""
  order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
  order = order[: top_k or len(order)]
  p = np.exp([logits[i] / temperature for i in order])
  p /= p.sum()
  kept, mass = [], 0.0
  for i, probability in zip(order, p, strict=True):
    if kept and mass >= top_p:
      break
    kept.append(i)
    mass += probability
  return sorted(kept)


def draw(logits, key=0, positions=None, **fields):
  B = logits.shape[0]
  positions = jnp.arange(B) if positions is None else positions
  keys = jax.random.split(jax.random.key(key), B)
  return sampling.sample(logits, keys, positions, sampling.Sampling(**fields))


class SamplingTest(parameterized.TestCase):
  def test_greedy_takes_the_lowest_index_of_equal_logits(self):
    logits = jnp.array([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]], jnp.bfloat16)
    got = draw(logits)
    np.testing.assert_array_equal(got, [1, 0])
    self.assertEqual(got.dtype, jnp.int32)

  @parameterized.product(
    temperature=(0.5, 2.0), top_k=(0, 1, 5, 40), top_p=(1e-6, 0.6, 0.95, 1.0)
  )
  def test_numpy_oracle(self, temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(4, 40)).round(1) * 2
    config = sampling.Sampling(
      temperature=temperature, top_k=top_k, top_p=top_p
    )
    got = sampling.filter_logits(jnp.asarray(logits, jnp.float32), config)
    for row, filtered in zip(logits, np.asarray(got), strict=True):
      kept = np.flatnonzero(np.isfinite(filtered))
      oracle = filter_oracle(row, temperature, top_k, top_p)
      np.testing.assert_array_equal(kept, oracle)
      np.testing.assert_allclose(
        filtered[kept], row[kept] / temperature, rtol=1e-6
      )

  def test_top_k_of_ties_keeps_exactly_k(self):
    config = sampling.Sampling(temperature=1.0, top_k=2)
    got = sampling.filter_logits(jnp.ones((1, 4)), config)
    np.testing.assert_array_equal(np.isfinite(got), [[1, 1, 0, 0]])

  def test_top_k_comes_before_top_p(self):
    # Of all: 0.4 0.3 0.3. Of the first two: 0.57 is enough for 0.5 alone.
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.3]]))
    config = sampling.Sampling(temperature=1.0, top_k=2, top_p=0.5)
    got = sampling.filter_logits(logits, config)
    np.testing.assert_array_equal(np.isfinite(got), [[1, 0, 0]])

  @parameterized.parameters(
    (dict(), [0.5, 0.3, 0.2]),
    (dict(top_k=2), [0.625, 0.375, 0.0]),
    (dict(temperature=0.5), [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38]),
  )
  def test_frequencies(self, fields, expected):
    logits = jnp.tile(jnp.log(jnp.array([[0.5, 0.3, 0.2]])), (4000, 1))
    got = draw(logits, **(dict(temperature=1.0) | fields))
    frequencies = np.bincount(np.asarray(got), minlength=3) / 4000
    # Four standard deviations of a frequency of 0.5 in 4000.
    np.testing.assert_allclose(frequencies, expected, atol=0.032)

  def test_draw_depends_on_key_and_position_only(self):
    logits = jax.random.normal(jax.random.key(5), (8, 50))
    config = sampling.Sampling(temperature=1.0)
    keys = jax.random.split(jax.random.key(1), 8)
    positions = jnp.arange(8) * 3
    batch = sampling.sample(logits, keys, positions, config)
    for i in range(8):
      one = slice(i, i + 1)
      alone = sampling.sample(logits[one], keys[one], positions[one], config)
      self.assertEqual(alone[0], batch[i])
    other = sampling.sample(logits, keys, positions + 1, config)
    self.assertFalse(np.array_equal(batch, other))
    np.testing.assert_array_equal(
      jax.jit(sampling.sample, static_argnums=3)(
        logits, keys, positions, config
      ),
      batch,
    )

  @parameterized.parameters(
    (dict(temperature=-1.0), 'temperature=-1.0; .*not negative.*0 is greedy'),
    (dict(temperature=float('nan')), 'temperature=nan; .*finite'),
    (dict(top_k=-1), 'top_k=-1; .*0 keeps all'),
    (dict(top_p=0.0), 'top_p=0.0; .*above 0 and at most 1'),
    (dict(top_p=1.5), 'top_p=1.5; .*above 0 and at most 1'),
  )
  def test_messages(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      sampling.Sampling(**fields)

  def test_greedy_filters_nothing(self):
    with self.assertRaisesRegex(ValueError, 'temperature=0.0; .*Use sample'):
      sampling.filter_logits(jnp.zeros((1, 2)), sampling.GREEDY)


if __name__ == '__main__':
  absltest.main()
