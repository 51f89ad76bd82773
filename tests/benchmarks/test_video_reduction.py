"""Tests of video_reduction: its measures by hand, and the page."""

import numpy as np
from absl.testing import absltest, parameterized

from benchmarks import video_reduction
from jaxq.tokens import controls, dycoke, vqtoken


def still(windows=3, frames=4, side=2, channels=8):
  """Windows whose frames all show the same patches (N, T, side * side, C)."""
  rng = np.random.default_rng(0)
  first = rng.normal(size=(windows, 1, side * side, channels))
  return np.repeat(first, frames, axis=1).astype(np.float32)


class MeasuresTest(parameterized.TestCase):
  def test_a_still_video_repeats_in_time_and_not_in_space(self):
    found = video_reduction.repeats(still(), 2)
    self.assertEqual(found['time'].shape, (3, 3 * 4))
    self.assertEqual(found['space'].shape, (3, 4 * 2))
    np.testing.assert_allclose(found['time'], 1, atol=1e-6)
    self.assertLess(np.abs(found['space']).max(), 0.99)

  @parameterized.parameters(2, 3, 9, 14)
  def test_mixed_windows_take_no_frame_twice(self, windows):
    frames = min(windows, 4)
    tokens = np.arange(windows * frames).reshape(windows, frames, 1, 1)
    got = video_reduction.mixed(tokens)[..., 0, 0]
    self.assertCountEqual(got.ravel(), range(windows * frames))
    for row in got // frames:  # Every frame of a window is of another one.
      self.assertLen(set(row.tolist()), frames)
    np.testing.assert_array_equal(got[:, 0] // frames, range(windows))

  def test_one_frame_of_four_keeps_all_of_a_still_video(self):
    tokens = still()
    dycoke_ = dycoke.DycokeConfig(budget=0.25)
    np.testing.assert_allclose(
      video_reduction.variance_kept(dycoke_, tokens, 2), 1, atol=1e-5
    )
    mixed = video_reduction.variance_kept(
      dycoke_, video_reduction.mixed(tokens), 2
    )
    self.assertLess(mixed.max(), 0.9)

  @parameterized.parameters(
    (controls.RandomConfig(budget=1.0),),
    (vqtoken.VQTokenConfig(wiring='none', codebook_of='raw', codes=16),),
  )
  def test_as_many_slots_as_there_are_tokens_keep_all(self, reducer):
    kept = video_reduction.variance_kept(reducer, still(), 2)
    np.testing.assert_allclose(kept, 1, atol=1e-5)

  def test_one_slot_at_the_mean_keeps_nothing(self):
    reducer = vqtoken.VQTokenConfig(wiring='none', codebook_of='raw', codes=1)
    kept = video_reduction.variance_kept(reducer, still(), 2)
    np.testing.assert_allclose(kept, 0, atol=1e-5)


class PageTest(absltest.TestCase):
  def test_rows_and_what_time_is_worth(self):
    kept = {'random': (0.8, 0.7), 'dycoke': (0.9, 0.5)}
    store = {
      name: video_reduction._reducer_row(
        name, 0.25, *(np.full(4, value) for value in values)
      )
      for name, values in kept.items()
    }
    store['bikes'] = video_reduction._redundancy_row('bikes', still(), 2)
    page = video_reduction.page(store)
    self.assertIn('| bikes ', page)
    self.assertIn(
      '- dycoke at 25%: +10.0% points against random, -20.0% where', page
    )
    self.assertEqual(video_reduction.page({}), '')

  def test_budgets_that_a_method_cannot_have(self):
    self.assertIsNone(video_reduction._reducer('dycoke', 0.1))
    self.assertIsNone(video_reduction._reducer('average_pool', 0.5))
    self.assertEqual(video_reduction._reducer('vqtoken_codes', 0.1).codes, 80)


if __name__ == '__main__':
  absltest.main()
