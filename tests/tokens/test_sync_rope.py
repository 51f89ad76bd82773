"""Tests of jaxq.tokens.sync_rope."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.nn import rope as rope_lib
from jaxq.tokens import sync_rope

SMALL = sync_rope.SyncRope(sections=(3, 2, 2, 1), theta=100.0)


def positions(T, axes=3):
  """(1, T, axes), different on every axis."""
  return jnp.arange(T * axes, dtype=jnp.int32).reshape(1, T, axes) * 7 % 31


class SyncRopeTest(parameterized.TestCase):
  def test_frequencies_of_the_layouts(self):
    f = sync_rope.SyncRope().frequencies()
    self.assertAlmostEqual(f[15], 0.0392, places=4)  # M-RoPE's slowest time.
    self.assertAlmostEqual(2 * np.pi / f[15], 160, delta=1)
    self.assertAlmostEqual(f[54], 8.66e-6, delta=1e-8)

  def test_one_axis_is_plain_rope(self):
    x = jax.random.normal(jax.random.key(0), (1, 6, 2, 128))
    at = jnp.array([[0, 3, 9, 200, 2048, 5]], jnp.int32)
    expected = rope_lib.rotate(x, at, rope_lib.Rope(theta=1e6))
    for rope in (
      sync_rope.plain(128),
      sync_rope.SyncRope(sections=(64, 0, 0, 0)),
    ):
      both = jnp.stack([at, at + 50, at * 3], axis=-1)
      turned = sync_rope.rotate(x, sync_rope.tables(both, rope))
      np.testing.assert_allclose(turned, expected, atol=1e-6)

  @parameterized.parameters(
    (sync_rope.SyncRope(sections=(16, 24, 24, 0)), (16, 24, 24, 0)),
    (sync_rope.M_ROPE, (16, 24, 24)),
    (sync_rope.SyncRope(), (18, 18, 18, 10)),
  )
  def test_is_the_full_table_per_axis_with_sections_picked(self, rope, split):
    at = np.asarray(positions(5))[0]
    axes = [at[:, 0], at[:, 1], at[:, 2], at[:, 0]]  # t is there twice.
    f = 1e6 ** -(np.arange(64) / 64)
    pieces, first = [], 0
    for axis, n in zip(axes, split, strict=False):
      full = np.cos(axis[:, None] * f[None])  # All channels of one axis.
      pieces.append(full[:, first : first + n])
      first += n
    cos, _ = sync_rope.tables(positions(5), rope)
    np.testing.assert_allclose(cos[0], np.concatenate(pieces, 1), atol=1e-5)

  def test_scores_see_differences_only(self):
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 5, 1, 16))

    def scores(shift):
      moved = positions(5) + jnp.array([[shift]], jnp.int32)
      tables = sync_rope.tables(moved, SMALL)
      a, b = sync_rope.rotate(q, tables), sync_rope.rotate(k, tables)
      return jnp.einsum('bthd,bshd->bts', a, b)

    np.testing.assert_allclose(
      scores((0, 0, 0)), scores((11, 5, 40)), atol=1e-4
    )

  def test_slow_channels_do_not_alias(self):
    # The product of equal vectors d ids apart, h and w alike.
    f = sync_rope.SyncRope().frequencies()
    d = np.arange(2049)[:, None]
    slow = np.cos(f[None, 54:] * d).sum(axis=1)
    fast = np.cos(f[None, :16] * d).sum(axis=1)
    self.assertTrue((np.diff(slow) < 0).all())
    self.assertGreater((np.diff(fast) > 0).mean(), 0.4)

    def alike(channels):  # Distances at which no channel is far from 0's.
      apart = np.arange(1, 100_001)[:, None]
      return ((1 - np.cos(channels[None] * apart)).max(axis=1) < 1.2).sum()

    self.assertLess(alike(np.concatenate([f[:18], f[54:]])), alike(f[:16]))

  def test_a_prompt_with_video_and_audio(self):
    clip = sync_rope.Clip(
      frame_times=(0.0, 1.0, 2.0, 3.0), rows=1, columns=2, audio_tokens=100
    )
    out = sync_rope.interleaved(
      [sync_rope.Text(length=3), clip, sync_rope.Text(length=2)]
    )
    self.assertLen(out.positions, 3 + 8 + 100 + 2)
    np.testing.assert_array_equal(
      out.positions[:3], [[i] * 3 for i in range(3)]
    )
    # The first 2 seconds: frames at 0 and 25, then 50 audio tokens.
    np.testing.assert_array_equal(
      out.positions[3:8],
      [[3, 3, 3], [3, 3, 4], [28, 3, 3], [28, 3, 4], [3, 3, 3]],
    )
    np.testing.assert_array_equal(out.modality[3:11], [1] * 4 + [2] * 4)
    np.testing.assert_array_equal(out.modality[57:61], [1] * 4)
    np.testing.assert_array_equal(out.positions[57], [53, 3, 3])
    np.testing.assert_array_equal(out.positions[-2:], [[103] * 3, [104] * 3])
    np.testing.assert_array_equal(out.segment[[0, 3, 110, 112]], [0, 1, 1, 2])

  def test_bad_input(self):
    with self.assertRaisesRegex(ValueError, 'each section needs one axis'):
      sync_rope.SyncRope(sections=(1, 2), axes=(0,))
    with self.assertRaisesRegex(ValueError, 'none may be negative'):
      sync_rope.SyncRope(sections=(-1,), axes=(0,))
    with self.assertRaisesRegex(ValueError, 'must sum to 32, half of it'):
      sync_rope.check(sync_rope.SyncRope(), 64, 3)
    with self.assertRaisesRegex(ValueError, 'positions need 3 axes'):
      sync_rope.tables(positions(2, axes=2), SMALL)
    with self.assertRaisesRegex(ValueError, 'without a token'):
      sync_rope.interleaved([sync_rope.Text(length=0)])


if __name__ == '__main__':
  absltest.main()
