"""Tests of the selectors, poolings and two-part baselines, ToMe apart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import (
  controls,
  dycoke,
  fastv,
  interface,
  pixel_shuffle,
  pooling,
  prumerge,
  sparsevlm,
  visionzip,
)
from tests.parity import oracle


@functools.partial(jax.jit, static_argnums=(0, 2))
def _reduce(config, ts, k_max, scores=None, rng=None, k=None):
  budget = None if k_max is None else interface.Budget(k_max=k_max, k=k)
  return config.reduce(ts, budget=budget, scores=scores, rng=rng)


def normal(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


class FastvTest(absltest.TestCase):
  def test_keeps_the_best_in_order(self):
    ts = interface.token_set(normal(1, 6, 3))
    scores = jnp.array([[0.1, 0.9, 0.3, 0.9, 0.0, 0.2]])
    reduced = _reduce(fastv.FastvConfig(), ts, None, scores)
    np.testing.assert_array_equal(reduced.index, [[1, 2, 3]])
    np.testing.assert_array_equal(reduced.positions[..., 0], [[1, 2, 3]])

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, 'layer=0; it must be at least 1'):
      fastv.FastvConfig(layer=0)


class VisionZipTest(parameterized.TestCase):
  @parameterized.parameters('add', 'mean')
  def test_equals_loops(self, merge):
    N, K, C = 20, 9, 3  # The class token, 5 dominant and 3 contextual.
    x, keys = np.asarray(normal(1, N, 4)), np.asarray(normal(1, N, 5, seed=1))
    a = np.random.default_rng(2).random((1, N)).astype(np.float32)
    ts = interface.token_set(jnp.asarray(x), keys=jnp.asarray(keys), special=1)
    config = visionzip.VisionZipConfig(contextual=C, merge=merge)
    reduced = _reduce(config, ts, K, jnp.asarray(a))
    x, keys, a = x[0], unit(keys[0]), a[0]
    best = sorted(range(1, N), key=lambda i: -a[i])[: K - C - 1]
    dominant = [0, *sorted(best)]
    rest = [i for i in range(N) if i not in dominant]
    targets = rest[:: len(rest) // C][:C]
    expected = [x[i] for i in dominant]
    joins = {
      i: int(np.argmax(keys[targets] @ keys[i]))
      for i in rest
      if i not in targets
    }
    for t, target in enumerate(targets):
      members = [x[i] for i, to in joins.items() if to == t]
      if merge == 'mean':
        expected.append(np.mean([x[target], *members], axis=0))
      else:
        expected.append(
          x[target] + (np.mean(members, axis=0) if members else 0)
        )
    np.testing.assert_array_equal(reduced.index[0], dominant + targets)
    np.testing.assert_allclose(
      reduced.tokens[0], np.stack(expected), rtol=1e-5, atol=1e-6
    )

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, "merge='sum'; allowed .'add'"):
      visionzip.VisionZipConfig(merge='sum')
    with self.assertRaisesRegex(ValueError, 'contextual=-1; .*dominant tokens'):
      visionzip.VisionZipConfig(contextual=-1)


class PruMergeTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_equals_loops(self, plus):
    N, K, near = 41, 20, 4  # A class token and 40 patches.
    x, keys = np.asarray(normal(1, N, 4)), np.asarray(normal(1, N, 5, seed=1))
    a = np.random.default_rng(2).random((1, N)).astype(np.float32) * 0.1
    a[0, [5, 17, 30]] = [0.9, 0.8, 0.95]
    ts = interface.token_set(jnp.asarray(x), keys=jnp.asarray(keys), special=1)
    config = prumerge.PruMergeConfig(plus=plus, neighbours=near)
    reduced = _reduce(config, ts, K, jnp.asarray(a))
    x, keys, a = x[0, 1:], unit(keys[0, 1:]), a[0, 1:]
    low, high = np.percentile(a, [25, 75])
    kept = np.flatnonzero(a > high + 1.5 * (high - low))
    self.assertEqual(kept.tolist(), [4, 16, 29])
    if plus:
      kept = np.union1d(kept, np.arange(0, 40, 40 // 3 // 3))
    expected = []
    for i in kept:
      cosine = keys @ keys[i]
      cosine[i] = -np.inf
      around = np.argsort(-cosine)[:near]
      expected.append(x[i] + (a[around, None] * x[around]).sum(0))
    rest = np.setdiff1d(np.arange(40), kept)
    expected.append((a[rest, None] * x[rest]).sum(0))
    count = int(reduced.count[0])
    np.testing.assert_array_equal(reduced.index[0, :count], [*(kept + 1), -1])
    np.testing.assert_allclose(
      reduced.tokens[0, :count], np.stack(expected), rtol=1e-5, atol=1e-5
    )

  def test_a_fixed_number_has_the_shares_of_plus(self):
    # 16 slots: the extra one, 4 by attention, 11 evenly spaced of the others.
    scores = jnp.zeros((1, 65)).at[0, 10:25].set(jnp.linspace(0.9, 0.5, 15))
    ts = interface.token_set(normal(1, 65, 4), special=1)
    kept = {}
    for plus in (False, True):
      config = prumerge.PruMergeConfig(plus=plus, adaptive=False, neighbours=0)
      reduced = _reduce(config, ts, 16, scores)
      self.assertEqual(int(reduced.count[0]), 16)
      kept[plus] = np.asarray(reduced.index[0, :15]).tolist()
    self.assertEqual(kept[False], list(range(10, 25)))
    others = sorted(set(kept[True]) - {10, 11, 12, 13})
    self.assertLen(others, 11)
    self.assertLessEqual(np.diff([0, *others, 65]).max(), 11)

  def test_spaced_ones_without_room_are_spaced_still(self):
    # 3 outliers ask for 14 more of 64, and there is room for 4.
    scores = jnp.full((1, 65), 0.1).at[0, jnp.array([5, 17, 30])].set(0.9)
    ts = interface.token_set(normal(1, 65, 4), special=1)
    config = prumerge.PruMergeConfig(plus=True, neighbours=0)
    reduced = _reduce(config, ts, 8, scores)
    index = np.asarray(reduced.index[0])
    self.assertContainsSubset({5, 17, 30}, set(index.tolist()))
    others = sorted(set(index.tolist()) - {5, 17, 30, -1})
    self.assertLen(others, 4)
    self.assertGreater(others[-1], 48)  # The last quarter has one.

  def test_without_outliers_an_eighth_is_kept(self):
    mask = jnp.ones((2, 40), bool)
    flat = jnp.full((2, 40), 0.5)
    np.testing.assert_array_equal(prumerge.outliers(flat, mask), [5, 5])
    spiked = flat.at[0, 3].set(1.0)
    np.testing.assert_array_equal(prumerge.outliers(spiked, mask), [1, 5])
    # Over the batch there are 1 of 80: less than one of a row's 40.
    both = prumerge.outliers(spiked.at[0, 4].set(1.0), mask, over_batch=True)
    np.testing.assert_array_equal(both, [1, 1])

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, 'neighbours=-1; it must be'):
      prumerge.PruMergeConfig(neighbours=-1)


class SparseVlmTest(parameterized.TestCase):
  def test_kept_tokens_then_means_of_clusters(self):
    N = 60
    x = normal(1, N, 4)
    scores = jnp.asarray(np.random.default_rng(3).random((1, N)), jnp.float32)
    config = sparsevlm.SparseVlmConfig(layers=(2,), keep=(20,))
    ((layer, budget),) = config.stages(N)
    # 13 of the 40 others are recycled, as 2 clusters.
    self.assertEqual((layer, budget.k_max), (2, 22))
    reduced = _reduce(config, interface.token_set(x), 22, scores)
    order = np.argsort(-np.asarray(scores[0]))
    np.testing.assert_array_equal(reduced.index[0, :20], np.sort(order[:20]))
    np.testing.assert_array_equal(reduced.index[0, 20:], [-1, -1])
    self.assertEqual(float(reduced.size[0, 20:].sum()), 13)
    recycled = np.flatnonzero(np.asarray(reduced.assignment[0]) >= 20)
    np.testing.assert_array_equal(recycled, np.sort(order[20:33]))
    for s in (20, 21):
      member = np.asarray(reduced.assignment[0]) == s
      np.testing.assert_allclose(
        reduced.tokens[0, s], x[0][member].mean(0), rtol=1e-5, atol=1e-6
      )

  def test_raters_are_the_text_that_the_image_is_like(self):
    visual = jnp.array([[[4.0, 0], [4.0, 1]]])
    text = jnp.array([[[1.0, 0], [0, 0.1], [-1, 0], [9, 9]]])
    real = jnp.array([[True, True, True, False]])
    rates = sparsevlm.rate(visual, text, jnp.ones((1, 2), bool), real)
    np.testing.assert_array_equal(rates, [[True, False, False, False]])

  def test_scores_of_raters_and_of_the_best_heads(self):
    weights = (
      jnp.zeros((1, 2, 3, 2))
      .at[0, :, 0]
      .set(jnp.array([[0.2, 0.4], [0.1, 0.0]]))
    )
    raters = jnp.array([[True, False, False]])
    np.testing.assert_allclose(
      sparsevlm.scores_of(weights, raters), [[0.15, 0.2]], rtol=1e-6
    )
    np.testing.assert_allclose(
      sparsevlm.scores_of(weights, raters, heads=1), [[0.2, 0.4]], rtol=1e-6
    )

  @parameterized.parameters(
    ({'layers': (2, 2), 'keep': (3, 2)}, r'layers=\(2, 2\); they must'),
    ({'layers': (2,), 'keep': (3, 2)}, 'a number of tokens per layer'),
    ({'layers': (1, 2), 'keep': (2, 3)}, 'none above the one before it'),
    ({'heads': 0}, 'heads=0; at least 1 must rate'),
  )
  def test_messages(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      sparsevlm.SparseVlmConfig(**fields)


class DycokeTest(parameterized.TestCase):
  def test_a_static_video_loses_tokens_of_later_frames_only(self):
    frame = np.asarray(normal(1, 10, 4))
    x = jnp.asarray(np.tile(frame, (1, 6, 1)))
    ts = interface.token_set(x, grid=(6, 2, 5))
    config = dycoke.DycokeConfig()  # p = 0.3: 3 of 10.
    self.assertEqual(config.budget_for(ts).k_max, 20 + 4 * 3)
    reduced = _reduce(config, ts, None)
    kept = np.asarray(reduced.assignment[0] >= 0).reshape(6, 10)
    np.testing.assert_array_equal(kept.sum(1), [10, 3, 3, 3, 10, 3])

  def test_what_changes_stays(self):
    x = np.tile(np.asarray(normal(1, 10, 4)), (1, 4, 1))
    x = x.reshape(4, 10, 4)
    x[1, 7], x[2, 2], x[3, 4] = -x[1, 7], -x[2, 2], -x[3, 4]
    ts = interface.token_set(jnp.asarray(x).reshape(1, 40, 4), grid=(4, 2, 5))
    reduced = _reduce(dycoke.DycokeConfig(), ts, 13)  # One token per frame.
    kept = np.asarray(reduced.assignment[0] >= 0).reshape(4, 10)
    self.assertTrue(kept[0].all())
    # Frame 3 is compared with 2, whose token 2 is new; frame 3 has the old one.
    self.assertEqual(np.flatnonzero(kept[1]).tolist(), [7])
    self.assertEqual(np.flatnonzero(kept[2]).tolist(), [2])
    self.assertIn(np.flatnonzero(kept[3])[0], (2, 4))

  def test_messages(self):
    ts = interface.token_set(jnp.ones((1, 40, 2)), grid=(4, 2, 5))
    with self.assertRaisesRegex(ValueError, 'k_max=9 for 4 frames of 10'):
      _reduce(dycoke.DycokeConfig(), ts, 9)
    with self.assertRaisesRegex(ValueError, 'budget=0.1; one frame of 4'):
      _reduce(dycoke.DycokeConfig(budget=0.1), ts, None)
    with self.assertRaisesRegex(ValueError, 'layer=3, prune=1; allowed'):
      dycoke.DycokeConfig(prune=1)


class PoolingTest(parameterized.TestCase):
  @parameterized.parameters(
    ('average', 2, (3, 4)), ('adaptive', 0, (4, 5)), ('bilinear', 0, (4, 5))
  )
  def test_equals_torch(self, method, stride, size):
    torch = oracle.torch()
    T, H, W, D = 2, 7, 9, 3
    x = normal(1, T * H * W, D)
    ts = interface.token_set(x, grid=(T, H, W))
    fields = {'stride': stride} if stride else {'budget': 0.34}
    config = pooling.PoolingConfig(method=method, **fields)
    h, w = size
    self.assertEqual(config.budget_for(ts).k_max, T * h * w)
    reduced = _reduce(config, ts, None)
    frames = torch.from_numpy(np.asarray(x)).reshape(T, H, W, D).double()
    frames = frames.permute(0, 3, 1, 2)
    functional = torch.nn.functional
    expected = {
      'average': lambda: functional.avg_pool2d(frames, 2),
      'adaptive': lambda: functional.adaptive_avg_pool2d(frames, size),
      'bilinear': lambda: functional.interpolate(
        frames, size, mode='bilinear', align_corners=False
      ),
    }[method]()
    np.testing.assert_allclose(
      reduced.tokens[0],
      expected.permute(0, 2, 3, 1).reshape(-1, D).numpy(),
      rtol=1e-5,
      atol=1e-6,
    )
    self.assertTrue(reduced.mask.all())

  def test_a_traced_k_is_a_smaller_grid(self):
    ts = interface.token_set(normal(3, 36, 2), grid=(1, 6, 6))
    config = pooling.PoolingConfig(method='adaptive')
    reduced = _reduce(config, ts, 9, k=jnp.array([9, 8, 1]))
    np.testing.assert_array_equal(reduced.count, [9, 4, 1])
    np.testing.assert_allclose(
      reduced.tokens[2, 0], ts.tokens[2].mean(0), rtol=1e-5, atol=1e-6
    )
    # Positions are those of the patches at the centres of windows.
    np.testing.assert_array_equal(
      reduced.positions[1, :4, 1:], [[1, 1], [1, 4], [4, 1], [4, 4]]
    )

  def test_messages(self):
    ts = interface.token_set(jnp.ones((1, 8, 2)), grid=(2, 2, 2))
    with self.assertRaisesRegex(ValueError, 'k_max=1 for 2 frames; each keeps'):
      _reduce(pooling.PoolingConfig(method='adaptive'), ts, 1)
    with self.assertRaisesRegex(ValueError, 'k_max=1 for a grid of 2 x 1 x 1'):
      _reduce(pooling.PoolingConfig(), ts, 1)
    with self.assertRaisesRegex(ValueError, 'stride=3 on a grid of 2 x 2'):
      _reduce(pooling.PoolingConfig(stride=3), ts, None)
    with self.assertRaisesRegex(ValueError, "method='max'; allowed"):
      pooling.PoolingConfig(method='max')
    with self.assertRaisesRegex(ValueError, 'stride=0; it must be'):
      pooling.PoolingConfig(stride=0)


class PixelShuffleTest(parameterized.TestCase):
  def test_channels_are_in_raster_order_of_the_block(self):
    x = jnp.arange(16.0).reshape(1, 16, 1)
    ts = interface.token_set(x, grid=(1, 4, 4))
    reduced = _reduce(pixel_shuffle.PixelShuffleConfig(), ts, None)
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    np.testing.assert_array_equal(reduced.tokens[0], expected)
    np.testing.assert_array_equal(reduced.size[0], [4] * 4)
    first = _reduce(pixel_shuffle.PixelShuffleConfig(version='v1'), ts, None)
    np.testing.assert_array_equal(
      first.tokens[0], np.array(expected)[[0, 2, 1, 3]]
    )

  def test_nothing_is_lost(self):
    x = normal(1, 2 * 6 * 9, 3)
    blocks = pixel_shuffle.to_blocks(x, (2, 6, 9), 3)  # (1, 12, 9, 3)
    back = blocks.reshape(1, 2, 2, 3, 3, 3, 3).transpose(0, 1, 2, 4, 3, 5, 6)
    np.testing.assert_array_equal(back.reshape(x.shape), x)

  def test_messages(self):
    ts = interface.token_set(jnp.ones((1, 6, 2)), grid=(1, 2, 3))
    with self.assertRaisesRegex(ValueError, 'stride=2 on a grid of 2 x 3; it'):
      _reduce(pixel_shuffle.PixelShuffleConfig(), ts, None)
    ts = interface.token_set(jnp.ones((1, 8, 2)), grid=(1, 2, 4))
    with self.assertRaisesRegex(ValueError, 'k_max=1 for 2 blocks'):
      _reduce(pixel_shuffle.PixelShuffleConfig(), ts, 1)
    with self.assertRaisesRegex(ValueError, "version='v3'"):
      pixel_shuffle.PixelShuffleConfig(version='v3')


class ControlsTest(parameterized.TestCase):
  def test_every_token_is_as_likely(self):
    ts = interface.token_set(normal(500, 11, 1), special=1)
    reduced = _reduce(controls.RandomConfig(), ts, 5, rng=jax.random.key(0))
    kept = np.asarray(reduced.assignment >= 0)
    self.assertTrue(kept[:, 0].all())
    np.testing.assert_allclose(kept[:, 1:].mean(0), 0.4, atol=0.1)

  def test_even_distances(self):
    ts = interface.token_set(normal(1, 13, 1), special=1)
    reduced = _reduce(controls.UniformConfig(), ts, 5)
    np.testing.assert_array_equal(reduced.index, [[0, 3, 6, 9, 12]])

  def test_whole_frames_at_equal_count(self):
    ts = interface.token_set(normal(1, 32, 1), grid=(8, 2, 2))
    reduced = _reduce(controls.FramesConfig(), ts, 8)
    frames = np.unique(np.asarray(reduced.positions[0, :, 0]))
    self.assertLen(frames, 2)
    self.assertEqual(int(reduced.count[0]), 8)
    reduced = _reduce(controls.FramesConfig(), ts, 10)
    self.assertEqual(int(reduced.count[0]), 10)
    self.assertLen(np.unique(np.asarray(reduced.positions[0, :, 0])), 3)

  def test_messages(self):
    with self.assertRaisesRegex(ValueError, 'RandomConfig: r=-1; it must'):
      controls.RandomConfig(r=-1)


if __name__ == '__main__':
  absltest.main()
