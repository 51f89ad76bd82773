"""Tests of jaxq.tokens.embedlens_groups."""

import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import embedlens, embedlens_groups


def observed(rng, number=60):
  """Images of 50 tokens: ids 3 and 9 sinks, 17 dead, 5 rare, others alive."""
  for i in range(number):
    ids = rng.integers(100, 400, 50)
    ids[:3], ids[3:5], ids[5:12] = 3, 9, 17
    if i % 2:
      ids[12:20] = 5  # Of many tokens, but not in nearly all images.
    ids[20] = 7  # In all images, but of few tokens: 2 % of 50 is 1.
    norm, llm = rng.uniform(0.8, 1.2, 50), rng.uniform(0.8, 1.2, 50)
    norm[:3] *= 6
    attention = np.ones(50)
    attention[3:5] = 40
    if i % 3 == 0:
      ids[20] = 99
    yield embedlens_groups.Observed(
      ids=ids, encoder_norm=norm, llm_norm=llm, llm_attention=attention
    )


class DiscoverTest(parameterized.TestCase):
  def test_finds_sinks_and_the_dead(self):
    found, candidates = embedlens_groups.discover_groups(
      observed(np.random.default_rng(0))
    )
    self.assertEqual(
      found, embedlens.Groups(vit_sink=(3,), llm_sink=(9,), dead=(17,))
    )
    dead = {c.id: c for c in candidates}[17]
    self.assertEqual(dead.images, 1.0)
    self.assertAlmostEqual(dead.tokens, 7 / 50)
    self.assertAlmostEqual(dead.specificity, 0.0, places=6)  # Evenly in all.
    self.assertAlmostEqual(dead.encoder_norm, 1.0, delta=0.1)
    self.assertTrue(np.isnan(dead.encoder_attention))  # Was not given.

  def test_a_model_may_have_no_groups(self):
    rng = np.random.default_rng(0)
    plain = embedlens_groups.Observed(
      ids=rng.integers(0, 9999, 50), encoder_norm=np.ones(50),
      llm_norm=np.ones(50),
    )  # fmt: skip
    strict = embedlens_groups.Thresholds(tokens=0.1)
    found, _ = embedlens_groups.discover_groups([plain], strict)
    self.assertEqual(found, embedlens.Groups())
    with self.assertRaisesRegex(ValueError, '0 images; at least 1'):
      embedlens_groups.discover_groups([])

  @parameterized.parameters(
    (0.80, 0.799, 0.70, True), (0.80, 0.78, 0.70, False),
    (0.80, 0.799, 0.80, False),
  )  # fmt: skip
  def test_holds(self, full, without_group, without_alive, expected):
    self.assertEqual(
      embedlens_groups.holds(full, without_group, without_alive), expected
    )


class SinglePatchTest(absltest.TestCase):
  def test_a_picture_in_one_patch_is_read_from_that_token(self):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, 900)  # Ten shapes, drawn with noise.
    x = rng.uniform(0.1, 1, (10, 8, 8, 1))[y] + rng.normal(
      0, 0.3, (900, 8, 8, 1)
    )
    cells = rng.integers(0, 4, (900, 2))
    pictures = embedlens_groups.single_patch_images(x, 32, cells)
    self.assertEqual(pictures.shape, (900, 32, 32, 1))
    tokens = pictures.reshape(900, 4, 8, 4, 8).transpose(0, 1, 3, 2, 4)
    token = tokens[np.arange(900), cells[:, 0], cells[:, 1]].reshape(900, 64)
    np.testing.assert_array_equal(token, x.reshape(900, 64))
    self.assertEqual(np.count_nonzero(pictures), np.count_nonzero(x))
    accuracy = embedlens_groups.linear_readout(
      token[:700], y[:700], token[700:], y[700:]
    )
    self.assertGreater(accuracy, 0.85)
    elsewhere = tokens[np.arange(900), (cells[:, 0] + 1) % 4, 0].reshape(
      900, -1
    )
    chance = embedlens_groups.linear_readout(
      elsewhere[:700] + 1, y[:700], elsewhere[700:] + 1, y[700:]
    )
    self.assertLess(chance, 0.2)
    with self.assertRaisesRegex(ValueError, 'must be a multiple of 8. Use 40'):
      embedlens_groups.single_patch_images(x, 36, cells)


if __name__ == '__main__':
  absltest.main()
