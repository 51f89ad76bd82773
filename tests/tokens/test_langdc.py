"""Tests of jaxq.tokens.langdc."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import captioner, interface, langdc
from tests.tokens import testing

CONFIG = langdc.LangDCConfig(
  features=6, clip_frames=2, caption_side=2, base_side=1, video_caption_side=1,
  video_base_side=1, max_new=4, layer=1, width=8, num_layers=2, num_heads=2,
  num_kv_heads=1, head_dim=4, intermediate_size=16, vocab=16, stop_id=3,
  before=(5,), after=(1, 2),
)  # fmt: skip
B, T, C = 2, 4, 5
IMAGES = jax.random.normal(jax.random.key(0), (B, T, 4, 4, C))
VIDEO = jax.random.normal(jax.random.key(1), (B, T, 2, 2, 3))


@functools.cache
def params(config=CONFIG):
  return testing.filled(
    lambda key: langdc.init_params(key, config, C, 3), jax.random.key(0)
  )


@functools.partial(jax.jit, static_argnums=0)
def compress(config, x, video=None, mask=None, captions=None):
  return langdc.compress(
    params(config), config, x, video, mask=mask, captions=captions
  )


def captions(lengths, Lmax=4, width=8):
  """Known captions of every clip."""
  n = len(lengths)
  at = jnp.arange(Lmax)[None] < jnp.array(lengths)[:, None]
  soft = jax.random.normal(jax.random.key(9), (n, Lmax, width))
  return captioner.Captions(
    soft=jnp.where(at[..., None], soft, 0),
    ids=jnp.where(at, 7, 3),
    lengths=jnp.array(lengths),
  )


class LangDCTest(parameterized.TestCase):
  def test_count_order_and_groups(self):
    known = captions([0, 3, 4, 1])
    out = compress(CONFIG, IMAGES, captions=known)
    # 4 base tokens a row, then captions of clips 0 and 1 without a gap.
    np.testing.assert_array_equal(out.count, [4 + 3, 4 + 5])
    np.testing.assert_array_equal(
      out.aux['group'][0], [0, 0, 1, 1, 1, 1, 1] + [-1] * 5
    )
    np.testing.assert_array_equal(
      out.aux['group'][1], [0, 0, 1, 1, 0, 0, 0, 0, 1] + [-1] * 3
    )
    np.testing.assert_array_equal(out.aux['is_caption'].sum(1), [3, 5])
    np.testing.assert_array_equal(out.positions[0, :, 0], [*range(7)] + [0] * 5)
    self.assertTrue(bool(jnp.all(out.assignment == -1)))
    kernel = params()['project']['down']['kernel']
    bias = params()['project']['down']['bias']
    np.testing.assert_allclose(
      out.tokens[0, 4:7], known.soft[1, :3] @ kernel + bias[None], atol=1e-5
    )
    self.assertFalse(bool(out.tokens[0, 7:].any()))

  def test_lengths_of_the_paper_sizes(self):
    # 4 clips with captions of 0, 3, 128 and 5 tokens; base 16*36 + 16*16.
    big = langdc.LangDCConfig()
    self.assertEqual(big.slots(16, video=True), 832 + 4 * 128)
    config = dataclasses.replace(CONFIG, max_new=128, clip_frames=1)
    known = captions([0, 3, 128, 5], 128)
    out = compress(config, IMAGES[:1], captions=known)
    self.assertEqual(int(out.count[0]), 4 + 136)
    self.assertNotIn(0, np.asarray(out.aux['group'][0, 4:140]))
    self.assertTrue(bool(out.mask[0, :140].all()))

  def test_written_captions_with_two_encoders(self):
    config = dataclasses.replace(CONFIG, base='ldp', projection='mlp')
    out = compress(config, IMAGES, VIDEO)
    self.assertEqual(out.tokens.shape, (B, config.slots(T, video=True), 6))
    lengths = np.asarray(out.aux['lengths'])
    np.testing.assert_array_equal(out.count, 4 + 4 + lengths.sum(axis=1))

    prompt = jax.eval_shape(
      lambda x, video: langdc.clip_prompt(
        params(config), config, x.reshape(4, 2, 4, 4, C),
        jnp.ones((4, 2, 4, 4), bool), video.reshape(4, 2, 2, 2, 3),
      ),
      IMAGES, VIDEO,
    )  # fmt: skip
    self.assertEqual(prompt.x.shape, (4, 1 + 2 * 4 + 2 * 1 + 2, 8))

  def test_padding(self):
    mask = np.ones((B, T, 4, 4), bool)
    mask[1, 2:] = False
    mask[0, 0, 3] = False
    one = compress(CONFIG, IMAGES, mask=mask)
    other = np.where(mask[..., None], IMAGES, np.nan)
    two = compress(CONFIG, other, mask=mask)
    np.testing.assert_array_equal(one.tokens, two.tokens)
    lengths = np.asarray(one.aux['lengths'])
    self.assertEqual(lengths[1, 1], 0)  # The clip is not there.
    np.testing.assert_array_equal(
      np.asarray(one.aux['is_caption']).sum(1), lengths.sum(1)
    )
    self.assertEqual(int(one.count[1]), 2 + lengths[1].sum())

  def test_pooling_leaves_padding_out(self):
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    mask = jnp.ones((1, 4, 4), bool).at[0, 0, 0].set(False)
    mask = mask.at[0, 2:, 2:].set(False)
    out = langdc.pool(x, mask, 2)[0, ..., 0]
    np.testing.assert_allclose(out, [[(1 + 4 + 5) / 3, 4.5], [10.5, 0]])

  def test_branches(self):
    known = captions([0, 3, 4, 1])
    both = compress(CONFIG, IMAGES, captions=known)
    base = dataclasses.replace(CONFIG, caption_branch=False)
    ts = interface.token_set(IMAGES.reshape(B, -1, C), grid=(T, 4, 4))
    out = jax.jit(lambda ts: base.reduce(ts, params=params()))(ts)
    np.testing.assert_array_equal(out.count, [4, 4])
    np.testing.assert_allclose(both.tokens[:, :4], out.tokens, atol=1e-6)
    only = dataclasses.replace(CONFIG, base_branch=False)
    out = compress(only, IMAGES, captions=known)
    np.testing.assert_array_equal(out.count, [3, 5])
    np.testing.assert_allclose(
      out.tokens[0, :3], both.tokens[0, 4:7], atol=1e-6
    )
    with self.assertRaisesRegex(ValueError, 'one of them must be on'):
      dataclasses.replace(base, base_branch=False)

  def test_bad_input(self):
    with self.assertRaisesRegex(ValueError, 'T=3 frames in clips.*Sample 4'):
      langdc.compress(params(), CONFIG, IMAGES[:, :3])
    with self.assertRaisesRegex(ValueError, 'stop_id=16 of vocab=16'):
      dataclasses.replace(CONFIG, stop_id=16)
    with self.assertRaisesRegex(ValueError, 'layer=5 of a captioner with 2'):
      dataclasses.replace(CONFIG, layer=5)
    with self.assertRaisesRegex(ValueError, "base='none'; allowed"):
      dataclasses.replace(CONFIG, base='none')
    with self.assertRaisesRegex(ValueError, 'clip_frames=0.*at least 1'):
      dataclasses.replace(CONFIG, clip_frames=0)


if __name__ == '__main__':
  absltest.main()
