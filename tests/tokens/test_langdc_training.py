"""Tests of jaxq.tokens.langdc_training."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from jaxq.tokens import langdc, langdc_training, training
from tests.tokens import testing

CONFIG = langdc.LangDCConfig(
  features=6, clip_frames=1, caption_side=3, base_side=1, max_new=8, layer=1,
  width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
  intermediate_size=32, vocab=12, stop_id=0, after=(11,),
)  # fmt: skip
DENSITY = langdc_training.DensityConfig(clusters=4, shortest=2, longest=8)
C, M = 12, 32


def clips(key):
  """(M, 1, 3, 3, C) with 0 to 6 marked cells; captions name them in order."""
  number, place, noise = jax.random.split(key, 3)
  n = jax.random.randint(number, (M,), 1, 7)
  rank = jnp.argsort(jax.random.uniform(place, (M, 9)), axis=1)
  shown = jnp.argsort(rank, axis=1) < n[:, None]  # (M, 9)
  cells = jnp.where(shown[..., None], jnp.eye(9, C)[None] * 3, 0.0)
  cells = cells + 0.1 * jax.random.normal(noise, (M, 9, C))
  order = jnp.argsort(~shown, axis=1, stable=True)[:, :8]
  ids = jnp.where(jnp.arange(8)[None] < n[:, None], order + 1, 0)
  return cells.reshape(M, 1, 3, 3, C), ids.astype(jnp.int32), n


def init():
  return testing.filled(
    lambda key: langdc.init_params(key, CONFIG, C), jax.random.key(0)
  )


class DensityTest(absltest.TestCase):
  def test_grows_with_change_and_with_variety(self):
    rng = jax.random.key(0)
    plain = jnp.ones((1, 4, 16, C))
    kinds = jax.random.normal(rng, (4, C))
    still = jnp.broadcast_to(
      kinds[jnp.arange(16) % 4][None, None], (1, 4, 16, C)
    )
    moving = jax.random.normal(rng, (1, 4, 16, C))
    d = jax.jit(langdc_training.density, static_argnums=1)(
      jnp.concatenate([plain, still, moving]), DENSITY
    )
    np.testing.assert_allclose(d[0], 0.0, atol=1e-5)
    np.testing.assert_allclose(d[1], 1.0, atol=1e-4)  # 4 kinds, evenly.
    self.assertGreater(float(d[2]), float(d[1]))
    low, high = langdc_training.density_range(np.asarray(d))
    lengths = langdc_training.target_length(d, low, high, DENSITY)
    self.assertTrue(bool(jnp.all(jnp.diff(lengths) >= 0)))
    self.assertEqual((int(lengths[0]), int(lengths[2])), (2, 8))
    with self.assertRaisesRegex(ValueError, 'low must be below high'):
      langdc_training.target_length(d, 1.0, 1.0, DENSITY)
    with self.assertRaisesRegex(ValueError, 'at least 2 clusters'):
      langdc_training.DensityConfig(clusters=1)

  def test_expected_length_by_hand(self):
    # The end has probability 1/2, 1/4 and 1/2 at the three steps.
    p = jnp.array([[[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]]])
    expected = langdc_training.expected_length(
      jnp.log(p), jnp.array([2]), stop_id=0
    )
    np.testing.assert_allclose(
      expected, [0.5 + 0.5 * 0.75 + 0.5 * 0.75 * 0.5], rtol=1e-5
    )


class TrainingTest(absltest.TestCase):
  def test_captions_grow_with_what_is_to_say(self):
    params = init()
    optimizer = langdc_training.optimizer(2, 5e-3)
    update = training.step(
      lambda p, x, ids, n: langdc_training.caption_loss(
        p, CONFIG, x, ids, n, n
      ),
      optimizer,
    )

    @jax.jit
    def train(params):
      def body(carry, key):
        new, state, loss, aux = update(*carry, *clips(key))
        return (new, state), (loss, aux['ce'])

      keys = jax.random.split(jax.random.key(1), 250)
      return jax.lax.scan(body, (params, optimizer.init(params)), keys)

    @jax.jit
    def lengths(params):
      x, ids, n = clips(jax.random.key(99))
      out = langdc.compress(params, CONFIG, x)
      right = jnp.all(out.aux['ids'][:, 0] == ids, axis=1)
      return out.aux['lengths'][:, 0], n, jnp.mean(right)

    def ranks(x):
      return np.argsort(np.argsort(np.asarray(x), kind='stable'))

    (trained, _), (losses, _) = train(params)
    written, n, right = lengths(trained)
    self.assertLess(float(losses[-1]), 0.3 * float(losses[0]))
    self.assertGreater(np.corrcoef(ranks(written), ranks(n))[0, 1], 0.9)
    self.assertGreater(float(right), 0.5)
    # Stage II trains the captioner and its projector, nothing else.
    for name in ('project', 'base_image'):
      for a, b in zip(
        jax.tree.leaves(params[name]), jax.tree.leaves(trained[name]),
        strict=True,
      ):  # fmt: skip
        np.testing.assert_array_equal(a, b)

  def test_instructions_stop_at_the_soft_tokens(self):
    params = init()
    params['decoder'] = jnp.ones((6, 5))
    x, ids, n = jax.jit(clips)(jax.random.key(0))
    x = x[:8].reshape(4, 2, 3, 3, C)

    def decode(w, visual, mask, ids):
      total = jnp.sum(jnp.where(mask[..., None], visual, 0), axis=1)
      logits = jnp.tanh(total) @ (w * jnp.arange(5.0)[None])
      return jnp.broadcast_to(logits[:, None], (*ids.shape, 5))

    def gradients():
      method = langdc_training.Instruction(CONFIG, decode)
      texts = jnp.tile(jnp.array([[1, 4]], jnp.int32), (4, 1))
      asked = jnp.tile(jnp.array([[False, True]]), (4, 1))
      loss = lambda p: method.loss(
        p, x, ids[:8].reshape(4, 2, 8), n[:8].reshape(4, 2), texts, asked
      )[0]
      return jax.jit(jax.grad(loss))(params)

    released = gradients()

    def moves(tree):
      return any(bool(jnp.any(a != 0)) for a in jax.tree.leaves(tree))

    self.assertFalse(moves(released['captioner']))
    self.assertTrue(moves(released['project']))
    self.assertTrue(moves(released['base_image']))
    with self.assertRaisesRegex(ValueError, r'stage=4; allowed \[1, 2, 3\]'):
      langdc_training.optimizer(4)

  def test_token_table(self):
    paper = langdc.LangDCConfig(before=(1,) * 20, after=(1,) * 27)
    table = langdc_training.token_table(
      paper, 16, np.array([0, 3, 128, 5]), text=40
    )
    self.assertEqual(table['base_tokens'], 576)
    self.assertEqual(table['caption_tokens'], 136)
    self.assertEqual(table['captioner_prefill'], 4 * (576 + 47))
    self.assertEqual(table['decode_steps'], 129)
    self.assertEqual(table['prefill'], 576 + 136 + 40)
    # About 0.36e9 weights in layers, 2 operations each.
    per_token = 2 * 0.358e9
    self.assertGreater(table['captioner_flops'], 2600 * per_token)


if __name__ == '__main__':
  absltest.main()
