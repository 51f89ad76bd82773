"""Tests of jaxq.tokens.primitives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import interface, primitives
from tests.parity import oracle


def oracle_topk(scores, mask, k):
  """Indices of the k best of one row, by a stable sort in NumPy."""
  allowed = [i for i in range(len(scores)) if mask[i] and scores[i] > -np.inf]
  best = sorted(allowed, key=lambda i: (-scores[i], i))[:k]
  return sorted(best)


class SelectionTest(parameterized.TestCase):
  @parameterized.parameters(3, 20)  # By sorting, and by counting.
  def test_topk_with_ties_masks_and_infinities(self, k_max):
    rng = np.random.default_rng(k_max)
    B, N = 6, 32
    scores = rng.integers(-3, 4, (B, N)).astype(np.float32)
    scores[0, 5], scores[0, 7], scores[1, 2] = np.inf, -np.inf, np.nan
    scores[2] = -0.0
    scores[2, ::2] = 0.0  # As large as -0.0: a tie.
    scores[3] = rng.normal(size=N) * 1e-30
    mask = rng.random((B, N)) > 0.2
    mask[4] = False
    k = np.array([k_max, k_max, 2, k_max, k_max, 0])
    select = jax.jit(primitives.select_topk, static_argnums=2)
    index, used = map(np.asarray, select(scores, mask, k_max, k))
    for b in range(B):
      expected = oracle_topk(scores[b], mask[b], k[b])
      self.assertEqual(index[b][used[b]].tolist(), expected)
      self.assertTrue((index[b][~used[b]] == -1).all())
      self.assertEqual(used[b].tolist(), sorted(used[b], reverse=True))

  def test_compact_keeps_order_and_stops_at_k(self):
    mask = jnp.array([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0] * 5], bool)
    index, used = primitives.compact(mask, 3, jnp.array([3, 2, 3]))
    np.testing.assert_array_equal(index, [[1, 2, 4], [0, 1, -1], [-1] * 3])
    np.testing.assert_array_equal(used, np.asarray(index) >= 0)

  def test_spaced_takes_exactly_k(self):
    mask = jnp.array([[True] * 10, [False, True] * 5, [False] * 10])
    for k in (0, 1, 3, 10):
      kept = np.asarray(primitives.spaced(mask, jnp.full((3,), k)))
      np.testing.assert_array_equal(kept.sum(1), [k, min(k, 5), 0])
      self.assertFalse((kept & ~np.asarray(mask)).any())
    np.testing.assert_array_equal(
      np.flatnonzero(primitives.spaced(mask, jnp.full((3,), 3))[0]), [3, 6, 9]
    )

  def test_gather_and_scatter_slots_undo_each_other(self):
    index = jnp.array([[4, 0, -1]])
    slots = primitives.scatter_slots(index, 5)
    np.testing.assert_array_equal(slots, [[1, -1, -1, -1, 0]])
    x = jnp.arange(10.0).reshape(1, 5, 2)
    np.testing.assert_array_equal(
      primitives.gather(x, index), [[[8, 9], [0, 1], [0, 0]]]
    )

  def test_gumbel_topk_draws_as_often_as_the_probabilities_say(self):
    logp = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    draws = jax.vmap(lambda key: primitives.gumbel_topk(key, logp, 2))(
      jax.random.split(jax.random.key(0), 4000)
    )
    self.assertTrue((draws[:, 0] != draws[:, 1]).all())
    first = np.bincount(draws[:, 0], minlength=3) / 4000
    np.testing.assert_allclose(first, [0.5, 0.3, 0.2], atol=0.03)
    # Of those whose first is 0, the second is 1 with 0.3 / 0.5.
    second = np.asarray(draws[draws[:, 0] == 0, 1])
    self.assertAlmostEqual(np.mean(second == 1), 0.6, delta=0.04)

  def test_straight_through(self):
    value, grad = jax.value_and_grad(
      lambda x: primitives.ste(jnp.round(x), 3 * x)
    )(1.2)
    self.assertEqual((float(value), float(grad)), (1.0, 3.0))

  def test_nearest(self):
    x = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])
    c = jnp.array([[[0.9, 0.0], [0.9, 0.1], [2.0, 2.0]]])
    value, index = primitives.nearest(x, c)
    np.testing.assert_array_equal(index[..., 0], [[2, 2]])
    np.testing.assert_allclose(value[..., 0], [[2, 2]])
    allowed = jnp.array([[[True, True, False]]])
    _, index = primitives.nearest(x, c, top=2, allowed=allowed)
    np.testing.assert_array_equal(
      index, [[[0, 1], [1, 0]]]
    )  # A tie: the first.
    value, _ = primitives.nearest(x, c, allowed=allowed & False)
    self.assertTrue(np.isneginf(value).all())


class MergeTest(parameterized.TestCase):
  @parameterized.parameters(5, 2100)  # By a matmul, and by a segment sum.
  def test_weighted_means_against_loops(self, k):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 12, 3)).astype(np.float32)
    size = rng.uniform(1, 3, (2, 12)).astype(np.float32)
    slot = rng.permuted(np.tile(np.arange(-1, 4), (2, 3))[:, :12], axis=1)
    slot = slot.astype(np.int32)
    x[slot == -1] = np.nan  # Never looked at.
    merge = jax.jit(primitives.merge, static_argnums=3)
    means, sizes = merge(x, size, slot, k)
    for b in range(2):
      for s in range(4):
        member = slot[b] == s
        total = size[b][member].sum()
        np.testing.assert_allclose(sizes[b, s], total, rtol=1e-6)
        expected = (size[b][member, None] * x[b][member]).sum(0) / total
        np.testing.assert_allclose(means[b, s], expected, rtol=1e-5, atol=1e-6)
    self.assertFalse(np.asarray(sizes)[:, 4:].any())
    self.assertFalse(np.asarray(means)[:, 4:].any())

  def test_slots_are_ordered_by_their_first_member(self):
    slot = jnp.array([[3, -1, 0, 3, 2]])
    ordered = primitives.order_slots(slot, 5)
    np.testing.assert_array_equal(ordered, [[0, -1, 1, 0, 2]])
    np.testing.assert_array_equal(
      primitives.representatives(ordered, 5), [[0, 2, 4, -1, -1]]
    )

  def test_unmerge_gives_every_token_its_slot(self):
    ts = interface.token_set(jnp.arange(8.0).reshape(1, 4, 2))
    reduced = primitives.merged(ts, jnp.array([[0, 1, 0, -1]]), 3)
    np.testing.assert_array_equal(reduced.size, [[2, 1, 0]])
    np.testing.assert_array_equal(
      primitives.unmerge(reduced)[0], [[2, 3], [2, 3], [2, 3], [0, 0]]
    )

  def test_packed_closes_gaps(self):
    ts = interface.token_set(jnp.arange(4.0).reshape(1, 4, 1))
    reduced = primitives.merged(ts, jnp.array([[0, 1, 2, 2]]), 3)
    reduced = dataclasses.replace(
      reduced, mask=jnp.array([[True, False, True]])
    )
    packed = primitives.packed(reduced, 4)
    np.testing.assert_array_equal(packed.tokens[..., 0], [[0, 2.5, 0, 0]])
    np.testing.assert_array_equal(packed.assignment, [[0, -1, 1, 1]])
    np.testing.assert_array_equal(packed.index, [[0, 2, -1, -1]])
    np.testing.assert_array_equal(packed.count, [2])


class ResampleTest(parameterized.TestCase):
  @parameterized.product(
    sizes=((27, 14), (27, 8), (16, 5)), kind=primitives.RESAMPLING
  )
  def test_equals_torch(self, sizes, kind):
    torch = oracle.torch()
    n_in, n_out = sizes
    x = np.random.default_rng(0).normal(size=(2, n_in, n_in, 3))
    x = x.astype(np.float32)
    matrix = _matrix(n_in, n_out, 14, kind)
    np.testing.assert_allclose(matrix[:n_out].sum(1), 1, rtol=1e-6)
    self.assertFalse(matrix[n_out:].any())
    ours = primitives.resample_grid(
      jnp.asarray(x), matrix[:n_out], matrix[:n_out]
    )
    # Its own float32 weights are off by 3e-6 where ours are exact.
    channels_first = torch.from_numpy(x).double().permute(0, 3, 1, 2)
    if kind == 'bilinear':
      theirs = torch.nn.functional.interpolate(
        channels_first, (n_out, n_out), mode='bilinear', align_corners=False
      )
    else:
      theirs = torch.nn.functional.adaptive_avg_pool2d(channels_first, n_out)
    np.testing.assert_allclose(
      ours, theirs.permute(0, 2, 3, 1).numpy(), rtol=1e-6, atol=1e-6
    )

  def test_an_unknown_kind(self):
    with self.assertRaisesRegex(ValueError, "kind='cubic'; allowed .'adaptive"):
      primitives.resample_matrix(4, 2, 2, 'cubic')


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _matrix(n_in, n_out, n_out_max, kind):
  """n_out is traced: one compile serves all sizes."""
  return primitives.resample_matrix(n_in, n_out, n_out_max, kind)


if __name__ == '__main__':
  absltest.main()
