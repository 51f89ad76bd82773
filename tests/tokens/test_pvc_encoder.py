"""Tests of jaxq.tokens.pvc_encoder."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from jaxq.tokens import pvc, pvc_encoder
from models import vit
from tests.tokens import testing

B, T, P, C, L = 2, 4, 5, 8, 3
VIT = vit.VitConfig(
  hidden_size=C, intermediate_size=16, num_layers=L, num_heads=2, patch_size=2,
  image_size=4,
)  # fmt: skip
CONFIG = pvc_encoder.EncoderConfig(
  num_layers=2, num_heads=2, intermediate_size=16, sinusoid=8
)


def noise(rng, leaf):
  return 0.3 * rng.normal(size=leaf.shape).astype(np.float32)


def vit_blocks():
  """Stacked params of a ViT's blocks, none of them at its initial value."""
  images = jnp.zeros((1, 4, 4, 3))
  params = testing.filled(vit.Vit(VIT).init, jax.random.key(0), images)
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: leaf + noise(rng, leaf), params['params']['blocks_0']
  )


BLOCKS = vit_blocks()
FRESH = jax.jit(pvc_encoder.from_vit, static_argnums=2)(
  jax.random.key(3), BLOCKS, CONFIG
)


def trained(modulated=True):
  """As after training: what begins at 0 is not 0."""
  rng = np.random.default_rng(4)

  def move(path, leaf):
    name = jax.tree_util.keystr(path)
    if "'temporal'" in name and 'o_proj' in name:
      return jnp.asarray(noise(rng, leaf))
    if modulated and '_time' in name:
      return jnp.asarray(noise(rng, leaf))
    return leaf

  return jax.tree_util.tree_map_with_path(move, FRESH)


X = jax.random.normal(jax.random.key(5), (B, T, P, C))
TIME = jax.random.normal(jax.random.key(6), (B, T, C))


@jax.jit
def encode(params, x, time, mask=None):
  return pvc_encoder.encode(params, CONFIG, x, time, mask)


class EncoderTest(absltest.TestCase):
  def test_begins_as_the_vit(self):

    @jax.jit
    def plain(x):
      for i in (1, 2):
        block = jax.tree.map(lambda a, i=i: a[i], BLOCKS)
        x, _ = vit.Block(VIT).apply({'params': block}, x)
      return x

    expected = np.stack([plain(X[:, t]) for t in range(T)], axis=1)
    np.testing.assert_allclose(encode(FRESH, X, TIME), expected, atol=1e-5)

  def test_a_frame_does_not_see_later_ones(self):
    params = trained()
    one = encode(params, X, TIME)
    two = encode(params, X.at[:, 2].add(1.0), TIME)
    np.testing.assert_array_equal(one[:, :2], two[:, :2])
    self.assertTrue(bool(jnp.all(jnp.any(one[:, 2:] != two[:, 2:], -1))))

  def test_padding_frames_do_not_matter(self):
    params = trained()
    mask = jnp.broadcast_to(jnp.arange(T)[None] < 3, (B, T))
    one = encode(params, X, TIME, mask)
    two = encode(params, X.at[:, 3].set(9.0), TIME, mask)
    np.testing.assert_array_equal(one[:, :3], two[:, :3])

  def test_frame_by_frame(self):
    params = trained()
    whole = encode(params, X, TIME)
    state = pvc_encoder.stream(CONFIG, B, T, P, C)
    step = jax.jit(
      lambda x, time, state: pvc_encoder.encode_frame(
        params, CONFIG, x, time, state
      )
    )
    for t in range(T):
      out, state = step(X[:, t], TIME[:, t], state)
      np.testing.assert_allclose(out, whole[:, t], atol=1e-4)
    with self.assertRaisesRegex(ValueError, 'frame 5 of a stream made for 4'):
      pvc_encoder.encode_frame(params, CONFIG, X[:, 0], TIME[:, 0], state)

  def test_a_static_video_needs_the_time(self):
    still = pvc.static_video(X[:, 0], T)
    same = encode(trained(modulated=False), still, TIME)
    np.testing.assert_allclose(same[:, 1:], same[:, :-1], atol=1e-5)
    differ = encode(trained(), still, TIME)
    self.assertGreater(float(jnp.min(jnp.std(differ, axis=1).max(-1))), 0.01)

  def test_one_frame(self):
    out = encode(trained(), X[:, :1], TIME[:, :1])
    whole = encode(trained(), X, TIME)
    np.testing.assert_allclose(out, whole[:, :1], atol=1e-5)

  def test_bad_input(self):
    with self.assertRaisesRegex(ValueError, 'even width are needed'):
      pvc_encoder.EncoderConfig(sinusoid=7)
    with self.assertRaisesRegex(ValueError, 'num_layers=12 of a ViT with 3'):
      pvc_encoder.from_vit(
        jax.random.key(0), BLOCKS, pvc_encoder.EncoderConfig()
      )


if __name__ == '__main__':
  absltest.main()
