"""Tests of jaxq.tokens.echoingpixels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from jaxq.tokens import (
  decoder_layers,
  echoingpixels,
  interface,
  sync_rope,
  training,
)
from tests.tokens import testing

CONFIG = echoingpixels.EchoingPixelsConfig(
  budget=0.5, refiner_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
  intermediate_size=16, sections=(1, 1, 1, 1), theta=100.0,
)  # fmt: skip
HEAD_ONLY = dataclasses.replace(CONFIG, refiner_layers=0)
B, N, C = 2, 10, 8
MODALITY = np.array([0, 0, 1, 1, 2, 1, 1, 2, 0, 0])  # Text around media.


def tokens(rows=B, modality=MODALITY, mask=None, seed=0):
  positions = np.stack([np.arange(N) * 3, np.arange(N), np.arange(N)], -1)
  return interface.token_set(
    jax.random.normal(jax.random.key(seed), (rows, N, C)),
    mask=mask,
    positions=jnp.broadcast_to(
      jnp.asarray(positions, jnp.int32)[None], (rows, N, 3)
    ),
    modality=jnp.broadcast_to(
      jnp.asarray(modality, jnp.int32)[None], (rows, N)
    ),
  )


@functools.cache
def params_of(config):
  return testing.filled(
    lambda ts: config.init_params(jax.random.key(1), ts), tokens()
  )


@functools.partial(jax.jit, static_argnums=0)
def reduce(config, params, ts):
  return config.reduce(ts, params=params)


@functools.partial(jax.jit, static_argnums=0)
def reduce_joint(config, ts, logits, budget=None, rng=None):
  budget = config.budget_for(ts) if budget is None else budget
  return echoingpixels.reduce_joint(ts, ts.tokens, logits, budget, config, rng)


class PoolTest(parameterized.TestCase):
  @parameterized.parameters(
    (1001, 0.2, 201), (0, 0.2, 0), (3, 0.05, 1), (20, 0.05, 1), (30, 0.1, 3)
  )
  def test_how_many_are_kept(self, n, ratio, expected):
    config = dataclasses.replace(CONFIG, budget=ratio)
    modality = jnp.where(jnp.arange(1005) < n, 1 + jnp.arange(1005) % 2, 0)
    ts = interface.token_set(
      jnp.zeros((1, 1005, 1)),
      positions=jnp.zeros((1, 1005, 3), jnp.int32),
      modality=modality[None],
    )
    _, always, k = echoingpixels.pool(ts, config)
    self.assertEqual(int(k[0]), expected)
    self.assertEqual(int(always.sum()), 1005 - n)
    budget = config.budget_for(ts)
    self.assertEqual(int(budget.k[0]), expected + 1005 - n)
    reduced = reduce_joint(config, ts, jnp.arange(1005.0)[None])
    self.assertEqual(int(reduced.count[0]), expected + 1005 - n)

  def test_video_only(self):
    ts = tokens()  # 4 video and 2 audio tokens.
    config = dataclasses.replace(HEAD_ONLY, candidates='v')
    reduced = reduce(config, params_of(HEAD_ONLY), ts)
    np.testing.assert_array_equal(reduced.aux['kept_video'], [2, 2])
    audio = np.flatnonzero(MODALITY == sync_rope.AUDIO)
    self.assertTrue((np.asarray(reduced.assignment)[:, audio] >= 0).all())
    # As the reference counts: of audio too, and never more than there are.
    config = dataclasses.replace(config, base='av', budget=0.9)
    _, _, k = echoingpixels.pool(ts, config)
    np.testing.assert_array_equal(k, [4, 4])


class SieveTest(parameterized.TestCase):
  def test_one_pool_for_both_and_text_stays(self):
    ts = tokens()
    # Audio 4 and 7 and video 5 are best: no split between the two is fixed.
    logits = jnp.broadcast_to(
      jnp.array([0, 0, -1, -2, 5, 3, -3, 4, 0, 0.0])[None], (B, N)
    )
    reduced = reduce_joint(HEAD_ONLY, ts, logits)
    kept = [0, 1, 4, 5, 7, 8, 9]
    np.testing.assert_array_equal(reduced.index[0, :7], kept)
    np.testing.assert_array_equal(reduced.count, [7, 7])
    np.testing.assert_array_equal(
      np.asarray(reduced.tokens[:, :7]).view(np.int32),
      np.asarray(ts.tokens[:, jnp.array(kept)]).view(np.int32),
    )
    np.testing.assert_array_equal(
      reduced.positions[0, :7], ts.positions[0, jnp.array(kept)]
    )
    np.testing.assert_array_equal(reduced.aux['kept_audio'], [2, 2])
    np.testing.assert_allclose(reduced.aux['mean_gap'], (21 - 12) / 2)
    y = np.exp([-1, -2, 5, 3, -3, 4]) / np.exp([-1, -2, 5, 3, -3, 4]).sum()
    entropy = -(y * np.log(y)).sum()
    np.testing.assert_allclose(reduced.aux['entropy'], entropy, rtol=1e-5)
    # Two counters of decoding: behind the whole prompt, and what is cached.
    after = echoingpixels.offsets(ts, reduced)
    np.testing.assert_array_equal(after.position, [28, 28])
    np.testing.assert_array_equal(after.length, [7, 7])

  def test_all_of_it_without_refiner_is_the_prompt(self):
    ts = tokens()
    config = dataclasses.replace(HEAD_ONLY, budget=1.0)
    reduced = reduce(config, params_of(HEAD_ONLY), ts)
    np.testing.assert_array_equal(reduced.tokens, ts.tokens)
    np.testing.assert_array_equal(reduced.positions, ts.positions)
    np.testing.assert_array_equal(reduced.index[0], np.arange(N))

  @parameterized.parameters('softmax', 'sigmoid', 'gumbel')
  def test_gradient_of_the_scores(self, relaxation):
    ts = tokens()
    config = dataclasses.replace(HEAD_ONLY, relaxation=relaxation, tau=0.5)
    logits = jax.random.normal(jax.random.key(3), (B, N))
    out = jax.random.normal(jax.random.key(4), (B, N, C))
    rng = jax.random.key(5)
    budget = interface.Budget(k_max=N, k=jnp.array([7, 7]))

    def value(logits):
      reduced = reduce_joint(config, ts, logits, budget, rng)
      return jnp.sum(reduced.tokens * out), reduced

    gradient, reduced = jax.jit(jax.grad(value, has_aux=True))(logits)
    # dL/dg of a kept token is <h, dL/dout>, of a dropped one 0.
    dot = np.zeros((B, N))
    for b in range(B):
      for s, j in enumerate(np.asarray(reduced.index[b])):
        if j >= 0 and MODALITY[j] != sync_rope.TEXT:
          dot[b, j] = np.dot(ts.tokens[b, j], out[b, s])

    def soft(logits):
      candidates, _, _ = echoingpixels.pool(ts, config)
      k = jnp.array([3, 3])
      return echoingpixels.relax(logits, candidates, k, config, rng)[1]

    _, pullback = jax.vjp(soft, logits)
    np.testing.assert_allclose(
      gradient, pullback(jnp.asarray(dot, jnp.float32))[0], atol=1e-5
    )
    if relaxation == 'softmax':  # The Jacobian itself, by hand.
      y = np.asarray(soft(logits))
      jacobian = (y * dot - y * (y * dot).sum(1, keepdims=True)) / config.tau
      np.testing.assert_allclose(gradient, jacobian, atol=1e-5)

  def test_weights_are_exactly_one_in_bfloat16(self):
    soft = jax.random.uniform(jax.random.key(0), (512,), jnp.bfloat16)
    hard = jnp.ones_like(soft)
    exact = echoingpixels.straight_through(hard, soft)
    self.assertTrue(bool(jnp.all(exact == 1)))
    gradient = jax.grad(
      lambda s: jnp.sum(echoingpixels.straight_through(hard, s))
    )(soft)
    self.assertTrue(bool(jnp.all(gradient == 1)))

  def test_answers_leak_nothing(self):
    params = params_of(CONFIG)
    answer = jnp.arange(N)[None] >= 8
    answer = jnp.broadcast_to(answer, (B, N))
    sieve = jax.jit(lambda ts: echoingpixels.sieve(params, ts, CONFIG, answer))
    ts = tokens()
    other = ts.replace(
      tokens=jnp.where(answer[..., None], ts.tokens + 3, ts.tokens)
    )
    (h, z), (h2, z2) = sieve(ts), sieve(other)
    np.testing.assert_array_equal(z[:, :8], z2[:, :8])
    np.testing.assert_array_equal(h[:, :8], h2[:, :8])
    np.testing.assert_array_equal(h2[:, 8:], other.tokens[:, 8:])  # Untouched.
    self.assertTrue(bool(jnp.all(jnp.any(h[:, :8] != ts.tokens[:, :8], -1))))

  def test_a_row_of_text_passes_as_it_is(self):
    ts = tokens()
    text = ts.replace(modality=ts.modality.at[1].set(0))
    reduced = reduce(CONFIG, params_of(CONFIG), text)
    self.assertEqual(int(reduced.count[1]), N)
    np.testing.assert_array_equal(reduced.tokens[1], ts.tokens[1])
    self.assertFalse(bool(jnp.all(reduced.tokens[0, 0] == ts.tokens[0, 0])))

  def test_begins_as_copies_of_the_decoder(self):
    decoder = testing.filled(
      lambda key: decoder_layers.init(key, CONFIG.layer, C, 3),
      jax.random.key(7),
    )
    params = echoingpixels.params_from_decoder(
      jax.random.key(0), decoder, C, CONFIG
    )
    ts = tokens()
    h, _ = jax.jit(echoingpixels.sieve, static_argnums=2)(params, ts, CONFIG)
    tables = sync_rope.tables(ts.positions, CONFIG.rope)
    everything = jnp.ones((1, 1, N), bool)
    expected, _, _ = jax.jit(
      lambda layers: decoder_layers.run(
        CONFIG.layer,
        layers,
        ts.tokens,
        tables,
        lambda q, k, v, _: (
          decoder_layers.masked_attention(q, k, v, everything),
          None,
        ),
      )
    )(decoder_layers.part(decoder, 0, 2))
    np.testing.assert_allclose(h, expected, atol=1e-5)
    with self.assertRaisesRegex(ValueError, 'decoder with 3; it must have'):
      echoingpixels.params_from_decoder(
        jax.random.key(0), decoder, C, dataclasses.replace(
          CONFIG, refiner_layers=4
        ),
      )  # fmt: skip


class TrainingTest(absltest.TestCase):
  def test_the_sieve_learns_what_the_answer_needs(self):
    # One of 8 media tokens, audio or video, is marked and holds the answer.
    rows, classes = 64, 4
    config = dataclasses.replace(
      HEAD_ONLY, budget=0.25, text_max=2, tau=0.5
    )  # 2 of 8.
    modality = np.array([0, 1, 2, 1, 2, 1, 2, 1, 2, 0])

    def batch(key):
      noise, place, label = jax.random.split(key, 3)
      x = 0.3 * jax.random.normal(noise, (rows, N, C))
      at = jax.random.randint(place, (rows,), 1, 9)
      y = jax.random.randint(label, (rows,), 0, classes)
      row = jnp.arange(rows)
      x = x.at[row, at, y].add(2.0).at[row, at, 7].add(2.0)
      ts = tokens(rows, modality).replace(tokens=x)
      answer = jnp.broadcast_to(jnp.arange(N)[None] == 9, (rows, N))
      labels = jnp.where(answer, y[:, None], -1)
      return ts, labels, answer, at

    def decode(params, x, positions, mask):  # Predicts from the slots' mean.
      del positions
      used = jnp.sum(mask, axis=1, dtype=jnp.float32)
      mean = jnp.sum(x, axis=1, keepdims=True) / used[:, None, None]
      logits = mean @ params
      return jnp.broadcast_to(logits, (*x.shape[:2], classes))

    method = echoingpixels.Training(config, decode)
    params = {
      'sieve': params_of(config),
      'decoder': 0.1 * jax.random.normal(jax.random.key(2), (C, classes)),
    }
    optimizer = optax.adam(1e-2)
    update = training.step(
      lambda p, ts, labels, answer: method.loss(
        p, ts, labels, answer, config.budget_for(ts)
      ),
      optimizer,
    )

    @jax.jit
    def train(params, key):
      def body(carry, key):
        ts, labels, answer, _ = batch(key)
        params, state, loss, _ = update(*carry, ts, labels, answer)
        return (params, state), loss

      carry = params, optimizer.init(params)
      return jax.lax.scan(body, carry, jax.random.split(key, 200))

    @jax.jit
    def recall(params):
      ts, _, _, at = batch(jax.random.key(99))
      reduced = config.reduce(ts, params=params['sieve'])
      kept = jnp.take_along_axis(reduced.assignment, at[:, None], axis=1)
      return jnp.mean(kept >= 0)

    before = float(recall(params))
    (params, _), losses = train(params, jax.random.key(3))
    self.assertLess(before, 0.6)
    self.assertGreater(float(recall(params)), 0.95)
    self.assertLess(float(losses[-1]), 0.5 * float(losses[0]))


class MessagesTest(absltest.TestCase):
  def test_bad_input(self):
    make = echoingpixels.EchoingPixelsConfig
    with self.assertRaisesRegex(ValueError, r'budget=1.5.*in \(0, 1\]'):
      make(budget=1.5)
    with self.assertRaisesRegex(ValueError, "relaxation='hard'; allowed"):
      make(relaxation='hard')
    with self.assertRaisesRegex(ValueError, 'second positive'):
      make(tau=0.0)
    with self.assertRaisesRegex(ValueError, 'must sum to 32, half of it'):
      make(head_dim=64)
    ts = tokens()
    with self.assertRaisesRegex(ValueError, 'positions have 1 axes; at least'):
      CONFIG.reduce(
        ts.replace(positions=ts.positions[..., :1]), params=params_of(CONFIG)
      )
    with self.assertRaisesRegex(ValueError, 'k_max=2 for 4 tokens that always'):
      HEAD_ONLY.reduce(
        ts, params=params_of(HEAD_ONLY), budget=interface.Budget(k_max=2)
      )


if __name__ == '__main__':
  absltest.main()
