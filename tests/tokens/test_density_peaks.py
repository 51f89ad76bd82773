"""Density-peak scores against loops, with padding."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import density_peaks


def peaks(x, neighbours):
  """NumPy loops over one set of tokens."""
  n, D = x.shape
  d = np.linalg.norm(x[:, None] - x[None], axis=-1) / np.sqrt(D)
  density = np.exp(-np.mean(np.sort(d, axis=1)[:, :neighbours] ** 2, axis=1))
  out = np.zeros(n)
  for i in range(n):
    denser = [d[i, j] for j in range(n) if density[j] > density[i]]
    out[i] = density[i] * (min(denser) if denser else d.max())
  return out


class DensityPeaksTest(parameterized.TestCase):
  def test_is_the_definition(self):
    x = np.random.default_rng(0).normal(size=(3, 20, 5)).astype(np.float32)
    got = density_peaks.scores(jnp.asarray(x), jnp.ones((3, 20), bool))
    for row, expected in zip(got, x, strict=True):
      np.testing.assert_allclose(row, peaks(expected, 4), rtol=1e-4)

  def test_one_token_of_each_heap_stands_out(self):
    rng = np.random.default_rng(1)
    heaps = np.repeat(np.eye(3, 8) * 9, 6, axis=0)
    x = heaps + 0.1 * rng.normal(size=heaps.shape)
    got = density_peaks.scores(jnp.asarray(x, jnp.float32), jnp.ones(18, bool))
    best = np.argsort(-np.asarray(got))[:3] // 6
    self.assertCountEqual(best, [0, 1, 2])

  def test_masked_tokens_change_nothing(self):
    x = np.random.default_rng(2).normal(size=(9, 4)).astype(np.float32)
    mask = jnp.arange(9) < 6
    got = density_peaks.scores(jnp.asarray(x), mask)
    np.testing.assert_allclose(got[:6], peaks(x[:6], 4), rtol=1e-4)
    np.testing.assert_array_equal(got[6:], 0)
    spoilt = jnp.asarray(x).at[6:].set(jnp.nan)
    np.testing.assert_array_equal(density_peaks.scores(spoilt, mask), got)

  def test_clusters_equal_loops(self):
    n, c = 14, 3
    x = np.random.default_rng(3).normal(size=(1, n, 6)).astype(np.float32)
    mask = jnp.ones((1, n), bool)
    found = jax.jit(density_peaks.clusters, static_argnums=2)(
      jnp.asarray(x), mask, c, jnp.array([c])
    )
    distance = np.linalg.norm(x[0, :, None] - x[0], axis=-1) / np.sqrt(6)
    density = np.exp(-np.mean(np.sort(distance, 1)[:, :c] ** 2, axis=1))
    to_denser = [
      min(
        (distance[i, j] for j in range(n) if density[j] > density[i]),
        default=distance.max(),
      )
      for i in range(n)
    ]
    centres = np.argsort(-density * np.array(to_denser))[:c]
    label = np.argmin(distance[:, centres], axis=1)
    for i, centre in enumerate(centres):
      label[centre] = i
    same = label[:, None] == label
    found = np.asarray(found)
    np.testing.assert_array_equal(found[0][:, None] == found[0], same)
    self.assertEqual(int(found[0, 0]), 0)


if __name__ == '__main__':
  absltest.main()
