"""QuoTA: shares of frames, grids, the ragged reduction, its messages."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import interface, quota
from tests.parity import oracle


@functools.partial(jax.jit, static_argnames=('total', 'area', 'cap', 'share'))
def assign(scores, total, area=729, cap='none', share=False, gamma=2.0):
  """scores (T,) -> n, h, w (T,)."""
  scores = jnp.asarray(scores, jnp.float32)[None]
  weights = quota.frame_weights(scores, jnp.ones(scores.shape, bool), gamma)
  out = quota.assign_tokens(
    weights,
    jnp.array([total]),
    total,
    area=area,
    cap=cap,
    redistribute=share,
  )
  return [a[0] for a in out]


def frames(T=4, H=4, W=4, D=3, seed=0):
  x = jax.random.normal(jax.random.key(seed), (1, T * H * W, D))
  return interface.token_set(x, grid=(T, H, W))


@functools.partial(jax.jit, static_argnames='config')
def reduce_jit(config, ts, budget, given):
  return config.reduce(ts, budget=budget, **given)


def reduce(config, ts, relevance, k_max=16, **given):
  """The reduction of frames of 4 x 4 with these relevances, compiled."""
  cells = ts.mask.shape[1] // len(relevance)
  given = {'scores': scores_of(relevance, cells), **given}
  return reduce_jit(config, ts, interface.Budget(k_max=k_max), given)


def scores_of(relevance, cells=16):
  return jnp.repeat(jnp.asarray(relevance, jnp.float32), cells)[None]


class AssignmentTest(parameterized.TestCase):
  def test_by_hand(self):
    n, h, w = assign([0.1, 0.2, 0.4], 100)
    np.testing.assert_array_equal(n, [4, 19, 76])
    np.testing.assert_array_equal(h, [2, 4, 9])
    np.testing.assert_array_equal(w, [2, 4, 8])
    self.assertEqual(int((h * w).sum()), 92)

  def test_equal_scores_are_the_plain_grid(self):
    for score in (1.0, 0.3, 0.77):
      n, h, w = assign(np.full(64, score), 12_544)
      for values, expected in ((n, 196), (h, 14), (w, 14)):
        np.testing.assert_array_equal(values, expected)

  def test_a_frame_that_is_alone(self):
    scores = np.eye(64)[5]
    n, h, w = assign(scores, 12_544)
    self.assertEqual((n[5], h[5], w[5]), (12_544, 112, 112))
    for cap in ('exact', 'one_pass'):
      n, h, w = assign(scores, 12_544, cap=cap)
      self.assertEqual((n[5], h[5], w[5]), (729, 27, 27))
      self.assertEqual(int(n.sum()), 729)

  @parameterized.parameters(False, True)
  def test_never_past_the_budget_monotone_and_scale_free(self, share):
    rng = np.random.default_rng(0)
    for i in range(30):
      scores = rng.uniform(size=16) ** (i % 4 + 1)
      n, h, w = assign(scores, 300, share=share)
      self.assertLessEqual(int((h * w).sum()), 300)
      self.assertTrue(np.all(h * w <= n))
      order = np.argsort(scores)
      self.assertTrue((np.diff((h * w)[order]) >= 0).all())
      again, _, _ = assign(scores * 0.125, 300, share=share)
      np.testing.assert_array_equal(again, n)

  def test_the_exact_cap_is_kept_and_one_pass_is_not(self):
    scores = np.sqrt([0.5, 0.3, 0.1, 0.1])
    n, _, _ = assign(scores, 400, area=130, cap='exact')
    np.testing.assert_array_equal(n, [130, 130, 70, 70])
    n, _, _ = assign(scores, 400, area=130, cap='one_pass')
    # 0.5 is cut to 0.325; its 0.175 go to the others, 0.3 ends at 0.405.
    np.testing.assert_array_equal(n, [130, 162, 54, 54])

  def test_redistribution_spends_nearly_all(self):
    scores = np.random.default_rng(1).uniform(size=16)
    n, h, w = assign(scores, 300)
    spent = int((h * w).sum())
    n, h, w = assign(scores, 300, share=True)
    self.assertEqual(int(n.sum()), 300)
    self.assertGreater(int((h * w).sum()), max(spent, 290))

  def test_best_grids_are_the_fullest(self):
    for n, grid in enumerate(quota.best_grids(60).tolist()):
      h, w = grid
      fullest = max(
        (a * b for b in range(1, 9) for a in range(b, 2 * b + 1) if a * b <= n),
        default=0,
      )
      self.assertEqual(h * w, fullest, n)

  def test_gamma_0_shares_equally_and_no_score_too(self):
    n, _, _ = assign([0.1, 0.9], 100, gamma=0.0)
    np.testing.assert_array_equal(n, [50, 50])
    n, _, _ = assign([0.0, 0.0], 100)
    np.testing.assert_array_equal(n, [50, 50])

  def test_number_of_frames(self):
    self.assertEqual(quota.frame_count(1800), 128)
    self.assertEqual(quota.frame_count(59), 97)
    np.testing.assert_array_equal(quota.frame_indices(4, 11), [0, 3, 6, 10])
    with self.assertRaisesRegex(ValueError, '128 frames for 1800.*limit=100'):
      quota.frame_count(1800, limit=100)


class ReduceTest(parameterized.TestCase):
  @parameterized.parameters('bilinear', 'adaptive_avg', 'auto')
  def test_equal_scores_are_plain_resampling(self, kind):
    torch = oracle.torch()
    ts = frames(H=5, W=5)
    config = quota.QuotaConfig(kind=kind, budget=0.4)
    got = reduce(config, ts, [0.5] * 4, 36)
    x = torch.from_numpy(np.array(ts.tokens[0]).reshape(4, 5, 5, 3))
    x = x.permute(0, 3, 1, 2)
    if kind == 'adaptive_avg':
      expected = torch.nn.functional.adaptive_avg_pool2d(x, (3, 3))
    else:
      expected = torch.nn.functional.interpolate(
        x, size=(3, 3), mode='bilinear', align_corners=False
      )
    expected = expected.permute(0, 2, 3, 1).reshape(36, 3)
    np.testing.assert_allclose(got.tokens[0], expected, atol=1e-5)
    np.testing.assert_allclose(got.size.sum(), 100, rtol=1e-5)
    np.testing.assert_allclose(got.aux['effective_frames'], [4], rtol=1e-5)
    # A patch is in the slot of its own frame.
    frame = np.asarray(got.assignment[0]).reshape(4, 25) // 9
    np.testing.assert_array_equal(frame, np.arange(4)[:, None] + 0 * frame)

  def test_dropped_frames_contribute_nothing(self):
    ts = frames()
    config = quota.QuotaConfig()
    relevance = [0.8, 0.001, 0.9, 0.0]
    got = reduce(config, ts, relevance, 20)
    spoilt = ts.tokens.at[:, 16:32].set(9.0).at[:, 48:].set(9.0)
    other = reduce(config, ts.replace(tokens=spoilt), relevance, 20)
    np.testing.assert_array_equal(got.tokens, other.tokens)
    assignment = np.asarray(got.assignment[0]).reshape(4, 16)
    self.assertTrue((assignment[[1, 3]] == -1).all())
    self.assertTrue((assignment[[0, 2]] >= 0).all())
    np.testing.assert_array_equal(got.aux['tokens_per_frame'], [[8, 0, 11, 0]])
    frames_of = np.asarray(got.positions[0, :, 0])
    np.testing.assert_array_equal(frames_of, [0] * 6 + [2] * 9 + [0] * 5)

  def test_constant_frames_stay_constant(self):
    x = jnp.repeat(jnp.arange(4.0), 16)[None, :, None]
    ts = interface.token_set(x, grid=(4, 4, 4))
    for kind in ('bilinear', 'adaptive_avg'):
      got = reduce(quota.QuotaConfig(kind=kind), ts, [0.2, 0.9, 0.5, 0.7])
      used = np.asarray(got.mask[0])
      np.testing.assert_allclose(
        got.tokens[0, used, 0], got.positions[0, used, 0], atol=1e-6
      )

  def test_linspace_copies_patches(self):
    ts = frames()
    config = quota.QuotaConfig(kind='linspace')
    got = reduce(config, ts, [1.0, 0.0, 0.0, 0.0], 4)
    np.testing.assert_array_equal(got.tokens[0], ts.tokens[0, [0, 5, 10, 15]])
    np.testing.assert_array_equal(
      np.flatnonzero(got.assignment[0] >= 0), [0, 5, 10, 15]
    )

  @parameterized.parameters('tome', 'tome_grid')
  def test_merging_versions(self, kind):
    # Frame t has t + 1 kinds of 2 x 2 patches: they are found again.
    rng = np.random.default_rng(0)
    kinds = np.linalg.qr(rng.normal(size=(8, 8)))[0].astype(np.float32)
    x = np.zeros((3, 6, 6, 8), np.float32)
    for t, number in enumerate((1, 2, 3)):
      label = np.arange(3)[:, None] + np.zeros((1, 3), int)
      x[t] = kinds[np.kron(label % number, np.ones((2, 2), int))]
    ts = interface.token_set(jnp.asarray(x.reshape(1, 108, 8)), grid=(3, 6, 6))
    config = quota.QuotaConfig(kind=kind, newline='end')
    params = {'newline': jnp.full((8,), 7.0)}
    got = reduce(config, ts, [0.5, 0.5, 0.5], 12, params=params)
    np.testing.assert_array_equal(got.aux['tokens_per_frame'], [[4, 4, 4]])
    self.assertEqual(int(got.count[0]), 13)
    np.testing.assert_array_equal(got.tokens[0, 12], np.full(8, 7.0))
    np.testing.assert_allclose(got.size[0, :12].sum(), 108)
    np.testing.assert_array_equal(
      got.positions[0, :12, 0], np.repeat(np.arange(3), 4)
    )
    slot = np.asarray(got.assignment[0])
    self.assertTrue((slot >= 0).all())
    self.assertTrue((slot.reshape(3, 36) // 4 == np.arange(3)[:, None]).all())
    if kind == 'tome':  # Only tokens that are alike were merged.
      near = np.asarray(got.tokens[0])[slot]
      np.testing.assert_allclose(near, x.reshape(108, 8), atol=1e-5)

  def test_newlines(self):
    ts = frames()
    relevance = [1.0, 1.0, 0.0, 0.0]
    plain = reduce(quota.QuotaConfig(), ts, relevance, 8)
    for newline, places in (('row', [2, 5, 8, 11]), ('end', [8])):
      config = quota.QuotaConfig(newline=newline)
      params = {'newline': jnp.full((3,), 7.0)}
      got = reduce(config, ts, relevance, 8, params=params)
      at = np.flatnonzero((got.tokens[0] == 7).all(-1))
      np.testing.assert_array_equal(at, places)
      self.assertEqual(int(got.count[0]), 8 + len(places))
      self.assertEqual(int(got.aux['newlines'][0]), len(places))
      kept = np.setdiff1d(np.arange(int(got.count[0])), at)
      np.testing.assert_allclose(
        got.tokens[0, kept], plain.tokens[0], atol=1e-6
      )
      np.testing.assert_array_equal(
        kept[np.asarray(plain.assignment[0])][:32], got.assignment[0][:32]
      )

  def test_the_light_scorer_stands_in_for_scores(self):
    config = quota.QuotaConfig(scorer='light')
    ts, query = frames(), jnp.ones((1, 2, 5))
    params = config.init_params(jax.random.key(0), ts, query)
    given = {'query': query, 'params': params}
    got = reduce_jit(config, ts, interface.Budget(k_max=16), given)
    self.assertEqual(got.aux['relevance'].shape, (1, 4))
    self.assertGreater(int(got.count[0]), 0)


class MessagesTest(parameterized.TestCase):
  def test_messages(self):
    ts, config = frames(), quota.QuotaConfig()
    for bad in (-0.1, 1.5):
      with self.assertRaisesRegex(ValueError, 'a relevance is a probability'):
        config.reduce(ts, scores=scores_of([bad, 0.5, 0.5, 0.5]))
    with self.assertLogs(level='WARNING') as logs:
      quota.check_scores(scores_of([0.0] * 4), ts.mask)
    self.assertIn('all scores are 0', logs.output[0])
    with self.assertRaisesRegex(ValueError, 'k_max=0; at least 1 slot'):
      config.reduce(
        ts, scores=scores_of([0.5] * 4), budget=interface.Budget(k_max=0)
      )
    with self.assertRaisesRegex(ValueError, 'frames \\* rows \\* columns'):
      interface.token_set(ts.tokens, grid=(4, 4, 3))
    for field in ('kind', 'cap', 'newline', 'scorer'):
      with self.assertRaisesRegex(ValueError, f"{field}='x'; allowed"):
        wrong: Any = {field: 'x'}
        quota.QuotaConfig(**wrong)
    with self.assertRaisesRegex(ValueError, 'gamma=-1; it must not be neg'):
      quota.QuotaConfig(gamma=-1)
    for kind in ('linspace', 'tome'):
      with self.assertRaisesRegex(ValueError, f"'row' with kind='{kind}'"):
        quota.QuotaConfig(kind=kind, newline='row')
    light = quota.QuotaConfig(scorer='light')
    with self.assertRaisesRegex(ValueError, "query=None; scorer='light'"):
      light.init_params(jax.random.key(0), ts)


if __name__ == '__main__':
  absltest.main()
