"""Tests of jaxq.kvcache.topk: what is chosen, whoever counts."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.kvcache import quest, slots, tokenselect, topk

KERNEL = {
  'implementation': 'pallas_mosaic_tpu',
  'chip': 'v5e',
  'interpret': True,
}


def scores():
  """(2, 3, 200) of nine values, so most are ties; -inf and inf among them."""
  rng = np.random.default_rng(0)
  found = rng.integers(-4, 5, size=(2, 3, 200)).astype('float32')
  found[0, 0, 5:] = -np.inf  # Fewer than are asked for.
  found[0, 1, ::3] = -np.inf
  found[1, 2, 7:9] = np.inf
  return jnp.asarray(found)


class TopkTest(parameterized.TestCase):
  def test_a_cpu_chooses_as_top_k_in_its_order(self):
    best, want = jax.lax.top_k(scores(), 12)
    index, some = topk.largest(scores(), 12)
    np.testing.assert_array_equal(index, want)
    np.testing.assert_array_equal(some, best > -np.inf)

  def test_the_kernel_chooses_the_same(self):
    index, some = (np.asarray(a) for a in topk.largest(scores(), 12))
    counted = jax.jit(lambda s: topk.largest(s, 12, **KERNEL))
    got, there = (np.asarray(a) for a in counted(scores()))
    for at in np.ndindex(2, 3):
      np.testing.assert_array_equal(
        np.sort(index[at][some[at]]), got[at][there[at]]
      )

  def test_tokenselect_chooses_as_sorted_top_k(self):
    votes = scores()[:, 1]
    config = tokenselect.TokenSelectConfig(budget=12)
    _, index = jax.lax.top_k(votes, 12)
    np.testing.assert_array_equal(
      tokenselect.select(votes, config), jnp.sort(index, axis=-1)
    )

  def test_masks_and_places_are_those_of_top_k(self):
    mask = jax.jit(quest.top, static_argnums=1)(scores(), 12)
    _, index = jax.lax.top_k(scores(), 12)
    want = np.zeros(mask.shape, bool)
    np.put_along_axis(want, np.asarray(index), True, axis=-1)
    np.testing.assert_array_equal(mask, want & (scores() > -jnp.inf))
    # 190 slots and 10 new tokens: of equal ones the first stay where they are.
    taken = jax.jit(slots.places, static_argnums=1)(scores(), 190)
    taken, found = np.asarray(taken), np.asarray(scores())  # (2, 10, 3)
    kept = np.asarray(jax.lax.top_k(scores(), 190)[1])
    for row, head in np.ndindex(2, 3):
      new = [i - 190 for i in kept[row, head] if i >= 190]
      new = [i for i in new if found[row, head, 190 + i] > -np.inf]
      held = np.flatnonzero(taken[row, :, head] < 190)
      self.assertEqual(sorted(new), held.tolist())


if __name__ == '__main__':
  absltest.main()
