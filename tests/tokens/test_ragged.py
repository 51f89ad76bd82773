"""Ragged resampling against torch at all sizes, with masks."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import ragged
from tests.parity import oracle

T, H, W, D = 40, 9, 7, 3
X = np.random.default_rng(0).normal(size=(T, H, W, D)).astype(np.float32)
# Frame t is resampled to sides t + 1 and 40 - t: all sizes 1..40.
ROWS = np.arange(1, T + 1)
COLUMNS = ROWS[::-1].copy()
SLOTS = int((ROWS * COLUMNS).sum()) + 7


def torch_frames(function):
  torch = oracle.torch()
  x = torch.from_numpy(X).permute(0, 3, 1, 2)
  out = [
    function(x[t : t + 1], (int(ROWS[t]), int(COLUMNS[t])))[0]
    .permute(1, 2, 0)
    .reshape(-1, D)
    for t in range(T)
  ]
  return torch.cat(out).numpy()


def run(name, weight=None):
  n = jnp.asarray(ROWS * COLUMNS, jnp.int32)
  h, w = jnp.asarray(ROWS, jnp.int32), jnp.asarray(COLUMNS, jnp.int32)
  weight = jnp.ones(T * H * W) if weight is None else weight

  @jax.jit
  def resample(x, weight):
    at = ragged.slots_of(n, h, w, SLOTS)
    sums, share = getattr(ragged, name)(x, weight, (T, H, W), at)
    return sums / jnp.where(share > 0, share, 1.0)[:, None], at.used

  return resample(jnp.asarray(X.reshape(-1, D)), weight)


class RaggedTest(parameterized.TestCase):
  def test_bilinear_is_interpolate_at_all_sizes(self):
    torch = oracle.torch()
    got, used = run('bilinear')
    expected = torch_frames(
      lambda x, size: torch.nn.functional.interpolate(
        x, size=size, mode='bilinear', align_corners=False
      )
    )
    np.testing.assert_array_equal(used, np.arange(SLOTS) < SLOTS - 7)
    np.testing.assert_allclose(got[:-7], expected, atol=1e-5)

  def test_adaptive_average_is_adaptive_pooling_at_all_sizes(self):
    torch = oracle.torch()
    got, _ = run('adaptive_average')
    expected = torch_frames(torch.nn.functional.adaptive_avg_pool2d)
    np.testing.assert_allclose(got[:-7], expected, atol=1e-5)

  def test_masked_patches_weigh_nothing(self):
    weight = np.ones((T, H, W), np.float32)
    weight[8, 2] = 0  # Frame 8 has 9 rows: each is one row of the source.
    got, _ = run('adaptive_average', jnp.asarray(weight.reshape(-1)))
    start = int((ROWS * COLUMNS)[:8].sum())
    rows = np.asarray(got)[start : start + 9 * 32].reshape(9, 32, D)
    np.testing.assert_allclose(rows[2], 0, atol=1e-5)
    self.assertGreater(np.abs(rows[[1, 3]]).min(axis=(1, 2)).max(), 0)
    np.testing.assert_allclose(
      rows[3, 0], X[8, 3, 0], atol=1e-5
    )  # The first of 32 columns is the first of 7.

  def test_slots_by_hand(self):
    n, h, w = (jnp.array(v) for v in ([4, 0, 2], [2, 0, 1], [2, 0, 2]))
    at = ragged.slots_of(n, h, w, 8)
    np.testing.assert_array_equal(at.frame[:6], [0, 0, 0, 0, 2, 2])
    np.testing.assert_array_equal(at.i[:6], [0, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(at.j[:6], [0, 1, 0, 1, 0, 1])
    np.testing.assert_array_equal(at.used, [True] * 6 + [False] * 2)
    at = ragged.slots_of(n, h, w, 9, newline=True)
    np.testing.assert_array_equal(at.j, [0, 1, 2, 0, 1, 2, 0, 1, 2])

  def test_linspace_takes_evenly_spaced_patches(self):
    at = ragged.slots_of(jnp.array([3]), jnp.array([3]), jnp.array([1]), 3)
    x = jnp.arange(8.0)[:, None]
    got, _ = ragged.linspace(x, jnp.ones(8), (1, 2, 4), at)
    np.testing.assert_array_equal(got[:, 0], [0, 3, 7])


if __name__ == '__main__':
  absltest.main()
