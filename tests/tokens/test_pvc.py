"""Tests of jaxq.tokens.pvc."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from jaxq.tokens import interface, pixel_shuffle, pvc, pvc_encoder, training
from models import vit
from tests.tokens import testing

C = 8
VIT = vit.VitConfig(
  hidden_size=C, intermediate_size=16, num_layers=2, num_heads=2, patch_size=2,
  image_size=8,
)  # fmt: skip
CONFIG = pvc.PvcConfig(shuffle=2, features=6, sinusoid=8)
ENCODER = pvc_encoder.EncoderConfig(
  num_layers=1, num_heads=2, intermediate_size=16, sinusoid=8
)


def prefix(params, images):
  """All but the last block of a ViT."""
  module = vit.Vit(VIT)
  x = module.apply({'params': params}, images, method='embed_images')
  block = jax.tree.map(lambda a: a[0], params['blocks_0'])
  return vit.Block(VIT).apply({'params': block}, x)[0]


MODEL = pvc.Pvc(config=CONFIG, encoder=ENCODER, prefix=prefix, grid=(4, 4))
IMAGES = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))


@functools.cache
def params():
  """Trained ones: time and temporal attention matter."""
  own = testing.filled(vit.Vit(VIT).init, jax.random.key(1), IMAGES)['params']
  return testing.filled(
    lambda own: MODEL.init_params(jax.random.key(2), own, own['blocks_0'], C),
    own,
  )


@jax.jit
def video(frames, counts):
  return MODEL.video(params(), frames, counts)


class PvcTest(parameterized.TestCase):
  def test_shuffles_into_blocks(self):
    # 32 x 32 places in blocks of 4 x 4: 64 tokens of 16 C.
    x = jnp.arange(1024, dtype=jnp.float32).reshape(1, 1024, 1)
    ts = interface.token_set(x, grid=(1, 32, 32))
    reduced = jax.jit(pvc.PvcConfig().reduce)(ts)
    self.assertEqual(reduced.tokens.shape, (1, 64, 16))
    first = np.arange(1024).reshape(32, 32)[:4, :4].reshape(-1)
    np.testing.assert_array_equal(reduced.tokens[0, 0], first)
    back = np.asarray(reduced.tokens).reshape(8, 8, 4, 4).transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(back.reshape(-1), np.arange(1024))
    same = jax.jit(pixel_shuffle.PixelShuffleConfig(stride=4).reduce)(ts)
    np.testing.assert_array_equal(same.assignment, reduced.assignment)
    np.testing.assert_array_equal(same.positions, reduced.positions)

  def test_an_image_is_a_static_video(self):
    shared = jax.jit(MODEL.image)(params(), IMAGES)
    apart = video(pvc.static_video(IMAGES), jnp.array([4, 4]))
    self.assertEqual(shared.shape, (2, 4 * 4, 6))
    # The plain layers in batches of 2 and of 8 round alike to the last bits.
    np.testing.assert_allclose(shared, apart, atol=1e-5)
    passes = np.asarray(shared).reshape(2, 4, 4, 6)
    self.assertGreater(np.abs(passes[:, 1:] - passes[:, :-1]).max(), 1e-2)

  def test_what_is_behind_a_video_does_not_matter(self):
    frames = jax.random.uniform(jax.random.key(3), (2, 4, 8, 8, 3))
    counts = jnp.array([4, 2])
    one = video(frames, counts)
    two = video(frames.at[1, 2:].set(9.0), counts)
    np.testing.assert_array_equal(one, two)
    self.assertFalse(bool(one[1, 8:].any()))
    # Its times are its own: the second of two frames is the last.
    whole = video(frames, jnp.array([4, 4]))
    self.assertFalse(np.allclose(one[1, 4:8], whole[1, 4:8], atol=1e-3))

  def test_relative_time(self):
    tau = pvc.relative_time(jnp.array([5, 3, 1]), 5)
    np.testing.assert_allclose(
      tau, [[0, 0.25, 0.5, 0.75, 1], [0, 0.5, 1, 1, 1], [0, 1, 1, 1, 1]]
    )
    pvc.check_times(tau[:1])
    with self.assertRaisesRegex(ValueError, 'of row 1 do not increase'):
      pvc.check_times(tau)

  def test_time_reaches_the_compressor_by_frame_not_by_position(self):
    x = jax.random.normal(jax.random.key(0), (1, 32, C))
    ts = interface.token_set(x, grid=(2, 4, 4))
    moved = ts.replace(positions=ts.positions + 100)
    run = jax.jit(lambda ts: CONFIG.reduce(ts, params=params()).tokens)
    one, two = run(ts), run(moved)
    np.testing.assert_array_equal(one, two)

  def test_trains_what_a_stage_trains(self):
    def decode(w, visual, ids):  # Predicts a constant from the visual mean.
      logits = jnp.mean(visual, axis=1) @ w
      return jnp.broadcast_to(logits[:, None], (*ids.shape, 3))

    frames = jnp.stack([jnp.zeros((2, 8, 8, 3)), jnp.ones((2, 8, 8, 3))])
    ids = jnp.array([[0, 1], [0, 2]], jnp.int32)
    asked = jnp.array([[False, True]] * 2)
    start = {**params(), 'decoder': jnp.arange(18.0).reshape(6, 3) % 5}

    def loss(p):
      return MODEL.loss(p, decode, frames, jnp.array([2, 2]), ids, asked)

    # What stage 'align' trains; SGD compiles faster than its AdamW.
    optimizer = training.rates([(pvc.NEW, 0.02), ('', 0.0)], optax.sgd)
    update = jax.jit(training.step(loss, optimizer))
    trained, state = start, optimizer.init(start)
    values = []
    for _ in range(5):
      trained, state, value, _ = update(trained, state)
      values.append(float(value))
    self.assertLess(values[-1], values[0])
    moved = {
      name: any(
        bool(jnp.any(a != b))
        for a, b in zip(
          jax.tree.leaves(start[name]), jax.tree.leaves(trained[name]),
          strict=True,
        )
      )
      for name in start
    }  # fmt: skip
    self.assertTrue(moved['compressor'] and moved['encoder'] and moved['time'])
    self.assertFalse(moved['prefix'] or moved['decoder'])
    old = 'attention'
    np.testing.assert_array_equal(
      start['encoder'][old]['q_proj']['kernel'],
      trained['encoder'][old]['q_proj']['kernel'],
    )

  def test_frames_and_tiles(self):
    np.testing.assert_array_equal(pvc.frame_indices(640, 64)[:3], [4, 14, 24])
    self.assertLess(pvc.frame_indices(640, 64)[-1], 640)
    self.assertEqual(pvc.tile_grid(448 * 3, 448 * 2), (3, 2))
    self.assertEqual(pvc.tile_grid(448, 448), (1, 1))
    self.assertEqual(pvc.tile_grid(2000, 2000), (3, 3))  # Fills the larger.
    image = jnp.zeros((8, 12, 3)).at[:4, 4:8].set(1.0)
    cut = pvc.tiles(image, most=6, size=4)
    self.assertEqual(cut.shape, (7, 4, 4, 3))  # 6 and a thumbnail.
    np.testing.assert_allclose(cut[1], 1.0, atol=1e-5)
    np.testing.assert_allclose(cut[4], 0.0, atol=1e-5)
    # Tokens of 6 tiles and a thumbnail, and of 64 frames.
    self.assertEqual(7 * 4 * 64, 1792)
    self.assertEqual([pvc.bucket(n) for n in (1, 4, 5, 96)], [4, 4, 16, 96])

  def test_bad_input(self):
    with self.assertRaisesRegex(ValueError, 'image_repeat=0; an image is'):
      pvc.PvcConfig(image_repeat=0)
    with self.assertRaisesRegex(ValueError, 'image_repeat=0; an image is'):
      pvc.static_video(IMAGES, 0)
    with self.assertRaisesRegex(ValueError, 'shuffle=0.*at least 1'):
      pvc.PvcConfig(shuffle=0)
    ts = interface.token_set(jnp.zeros((1, 36, C)), grid=(1, 6, 6))
    with self.assertRaisesRegex(ValueError, 'must divide both sides'):
      pvc.PvcConfig(shuffle=4).reduce(ts)
    with self.assertRaisesRegex(ValueError, 'T=97 frames; allowed 1 to 96'):
      pvc.bucket(97)
    pvc.optimizer('full')
    with self.assertRaisesRegex(ValueError, "stage='rest'; allowed"):
      pvc.optimizer('rest')
    wrong = pvc.Pvc(config=CONFIG, encoder=ENCODER, prefix=prefix, grid=(3, 4))
    with self.assertRaisesRegex(ValueError, '17 states per frame for a grid'):
      jax.eval_shape(wrong.image, params(), IMAGES)


if __name__ == '__main__':
  absltest.main()
