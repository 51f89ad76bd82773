"""What every cache that selects tokens must do: one table, one row per cache.

All tests feed 20 tokens or one: a cache is compiled twice.
"""

import dataclasses
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.kvcache import interface, registry, storage
from tests.kvcache import testing

NAMES = tuple((name, name) for name in testing.SELECTING)
# Policies that share their rows' code with one of these are left out.
RAGGED = (
  'evict_snapkv',
  'evict_h2o',
  'evict_heads',
  'quest',
  'double_sparsity',
  'tokenselect',
)
# With room for all 40 tokens; their code still selects.
ROOM: dict[str, Any] = {
  'evict': dataclasses.replace(testing.EVICT, budget=48),
  'evict_heads': dataclasses.replace(
    testing.EVICT, budget=48, head_budgets=True, policy='h2o'
  ),
  'evict_streaming': dataclasses.replace(
    testing.SELECTING['evict_streaming'], budget=48
  ),
  'quest': dataclasses.replace(testing.SELECTING['quest'], budget=48),
  'double_sparsity': dataclasses.replace(testing.SPARSE, heavy_tokens=48),
  'tokenselect': dataclasses.replace(testing.TOKENSELECT, budget=36, theta=-1),
  # Tokens keep their positions: ordinary cached attention.
  'tokenselect_fixed': dataclasses.replace(
    testing.TOKENSELECT, budget=36, reposition=False
  ),
}
DATA = testing.qkv(40)


def ragged(config, counts, rows):
  """Feeds counts[i][row] tokens to the chosen rows; outputs and the cache."""
  cache, outs = config.init(testing.shape()), []
  for step in counts:
    step = [count if row in rows else 0 for row, count in enumerate(step)]
    T = 20 if max(step) > 1 else 1
    index = jnp.minimum(cache.length[:, None] + jnp.arange(T)[None], 39)
    new = [
      jnp.take_along_axis(x, index[:, :, None, None], axis=1) for x in DATA
    ]
    positions = testing.positions_of(cache.length, T, jnp.array(step))
    out, cache = testing.step(testing.PLAIN, cache, *new, positions)
    outs.append([out[row, :count] for row, count in enumerate(step)])
  return outs, cache


class SelectionTest(parameterized.TestCase):
  @parameterized.named_parameters(*((name, name) for name in ROOM))
  def test_a_budget_for_all_is_plain_attention(self, name):
    # Of layers with a window the others keep everything, contiguously.
    window = 9 if name.startswith('evict') else None
    scoring = interface.Scoring(scale=0.3, softcap=5.0, window=window)
    out, cache = testing.run(
      ROOM[name], DATA, (20,) + (1,) * 20, scoring=scoring
    )
    expected = testing.attention(DATA, scoring)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_array_equal(cache.length, [40, 40])

  @parameterized.named_parameters(*((name, name) for name in RAGGED))
  def test_a_row_of_a_ragged_batch_is_as_alone(self, name):
    config = testing.SELECTING[name]
    counts = ((20, 7), (20, 20), (1, 1), (0, 1), (0, 12))
    together, cache = ragged(config, counts, (0, 1))
    np.testing.assert_array_equal(cache.length, [41, 41])
    alone, other = ragged(config, counts, (1,))
    for a, b in zip(together, alone, strict=True):
      np.testing.assert_allclose(a[1], b[1], atol=2e-5)
    if hasattr(cache, 'positions'):
      np.testing.assert_array_equal(cache.positions[1], other.positions[1])

  @parameterized.named_parameters(*NAMES)
  def test_bytes_and_storage(self, name):
    config = testing.SELECTING[name]
    cache = config.init(testing.shape(dtype=jnp.bfloat16))
    total = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(cache))
    self.assertEqual(interface.nbytes(cache), total)
    bits = 8 * total / (2 * testing.B * 64 * testing.HKV * testing.D)
    self.assertAlmostEqual(interface.bits_per_element(cache), bits)
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / 'cache.npz'
      storage.save(path, cache, config)
      loaded, _ = storage.load(path, cache, config)
    self.assertTrue(testing.same(cache, loaded))
    self.assertEqual(registry.parse(registry.text_of(config)), config)

  @parameterized.named_parameters(*NAMES)
  def test_messages(self, name):
    config = testing.SELECTING[name]
    cache = config.init(testing.shape(batch=3))
    q, k, v = testing.qkv(1)
    positions = jnp.zeros((2, 1), jnp.int32)
    with self.assertRaisesRegex(ValueError, 'for a cache of 3 rows; the batch'):
      cache.attend(q, k, v, positions, testing.PLAIN)
    cache = config.init(testing.shape())
    with self.assertRaisesRegex(ValueError, '4 query and 1 key heads for a ca'):
      cache.attend(q, k[:, :, :1], v[:, :, :1], positions, testing.PLAIN)
    _, k, v = testing.qkv(65)
    with self.assertRaisesRegex(ValueError, 'row 0 would hold 65 tokens; the'):
      interface.append(cache, interface.Update(k=k, v=v))
    with self.assertRaisesRegex(ValueError, 'must not be more'):
      config.init(testing.shape(capacity=4))

  def test_a_layer_with_a_window_is_kept_whole(self):
    for name in ('quest', 'double_sparsity', 'tokenselect'):
      cache = testing.SELECTING[name].init(testing.shape(window=9))
      self.assertEqual(cache.k.shape[1], 64)


if __name__ == '__main__':
  absltest.main()
